// Samples ordered by level, for each block; den_kernels/plan.py says what the results are.
#pragma once

#include <cstdint>

namespace den {

// level: [samples, blocks], in [0, levels). Writes level_BN and order_BN [blocks, samples], count_BL [blocks, levels].
// Throws std::invalid_argument, before anything is written, for a level out of range.
void plan_levels(const std::int64_t* level_NB, int samples, int blocks, int levels, int* level_BN, int* order_BN,
                 int* count_BL);

}  // namespace den
