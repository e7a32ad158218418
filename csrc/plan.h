// Samples ordered by level, for each block; den_kernels/plan.py says what the results are.
#pragma once

#include <cstdint>

namespace den {

// level: [samples, blocks], in [0, levels). Writes level_BN and order_BN [blocks, samples], count_BL [blocks, levels].
// Returns the index of the first entry of `level` that is out of range (nothing is written then), or -1.
std::int64_t plan_levels(const std::int64_t* level_NB, int samples, int blocks, int levels, int* level_BN, int* order_BN,
                         int* count_BL);

}  // namespace den
