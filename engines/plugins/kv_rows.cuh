// The two small kernels around the attention: writing new rows into the caches before it, merging split results after it.
#pragma once

#include "kv_attention.cuh"

namespace star {

constexpr int kRowThreads = 128, kRowsPerBlock = kRowThreads / 32;  // a warp has one row

// One new row of key or value into its slot, as it is or as int8: scale = max |x| / 127, code = round half to even (x / scale).
template <Element kElement, int kDim, bool kInt8>
struct Write {
    static constexpr int kThreads = kRowThreads, kResident = 1, kSharedBytes = 0;
    static constexpr int kWords = kDim / 64;  // of two elements, per thread

    STAR_DEVICE static void run(Call const& call, int)
    {
        int const row = block_x() * kRowsPerBlock + thread() / 32, kv = block_y(), b = block_z();
        if (row >= 2 * call.shape.new_tokens) return;
        int const first = first_slot(call, b), token = row / 2;
        if (first < 0) return raise_flag(call.flag);
        void const* const source = row % 2 ? call.value : call.key;
        size_t const from = (size_t(b * call.shape.kv_heads + kv) * call.shape.new_tokens + token) * kDim;
        auto const* words = reinterpret_cast<uint32_t const*>(static_cast<uint16_t const*>(source) + from);
        auto* to = static_cast<uint8_t*>(row % 2 ? call.value_cache : call.key_cache) + plane<kDim, kInt8>(call.shape, b, kv);
        uint32_t word[kWords];
        STAR_UNROLL for (int i = 0; i < kWords; ++i) word[i] = words[thread() % 32 * kWords + i];
        if constexpr (kInt8) return store_codes(to, word, first + token, call.shape.capacity);
        auto* slot = reinterpret_cast<uint32_t*>(to + size_t(first + token) * kDim * 2);
        STAR_UNROLL for (int i = 0; i < kWords; ++i) slot[thread() % 32 * kWords + i] = word[i];
    }

    STAR_DEVICE static void store_codes(uint8_t* to, uint32_t const (&word)[kWords], int slot, int capacity)
    {
        float x[2 * kWords], highest = 0;
        STAR_UNROLL for (int i = 0; i < 2 * kWords; ++i) {
            x[i] = float_from_bits<kElement>(uint16_t(word[i / 2] >> (i % 2 * 16)));
            highest = fmaxf(highest, fabsf(x[i]));
        }
        STAR_UNROLL for (int mask = 16; mask > 0; mask /= 2) highest = fmaxf(highest, shuffle_xor(highest, mask));
        float const scale = highest / 127;
        auto* codes = reinterpret_cast<int8_t*>(to + size_t(slot) * kDim) + thread() % 32 * 2 * kWords;
        STAR_UNROLL for (int i = 0; i < 2 * kWords; ++i) codes[i] = scale > 0 ? int8_t(rintf(x[i] / scale)) : int8_t(0);
        if (thread() % 32 == 0) reinterpret_cast<float*>(to + size_t(capacity) * kDim)[slot] = scale;
    }
};

// The splits' shares of one packed query row, weighted by how far each one's maximum is below the highest. Splits without a key
// the row may see have total 0, and their sums are not read.
template <Element kElement, int kDim>
struct Merge {
    static constexpr int kThreads = kRowThreads, kResident = 1, kSharedBytes = 0;
    static constexpr int kColumns = kDim / 32;  // per thread

    STAR_DEVICE static void run(Call const& call, int)
    {
        Shape const& s = call.shape;
        int const row = block_x() * kRowsPerBlock + thread() / 32, kv = block_y(), b = block_z();
        if (row >= s.packed()) return;
        size_t const stride = size_t(s.rows) * s.kv_heads * s.packed();
        size_t const index = size_t(b * s.kv_heads + kv) * s.packed() + row;
        auto const* stats = reinterpret_cast<float2 const*>(call.stats);
        float highest = -kInfinity, total = 0, sums[kColumns] = {};
        for (int split = 0; split < call.splits; ++split) highest = fmaxf(highest, stats[split * stride + index].x);
        for (int split = 0; split < call.splits; ++split) {
            float2 const stat = stats[split * stride + index];
            if (!(stat.y > 0)) continue;
            float const weight = exp2_of(stat.x - highest);
            float const* part = call.partial + (split * stride + index) * kDim + thread() % 32 * kColumns;
            STAR_UNROLL for (int i = 0; i < kColumns; ++i) sums[i] += weight * part[i];
            total += weight * stat.y;
        }
        int const group = s.group();
        size_t const to = (size_t(b * s.heads + kv * group + row % group) * s.new_tokens + row / group) * kDim;
        auto* out = reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(call.output) + to) + thread() % 32 * kColumns / 2;
        STAR_UNROLL for (int i = 0; i < kColumns; i += 2)
            out[i / 2] = packed_from_floats<kElement>(sums[i] / total, sums[i + 1] / total);
    }
};

}  // namespace star
