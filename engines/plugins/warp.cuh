// The instructions of a GPU thread beyond C++, one function each. The tests replace this half with an
// emulator (STAR_EMULATED), so that the kernels' own source runs, fragment by fragment, on a machine without
// a GPU.
//
// Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16" and "ldmatrix".
#pragma once

#include <cstdint>

#include "kv_attention.h"

#ifdef STAR_EMULATED
#include "emulator.h"
#else

#define STAR_DEVICE __device__ __forceinline__
#define STAR_UNROLL _Pragma("unroll")  // loops over arrays that live in registers

namespace star {

STAR_DEVICE int thread() { return threadIdx.x; }
STAR_DEVICE int block_x() { return blockIdx.x; }
STAR_DEVICE int block_y() { return blockIdx.y; }
STAR_DEVICE int block_z() { return blockIdx.z; }
STAR_DEVICE void sync() { __syncthreads(); }
STAR_DEVICE void sync_warp() { __syncwarp(); }
STAR_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
STAR_DEVICE bool any(bool x) { return __any_sync(0xffffffffu, x); }

// A kernel that follows another (kFollows in kv_dispatch.cuh) may start before that one ends, and waits here
// for everything that it stored.
STAR_DEVICE void await_kernel_before()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

STAR_DEVICE void let_next_kernel_start()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

STAR_DEVICE uint16_t* shared()
{
    extern __shared__ __align__(256) uint4 memory[];
    return reinterpret_cast<uint16_t*>(memory);
}

STAR_DEVICE void raise_flag(int* flag) { *static_cast<int volatile*>(flag) = 1; }

STAR_DEVICE float exp2_of(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

STAR_DEVICE uint32_t shared_address(void const* p)
{
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copy 16 bytes to shared memory in the background: the first `bytes` are read, the others are zeros.
STAR_DEVICE void copy_async(void* to, void const* from, int bytes)
{
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
        : "memory");
}

STAR_DEVICE void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Load four 8x8 matrices of 16-bit elements. Lane i gives the byte of shared memory where row i % 8 of matrix
// i / 8 starts.
STAR_DEVICE void load_matrices(uint32_t (&r)[4], int row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(shared_address(shared()) + row)
        : "memory");
}

STAR_DEVICE void load_transposed(uint32_t (&r)[4], int row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(shared_address(shared()) + row)
        : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8], accumulated in float32.
template <Element kElement>
STAR_DEVICE void multiply_add(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1)
{
    if constexpr (kElement == Element::kHalf)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to elements, `low` in the lower half.
template <Element kElement>
STAR_DEVICE uint32_t packed_from_floats(float low, float high)
{
    uint32_t d;
    if constexpr (kElement == Element::kHalf)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// Byte `i` of `word` as an unsigned number, less 128: the float 2^23 + byte has the byte as its last bits. (A
// conversion instruction has a quarter of the rate.)
STAR_DEVICE float float_from_byte(uint32_t word, int i)
{
    return __uint_as_float(__byte_perm(word, 0x4B000000, 0x7650 + i)) - 8388736.0f;
}

template <Element kElement>
STAR_DEVICE float float_from_bits(uint16_t bits)
{
    if constexpr (kElement == Element::kBfloat16) return __uint_as_float(uint32_t(bits) << 16);
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
    return y;
}

}  // namespace star
#endif
