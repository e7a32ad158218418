// A residual block of one batch, ready to be computed: which samples run whole, one thread each, and which are shared.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "block_runner.h"
#include "schedule.h"

namespace den {

template <class T>
class BlockJob {
public:
    // Of the runner's block and its present batch; the runner outlives the job. owner: the thread that last wrote each
    // sample's map, -1 where none did alone: it is given the sample again where it can be, and is then up to date.
    BlockJob(const BlockRunner<T>& run, std::vector<int>& owner);
    // Of those of its samples n that have some[n] set.
    BlockJob(const BlockRunner<T>& run, std::vector<int>& owner, const std::vector<char>& some);

    const ResidualBlock& block() const { return run_.block(); }
    // Whether there is nothing to compute: in place, every sample at width 0.
    bool empty() const { return active_.empty() && idle_.empty(); }
    // Scratch memory that each thread needs for itself, and that all need together.
    std::size_t own_floats() const { return own_floats_; }
    std::size_t shared_floats() const { return shared_floats_; }
    // The calling thread's part. All of the block's threads call it; when it returns, all parts are done.
    void work(float* own, float* shared) const;

private:
    // Gives idle samples, or parts of them, to threads.
    void deal_idle(std::vector<int>& owner);
    void work_whole(float* bench) const;
    void work_idle(float* bench) const;
    void work_shared(float* workspaces, float* bench) const;

    const BlockRunner<T>& run_;
    int threads_, team_;
    std::vector<int> active_, idle_, shared_;  // samples
    int whole_ = 0;                            // teams of active samples that one thread computes
    int idle_parts_ = 1;                       // of each sample that is its shortcut
    Pieces teams_, idle_pieces_;               // of whole teams, and of idle samples
    std::vector<Cut> cuts_;                    // [convolution][shared sample]
    std::size_t bench_floats_ = 0, own_floats_ = 0, shared_floats_ = 0;
};

// Memory for jobs that run one after the other. A thread has the same place in all of them: no other has it in its cache.
class JobMemory {
public:
    template <class Job>
    JobMemory(const std::vector<Job>& jobs, int threads) {
        std::size_t shared = 0;
        for (const Job& job : jobs) {
            own_ = std::max(own_, job.own_floats());
            shared = std::max(shared, job.shared_floats());
        }
        start_ = scratch(Scratch::kWork, threads * own_ + shared);
        shared_ = start_ + threads * own_;
    }
    float* own() const { return start_ + thread_index() * own_; }
    float* shared() const { return shared_; }

private:
    std::size_t own_ = 0;
    float *start_, *shared_;
};

}  // namespace den
