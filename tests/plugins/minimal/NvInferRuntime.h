// A declaration of the TensorRT interfaces that the plugin uses, written for its tests: so that a compile
// error, and how the plugin answers its callers, show on machines without TensorRT's headers. Names and
// signatures are the documented ones of 10.3. Virtual functions stand in TensorRT for RTX 1.7's order, so
// that a plugin compiled with this is one for that library (test_tensorrt.py). What is loaded on a device is
// built against the device's own headers.
#pragma once

#include <cstddef>
#include <cstdint>

#define NV_TENSORRT_MAJOR 1
#define NV_TENSORRT_MINOR 7

struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace nvinfer1 {

using AsciiChar = char;

enum class DataType : int32_t { kFLOAT, kHALF, kINT8, kINT32, kBOOL, kUINT8, kFP8, kBF16, kINT64, kINT4 };
enum class TensorFormat : int32_t { kLINEAR = 0, kCHW2 = 1 };
enum class PluginFieldType : int32_t { kFLOAT16, kFLOAT32, kFLOAT64, kINT8, kINT16, kINT32, kCHAR };
enum class PluginCapabilityType : int32_t { kCORE, kBUILD, kRUNTIME };
enum class APILanguage : int32_t { kCPP, kPYTHON };
enum class TensorRTPhase : int32_t { kBUILD, kRUNTIME };

struct Dims {
    static constexpr int32_t MAX_DIMS = 8;
    int32_t nbDims;
    int64_t d[MAX_DIMS];
};

class IDimensionExpr;
class IExprBuilder {};

struct DimsExprs {
    int32_t nbDims;
    IDimensionExpr const* d[Dims::MAX_DIMS];
};

struct PluginTensorDesc {
    Dims dims;
    DataType type;
    TensorFormat format;
    float scale;
};

struct DynamicPluginTensorDesc {
    PluginTensorDesc desc;
    Dims min, max, opt;
};

struct PluginField {
    AsciiChar const* name;
    void const* data;
    PluginFieldType type;
    int32_t length;

    PluginField(AsciiChar const* n = nullptr, void const* v = nullptr,
        PluginFieldType t = PluginFieldType::kFLOAT32, int32_t l = 0)
        : name(n), data(v), type(t), length(l)
    {
    }
};

struct PluginFieldCollection {
    int32_t nbFields;
    PluginField const* fields;
};

struct InterfaceInfo {
    char const* kind;
    int32_t major, minor;
};

class IVersionedInterface {
public:
    virtual APILanguage getAPILanguage() const noexcept { return APILanguage::kCPP; }
    virtual InterfaceInfo getInterfaceInfo() const noexcept = 0;
    virtual ~IVersionedInterface() noexcept = default;
};

class IPluginCapability : public IVersionedInterface {};
class IPluginCreatorInterface : public IVersionedInterface {};
class IPluginResourceContext;
class IErrorRecorder;
class ILoggerFinder;

class IPluginV3 : public IVersionedInterface {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN", 1, 0}; }
    virtual IPluginCapability* getCapabilityInterface(PluginCapabilityType) noexcept = 0;
    virtual IPluginV3* clone() noexcept = 0;
};

class IPluginV3OneCore : public IPluginCapability {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_CORE", 1, 0}; }
    virtual AsciiChar const* getPluginName() const noexcept = 0;
    virtual AsciiChar const* getPluginVersion() const noexcept = 0;
    virtual AsciiChar const* getPluginNamespace() const noexcept = 0;
};

class IPluginV3OneBuild : public IPluginCapability {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_BUILD", 1, 0}; }
    virtual int32_t configurePlugin(
        DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) noexcept = 0;
    virtual int32_t getOutputDataTypes(DataType*, int32_t, DataType const*, int32_t) const noexcept = 0;
    virtual int32_t getOutputShapes(DimsExprs const*, int32_t, DimsExprs const*, int32_t, DimsExprs*, int32_t,
        IExprBuilder&) noexcept = 0;
    virtual bool supportsFormatCombination(
        int32_t, DynamicPluginTensorDesc const*, int32_t, int32_t) noexcept = 0;
    virtual int32_t getNbOutputs() const noexcept = 0;
    virtual size_t getWorkspaceSize(
        DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) const noexcept
    {
        return 0;
    }
    virtual int32_t getValidTactics(int32_t*, int32_t) noexcept { return 0; }
    virtual int32_t getNbTactics() noexcept { return 0; }
    virtual char const* getTimingCacheID() noexcept { return nullptr; }
    virtual int32_t getFormatCombinationLimit() noexcept { return 100; }
    virtual char const* getMetadataString() noexcept { return nullptr; }
};

class IPluginV3OneRuntime : public IPluginCapability {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_RUNTIME", 1, 0}; }
    virtual int32_t setTactic(int32_t) noexcept { return 0; }
    virtual int32_t onShapeChange(
        PluginTensorDesc const*, int32_t, PluginTensorDesc const*, int32_t) noexcept = 0;
    virtual int32_t enqueue(PluginTensorDesc const*, PluginTensorDesc const*, void const* const*,
        void* const*, void*, cudaStream_t) noexcept = 0;
    virtual IPluginV3* attachToContext(IPluginResourceContext*) noexcept = 0;
    virtual PluginFieldCollection const* getFieldsToSerialize() noexcept = 0;
};

class IPluginCreatorV3One : public IPluginCreatorInterface {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN CREATOR_V3ONE", 1, 0}; }
    virtual IPluginV3* createPlugin(
        AsciiChar const*, PluginFieldCollection const*, TensorRTPhase) noexcept = 0;
    virtual PluginFieldCollection const* getFieldNames() noexcept = 0;
    virtual AsciiChar const* getPluginName() const noexcept = 0;
    virtual AsciiChar const* getPluginVersion() const noexcept = 0;
    virtual AsciiChar const* getPluginNamespace() const noexcept = 0;
};

class IPluginRegistry {
public:
    virtual ~IPluginRegistry() noexcept = default;
    virtual void setErrorRecorder(IErrorRecorder*) noexcept {}
    virtual IErrorRecorder* getErrorRecorder() const noexcept { return nullptr; }
    virtual bool isParentSearchEnabled() const { return false; }
    virtual void setParentSearchEnabled(bool) {}
    virtual void* loadLibrary(AsciiChar const*) noexcept { return nullptr; }
    virtual void deregisterLibrary(void*) noexcept {}
    virtual bool registerCreator(
        IPluginCreatorInterface& creator, AsciiChar const* pluginNamespace) noexcept = 0;
};

}  // namespace nvinfer1

extern "C" nvinfer1::IPluginRegistry* getPluginRegistry() noexcept;
