// The kernels for Python without TensorRT: tests and benchmarks call this with addresses of device memory.
//
// `sizes` are rows, heads, kv_heads, new, capacity, dim. `layout` are the multiprocessors to plan for, 0: as
// many as there are; and a configuration and splits, to be taken instead of the plan's where splits
// are not 0.
#include "kv_attention.h"

namespace {

star::Shape shape_from(int const* sizes)
{
    return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
}

star::Plan plan_from(int const* sizes, int const* layout)
{
    star::Shape const shape = shape_from(sizes);
    if (layout[2] > 0) return star::plan_with(shape, layout[1], layout[2]);
    return star::plan_from_shape(shape, layout[0] > 0 ? layout[0] : star::multiprocessors());
}

}  // namespace

extern "C" int star_configurations() { return star::kConfigCount; }

// The configuration and, times 16, the splits.
extern "C" int star_plan(int const* sizes, int const* layout)
{
    star::Plan const plan = plan_from(sizes, layout);
    return plan.config + 16 * plan.splits;
}

// Bytes of workspace, or -1 for a shape that is refused.
extern "C" long long star_workspace_bytes(int const* sizes, int cache, int const* layout)
{
    if (star::refusal(shape_from(sizes), static_cast<star::Cache>(cache))) return -1;
    return static_cast<long long>(plan_from(sizes, layout).workspace_bytes());
}

// pointers: query, key, value, key cache, value cache, write indices, output, workspace, flag; all on
// the device.
extern "C" int star_run(int const* sizes, void* const* pointers, int element, int cache, float scale,
    int const* layout, void* stream)
{
    star::Plan const plan = plan_from(sizes, layout);
    star::Call call{};
    call.query = pointers[0], call.key = pointers[1], call.value = pointers[2];
    call.key_cache = pointers[3], call.value_cache = pointers[4];
    call.write_indices = static_cast<int64_t const*>(pointers[5]), call.output = pointers[6];
    star::set_workspace(call, plan, pointers[7]);
    call.flag = static_cast<int*>(pointers[8]);
    call.shape = shape_from(sizes), call.scale_log2 = scale * 1.4426950408889634f;  // log2(e)
    return star::launch(
        call, plan, static_cast<star::Element>(element), static_cast<star::Cache>(cache), stream);
}
