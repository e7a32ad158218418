#include "residual_block.h"

#include "block_job.h"

namespace den {

template <class T>
void residual_block(const ResidualBlock& block) {
    const BlockRunner<T> run(block);
    std::vector<int> owner(block.samples, -1);
    std::vector<BlockJob<T>> jobs;
    jobs.emplace_back(run, owner);
    if (jobs[0].empty()) return;
    const int threads = block.threads > 1 ? block.threads : 1;
    const JobMemory memory(jobs, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    jobs[0].work(memory.own(), memory.shared());
}

template void residual_block<float>(const ResidualBlock&);
template void residual_block<bf16>(const ResidualBlock&);

}  // namespace den
