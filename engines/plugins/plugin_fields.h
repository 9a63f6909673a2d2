// The plugin's fields, and the checks of the fields and of the tensors' shapes.
#pragma once

#include <NvInferRuntime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

#include "kv_attention.h"

#define STAR_TEXT_(x) #x
#define STAR_TEXT(x) STAR_TEXT_(x)
#define STAR_ABI 1  // the plugin's version: it changes with the fields, the tensors or their meaning

namespace star {

using namespace nvinfer1;

inline constexpr char const* kName = "KVCacheAttention";
inline constexpr char const* kVersion = STAR_TEXT(STAR_ABI);
enum Input { kQuery, kKey, kValue, kPastKey, kPastValue, kWriteIndices, kMask, kInputs };
inline constexpr Input kRank4[] = {kQuery, kKey, kValue, kPastKey, kPastValue, kMask};
enum Output { kOutput, kPresentKey, kPresentValue, kOutputs };

// `multiprocessors` is the building device's number and stays with the plan, whose workspace is sized for it.
// A device with more of them (a larger one, or in another power mode) would otherwise split the cache into
// more parts than the workspace holds.
struct Fields {
    int32_t num_heads = 0, num_kv_heads = 0, head_dim = 0, cache_type = 0, multiprocessors = 0;
    float scale = 0;

    Cache cache() const { return static_cast<Cache>(cache_type); }
    int cache_dim() const { return cache() == Cache::kInt8 ? head_dim + kScaleBytes : head_dim; }
};

// The integer fields by name; a graph gives the first kGraphNumbers of them.
struct Number {
    char const* name;
    int32_t Fields::*at;
};
inline constexpr Number kNumbers[] = {{"num_heads", &Fields::num_heads},
    {"num_kv_heads", &Fields::num_kv_heads}, {"head_dim", &Fields::head_dim},
    {"cache_type", &Fields::cache_type}, {"multiprocessors", &Fields::multiprocessors}};
inline constexpr int kNumberCount = sizeof(kNumbers) / sizeof(kNumbers[0]), kGraphNumbers = 4;
inline constexpr char const* kScale = "scale";

inline bool complain(char const* what, char const* got)
{
    std::fprintf(stderr, "%s (version %s): %s, got %s\n", kName, kVersion, what, got);
    return false;
}

inline bool complain(char const* what, long long got) { return complain(what, std::to_string(got).c_str()); }

inline bool valid(Fields const& f)
{
    if (!supported_dim(f.head_dim)) return complain("head_dim: expected 64 or 128", f.head_dim);
    if (f.num_kv_heads < 1) return complain("num_kv_heads: expected 1 or more", f.num_kv_heads);
    if (f.num_heads < 1 || f.num_heads % f.num_kv_heads)
        return complain("num_heads: expected a multiple of num_kv_heads", f.num_heads);
    if (f.cache_type != 0 && f.cache_type != 1) return complain("cache_type: expected 0 or 1", f.cache_type);
    if (f.multiprocessors < 1) return complain("multiprocessors: expected 1 or more", f.multiprocessors);
    if (!(f.scale > 0) || !std::isfinite(f.scale))
        return complain("scale: expected a positive number", std::to_string(f.scale).c_str());
    return true;
}

inline bool same(Dims const& a, Dims const& b)
{
    return a.nbDims == b.nbDims && std::equal(a.d, a.d + a.nbDims, b.d);
}

// The call's sizes from those of the tensors, all of them fixed; or print what is wrong and return false.
inline bool shape_from_dims(Fields const& f, Dims const* (&dims)[kInputs + kOutputs], Shape& shape)
{
    for (Input i : kRank4)
        if (dims[i]->nbDims != 4) return complain("rank of an input: expected 4", dims[i]->nbDims);
    if (dims[kWriteIndices]->nbDims != 1)
        return complain("rank of write_indices: expected 1", dims[kWriteIndices]->nbDims);
    auto const size = [&](Input input, int axis) { return static_cast<int>(dims[input]->d[axis]); };
    shape = {
        size(kQuery, 0), size(kQuery, 1), size(kKey, 1), size(kQuery, 2), size(kPastKey, 2), size(kQuery, 3)};
    if (shape.heads != f.num_heads) return complain("query heads: expected num_heads", shape.heads);
    if (shape.kv_heads != f.num_kv_heads) return complain("key heads: expected num_kv_heads", shape.kv_heads);
    if (shape.dim != f.head_dim) return complain("query size: expected head_dim", shape.dim);
    if (size(kPastKey, 3) != f.cache_dim())
        return complain("cache row: expected head_dim, 4 more for int8", size(kPastKey, 3));
    Dims const key{4, {shape.rows, shape.kv_heads, shape.new_tokens, shape.dim}};
    Dims const past{4, {shape.rows, shape.kv_heads, shape.capacity, f.cache_dim()}};
    bool const news =
        same(*dims[kKey], key) && same(*dims[kValue], key) && size(kWriteIndices, 0) == shape.rows;
    if (!news || !same(*dims[kPastKey], past) || !same(*dims[kPastValue], past))
        return complain("shapes: expected rows, heads, positions and capacity that agree", "others");
    if (char const* what = refusal(shape, f.cache())) return complain(what, "another");
    return true;
}

// The process's one creator (plugin.cpp).
IPluginCreatorInterface& creator();

}  // namespace star
