#include "residual_block.h"

#include <algorithm>

#include "block_runner.h"
#include "schedule.h"

namespace den {

namespace {

// Whether the block leaves its map as it is: in place, every sample at width 0.
bool is_identity(const ResidualBlock& block) {
    if (block.x != block.out || block.projection.weight || !block.shortcut) return false;
    for (const BlockConv& conv : block.convs)
        if (conv.stride != 1) return false;
    return std::all_of(block.level, block.level + block.samples, [&](int level) { return block.widths[level] == 0; });
}

}  // namespace

template <class T>
void residual_block(const ResidualBlock& block) {
    if (is_identity(block)) return;
    const BlockRunner<T> run(block);
    std::vector<int> active, idle;
    for (int i = 0; i < block.samples; ++i) {
        const int n = block.order[i];
        (run.is_active(n) ? active : idle).push_back(n);
    }
    if (run.shortcut_is_output()) idle.clear();
    const int idles = int(idle.size());
    if (active.empty() && idle.empty()) return;

    // Teams of samples, dearest first; those that are too few to keep all threads busy are computed by all of them.
    const int threads = std::max(1, block.threads), team = run.team();
    std::vector<double> cost;
    for (int i = 0; i < int(active.size()); ++i) {
        if (i % team == 0) cost.push_back(0);
        cost.back() += run.cost(active[i]);
    }
    const int whole = count_whole(cost, threads);
    const std::vector<int> shared(active.begin() + std::min<std::size_t>(active.size(), std::size_t(whole) * team), active.end());
    const int shares = int(shared.size());
    const int parts = threads;  // of each shared sample
    const int idle_parts = ceil_div(threads, std::max(1, idles));  // of each sample that is its shortcut

    const std::size_t floats = run.workspace_floats(), own = (whole ? team * floats : 0) + run.bench_floats();
    float* memory = scratch(Scratch::kWork, threads * own + shares * floats);
    float* shared_memory = memory + threads * own;
    std::vector<Cut> cuts;  // [conv][shared sample]
    for (int i = 0; i < run.convs(); ++i)
        for (int n : shared) cuts.push_back(run.cut(i, n, parts));

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* bench = memory + thread_index() * own;
        float* workspaces = bench + run.bench_floats();
        bool bordered = false;
#pragma omp for schedule(dynamic, 1) nowait
        for (int i = 0; i < whole; ++i) {
            if (!bordered)
                for (int s = 0; s < team; ++s) run.zero_borders(workspaces + s * floats);
            bordered = true;
            const int first = i * team;
            run.run_team(workspaces, active.data() + first, std::min(team, int(active.size()) - first), bench);
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (int i = 0; i < idles * idle_parts; ++i) {
            const int part = i % idle_parts, rows = run.out_height();
            run.shortcut(idle[i / idle_parts], rows * part / idle_parts, rows * (part + 1) / idle_parts, bench);
        }
        if (shares) {
            // Part by part, and static: every thread has the same rows of all samples, from one convolution to the next.
#pragma omp for schedule(static)
            for (int i = 0; i < shares * parts; ++i)
                run.prepare_part(shared_memory + i % shares * floats, shared[i % shares], i / shares, parts, bench);
            for (int c = 0; c < run.convs(); ++c) {
                if (run.is_winograd(c)) {
                    run.shared_winograd(c, shared_memory, shared, bench, threads);
                    continue;
                }
#pragma omp for schedule(static)
                for (int i = 0; i < shares * parts; ++i) {
                    const int s = i % shares;
                    const Cut& cut = cuts[c * shares + s];
                    for (int p = i / shares; p < cut.parts(); p += parts)
                        run.conv(shared_memory + s * floats, c, shared[s], cut.unit0(p), cut.unit1(p), cut.row0(p),
                                 cut.row1(p));
                }
            }
        }
    }
}

template void residual_block<float>(const ResidualBlock&);
template void residual_block<bf16>(const ResidualBlock&);

}  // namespace den
