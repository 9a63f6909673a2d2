// The kernels for Python without TensorRT: tests and benchmarks call this with addresses of device memory.
#include "kv_attention.h"

namespace {

star::Shape shape_from(int const* sizes) { return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]}; }

}  // namespace

// Bytes of workspace for sizes (rows, heads, kv_heads, new, capacity, dim), or -1 for a shape that is refused.
extern "C" long long star_workspace_bytes(int const* sizes, int cache)
{
    star::Shape const shape = shape_from(sizes);
    if (star::refusal(shape, static_cast<star::Cache>(cache))) return -1;
    return static_cast<long long>(star::plan_from_shape(shape, star::multiprocessors()).workspace_bytes());
}

// pointers: query, key, value, key cache, value cache, write indices, output, workspace, flag; all on the device.
extern "C" int star_run(int const* sizes, void* const* pointers, int element, int cache, float scale, void* stream)
{
    star::Shape const shape = shape_from(sizes);
    star::Plan const plan = star::plan_from_shape(shape, star::multiprocessors());
    star::Call call{};
    call.query = pointers[0], call.key = pointers[1], call.value = pointers[2];
    call.key_cache = pointers[3], call.value_cache = pointers[4];
    call.write_indices = static_cast<int64_t const*>(pointers[5]), call.output = pointers[6];
    star::set_workspace(call, plan, pointers[7]);
    call.flag = static_cast<int*>(pointers[8]);
    call.shape = shape, call.scale_log2 = scale * 1.4426950408889634f;  // log2(e)
    return star::launch(call, plan, static_cast<star::Element>(element), static_cast<star::Cache>(cache), stream);
}
