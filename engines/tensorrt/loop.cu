// The image-token loop on the device: what engines/runtime/windows.py and gumbel.py do, bit for bit, on device
// memory. After the image head of a step, `advance` takes its draws over and places the next windows, `noise`
// makes the noise of their draws, and `feed` moves the embeddings that the base decoder reads next. Before the
// first token nothing is known and a window starts at -1, so the same kernels take the first draw over.
//
// device_loop.py launches them; NVRTC compiles them, without a header. Tests compile them as C++
// (STAR_EMULATED).

#ifdef STAR_EMULATED
#include "emulator.h"
#else
#define STAR_DEVICE __device__ __forceinline__
#ifdef STAR_WHILE
extern "C" __device__ __cudart_builtin__ void CUDARTAPI cudaGraphSetConditional(
    cudaGraphConditionalHandle handle, unsigned int value);
#endif
#endif

typedef long long i64;
typedef unsigned long long u64;

namespace star {

// In the order of `fields` in device_loop.py. `draws` is the number of positions of the head whose results are
// taken over: 1 for the first token, then `window`.
struct Loop {
    i64 images, window, tokens, hidden, codebook, draws;
    u64 condition;           // of the WHILE node that this step is in, or 0
    i64* state;              // 7 + 4 N numbers, see below
    float const* quantiles;  // the table of gumbel.py
    i64* ids;                // [N, T]
    i64* write_indices;      // [2N]
    i64* position_ids;       // [3, 2N, W]
    float* embeds;           // [2N, W, H], what the base decoder is fed
    float* noise;            // [N, draws, codebook]
    i64 const* drawn;        // [N, draws]
    float const* drawn_embeds;  // [2N, draws, H], the head's embeddings of `drawn`
};

enum State { kFirstSlot, kPosition, kSeedLow, kSeedHigh, kNoisy, kRemaining, kForwards, kImages };

#ifndef STAR_EMULATED
STAR_DEVICE int thread() { return threadIdx.x; }
STAR_DEVICE int block_x() { return blockIdx.x; }
STAR_DEVICE int block_y() { return blockIdx.y; }
STAR_DEVICE void sync() { __syncthreads(); }
STAR_DEVICE u64 upper_product(u64 a, u64 b) { return __umul64hi(a, b); }
STAR_DEVICE unsigned bits_from_float(float x) { return __float_as_uint(x); }
STAR_DEVICE void set_condition(u64 condition, unsigned value)
{
#ifdef STAR_WHILE
    if (condition) cudaGraphSetConditional(condition, value);
#endif
}
#else
STAR_DEVICE u64 upper_product(u64 a, u64 b) { return u64((unsigned __int128)a * b >> 64); }
STAR_DEVICE unsigned bits_from_float(float x)
{
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
STAR_DEVICE void set_condition(u64 condition, unsigned value)
{
    if (condition) *reinterpret_cast<unsigned*>(condition) = value;
}
#endif

constexpr int kThreads = 256;  // of every block

STAR_DEVICE i64* known_of(Loop const& loop) { return loop.state + kImages; }
STAR_DEVICE i64* starts_of(Loop const& loop) { return known_of(loop) + loop.images; }
STAR_DEVICE i64* moved_of(Loop const& loop) { return starts_of(loop) + loop.images; }
STAR_DEVICE i64* kept_of(Loop const& loop) { return moved_of(loop) + loop.images; }

// Windows.advance of one image. `moved` is how far its window moves, and `kept` how many rows of the window
// that was fed are tokens that were known.
STAR_DEVICE void take_draws(Loop const& loop, i64 image)
{
    i64 const known = known_of(loop)[image], start = starts_of(loop)[image];
    i64* const ids = loop.ids + image * loop.tokens;
    i64 const* const drawn = loop.drawn + image * loop.draws;
    i64 right = 0, fed = 0;  // draws that are right; what the forward was fed at the place before
    for (i64 i = 0; i < loop.draws; ++i) {
        i64 const at = start + 1 + i, guess = ids[at];
        if (right == i && (at <= known || fed == drawn[i - 1])) ++right;
        if (at >= known) ids[at] = drawn[i];
        fed = guess;
    }
    i64 const now = known > start + 1 + right ? known : start + 1 + right;
    i64 const last = loop.tokens - loop.window;
    i64 const next = (now < last ? now : last) - 1;
    known_of(loop)[image] = now, starts_of(loop)[image] = next;
    moved_of(loop)[image] = next - start, kept_of(loop)[image] = known - start > 1 ? known - start : 1;
}

// In one block: take the draws over, guess the tokens after them, and say where the next step goes.
STAR_DEVICE void advance(Loop const& loop)
{
    i64 const* const starts = starts_of(loop);
    for (i64 image = thread(); image < loop.images; image += kThreads) take_draws(loop, image);
    sync();
    for (i64 i = thread(); i < loop.images * loop.tokens; i += kThreads) {
        i64 const image = i / loop.tokens;
        i64 const drawn = starts[image] - moved_of(loop)[image] + loop.draws;  // the last place that was
        if (i % loop.tokens > drawn) loop.ids[i] = loop.ids[image * loop.tokens + drawn];
    }
    i64 const rows = 2 * loop.images;
    for (i64 i = thread(); i < rows; i += kThreads)
        loop.write_indices[i] = loop.state[kFirstSlot] + starts[i / 2];
    for (i64 i = thread(); i < 3 * rows * loop.window; i += kThreads)
        loop.position_ids[i] =
            loop.state[kPosition] + starts[i / loop.window % rows / 2] + i % loop.window;
    if (thread() == 0) {
        i64 remaining = 0;
        for (i64 image = 0; image < loop.images; ++image) remaining += known_of(loop)[image] < loop.tokens;
        loop.state[kForwards] += loop.state[kRemaining] > 0;
        loop.state[kRemaining] = remaining;
        set_condition(loop.condition, remaining > 0);
    }
}

// Philox4x64-10 (Salmon et al. 2011): four words from a counter and a key.
STAR_DEVICE void philox(u64 (&words)[4], u64 low, u64 high)
{
    for (int round = 0; round < 10; ++round) {
        u64 const a = 0xD2E7470EE14C6C93u, b = 0xCA5A826395121157u;
        u64 const upper_a = upper_product(a, words[0]), upper_b = upper_product(b, words[2]);
        u64 const lower_a = a * words[0], lower_b = b * words[2];
        words[0] = upper_b ^ words[1] ^ low, words[1] = lower_b;
        words[2] = upper_a ^ words[3] ^ high, words[3] = lower_a;
        low += 0x9E3779B97F4A7C15u, high += 0xBB67AE8584CAA73Bu;
    }
}

// gumbel_noise: a thread makes the numbers of eight ids; block_y counts images and positions.
STAR_DEVICE void noise(Loop const& loop)
{
    i64 const block = i64(block_x()) * kThreads + thread(), first = block * 8;
    if (first >= loop.codebook) return;
    i64 const image = block_y() / loop.draws, step = starts_of(loop)[image] + 1 + block_y() % loop.draws;
    float* const to = loop.noise + block_y() * loop.codebook;
    u64 words[4] = {u64(block) + 1, u64(step), u64(image), 0};
    philox(words, u64(loop.state[kSeedLow]), u64(loop.state[kSeedHigh]));
    for (int i = 0; i < 8 && first + i < loop.codebook; ++i) {
        unsigned const number = unsigned(words[i / 2] >> i % 2 * 32);
        unsigned const bits = bits_from_float(float((number >> 8) + 1));  // exact: at most 2^24
        to[first + i] = loop.state[kNoisy] ? loop.quantiles[(bits >> 12) - (127u << 11)] : 0.0f;
    }
}

// The rows of the next windows: tokens that were known stay where they are, since a window that holds any
// beyond its first is the image's last and does not move; then come draws, then the last draw repeated. A
// thread writes one number of each row, and block_y counts rows of the batch.
STAR_DEVICE void feed(Loop const& loop)
{
    i64 const column = i64(block_x()) * kThreads + thread();
    if (column >= loop.hidden) return;
    i64 const row = block_y(), moved = moved_of(loop)[row / 2], kept = kept_of(loop)[row / 2];
    float* const embeds = loop.embeds + row * loop.window * loop.hidden + column;
    float const* const drawn = loop.drawn_embeds + row * loop.draws * loop.hidden + column;
    for (i64 i = 0; i < loop.window; ++i) {
        i64 const from = moved + i, draw = from - 1 < loop.draws ? from - 1 : loop.draws - 1;
        if (from >= kept) embeds[i * loop.hidden] = drawn[draw * loop.hidden];
    }
}

}  // namespace star

#ifndef STAR_EMULATED
extern "C" __global__ void advance(star::Loop const loop) { star::advance(loop); }
extern "C" __global__ void noise(star::Loop const loop) { star::noise(loop); }
extern "C" __global__ void feed(star::Loop const loop) { star::feed(loop); }
#endif
