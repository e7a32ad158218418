#include "block_job.h"

#include <algorithm>

namespace den {

template <class T>
BlockJob<T>::BlockJob(const BlockRunner<T>& run, std::vector<int>& owner)
    : BlockJob(run, owner, std::vector<char>(owner.size(), true)) {}

template <class T>
BlockJob<T>::BlockJob(const BlockRunner<T>& run, std::vector<int>& owner, const std::vector<char>& some)
    : run_(run), threads_(std::max(1, run.block().threads)), team_(run.team()) {
    const ResidualBlock& block = run.block();
    for (int i = 0; i < block.samples; ++i) {
        const int n = block.order[i];
        if (!some[n]) continue;
        (run.is_active(n) ? active_ : idle_).push_back(n);
    }
    if (run.shortcut_is_output()) idle_.clear();
    if (empty()) return;

    // Teams of samples, dearest first; those that are too few to keep all threads busy are computed by all of them.
    std::vector<double> cost;
    for (int i = 0; i < int(active_.size()); ++i) {
        if (i % team_ == 0) cost.push_back(0);
        cost.back() += run.cost(active_[i]);
    }
    whole_ = count_whole(cost, threads_, run.sharing());
    cost.resize(whole_);
    std::vector<int> wanted;
    for (int i = 0; i < whole_; ++i) wanted.push_back(owner[active_[i * team_]]);
    const std::vector<int> dealt = deal(cost, wanted, threads_);
    teams_ = Pieces(dealt, threads_);
    for (int i = 0; i < whole_; ++i)
        for (int s = i * team_; s < std::min((i + 1) * team_, int(active_.size())); ++s) owner[active_[s]] = dealt[i];
    shared_.assign(active_.begin() + std::min<std::size_t>(active_.size(), std::size_t(whole_) * team_), active_.end());
    for (int n : shared_) owner[n] = -1;
    idle_parts_ = ceil_div(threads_, std::max(1, int(idle_.size())));
    deal_idle(owner);
    for (int i = 0; i < run.convs(); ++i)
        for (int n : shared_) cuts_.push_back(run.cut(i, n, threads_));

    const std::size_t workspace = run.workspace_floats();
    bench_floats_ = run.bench_floats();
    own_floats_ = bench_floats_ + (whole_ ? team_ * workspace : 0);
    shared_floats_ = shared_.size() * workspace;
}

template <class T>
void BlockJob<T>::deal_idle(std::vector<int>& owner) {
    const std::vector<double> cost(idle_.size() * idle_parts_, 1.0);
    std::vector<int> wanted;
    for (int n : idle_)
        for (int part = 0; part < idle_parts_; ++part) wanted.push_back(idle_parts_ == 1 ? owner[n] : part % threads_);
    const std::vector<int> dealt = deal(cost, wanted, threads_);
    idle_pieces_ = Pieces(dealt, threads_);
    for (int i = 0; i < int(dealt.size()); ++i) owner[idle_[i / idle_parts_]] = idle_parts_ == 1 ? dealt[i] : -1;
}

template <class T>
void BlockJob<T>::work(float* own, float* shared) const {
    work_whole(own);
    work_idle(own);
    if (shared_.empty()) {
#pragma omp barrier
    } else {
        work_shared(shared, own);
    }
}

template <class T>
void BlockJob<T>::work_whole(float* bench) const {
    float* workspaces = bench + bench_floats_;
    bool bordered = false;
    teams_.run(thread_index(), [&](int i) {
        if (!bordered)
            for (int s = 0; s < team_; ++s) run_.zero_borders(workspaces + s * run_.workspace_floats());
        bordered = true;
        const int first = i * team_;
        run_.run_team(workspaces, active_.data() + first, std::min(team_, int(active_.size()) - first), bench);
    });
}

template <class T>
void BlockJob<T>::work_idle(float* bench) const {
    idle_pieces_.run(thread_index(),
                     [&](int i) { run_.shortcut(idle_[i / idle_parts_], i % idle_parts_, idle_parts_, bench); });
}

// Part by part, and static: every thread has the same rows of all samples, from one convolution to the next.
template <class T>
void BlockJob<T>::work_shared(float* workspaces, float* bench) const {
    const int shares = int(shared_.size()), parts = threads_;
    const std::size_t floats = run_.workspace_floats();
#pragma omp for schedule(static)
    for (int i = 0; i < shares * parts; ++i)
        run_.prepare_part(workspaces + i % shares * floats, shared_[i % shares], i / shares, parts, bench);
    for (int c = 0; c < run_.convs(); ++c) {
        if (run_.is_winograd(c)) {
            run_.shared_winograd(c, workspaces, shared_, bench, threads_);
            continue;
        }
#pragma omp for schedule(static)
        for (int i = 0; i < shares * parts; ++i) {
            const int s = i % shares;
            const Cut& cut = cuts_[c * shares + s];
            for (int p = i / shares; p < cut.parts(); p += parts)
                run_.conv(workspaces + s * floats, c, shared_[s], cut.unit0(p), cut.unit1(p), cut.row0(p), cut.row1(p));
        }
    }
}

template class BlockJob<float>;
template class BlockJob<bf16>;

}  // namespace den
