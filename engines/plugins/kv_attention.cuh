// Attention over a KV cache, the work of one block: tiles of keys stream through shared memory, scores and
// weighted values are tensor-core products, and the softmax is computed online, with a maximum and a total
// per query row (Dao, FlashAttention-2, 2023).
//
// A block has one row of the batch, one key head and a tile of the query rows that share it (grouped queries
// are packed). The next tile of K and V arrives while the current one is worked on. Warps that divide the
// rows share the tiles and synchronise once per tile. Warps that divide the keys load their own and do not
// wait for one another until the end.
#pragma once

#include "warp.cuh"

namespace star {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kSlack = 8;  // weights may grow to 2^kSlack before a row's maximum and sums are rescaled

// Element index of 16-byte chunk `chunk` of row `row` in a tile of kChunks chunks per row. The exclusive or
// spreads eight rows of one column over all banks.
template <int kChunks>
STAR_DEVICE int swizzled(int row, int chunk) { return (row * kChunks + (chunk ^ (row & 7))) * 8; }

// The first new slot of batch row `b`, or -1 where the new positions do not fit.
STAR_DEVICE int first_slot(Call const& call, int b)
{
    int64_t const first = call.write_indices[b];
    return first < 0 || first > call.shape.capacity - call.shape.new_tokens ? -1 : int(first);
}

// The start of the plane of (b, kv) in a cache, in bytes.
template <int kDim, bool kInt8>
STAR_DEVICE size_t plane(Shape const& shape, int b, int kv)
{
    return size_t(b * shape.kv_heads + kv) * shape.capacity * (kInt8 ? kDim + kScaleBytes : 2 * kDim);
}

template <Element kElement, int kDim, bool kInt8, int kIndex>
struct Attend {
    static constexpr Config kConfig = kConfigs[kIndex];
    static constexpr int kWarpsM = kConfig.warps_m, kWarpsN = kConfig.warps_n, kFragments = kConfig.fragments;
    static constexpr int kKeys = kConfig.keys;
    static constexpr int kResident = kConfig.resident;
    static constexpr int kTileRows = kConfig.tile_rows(), kThreads = kConfig.threads(), kChunks = kDim / 8;
    static constexpr int kWarpKeys = kKeys / kWarpsN;  // keys of a tile that one warp takes
    static constexpr bool kOwnKeys = kWarpsN > 1, kFollows = true;
    static constexpr int kLoaders = kOwnKeys ? 32 : kThreads, kLoadedKeys = kOwnKeys ? kWarpKeys : kKeys;
    // A thread's chunks of a tile are kStep keys apart, and there are kSteps of them.
    static constexpr int kStep = kLoaders / kChunks, kSteps = kLoadedKeys / kStep;
    // Shared memory, in elements: the query; for an int8 cache, K and V of the current tile converted to
    // elements; and two stages of arriving data, each K, V and their scales.
    static constexpr int kTile = kKeys * kDim, kLanded = kInt8 ? kTile / 2 : kTile, kScales = 2 * kLanded;
    static constexpr int kQuery = 0, kWork = kTileRows * kDim, kStages = kWork + (kInt8 ? 2 * kTile : 0);
    static constexpr int kStage = kScales + (kInt8 ? 4 * kKeys : 0);
    static constexpr int kSharedBytes = 2 * (kStages + 2 * kStage);
    static_assert(kWarpsN == 1 || (kWarpsM == 1 && kFragments == 1), "warps share either rows or keys");
    static_assert(kLoaders % kChunks == 0 && kLoadedKeys % kStep == 0, "all threads load as much");
    static_assert(kWarpsN * 16 <= kKeys && kWarpsN * 2 * 16 * 4 <= 2 * kWork, "the warps' results fit");

    Call const& call;
    int const b, kv, group, split, m_tile, first, begin, end;  // tiles [begin, end) of keys are this block's
    int const seen;  // the last key that all query rows see
    int const warp_m, warp_n, lane, loader;
    float scores[kFragments][kWarpKeys / 8][4], sums[kFragments][kDim / 8][4];
    float top[kFragments][2], total[kFragments][2];

    // The blocks of the last query rows start first, because they see the most keys.
    STAR_DEVICE Attend(Call const& c, int m_tiles)
        : call(c), b(block_x() / c.shape.kv_heads), kv(block_x() % c.shape.kv_heads), group(c.shape.group()),
          split(block_y() % c.splits), m_tile(m_tiles - 1 - block_y() / c.splits), first(first_slot(c, b)),
          begin(tiles() * split / c.splits), end(tiles() * (split + 1) / c.splits),
          seen(first + m_tile * kTileRows / group), warp_m(thread() / 32 % kWarpsM),
          warp_n(thread() / 32 / kWarpsM), lane(thread() % 32), loader(thread() % kLoaders)
    {
        STAR_UNROLL for (int f = 0; f < kFragments; ++f)
            STAR_UNROLL for (int h = 0; h < 2; ++h) {
                top[f][h] = -kInfinity;
                total[f][h] = 0;
                STAR_UNROLL for (int n = 0; n < kDim / 8; ++n) sums[f][n][2 * h] = sums[f][n][2 * h + 1] = 0;
            }
    }

    STAR_DEVICE static int least(int a, int b) { return a < b ? a : b; }
    STAR_DEVICE int row_of(int f, int h) const
    {
        return m_tile * kTileRows + (warp_m * kFragments + f) * 16 + h * 8 + lane / 4;
    }

    // How many key tiles the last query row may see: 0 if the new positions do not fit, so 0 / 0 results.
    STAR_DEVICE int tiles() const
    {
        int const last = least(call.shape.packed(), (m_tile + 1) * kTileRows) - 1;
        return first < 0 ? 0 : (first + last / group) / kKeys + 1;
    }

    STAR_DEVICE size_t query_offset(int row) const  // of packed row `row`, in elements
    {
        Shape const& s = call.shape;
        return (size_t(b * s.heads + kv * group + row % group) * s.new_tokens + row / group) * kDim;
    }

    // Synchronise the threads that share a tile: the block's, or the warp's if each has its own keys.
    STAR_DEVICE static void meet()
    {
        if constexpr (kOwnKeys) sync_warp();
        else sync();
    }

    STAR_DEVICE static int stage(int t) { return kStages + (t & 1) * kStage; }
    STAR_DEVICE int first_key() const { return warp_n * kWarpKeys; }  // of a tile, for this warp

    // The place of a thread's chunk, `steps` times kStep keys after its first chunk at `at`.
    STAR_DEVICE static int steps_on(int at, int steps)
    {
        return (at ^ steps * kStep % 8 * 8) + steps * kStep * kDim;
    }

    // In kv_tiles.cuh:
    STAR_DEVICE void load_query() const;
    STAR_DEVICE void load_tile(int t) const;
    STAR_DEVICE void load_slots(void const* cache, int t, int to, int scales_to) const;
    STAR_DEVICE void convert(int codes_at, int scales_at, int to) const;

    STAR_DEVICE static void run(Call const& call, int m_tiles)
    {
        let_next_kernel_start();
        Attend(call, m_tiles).attend();
        await_kernel_before();  // so that waiting for this kernel includes the preceding one
    }

    STAR_DEVICE void attend()
    {
        if (begin >= end && call.splits > 1) return store_nothing();
        load_query();
        if (begin < end) load_tile(begin);
        wait_copies();
        if constexpr (kOwnKeys) sync();  // the warps share the query
        for (int t = begin; t < end; ++t) {
            wait_copies();
            meet();  // this tile has arrived, and no warp reads the previous one any more
            if (t + 1 < end) load_tile(t + 1);
            int keys = stage(t);
            if constexpr (kInt8) {
                convert(keys, keys + kScales, kWork);
                convert(keys + kLanded, keys + kScales + 2 * kKeys, kWork + kTile);
                keys = kWork;
                meet();
            }
            score(keys);
            if ((t + 1) * kKeys - 1 > seen) mask(t);
            soften();
            accumulate(keys + kTile);
        }
        STAR_UNROLL for (int f = 0; f < kFragments; ++f)
            STAR_UNROLL for (int h = 0; h < 2; ++h) {
                total[f][h] += shuffle_xor(total[f][h], 1);
                total[f][h] += shuffle_xor(total[f][h], 2);
            }
        if constexpr (kWarpsN > 1) merge_warps();
        else store_fragments();
    }

    // The byte of shared memory where a chunk of the tile at element `tile` starts; and the byte `rows` times
    // 16 rows and `chunks` times 2 chunks farther. Tiles start on a multiple of a row, so the exclusive or
    // affects only the chunk.
    STAR_DEVICE static int place(int tile, int row, int chunk)
    {
        return 2 * (tile + swizzled<kChunks>(row, chunk));
    }
    STAR_DEVICE static int farther(int at, int rows, int chunks)
    {
        return (at ^ 32 * chunks) + rows * 32 * kDim;
    }

    // scores [16 rows, kWarpKeys] = query key^T
    STAR_DEVICE void score(int keys_at)
    {
        int const a_at = place(kQuery, warp_m * kFragments * 16 + lane % 16, lane / 16);
        int const b_at = place(keys_at, first_key() + lane % 8 + lane / 16 * 8, lane / 8 % 2);
        STAR_UNROLL for (int f = 0; f < kFragments; ++f)
            STAR_UNROLL for (int n = 0; n < kWarpKeys / 8; ++n)
                STAR_UNROLL for (int e = 0; e < 4; ++e) scores[f][n][e] = 0;
        STAR_UNROLL for (int k = 0; k < kDim / 16; ++k) {
            uint32_t a[kFragments][4], keys[4];
            STAR_UNROLL for (int f = 0; f < kFragments; ++f) load_matrices(a[f], farther(a_at, f, k));
            STAR_UNROLL for (int n = 0; n < kWarpKeys / 16; ++n) {
                load_matrices(keys, farther(b_at, n, k));
                STAR_UNROLL for (int f = 0; f < kFragments; ++f) {
                    multiply_add<kElement>(scores[f][2 * n], a[f], keys[0], keys[1]);
                    multiply_add<kElement>(scores[f][2 * n + 1], a[f], keys[2], keys[3]);
                }
            }
        }
    }

    // Key j is visible to token i iff j <= first + i.
    STAR_DEVICE void mask(int t)
    {
        STAR_UNROLL for (int f = 0; f < kFragments; ++f)
            STAR_UNROLL for (int h = 0; h < 2; ++h) {
                int const last =
                    first + row_of(f, h) / group - (t * kKeys + warp_n * kWarpKeys + lane % 4 * 2);
                STAR_UNROLL for (int n = 0; n < kWarpKeys / 8; ++n)
                    STAR_UNROLL for (int e = 0; e < 2; ++e)
                        if (n * 8 + e > last) scores[f][n][2 * h + e] = -kInfinity;
            }
    }

    // Turn scores into exp(score - top). Where a score is far above top, raise top and rescale the sums.
    STAR_DEVICE void soften()
    {
        float kept[kFragments][2];
        bool moved = false;
        STAR_UNROLL for (int f = 0; f < kFragments; ++f)
            STAR_UNROLL for (int h = 0; h < 2; ++h) {
                float highest = -kInfinity, added = 0;
                STAR_UNROLL for (int n = 0; n < kWarpKeys / 8; ++n)
                    highest = fmaxf(highest, fmaxf(scores[f][n][2 * h], scores[f][n][2 * h + 1]));
                highest = fmaxf(highest, shuffle_xor(highest, 1));
                highest = fmaxf(highest, shuffle_xor(highest, 2));
                bool const far = (highest - top[f][h]) * call.scale_log2 > kSlack;
                kept[f][h] = far ? exp2_of((top[f][h] - highest) * call.scale_log2) : 1;
                top[f][h] = far ? highest : top[f][h];
                moved = moved || far;
                // A row that sees no key yet has no maximum.
                float const base = top[f][h] == -kInfinity ? 0 : top[f][h] * call.scale_log2;
                STAR_UNROLL for (int n = 0; n < kWarpKeys / 8; ++n)
                    STAR_UNROLL for (int e = 2 * h; e < 2 * h + 2; ++e)
                        added += scores[f][n][e] = exp2_of(scores[f][n][e] * call.scale_log2 - base);
                total[f][h] = total[f][h] * kept[f][h] + added;
            }
        if (!any(moved)) return;
        STAR_UNROLL for (int f = 0; f < kFragments; ++f)
            STAR_UNROLL for (int n = 0; n < kDim / 8; ++n)
                STAR_UNROLL for (int e = 0; e < 4; ++e) sums[f][n][e] *= kept[f][e / 2];
    }

    // sums [16 rows, kDim] += weights value. The scores' fragments, packed, are those of the left operand.
    STAR_DEVICE void accumulate(int values_at)
    {
        int const b_at = place(values_at, first_key() + lane % 16, lane / 16);
        STAR_UNROLL for (int k = 0; k < kWarpKeys / 16; ++k) {
            uint32_t a[kFragments][4], values[4];
            STAR_UNROLL for (int f = 0; f < kFragments; ++f)
                STAR_UNROLL for (int i = 0; i < 4; ++i) {
                    float const* two = scores[f][2 * k + i / 2] + i % 2 * 2;
                    a[f][i] = packed_from_floats<kElement>(two[0], two[1]);
                }
            STAR_UNROLL for (int n = 0; n < kDim / 16; ++n) {
                load_transposed(values, farther(b_at, k, n));
                STAR_UNROLL for (int f = 0; f < kFragments; ++f) {
                    multiply_add<kElement>(sums[f][2 * n], a[f], values[0], values[1]);
                    multiply_add<kElement>(sums[f][2 * n + 1], a[f], values[2], values[3]);
                }
            }
        }
    }

    // Where one packed row's result goes: the output, or, with several splits, its share in the workspace.
    struct Target {
        bool whole;
        uint16_t* output;
        float* partial;
        float inverse_total;

        STAR_DEVICE void store(int column, float x, float y) const
        {
            if (whole)
                *reinterpret_cast<uint32_t*>(output + column) =
                    packed_from_floats<kElement>(x * inverse_total, y * inverse_total);
            else
                *reinterpret_cast<float2*>(partial + column) = float2{x, y};
        }
    };

    STAR_DEVICE Target target(int row, float row_total) const
    {
        return {call.splits == 1, static_cast<uint16_t*>(call.output) + query_offset(row),
            call.partial + split_index(row) * kDim, 1 / row_total};
    }

    STAR_DEVICE size_t split_index(int row) const  // the index of this split's share of packed row `row`
    {
        Shape const& s = call.shape;
        return (size_t(split) * s.rows * s.kv_heads + b * s.kv_heads + kv) * s.packed() + row;
    }

    STAR_DEVICE void store_stats(int row, float row_top, float row_total) const
    {
        *reinterpret_cast<float2*>(call.stats + 2 * split_index(row)) =
            float2{row_top * call.scale_log2, row_total};
    }

    // The share of a split without keys: a total of 0 tells the merge that there are no sums.
    STAR_DEVICE void store_nothing() const
    {
        for (int row = m_tile * kTileRows + thread();
             row < least(call.shape.packed(), (m_tile + 1) * kTileRows); row += kThreads)
            store_stats(row, -kInfinity, 0);
    }

    STAR_DEVICE void store_fragments() const
    {
        STAR_UNROLL for (int f = 0; f < kFragments; ++f)
            STAR_UNROLL for (int h = 0; h < 2; ++h) {
                int const row = row_of(f, h);
                if (row >= call.shape.packed()) continue;
                Target const to = target(row, total[f][h]);
                STAR_UNROLL for (int n = 0; n < kDim / 8; ++n)
                    to.store(n * 8 + lane % 4 * 2, sums[f][n][2 * h], sums[f][n][2 * h + 1]);
                if (call.splits > 1 && lane % 4 == 0) store_stats(row, top[f][h], total[f][h]);
            }
    }

    // The warps saw different keys of the same 16 query rows, so their results are merged in shared memory.
    STAR_DEVICE void merge_warps()
    {
        auto* tops = reinterpret_cast<float*>(shared() + kQuery);           // [kWarpsN, 16]
        auto* totals = tops + kWarpsN * 16;                                 // [kWarpsN, 16]
        auto* parts = reinterpret_cast<float*>(shared() + kWork);           // [kWarpsN, 16, kDim]
        sync();  // wait until no warp reads a tile any more
        STAR_UNROLL for (int h = 0; h < 2; ++h) {
            int const row = warp_n * 16 + h * 8 + lane / 4;
            if (lane % 4 == 0) tops[row] = top[0][h], totals[row] = total[0][h];
            auto* part = reinterpret_cast<float2*>(parts + row * kDim);
            STAR_UNROLL for (int n = 0; n < kDim / 8; ++n)
                part[n * 4 + lane % 4] = float2{sums[0][n][2 * h], sums[0][n][2 * h + 1]};
        }
        sync();
        for (int i = thread(); i < 16 * kDim / 2; i += kThreads) {
            int const row = i / (kDim / 2), column = i % (kDim / 2) * 2, packed = m_tile * kTileRows + row;
            if (packed >= call.shape.packed()) break;
            float highest = -kInfinity, sum = 0, x = 0, y = 0;
            for (int w = 0; w < kWarpsN; ++w) highest = fmaxf(highest, tops[w * 16 + row]);
            for (int w = 0; w < kWarpsN; ++w) {
                float const top_w = tops[w * 16 + row];
                float const weight = top_w == -kInfinity ? 0 : exp2_of((top_w - highest) * call.scale_log2);
                float2 const part = *reinterpret_cast<float2 const*>(parts + (w * 16 + row) * kDim + column);
                sum += weight * totals[w * 16 + row], x += weight * part.x, y += weight * part.y;
            }
            target(packed, sum).store(column, x, y);
            if (call.splits > 1 && column == 0) store_stats(packed, highest, sum);
        }
    }
};

}  // namespace star

#include "kv_tiles.cuh"
