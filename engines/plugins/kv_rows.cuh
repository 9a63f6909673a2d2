// The two small kernels around the attention: one writes new rows into the caches before it, the other merges
// split results after it.
#pragma once

#include "kv_attention.cuh"

namespace star {

constexpr int kRowThreads = 128, kRowsPerBlock = kRowThreads / 32;  // one row per warp

// Write one new row of key or value into its slot, unchanged or as int8: scale = max |x| / 127, code = x /
// scale, rounded half to even.
template <Element kElement, int kDim, bool kInt8>
struct Write {
    static constexpr int kThreads = kRowThreads, kResident = 1, kSharedBytes = 0;
    static constexpr int kWords = kDim / 64;  // per thread, of two elements each
    static constexpr bool kFollows = false;

    struct alignas(4 * kWords) Words {
        uint32_t word[kWords];
    };
    struct alignas(2 * kWords) Codes {
        int8_t code[2 * kWords];
    };

    STAR_DEVICE static void run(Call const& call, int)
    {
        let_next_kernel_start();
        int const row = block_x() * kRowsPerBlock + thread() / 32, kv = block_y(), b = block_z();
        if (row >= 2 * call.shape.new_tokens) return;
        int const first = first_slot(call, b), token = row / 2;
        if (first < 0) return raise_flag(call.flag);
        void const* const source = row % 2 ? call.value : call.key;
        size_t const from = (size_t(b * call.shape.kv_heads + kv) * call.shape.new_tokens + token) * kDim;
        Words const words =
            reinterpret_cast<Words const*>(static_cast<uint16_t const*>(source) + from)[thread() % 32];
        auto* to = static_cast<uint8_t*>(row % 2 ? call.value_cache : call.key_cache) +
                   plane<kDim, kInt8>(call.shape, b, kv);
        if constexpr (kInt8) return store_codes(to, words, first + token, call.shape.capacity);
        reinterpret_cast<Words*>(to + size_t(first + token) * kDim * 2)[thread() % 32] = words;
    }

    STAR_DEVICE static void store_codes(uint8_t* to, Words const& words, int slot, int capacity)
    {
        float x[2 * kWords], highest = 0;
        STAR_UNROLL for (int i = 0; i < 2 * kWords; ++i) {
            x[i] = float_from_bits<kElement>(uint16_t(words.word[i / 2] >> (i % 2 * 16)));
            highest = fmaxf(highest, fabsf(x[i]));
        }
        STAR_UNROLL for (int mask = 16; mask > 0; mask /= 2)
            highest = fmaxf(highest, shuffle_xor(highest, mask));
        float const scale = highest / 127;
        Codes codes;
        STAR_UNROLL for (int i = 0; i < 2 * kWords; ++i)
            codes.code[i] = scale > 0 ? int8_t(rintf(x[i] / scale)) : int8_t(0);
        reinterpret_cast<Codes*>(to + size_t(slot) * kDim)[thread() % 32] = codes;
        if (thread() % 32 == 0) reinterpret_cast<float*>(to + size_t(capacity) * kDim)[slot] = scale;
    }
};

// Merge the splits' shares of one packed query row, weighted by how far each split's maximum is below the
// highest one. A split without a key that the row may see has a total of 0, and its sums are not read. A
// block has one row; its parts take different splits, a thread takes four columns, and the loads of kBatch
// splits are in flight together.
template <Element kElement, int kDim>
struct Merge {
    static constexpr int kThreads = kRowThreads, kResident = 6, kParts = kThreads / (kDim / 4), kBatch = 8;
    static constexpr int kSharedBytes = 4 * kParts * (kDim + 1);
    static constexpr bool kFollows = true;

    STAR_DEVICE static void run(Call const& call, int)
    {
        await_kernel_before();
        Shape const& s = call.shape;
        int const row = block_x(), kv = block_y(), b = block_z(), part = thread() / (kDim / 4);
        size_t const stride = size_t(s.rows) * s.kv_heads * s.packed();
        size_t const index = size_t(b * s.kv_heads + kv) * s.packed() + row;
        auto const* stats = reinterpret_cast<float2 const*>(call.stats) + index;
        auto const* shares =
            reinterpret_cast<float4 const*>(call.partial + index * kDim) + thread() % (kDim / 4);
        float highest = -kInfinity, total = 0;
        float4 sums{0, 0, 0, 0};
        for (int split = thread() % 32; split < call.splits; split += 32)
            highest = fmaxf(highest, stats[split * stride].x);
        STAR_UNROLL for (int mask = 16; mask > 0; mask /= 2)
            highest = fmaxf(highest, shuffle_xor(highest, mask));
        for (int from = part; from < call.splits; from += kParts * kBatch) {
            float2 stat[kBatch];
            float4 share[kBatch];
            STAR_UNROLL for (int i = 0; i < kBatch; ++i) {
                int const split = from + i * kParts;
                stat[i] = split < call.splits ? stats[split * stride] : float2{0, 0};
            }
            STAR_UNROLL for (int i = 0; i < kBatch; ++i)
                share[i] =
                    stat[i].y > 0 ? shares[(from + i * kParts) * stride * (kDim / 4)] : float4{0, 0, 0, 0};
            STAR_UNROLL for (int i = 0; i < kBatch; ++i) {
                float const weight = stat[i].y > 0 ? exp2_of(stat[i].x - highest) : 0;
                sums.x += weight * share[i].x, sums.y += weight * share[i].y;
                sums.z += weight * share[i].z, sums.w += weight * share[i].w;
                total += weight * stat[i].y;
            }
        }
        auto* all = reinterpret_cast<float*>(shared());  // [kParts, kDim], then the totals [kParts]
        reinterpret_cast<float4*>(all)[thread()] = sums;
        if (thread() % (kDim / 4) == 0) all[kParts * kDim + part] = total;
        sync();
        if (thread() >= kDim / 2) return;
        float x = 0, y = 0, whole = 0;
        STAR_UNROLL for (int i = 0; i < kParts; ++i) {
            x += all[i * kDim + 2 * thread()], y += all[i * kDim + 2 * thread() + 1];
            whole += all[kParts * kDim + i];
        }
        int const group = s.group();
        size_t const to =
            (size_t(b * s.heads + kv * group + row % group) * s.new_tokens + row / group) * kDim;
        auto* out = reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(call.output) + to);
        out[thread()] = packed_from_floats<kElement>(x / whole, y / whole);
    }
};

}  // namespace star
