#include "plan.h"

#include <algorithm>
#include <string>
#include <vector>

#include "checks.h"

namespace den {

void plan_levels(const std::int64_t* level_NB, int samples, int blocks, int levels, int* level_BN, int* order_BN,
                 int* count_BL) {
    const std::int64_t entries = std::int64_t(samples) * blocks;
    for (std::int64_t i = 0; i < entries; ++i)
        if (level_NB[i] < 0 || level_NB[i] >= levels)
            fail("level[" + std::to_string(i / blocks) + ", " + std::to_string(i % blocks) + "] is " +
                 std::to_string(level_NB[i]) + "; it must be between 0 and " + std::to_string(levels - 1));
    std::vector<int> next(levels);
    for (int b = 0; b < blocks; ++b) {
        int* level = level_BN + std::int64_t(b) * samples;
        int* order = order_BN + std::int64_t(b) * samples;
        int* count = count_BL + std::int64_t(b) * levels;
        std::fill_n(count, levels, 0);
        for (int n = 0; n < samples; ++n) ++count[level[n] = int(level_NB[std::int64_t(n) * blocks + b])];
        for (int l = levels - 2; l >= 0; --l) count[l] += count[l + 1];  // now: samples of level l or above
        // Descending levels: those of level l come behind all that are above.
        for (int l = 0; l < levels; ++l) next[l] = l + 1 < levels ? count[l + 1] : 0;
        for (int n = 0; n < samples; ++n) order[next[level[n]]++] = n;
    }
}

}  // namespace den
