// star::KVCacheAttention on a GPU: the arguments of a call, its limits, and its distribution over blocks.
//
// engines/runtime/kv_cache.py defines the operation in numpy. Layouts, all contiguous, heads first:
//   query, output [rows, heads, new, dim]    key, value [rows, kv_heads, new, dim]    write_indices [rows]
//   caches [rows, kv_heads, capacity, dim] of the element type, or int8 [rows, kv_heads, capacity, dim + 4],
//   where every [row, kv head] is a plane of capacity * dim codes,
//   then capacity float32 scales (one per slot).
// This header is plain C++, so that the tests can compile it without CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define STAR_BOTH __host__ __device__
#else
#define STAR_BOTH
#endif

namespace star {

enum class Element : int { kHalf = 0, kBfloat16 = 1 };
enum class Cache : int { kElement = 0, kInt8 = 1 };

constexpr int kMaxRows = 8, kMaxCapacity = 4096;
constexpr int kInt8Align = 4;  // an int8 capacity is a multiple of it, so that every plane starts on 16 bytes
constexpr int kScaleBytes = 4;  // one float32 per slot of an int8 plane

struct Shape {
    int rows, heads, kv_heads, new_tokens, capacity, dim;

    STAR_BOTH int group() const { return heads / kv_heads; }
    // Query rows that share one key head, packed: row r is token r / group, head r % group.
    STAR_BOTH int packed() const { return new_tokens * group(); }
};

// How a block divides its query rows and keys among warps: `warps_m` groups of warps divide the rows, and
// each warp takes 16 * `fragments` of them; `warps_n` warps divide the `keys` of a tile. `resident` is how
// many blocks should fit a multiprocessor.
struct Config {
    int warps_m, warps_n, fragments, keys, resident;

    constexpr int tile_rows() const { return warps_m * fragments * 16; }
    constexpr int threads() const { return 32 * warps_m * warps_n; }
};
constexpr Config kConfigs[] = {{1, 4, 1, 64, 3}, {4, 1, 1, 64, 2}, {4, 1, 2, 64, 2}};
constexpr int kConfigCount = sizeof(kConfigs) / sizeof(kConfigs[0]);
enum { kDecode, kShort, kLong };

// `splits` blocks divide the keys of each tile of query rows. The partial results of several are merged.
struct Plan {
    int config;  // of kConfigs
    int m_tiles, splits;
    size_t partial_floats, stats_floats;

    size_t workspace_bytes() const { return 4 * (partial_floats + stats_floats); }
};

inline int divided_up(int a, int b) { return (a + b - 1) / b; }

// A plan for `config` with the wanted number of splits, within 1 and the number of tiles of keys.
inline Plan plan_with(Shape const& shape, int config, int wanted)
{
    int const packed = shape.packed(), most = divided_up(shape.capacity, kConfigs[config].keys);
    int const splits = wanted < 1 ? 1 : wanted < most ? wanted : most;
    size_t const outputs = splits > 1 ? size_t(splits) * shape.rows * shape.kv_heads * packed : 0;
    return {
        config, divided_up(packed, kConfigs[config].tile_rows()), splits, outputs * shape.dim, outputs * 2};
}

// With few query rows, the warps take different keys; with many, they take different rows. A cache is split
// until the device is full and no further, because a block that waits for another one to end doubles the
// time. The device is filled twice only where much of it would stay idle otherwise.
inline Plan plan_from_shape(Shape const& shape, int multiprocessors)
{
    int const packed = shape.packed(), pairs = shape.rows * shape.kv_heads;
    bool const few = packed <= 2 * kConfigs[kDecode].tile_rows();
    bool const full = divided_up(packed, kConfigs[kLong].tile_rows()) * pairs >= multiprocessors;
    int const config = few ? kDecode : full ? kLong : kShort;
    int const blocks = divided_up(packed, kConfigs[config].tile_rows()) * pairs;
    int const places = multiprocessors * kConfigs[config].resident, splits = places / blocks;
    if (!few && blocks >= multiprocessors) return plan_with(shape, config, 1);
    return plan_with(shape, config, 4 * splits * blocks >= 3 * places ? splits : 2 * places / blocks);
}

// The arguments of every kernel. `partial` and `stats` are the workspace; `flag` becomes 1 when a write would
// pass the capacity.
struct Call {
    void const *query, *key, *value;
    void *key_cache, *value_cache;
    int64_t const* write_indices;
    void* output;
    float *partial, *stats;
    int* flag;
    Shape shape;
    int splits;
    float scale_log2;  // the softmax's scale times log2(e)
};

inline void set_workspace(Call& call, Plan const& plan, void* workspace)
{
    call.splits = plan.splits;
    call.partial = static_cast<float*>(workspace);
    call.stats = call.partial + plan.partial_floats;
}

inline bool supported_dim(int dim) { return dim == 64 || dim == 128; }

// Why `shape` cannot be computed, with the limit, or nullptr.
inline char const* refusal(Shape const& shape, Cache cache)
{
    if (!supported_dim(shape.dim)) return "head_dim: expected 64 or 128";
    if (shape.rows < 1 || shape.rows > kMaxRows) return "rows: expected 1 to 8";
    if (shape.kv_heads < 1 || shape.heads < 1 || shape.heads % shape.kv_heads)
        return "heads: expected a multiple of kv_heads";
    if (shape.capacity < 1 || shape.capacity > kMaxCapacity) return "capacity: expected 1 to 4096";
    if (shape.new_tokens < 1 || shape.new_tokens > shape.capacity)
        return "new positions: expected 1 to the capacity";
    if (cache == Cache::kInt8 && shape.capacity % kInt8Align != 0)
        return "capacity of an int8 cache: expected a multiple of 4";
    return nullptr;
}

// Implemented in kv_attention.cu, and by an emulator in the tests. All but `multiprocessors` return 0 or a
// cudaError_t; `stream` is a cudaStream_t.
int multiprocessors();
int launch(Call const& call, Plan const& plan, Element element, Cache cache, void* stream);
int copy_cache(void* to, void const* from, size_t bytes, void* stream);
// The process's one flag, in host memory that the device can write.
int overflow_flag(int** host, int** device);

}  // namespace star
