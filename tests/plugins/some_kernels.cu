// One head dim and element type of every kernel: enough to see on each architecture that the source
// compiles, and into what.
#include "kv_dispatch.cuh"

namespace star {

template <class Work>
__global__ void __launch_bounds__(Work::kThreads, Work::kResident) kernel(Call const call, int m_tiles)
{
    Work::run(call, m_tiles);
}

template __global__ void kernel<Attend<Element::kBfloat16, 128, false, kDecode>>(Call const, int);
template __global__ void kernel<Attend<Element::kBfloat16, 128, true, kDecode>>(Call const, int);
template __global__ void kernel<Attend<Element::kHalf, 64, false, kShort>>(Call const, int);
template __global__ void kernel<Attend<Element::kHalf, 128, false, kLong>>(Call const, int);
template __global__ void kernel<Write<Element::kBfloat16, 128, true>>(Call const, int);
template __global__ void kernel<Merge<Element::kBfloat16, 128>>(Call const, int);

}  // namespace star
