// The launcher on emulated blocks, and an entry for Python: what kv_attention.cu is on a GPU.
#include "kv_dispatch.cuh"

namespace star {
namespace {

struct Emulated {
    Call const& call;
    int m_tiles;
    unsigned seed;

    template <class Work>
    int run(Grid grid)
    {
        if (!Work::kFollows) finish();
        kernel_before = [this, grid, before = std::move(kernel_before)] {
            kernel_before = before;
            Block emulated(Work::kThreads, Work::kSharedBytes, seed);
            std::vector<int> order(size_t(grid.x) * grid.y * grid.z);
            std::iota(order.begin(), order.end(), 0);
            std::shuffle(order.begin(), order.end(), emulated.random);  // blocks run in any order
            for (int i : order) {
                emulated.run(
                    i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y, [&] { Work::run(call, m_tiles); });
                for (Fiber const& fiber : emulated.fibers)
                    if (Work::kFollows && !fiber.awaited)
                        Block::fail("a thread ends before the kernel that it follows");
            }
        };
        return 0;
    }

    static void finish()  // run what was launched and not awaited
    {
        if (auto const run = std::exchange(kernel_before, nullptr)) run();
    }
};

}  // namespace

int pretended_multiprocessors = 16;
unsigned schedule_seed = 0;
int flag = 0;

int multiprocessors() { return pretended_multiprocessors; }

int launch(Call const& call, Plan const& plan, Element element, Cache cache, void*)
{
    Emulated runner{call, plan.m_tiles, schedule_seed};
    int const status = run_call(runner, call, plan, element, cache);
    Emulated::finish();
    return status;
}

int copy_cache(void* to, void const* from, size_t bytes, void*)
{
    std::memcpy(to, from, bytes);
    return 0;
}

int overflow_flag(int** host, int** device)
{
    *host = *device = &flag;
    return 0;
}

}  // namespace star

// sizes: rows, heads, kv_heads, new, capacity, dim. pointers: query, key, value, key cache, value cache,
// write indices, output. Returns -1 for a shape that is refused, or the plan: config + 16 * splits; bit 30: a
// write did not fit. Workspace and flag are made here; NaN fills the workspace first.
extern "C" int star_emulate(int const* sizes, void* const* pointers, int element, int cache, float scale,
    int processors, unsigned seed)
{
    using namespace star;
    Shape const shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
    if (refusal(shape, Cache(cache))) return -1;
    Plan const plan = plan_from_shape(shape, processors);
    std::vector<float> workspace(plan.workspace_bytes() / 4 + 1, NAN);
    int raised = 0;
    auto const* indices = static_cast<int64_t const*>(pointers[5]);
    Call call{pointers[0], pointers[1], pointers[2], pointers[3], pointers[4], indices, pointers[6], nullptr,
        nullptr, &raised, shape, 1, scale * 1.4426950408889634f};
    set_workspace(call, plan, workspace.data());
    Emulated runner{call, plan.m_tiles, seed};
    run_call(runner, call, plan, Element(element), Cache(cache));
    Emulated::finish();
    return plan.config + 16 * plan.splits + (raised << 30);
}
