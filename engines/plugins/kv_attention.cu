// The kernels on a GPU.
#include <cuda_runtime.h>

#include "kv_dispatch.cuh"

namespace star {
namespace {

template <class Work>
__global__ void __launch_bounds__(Work::kThreads, Work::kResident) kernel(Call const call, int m_tiles)
{
    Work::run(call, m_tiles);
}

// Code for this architecture and newer can wait for the preceding kernel (warp.cuh).
constexpr int kWaits = 90;

struct Runner {
    Call const& call;
    int m_tiles;
    cudaStream_t stream;

    template <class Work>
    int run(Grid grid)
    {
        auto const work = kernel<Work>;
        constexpr int kDefaultSharedBytes = 48 << 10;
        if constexpr (Work::kSharedBytes > kDefaultSharedBytes) {
            auto const attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
            auto const status = cudaFuncSetAttribute(work, attribute, Work::kSharedBytes);
            if (status != cudaSuccess) return status;
        }
        cudaFuncAttributes compiled{};
        if (auto const status = cudaFuncGetAttributes(&compiled, work); status != cudaSuccess) return status;
        cudaLaunchAttribute early{};
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(grid.x, grid.y, grid.z), config.blockDim = dim3(Work::kThreads);
        config.dynamicSmemBytes = Work::kSharedBytes, config.stream = stream;
        config.attrs = &early, config.numAttrs = Work::kFollows && compiled.ptxVersion >= kWaits;
        return cudaLaunchKernelEx(&config, work, call, m_tiles);
    }
};

}  // namespace

int multiprocessors()
{
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count > 0 ? count : 1;
}

int launch(Call const& call, Plan const& plan, Element element, Cache cache, void* stream)
{
    Runner runner{call, plan.m_tiles, static_cast<cudaStream_t>(stream)};
    return run_call(runner, call, plan, element, cache);
}

int copy_cache(void* to, void const* from, size_t bytes, void* stream)
{
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream));
}

int overflow_flag(int** host, int** device)
{
    static int* shared = nullptr;
    static auto const how = cudaHostAllocMapped | cudaHostAllocPortable;
    static cudaError_t const status = cudaHostAlloc(reinterpret_cast<void**>(&shared), sizeof(int), how);
    static bool const cleared = status == cudaSuccess && (*shared = 0, true);
    *host = shared;
    return cleared ? cudaHostGetDevicePointer(reinterpret_cast<void**>(device), shared, 0) : status;
}

}  // namespace star
