// The plugin as TensorRT drives it, on emulated blocks: create, configure, serialise, create again,
// attach, enqueue.
#include <memory>
#include <vector>

#include "host_driver.cpp"
#include "plugin_fields.h"

using namespace nvinfer1;

namespace {

struct Registry : IPluginRegistry {
    IPluginCreatorInterface* taken = nullptr;

    bool registerCreator(IPluginCreatorInterface& creator, AsciiChar const*) noexcept override
    {
        taken = &creator;
        return true;
    }
} registry;

struct Tensors {
    std::vector<DynamicPluginTensorDesc> dynamic;
    std::vector<PluginTensorDesc> fixed;

    void add(std::vector<int64_t> const& dims, DataType type)
    {
        PluginTensorDesc desc{};
        desc.dims.nbDims = int(dims.size());
        std::copy(dims.begin(), dims.end(), desc.dims.d);
        desc.type = type;
        fixed.push_back(desc);
        dynamic.push_back({desc, desc.dims, desc.dims, desc.dims});
    }
};

constexpr size_t kPast = 1 << 20;  // floats after the workspace

template <class Part>
Part* part(IPluginV3& plugin, PluginCapabilityType type)
{
    return static_cast<Part*>(plugin.getCapabilityInterface(type));
}

}  // namespace

extern "C" IPluginRegistry* getPluginRegistry() noexcept { return &registry; }

// sizes: rows, heads, kv_heads, new, capacity, dim, rank of query, multiprocessors of the device that builds
// and of the one that runs. fields: num_heads, num_kv_heads, head_dim, cache_type. pointers: the 7 inputs,
// then the 3 outputs. Returns 0, or where it was refused: 1 fields, 2 types, 3 configure, 4 shapes, 5
// enqueue; or 6: something past the workspace was written.
extern "C" int star_drive(int const* sizes, int const* fields, float scale, int type, void* const* pointers)
{
    auto* creator = static_cast<IPluginCreatorV3One*>(registry.taken);
    PluginField const given[] = {{"num_heads", fields, PluginFieldType::kINT32, 1},
        {"num_kv_heads", fields + 1, PluginFieldType::kINT32, 1},
        {"head_dim", fields + 2, PluginFieldType::kINT32, 1},
        {"cache_type", fields + 3, PluginFieldType::kINT32, 1},
        {"scale", &scale, PluginFieldType::kFLOAT32, 1}};
    PluginFieldCollection const collection{5, given};
    star::pretended_multiprocessors = sizes[7];
    std::unique_ptr<IPluginV3> built(creator->createPlugin("layer", &collection, TensorRTPhase::kBUILD));
    if (!built) return 1;
    auto* build = part<IPluginV3OneBuild>(*built, PluginCapabilityType::kBUILD);
    int64_t const rows = sizes[0], tokens = sizes[3], capacity = sizes[4],
                  wide = sizes[5] + (fields[3] ? 4 : 0);
    std::vector<int64_t> query{rows, sizes[1], tokens, sizes[5]}, key{rows, sizes[2], tokens, sizes[5]};
    std::vector<int64_t> const past{rows, sizes[2], capacity, wide};
    query.resize(sizes[6], 1);
    auto const element = static_cast<DataType>(type), cache = fields[3] ? DataType::kINT8 : element;
    Tensors all;
    all.add(query, element), all.add(key, element), all.add(key, element), all.add(past, cache),
        all.add(past, cache);
    all.add({rows}, DataType::kINT64), all.add({rows, 1, tokens, capacity}, DataType::kBOOL);
    all.add(query, element), all.add(past, cache), all.add(past, cache);
    for (int i = 0; i < 10; ++i)
        if (!build->supportsFormatCombination(i, all.dynamic.data(), 7, 3)) return 2;
    DataType types[3], inputs[7];
    for (int i = 0; i < 7; ++i) inputs[i] = all.fixed[i].type;
    if (build->getOutputDataTypes(types, 3, inputs, 7) != 0 || types[0] != element || types[2] != cache)
        return 2;
    if (build->configurePlugin(all.dynamic.data(), 7, all.dynamic.data() + 7, 3) != 0) return 3;
    size_t const floats = build->getWorkspaceSize(all.dynamic.data(), 7, all.dynamic.data() + 7, 3) / 4;
    std::vector<float> workspace(floats + kPast, NAN);
    star::pretended_multiprocessors = sizes[8];
    auto* fields_out =
        part<IPluginV3OneRuntime>(*built, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
    std::unique_ptr<IPluginV3> loaded(creator->createPlugin("layer", fields_out, TensorRTPhase::kRUNTIME));
    auto* unattached = part<IPluginV3OneRuntime>(*loaded, PluginCapabilityType::kRUNTIME);
    std::unique_ptr<IPluginV3> attached(unattached->attachToContext(nullptr));
    auto* runtime = part<IPluginV3OneRuntime>(*attached, PluginCapabilityType::kRUNTIME);
    if (runtime->onShapeChange(all.fixed.data(), 7, all.fixed.data() + 7, 3) != 0) return 4;
    auto const* descriptions = all.fixed.data();
    if (runtime->enqueue(
            descriptions, descriptions + 7, pointers, pointers + 7, workspace.data(), nullptr) != 0)
        return 5;
    return std::all_of(
               workspace.begin() + floats, workspace.end(), [](float x) { return std::isnan(x); }) ? 0 : 6;
}
