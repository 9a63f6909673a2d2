// The TensorRT plugin KVCacheAttention, which implements the ONNX function star::KVCacheAttention for a
// TensorRT without KV-cache layers.
//
// inputs   query [B,h,S,D]  key, value [B,KV,S,D]  past_key, past_value [B,KV,C,D]  write_indices int64 [B]
//          mask bool [B,1,S,C]
// outputs  output [B,h,S,D]  present_key, present_value as past
// fields   int32 num_heads, num_kv_heads, head_dim, cache_type (0 as the query, 1 int8 [B,KV,C,D+4]);
//          float32 scale; in a plan also int32 multiprocessors, the building device's
//
// The mask repeats what write_indices say and is not read. past and present should be bound to one address;
// where they are not, the cache is copied first. No alias is declared, because TensorRT would then keep a
// second copy of the cache.
#include <array>
#include <cstring>
#include <new>

#include "plugin_fields.h"

namespace star {
namespace {

class Plugin final : public IPluginV3,
                     public IPluginV3OneCore,
                     public IPluginV3OneBuild,
                     public IPluginV3OneRuntime {
public:
    explicit Plugin(Fields const& fields) : mFields(fields) {}

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override
    {
        switch (type) {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(mFields); }
    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return ""; }
    int32_t getNbOutputs() const noexcept override { return kOutputs; }

    int32_t getOutputDataTypes(
        DataType* types, int32_t outputs, DataType const* inputs, int32_t count) const noexcept override
    {
        if (count != kInputs || outputs != kOutputs)
            return !complain("expected 7 inputs and 3 outputs; inputs", count);
        types[kOutput] = inputs[kQuery], types[kPresentKey] = inputs[kPastKey],
        types[kPresentValue] = inputs[kPastValue];
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t count, DimsExprs const*, int32_t,
        DimsExprs* outputs, int32_t outs, IExprBuilder&) noexcept override
    {
        if (count != kInputs || outs != kOutputs)
            return !complain("expected 7 inputs and 3 outputs; inputs", count);
        for (Input i : kRank4)
            if (inputs[i].nbDims != 4) return !complain("rank of an input: expected 4", inputs[i].nbDims);
        outputs[kOutput] = inputs[kQuery], outputs[kPresentKey] = inputs[kPastKey],
        outputs[kPresentValue] = inputs[kPastValue];
        return 0;
    }

    bool supportsFormatCombination(
        int32_t pos, DynamicPluginTensorDesc const* tensors, int32_t inputs, int32_t) noexcept override
    {
        PluginTensorDesc const& desc = tensors[pos].desc;
        if (desc.format != TensorFormat::kLINEAR) return false;
        DataType const element = tensors[kQuery].desc.type;
        if (pos == kWriteIndices) return desc.type == DataType::kINT64;
        if (pos == kMask) return desc.type == DataType::kBOOL;
        bool const cache = pos == kPastKey || pos == kPastValue || pos > inputs;
        if (cache && mFields.cache() == Cache::kInt8) return desc.type == DataType::kINT8;
        return desc.type == element && (element == DataType::kHALF || element == DataType::kBF16);
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t inputs,
        DynamicPluginTensorDesc const* out, int32_t outputs) noexcept override
    {
        if (inputs != kInputs || outputs != kOutputs)
            return !complain("expected 7 inputs and 3 outputs; inputs", inputs);
        Dims const* dims[kInputs + kOutputs];
        Shape shape{};
        for (Dims DynamicPluginTensorDesc::*side :
             {&DynamicPluginTensorDesc::min, &DynamicPluginTensorDesc::max}) {
            for (int i = 0; i < kInputs; ++i) dims[i] = &(in[i].*side);
            for (int i = 0; i < kOutputs; ++i) dims[kInputs + i] = &(out[i].*side);
            if (!shape_from_dims(mFields, dims, shape)) return 1;
        }
        return 0;
    }

    // The largest workspace of all shapes in the profile, because fewer new positions can need more splits.
    size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*,
        int32_t) const noexcept override
    {
        auto const most = [&](Input input, int axis) { return static_cast<int>(in[input].max.d[axis]); };
        size_t bytes = 0;
        for (int rows = 1; rows <= most(kQuery, 0); ++rows)
            for (int tokens = 1; tokens <= most(kQuery, 2); ++tokens) {
                Shape const shape{rows, mFields.num_heads, mFields.num_kv_heads, tokens, most(kPastKey, 2),
                    mFields.head_dim};
                bytes = std::max(bytes, plan_from_shape(shape, mFields.multiprocessors).workspace_bytes());
            }
        return bytes;
    }

    int32_t onShapeChange(PluginTensorDesc const* in, int32_t inputs, PluginTensorDesc const* out,
        int32_t outputs) noexcept override
    {
        if (inputs != kInputs || outputs != kOutputs)
            return !complain("expected 7 inputs and 3 outputs; inputs", inputs);
        Dims const* dims[kInputs + kOutputs];
        for (int i = 0; i < kInputs; ++i) dims[i] = &in[i].dims;
        for (int i = 0; i < kOutputs; ++i) dims[kInputs + i] = &out[i].dims;
        if (!shape_from_dims(mFields, dims, mShape)) return 1;
        mPlan = plan_from_shape(mShape, mFields.multiprocessors);
        return 0;
    }

    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) noexcept override
    {
        int* unused = nullptr;
        Call call{inputs[kQuery], inputs[kKey], inputs[kValue], outputs[kPresentKey], outputs[kPresentValue],
            static_cast<int64_t const*>(inputs[kWriteIndices]), outputs[kOutput], nullptr, nullptr, nullptr,
            mShape, 1, mFields.scale * 1.4426950408889634f};  // log2(e)
        set_workspace(call, mPlan, workspace);
        int status = overflow_flag(&unused, &call.flag);
        Element const element = in[kQuery].type == DataType::kHALF ? Element::kHalf : Element::kBfloat16;
        size_t const item = mFields.cache() == Cache::kInt8 ? 1 : 2;
        size_t const bytes = item * mShape.rows * mShape.kv_heads * mShape.capacity * mFields.cache_dim();
        for (int i = 0; i < 2 && status == 0; ++i)
            if (inputs[kPastKey + i] != outputs[kPresentKey + i])
                status = copy_cache(outputs[kPresentKey + i], inputs[kPastKey + i], bytes, stream);
        return status != 0 ? status : launch(call, mPlan, element, mFields.cache(), stream);
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override
    {
        int *host = nullptr, *device = nullptr;
        overflow_flag(&host, &device);  // now, because graph capture allows no allocation
        return clone();
    }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override
    {
        for (int i = 0; i < kNumberCount; ++i)
            mSerialized[i] =
                PluginField{kNumbers[i].name, &(mFields.*kNumbers[i].at), PluginFieldType::kINT32, 1};
        mSerialized[kNumberCount] = PluginField{kScale, &mFields.scale, PluginFieldType::kFLOAT32, 1};
        mCollection = {kNumberCount + 1, mSerialized.data()};
        return &mCollection;
    }

private:
    Fields mFields;
    Shape mShape{};
    Plan mPlan{};
    std::array<PluginField, kNumberCount + 1> mSerialized;
    PluginFieldCollection mCollection{};
};

class Creator final : public IPluginCreatorV3One {
public:
    IPluginV3* createPlugin(
        AsciiChar const*, PluginFieldCollection const* given, TensorRTPhase phase) noexcept override
    {
        Fields fields;
        for (int i = 0; given != nullptr && i < given->nbFields; ++i) {
            PluginField const& field = given->fields[i];
            if (field.length != 1 || field.data == nullptr)
                return complain("a field: expected one value", field.name), nullptr;
            bool const real = std::strcmp(field.name, kScale) == 0;
            void* const value = real ? &fields.scale : static_cast<void*>(number_of(fields, field.name));
            if (value == nullptr)
                return complain("fields: expected those of this plugin", field.name), nullptr;
            if (field.type != (real ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32))
                return complain("a field: expected its own type", field.name), nullptr;
            std::memcpy(value, field.data, 4);
        }
        if (phase == TensorRTPhase::kBUILD) fields.multiprocessors = multiprocessors();
        return valid(fields) ? new (std::nothrow) Plugin(fields) : nullptr;
    }

    PluginFieldCollection const* getFieldNames() noexcept override
    {
        static auto const names = [] {
            std::array<PluginField, kGraphNumbers + 1> all;
            for (int i = 0; i < kGraphNumbers; ++i)
                all[i] = PluginField{kNumbers[i].name, nullptr, PluginFieldType::kINT32, 1};
            all[kGraphNumbers] = PluginField{kScale, nullptr, PluginFieldType::kFLOAT32, 1};
            return all;
        }();
        static PluginFieldCollection const collection{kGraphNumbers + 1, names.data()};
        return &collection;
    }

    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return ""; }

private:
    static int32_t* number_of(Fields& fields, char const* name)
    {
        for (Number const& number : kNumbers)
            if (std::strcmp(number.name, name) == 0) return &(fields.*number.at);
        return nullptr;
    }
};

}  // namespace

IPluginCreatorInterface& creator()
{
    static Creator instance;
    return instance;
}

}  // namespace star
