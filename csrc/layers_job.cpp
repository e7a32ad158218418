#include "layers_job.h"

#include <algorithm>
#include <numeric>

namespace den {

template <class T>
const BlockRunner<T>* LayersJob<T>::last_of(const BlockRunner<T>* first, const BlockRunner<T>* end) {
    const BlockRunner<T>* last = first + 1;
    // One sample alone is shared by all threads.
    if (!kernels<T>().tiles || first->block().samples < 2 || first->block().max_pool || first->team() > 1) return last;
    std::size_t weights = first->weight_bytes();
    for (; last != end; ++last) {
        const ResidualBlock& block = last->block();
        weights += last->weight_bytes();
        if (block.x != block.out || block.max_pool || last->team() > 1 || weights > std::size_t(kHeldWeights)) break;
    }
    return last;
}

template <class T>
LayersJob<T>::LayersJob(const BlockRunner<T>* first, const BlockRunner<T>* last, std::vector<int>& owner)
    : first_(first), last_(last) {
    const int samples = int(owner.size()), threads = std::max(1, first->block().threads);
    std::vector<char> shared(samples, true);
    if (last - first > 1) {
        std::vector<double> cost(samples, 0);
        for (const BlockRunner<T>* run = first; run != last; ++run)
            for (int n = 0; n < samples; ++n)
                if (run->is_active(n)) cost[n] += run->cost(n);
        whole_.resize(samples);
        std::iota(whole_.begin(), whole_.end(), 0);
        std::stable_sort(whole_.begin(), whole_.end(), [&](int a, int b) { return cost[a] > cost[b]; });
        std::vector<double> dearest_first;
        for (int n : whole_) dearest_first.push_back(cost[n]);
        const int count = count_whole(dearest_first, threads, first->sharing());
        whole_.resize(count), dearest_first.resize(count);
        std::vector<int> wanted;
        for (int n : whole_) wanted.push_back(owner[n]);
        const std::vector<int> dealt = deal(dearest_first, wanted, threads);
        pieces_ = Pieces(dealt, threads);
        for (int i = 0; i < count; ++i) owner[whole_[i]] = dealt[i], shared[whole_[i]] = false;
        for (const BlockRunner<T>* run = first; run != last; ++run) {
            bench_floats_ = std::max(bench_floats_, run->bench_floats());
            workspace_floats_ = std::max(workspace_floats_, run->workspace_floats());
        }
    }
    if (int(whole_.size()) == samples) return;
    for (const BlockRunner<T>* run = first; run != last; ++run)
        if (BlockJob<T> job(*run, owner, shared); !job.empty()) jobs_.push_back(std::move(job));
}

template <class T>
std::size_t LayersJob<T>::own_floats() const {
    std::size_t most = bench_floats_ + workspace_floats_;
    for (const BlockJob<T>& job : jobs_) most = std::max(most, job.own_floats());
    return most;
}

template <class T>
std::size_t LayersJob<T>::shared_floats() const {
    std::size_t most = 0;
    for (const BlockJob<T>& job : jobs_) most = std::max(most, job.shared_floats());
    return most;
}

template <class T>
void LayersJob<T>::work(float* own, float* shared) const {
    const BlockRunner<T>* bordered = nullptr;
    pieces_.run(thread_index(), [&](int i) { run_through(whole_[i], own, bordered); });
    for (const BlockJob<T>& job : jobs_) job.work(own, shared);
    if (jobs_.empty()) {
#pragma omp barrier
    }
}

// bordered: whose maps the borders in `own` are of.
template <class T>
void LayersJob<T>::run_through(int n, float* own, const BlockRunner<T>*& bordered) const {
    float* workspace = own + bench_floats_;
    for (const BlockRunner<T>* run = first_; run != last_; ++run) {
        if (!run->is_active(n)) {
            if (!run->shortcut_is_output()) run->shortcut(n, 0, 1, own);
            continue;
        }
        if (!bordered || !run->lays_out_as(*bordered)) run->zero_borders(workspace);
        bordered = run;
        run->run_team(workspace, &n, 1, own);
    }
}

template class LayersJob<float>;
template class LayersJob<bf16>;

}  // namespace den
