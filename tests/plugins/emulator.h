// A block of GPU threads on a CPU: the device half of warp.cuh, for tests.
//
// Every thread is a fiber with its own stack and runs the kernel's own code. Operations of a warp (shuffle,
// ldmatrix, mma) wait until all 32 lanes have come and are then computed from the lanes' registers in the
// layouts of the PTX ISA. Asynchronous copies happen at their wait and not before; shared memory is full of
// NaN at first; for random whiles, by a seed, only some warps run. So a missing wait, a missing barrier, an
// access outside shared memory and a wrong fragment show as wrong numbers or an abort.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "numbers.h"

#define STAR_DEVICE inline
#define STAR_UNROLL

struct float2 {
    float x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace star {

struct Block;
inline thread_local Block* block = nullptr;

struct Fiber {
    ucontext_t context{};
    jmp_buf place{};
    std::unique_ptr<char[]> stack;
    bool started = false, done = false, awaited = false;
    void const* gives = nullptr;  // a lane's operands of the warp operation under way
    void* takes = nullptr;
    struct Copy {
        void* to;
        void const* from;
        int bytes;
    };
    std::vector<Copy> copies;
    long const* waits_for = nullptr;
    long waits_at = 0;

    bool runnable() const { return !done && (waits_for == nullptr || *waits_for != waits_at); }
};

struct Warp {
    int arrived = 0;
    long generation = 0;
};

struct Block {
    static constexpr size_t kStack = 64 << 10;

    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<uint16_t> memory;
    std::function<void()> work;
    jmp_buf scheduler{};
    int current = 0, arrived = 0, x = 0, y = 0, z = 0;
    long generation = 0;
    std::mt19937 random;

    Block(int threads, size_t shared_bytes, unsigned seed)
        : fibers(threads), warps(threads / 32), memory(shared_bytes / 2 + 8), random(seed)
    {
        for (Fiber& fiber : fibers) fiber.stack.reset(new char[kStack]);
    }

    static void fail(char const* what)
    {
        std::fprintf(stderr, "emulator: %s\n", what);
        std::abort();
    }

    static void enter()
    {
        block->work();
        block->fibers[block->current].done = true;
        _longjmp(block->scheduler, 1);
    }

    void resume(int index)
    {
        current = index;
        Fiber& fiber = fibers[index];
        if (_setjmp(scheduler) != 0) return;
        if (fiber.started) _longjmp(fiber.place, 1);
        fiber.started = true;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        makecontext(&fiber.context, enter, 0);
        setcontext(&fiber.context);
    }

    // Let others run until `generation` is another than `now`.
    void wait(long const& generation, long now)
    {
        fibers[current].waits_for = &generation, fibers[current].waits_at = now;
        if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
    }

    // Run one block to its end.
    void run(int block_x, int block_y, int block_z, std::function<void()> body)
    {
        x = block_x, y = block_y, z = block_z, work = std::move(body), block = this;
        std::fill(memory.begin(), memory.end(), uint16_t(0x7fff));  // NaN as fp16 and bf16
        for (Fiber& fiber : fibers)
            fiber.started = fiber.done = fiber.awaited = false,
            fiber.waits_for = nullptr, fiber.copies.clear();
        size_t left = fibers.size();
        for (int idle = 0, passes = 0, active = -1; left > 0; --passes) {
            if (passes <= 0)
                passes = 1 + random() % 64, active = int(random());  // for a while only some warps run
            if (idle > 0) active = -1;
            if (idle > 4) fail("deadlock: threads wait for others that do not come");
            size_t const before = left;
            long const moved = progress();
            for (size_t warp = 0; warp < warps.size(); ++warp)
                if (active >> warp & 1) left -= resume_warp(int(warp));
            idle = left == before && moved == progress() ? idle + 1 : 0;
        }
        for (Fiber& fiber : fibers)
            if (!fiber.copies.empty()) fail("a thread ends with a copy under way");
    }

    // Every lane runs up to its next wait; how many came to their end.
    int resume_warp(int warp)
    {
        int ended = 0;
        for (int i = warp * 32; i < warp * 32 + 32; ++i)
            if (fibers[i].runnable()) resume(i), ended += fibers[i].done;
        return ended;
    }

    long progress() const
    {
        long sum = generation + arrived;
        for (Warp const& warp : warps) sum += warp.generation + warp.arrived;
        return sum;
    }

    void barrier()
    {
        long const now = generation;
        if (++arrived == int(fibers.size())) arrived = 0, ++generation;
        if (generation == now) wait(generation, now);
    }

    // All lanes of a warp meet; the last one computes `operation(lanes)` for all.
    template <class Operation>
    void together(void const* gives, void* takes, Operation operation)
    {
        int const index = current;
        Warp& warp = warps[index / 32];
        Fiber* lanes = &fibers[index / 32 * 32];
        fibers[index].gives = gives, fibers[index].takes = takes;
        long const now = warp.generation;
        if (++warp.arrived == 32) {
            operation(lanes);
            warp.arrived = 0, ++warp.generation;
        }
        if (warp.generation == now) wait(warp.generation, now);
    }

    void check_shared(void const* at) const
    {
        auto const* p = static_cast<char const*>(at);
        auto const* base = reinterpret_cast<char const*>(aligned());
        bool const inside = p >= base && p + 16 <= base + (memory.size() - 8) * 2;
        if (!inside || (p - base) % 16 != 0) fail("an address outside shared memory, or not on 16 bytes");
    }

    uint16_t* aligned() const
    {
        return reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16);
    }
};

inline int thread() { return block->current; }
inline int block_x() { return block->x; }
inline int block_y() { return block->y; }
inline int block_z() { return block->z; }
inline void sync() { block->barrier(); }
inline uint16_t* shared() { return block->aligned(); }
inline void sync_warp()
{
    block->together(nullptr, nullptr, [](Fiber*) {});
}
inline void raise_flag(int* flag) { *flag = 1; }
inline float exp2_of(float x) { return exp2f(x); }

inline float shuffle_xor(float x, int mask)
{
    float y;
    block->together(&x, &y, [mask](Fiber* lanes) {
        for (int i = 0; i < 32; ++i)
            *static_cast<float*>(lanes[i].takes) = *static_cast<float const*>(lanes[i ^ mask].gives);
    });
    return y;
}

inline bool any(bool x)
{
    bool y;
    block->together(&x, &y, [](Fiber* lanes) {
        bool const found = std::any_of(
            lanes, lanes + 32, [](Fiber const& lane) { return *static_cast<bool const*>(lane.gives); });
        for (int i = 0; i < 32; ++i) *static_cast<bool*>(lanes[i].takes) = found;
    });
    return y;
}

// The kernel before this one runs only when a thread of this one waits for it.
inline thread_local std::function<void()> kernel_before;

inline void await_kernel_before()
{
    block->fibers[block->current].awaited = true;
    Block* const mine = block;
    if (auto const run = std::exchange(kernel_before, nullptr)) run();
    block = mine;
}

inline void let_next_kernel_start() {}

inline void copy_async(void* to, void const* from, int bytes)
{
    block->check_shared(to);
    block->fibers[block->current].copies.push_back({to, from, bytes});
}

inline void wait_copies()
{
    for (auto const& copy : block->fibers[block->current].copies) {
        std::memset(copy.to, 0, 16);
        if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
    }
    block->fibers[block->current].copies.clear();
}

// Lane i gets elements (i / 4, 2 * (i % 4)) and the next of each matrix; transposed: (2 * (i % 4), i / 4) and
// the one below.
inline void gather_matrices(uint32_t (&r)[4], int at, bool transposed)
{
    void const* const row = block->aligned() + at / 2;
    block->check_shared(row);
    block->together(row, r, [transposed](Fiber* lanes) {
        for (int i = 0; i < 32; ++i)
            for (int m = 0; m < 4; ++m) {
                auto const element = [&](int row_index, int column) {
                    return uint32_t(static_cast<uint16_t const*>(lanes[m * 8 + row_index].gives)[column]);
                };
                int const a = i / 4, b = i % 4 * 2;
                uint32_t const low = transposed ? element(b, a) : element(a, b);
                uint32_t const high = transposed ? element(b + 1, a) : element(a, b + 1);
                static_cast<uint32_t*>(lanes[i].takes)[m] = low | high << 16;
            }
    });
}

inline void load_matrices(uint32_t (&r)[4], int row) { gather_matrices(r, row, false); }
inline void load_transposed(uint32_t (&r)[4], int row) { gather_matrices(r, row, true); }

inline float float_from_byte(uint32_t word, int i) { return float(word >> 8 * i & 255) - 128; }

template <Element kElement>
float float_from_bits(uint16_t bits)
{
    return kElement == Element::kHalf ? float_from_half(bits) : float_from_bfloat16(bits);
}

template <Element kElement>
uint32_t packed_from_floats(float low, float high)
{
    auto const bits = kElement == Element::kHalf ? half_from_float : bfloat16_from_float;
    return bits(low) | uint32_t(bits(high)) << 16;
}

// mma.m16n8k16: a[i] of lane l holds row l / 4 + i % 2 * 8, columns l % 4 * 2 + i / 2 * 8 and the next; b0
// and b1 hold rows l % 4 * 2 (+ 8) and the next of column l / 4; d[i] is row l / 4 + i / 2 * 8,
// column l % 4 * 2 + i % 2.
template <Element kElement>
void multiply_add(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1)
{
    struct Operands {
        uint32_t a[4], b[2];
    } const operands{{a[0], a[1], a[2], a[3]}, {b0, b1}};
    block->together(&operands, d, [](Fiber* lanes) {
        float left[16][16], right[16][8];
        for (int l = 0; l < 32; ++l) {
            auto const& o = *static_cast<Operands const*>(lanes[l].gives);
            for (int half = 0; half < 2; ++half) {
                auto const number = [half](uint32_t two) {
                    return float_from_bits<kElement>(uint16_t(two >> 16 * half));
                };
                for (int i = 0; i < 4; ++i)
                    left[l / 4 + i % 2 * 8][l % 4 * 2 + i / 2 * 8 + half] = number(o.a[i]);
                for (int i = 0; i < 2; ++i) right[l % 4 * 2 + i * 8 + half][l / 4] = number(o.b[i]);
            }
        }
        float product[16][8] = {};
        for (int m = 0; m < 16; ++m)
            for (int k = 0; k < 16; ++k)
                for (int n = 0; n < 8; ++n) product[m][n] += left[m][k] * right[k][n];
        for (int l = 0; l < 32; ++l)
            for (int i = 0; i < 4; ++i)
                static_cast<float*>(lanes[l].takes)[i] += product[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
    });
}

}  // namespace star
