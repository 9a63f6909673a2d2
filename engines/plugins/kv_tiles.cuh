// How the query and the tiles of keys and values come into shared memory for the attention of
// kv_attention.cuh: copied in the background, and converted from int8 where the cache holds it.
#pragma once

#include "kv_attention.cuh"

namespace star {

template <Element kElement, int kDim, bool kInt8, int kIndex>
STAR_DEVICE void Attend<kElement, kDim, kInt8, kIndex>::load_query() const
{
    auto const* query = static_cast<uint16_t const*>(call.query);
    for (int i = thread(); i < kTileRows * kChunks; i += kThreads) {
        int const row = i / kChunks, chunk = i % kChunks, packed = m_tile * kTileRows + row;
        bool const valid = packed < call.shape.packed();
        auto const* from = query + (valid ? query_offset(packed) + chunk * 8 : 0);
        copy_async(shared() + kQuery + swizzled<kChunks>(row, chunk), from, valid ? 16 : 0);
    }
}

// Load K and V of tile `t` into its stage. Slots from first + new_tokens on become zeros, never read.
template <Element kElement, int kDim, bool kInt8, int kIndex>
STAR_DEVICE void Attend<kElement, kDim, kInt8, kIndex>::load_tile(int t) const
{
    bool const has_new = (t + 1) * kKeys > first, had_new = t > begin && t * kKeys > first;
    if (has_new && !had_new) await_kernel_before();  // which stores the new slots
    load_slots(call.key_cache, t, stage(t), stage(t) + kScales);
    load_slots(call.value_cache, t, stage(t) + kLanded, stage(t) + kScales + 2 * kKeys);
}

template <Element kElement, int kDim, bool kInt8, int kIndex>
STAR_DEVICE void Attend<kElement, kDim, kInt8, kIndex>::load_slots(
    void const* cache, int t, int to, int scales_to) const
{
    auto const* from = static_cast<uint8_t const*>(cache) + plane<kDim, kInt8>(call.shape, b, kv);
    int const used = first + call.shape.new_tokens - t * kKeys;  // of this tile's slots
    if constexpr (kInt8) {
        auto const* scales = from + size_t(call.shape.capacity) * kDim + size_t(t) * kKeys * kScaleBytes;
        from += size_t(t) * kKeys * kDim;
        constexpr int kCodeChunks = kDim / 16, kCodeStep = kLoaders / kCodeChunks;
        STAR_UNROLL for (int i = 0; i < (kLoadedKeys + kCodeStep - 1) / kCodeStep; ++i) {
            int const key = loader / kCodeChunks + i * kCodeStep,
                      at = first_key() * kCodeChunks + loader + i * kLoaders;
            if (key < kLoadedKeys)
                copy_async(shared() + to + at * 8, from + at * 16, first_key() + key < used ? 16 : 0);
        }
        int const four = first_key() / 4 + loader, left = least(4, used - four * 4);
        if (loader < kLoadedKeys / 4)
            copy_async(
                shared() + scales_to + four * 8, scales + four * 16, left > 0 ? left * kScaleBytes : 0);
    } else {
        int const key = first_key() + loader / kChunks, chunk = loader % kChunks,
                  at = to + swizzled<kChunks>(key, chunk);
        from += (size_t(t) * kKeys + key) * kDim * 2 + chunk * 16;
        STAR_UNROLL for (int i = 0; i < kSteps; ++i) {
            int const bytes = key + i * kStep < used ? 16 : 0;
            copy_async(shared() + steps_on(at, i), from + i * kStep * kDim * 2, bytes);
        }
    }
}

// An int8 slot stands for round(code * scale) in the element type.
template <Element kElement, int kDim, bool kInt8, int kIndex>
STAR_DEVICE void Attend<kElement, kDim, kInt8, kIndex>::convert(int codes_at, int scales_at, int to) const
{
    int const key = first_key() + loader / kChunks, chunk = loader % kChunks,
              at = to + swizzled<kChunks>(key, chunk);
    auto const* codes_from = reinterpret_cast<uint2 const*>(shared() + codes_at) + key * kChunks + chunk;
    auto const* scales_from = reinterpret_cast<float const*>(shared() + scales_at) + key;
    STAR_UNROLL for (int i = 0; i < kSteps; ++i) {
        uint2 const codes = codes_from[i * kStep * kChunks];
        float const scale = scales_from[i * kStep];
        uint32_t const words[2] = {codes.x ^ 0x80808080, codes.y ^ 0x80808080};  // code + 128, unsigned
        uint32_t packed[4];
        STAR_UNROLL for (int j = 0; j < 4; ++j) {
            float const low = float_from_byte(words[j / 2], j % 2 * 2),
                        high = float_from_byte(words[j / 2], j % 2 * 2 + 1);
            packed[j] = packed_from_floats<kElement>(low * scale, high * scale);
        }
        *reinterpret_cast<uint4*>(shared() + steps_on(at, i)) =
            uint4{packed[0], packed[1], packed[2], packed[3]};
    }
}

}  // namespace star
