#include "residual_block.h"

#include "block_job.h"

namespace den {

template <class T>
void residual_block(const ResidualBlock& block) {
    const BlockRunner<T> run(block);
    const std::vector<BlockJob<T>> jobs(1, BlockJob<T>(run));
    if (jobs[0].empty()) return;
    float* memory = scratch_of(jobs);
    const int threads = block.threads > 1 ? block.threads : 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    jobs[0].work(memory);
}

template void residual_block<float>(const ResidualBlock&);
template void residual_block<bf16>(const ResidualBlock&);

}  // namespace den
