// From run-time values to the kernels compiled for them. `Runner` starts a kernel: on a GPU it is
// kv_attention.cu's, in the tests an emulator's.
#pragma once

#include "kv_rows.cuh"

namespace star {

struct Grid {
    int x, y, z;
};

// Run the compiled configuration with the number `config`.
template <Element kElement, int kDim, bool kInt8, int kIndex = 0, class Runner>
int run_attend(Runner& runner, int config, Grid grid)
{
    if (config == kIndex) return runner.template run<Attend<kElement, kDim, kInt8, kIndex>>(grid);
    if constexpr (kIndex + 1 < kConfigCount)
        return run_attend<kElement, kDim, kInt8, kIndex + 1>(runner, config, grid);
    return -1;
}

// Write, attend and, where the keys were split, merge; return the first status that is not 0. A kernel with
// `kFollows` may start before the preceding one ends, so each of its threads waits for that one before it
// ends itself.
template <Element kElement, int kDim, bool kInt8, class Runner>
int run_kernels(Runner& runner, Call const& call, Plan const& plan)
{
    Shape const& s = call.shape;
    int const y = s.kv_heads, z = s.rows;
    Grid const attend{y * z, plan.m_tiles * plan.splits, 1};
    int status = runner.template run<Write<kElement, kDim, kInt8>>(
        Grid{divided_up(2 * s.new_tokens, kRowsPerBlock), y, z});
    if (status == 0) status = run_attend<kElement, kDim, kInt8>(runner, plan.config, attend);
    if (status == 0 && plan.splits > 1)
        status = runner.template run<Merge<kElement, kDim>>(Grid{s.packed(), y, z});
    return status;
}

template <Element kElement, class Runner>
int run_element(Runner& runner, Call const& call, Plan const& plan, Cache cache)
{
    bool const int8 = cache == Cache::kInt8;
    if (call.shape.dim == 64)
        return int8 ? run_kernels<kElement, 64, true>(runner, call, plan)
                    : run_kernels<kElement, 64, false>(runner, call, plan);
    return int8 ? run_kernels<kElement, 128, true>(runner, call, plan)
                : run_kernels<kElement, 128, false>(runner, call, plan);
}

// The caller must have checked the shape with `refusal`.
template <class Runner>
int run_call(Runner& runner, Call const& call, Plan const& plan, Element element, Cache cache)
{
    return element == Element::kHalf ? run_element<Element::kHalf>(runner, call, plan, cache)
                                     : run_element<Element::kBfloat16>(runner, call, plan, cache);
}

}  // namespace star
