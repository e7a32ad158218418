// A residual block of one batch, ready to be computed: which samples run whole, one thread each, and which are shared.
#pragma once

#include <cstddef>
#include <vector>

#include "block_runner.h"

namespace den {

template <class T>
class BlockJob {
public:
    // Of the runner's block and its present batch; the runner outlives the job.
    explicit BlockJob(const BlockRunner<T>& run);

    const ResidualBlock& block() const { return run_.block(); }
    // Whether there is nothing to compute: in place, every sample at width 0.
    bool empty() const { return active_.empty() && idle_.empty(); }
    std::size_t scratch_floats() const { return scratch_floats_; }
    // The calling thread's part. All of the block's threads call it, with the same memory of scratch_floats(); when it
    // returns, all parts are done.
    void work(float* memory) const;

private:
    void work_whole(float* bench) const;
    void work_idle(float* bench) const;
    void work_shared(float* workspaces, float* bench) const;

    const BlockRunner<T>& run_;
    int threads_, team_;
    std::vector<int> active_, idle_, shared_;  // samples
    int whole_ = 0;                            // teams of active samples that one thread computes
    int idle_parts_ = 1;                       // of each sample that is its shortcut
    std::vector<Cut> cuts_;                    // [convolution][shared sample]
    std::size_t bench_floats_ = 0, own_floats_ = 0, scratch_floats_ = 0;  // of a thread, of a thread with workspaces, of all
};

// Memory for jobs that run one after the other.
template <class T>
float* scratch_of(const std::vector<BlockJob<T>>& jobs) {
    std::size_t most = 0;
    for (const BlockJob<T>& job : jobs) most = job.scratch_floats() > most ? job.scratch_floats() : most;
    return scratch(Scratch::kWork, most);
}

}  // namespace den
