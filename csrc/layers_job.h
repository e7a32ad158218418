// Some consecutive layers of one batch, ready to be computed: in one go for the samples that a thread takes through all of
// them, layer by layer for those that all threads share.
//
// Layers that follow each other with a barrier between them send all maps of a batch through the caches for each layer, and
// let threads wait for the slower of them in each. Where multiplying is fast (tiles of AMX) that is what counts.
#pragma once

#include <cstddef>
#include <vector>

#include "block_job.h"

namespace den {

template <class T>
class LayersJob {
public:
    // Layers [first, last), which outlive the job; owner: as of BlockJob.
    LayersJob(const BlockRunner<T>* first, const BlockRunner<T>* last, std::vector<int>& owner);

    // The end of the layers from `first` on that one job takes; end: of all. All but the first of them work in place: no
    // sample's map is written while another thread reads it as its own.
    static const BlockRunner<T>* last_of(const BlockRunner<T>* first, const BlockRunner<T>* end);

    // Whether there is nothing to compute.
    bool empty() const { return whole_.empty() && jobs_.empty(); }
    const ResidualBlock& last_layer() const { return last_[-1].block(); }
    std::size_t own_floats() const;
    std::size_t shared_floats() const;
    // The calling thread's part. All threads call it; when it returns, all parts are done.
    void work(float* own, float* shared) const;

private:
    void run_through(int n, float* own, const BlockRunner<T>*& bordered) const;

    const BlockRunner<T>*first_, *last_;
    std::vector<int> whole_;  // samples that one thread takes through all layers
    Pieces pieces_;           // of them
    std::vector<BlockJob<T>> jobs_;  // of the others, for each layer that has work
    std::size_t bench_floats_ = 0, workspace_floats_ = 0;
};

}  // namespace den
