// The kernels of loop.cu on emulated blocks, with an entry for Python: what cuLaunchKernel is on a GPU.
#include "kv_attention.h"
#include "loop.cu"

// kernel: 0 advance, 1 noise, 2 feed. Blocks run in any order, by `seed`.
extern "C" void star_emulate_loop(int kernel, star::Loop const* loop, int blocks_x, int blocks_y, unsigned seed)
{
    using namespace star;
    Block emulated(kThreads, 0, seed);
    std::vector<int> order(size_t(blocks_x) * blocks_y);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), emulated.random);
    for (int i : order)
        emulated.run(i % blocks_x, i / blocks_x, 0,
            [&] { (kernel == 0 ? advance : kernel == 1 ? noise : feed)(*loop); });
}
