// The kernels of loop.cu and of the toy model on emulated blocks, with an entry for Python: what cuLaunchKernel
// is on a GPU.
#include "kv_attention.h"
#include "loop.cu"
#include "toy.cu"

// kernel: its place in KERNELS of fake_cuda.py. Blocks run in any order, by `seed`.
extern "C" void star_emulate_loop(int kernel, void const* fields, int blocks_x, int blocks_y, unsigned seed)
{
    using namespace star;
    Block emulated(kThreads, 0, seed);
    std::vector<int> order(size_t(blocks_x) * blocks_y);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), emulated.random);
    auto const& loop = *static_cast<Loop const*>(fields);
    auto const& toy = *static_cast<Toy const*>(fields);
    for (int i : order)
        emulated.run(i % blocks_x, i / blocks_x, 0, [&] {
            if (kernel < 3)
                (kernel == 0 ? advance : kernel == 1 ? noise : feed)(loop);
            else
                (kernel == 3 ? toy_decoder : toy_head)(toy);
        });
}
