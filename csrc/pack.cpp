#include "pack.h"

#include <algorithm>

namespace den {

std::size_t packed_floats(int out_channels, int group_in, int taps, int groups) {
    return std::size_t(groups) * round_up(out_channels / groups, kBlock) * group_in * taps;
}

namespace {

// One block of 16 output channels, of which `outs` exist.
void pack_unit(const float* weight, int outs, int group_in, int taps, int first_in, float* packed) {
    for (int done = 0; done < group_in;) {
        const int run = std::min(kBlock - (first_in + done) % kBlock, group_in - done);
        for (int t = 0; t < taps; ++t)
            for (int c = 0; c < run; ++c, packed += kBlock) {
                const float* from = weight + std::ptrdiff_t(done + c) * taps + t;
                for (int o = 0; o < kBlock; ++o) packed[o] = o < outs ? from[std::ptrdiff_t(o) * group_in * taps] : 0.0f;
            }
        done += run;
    }
}

}  // namespace

void pack_weight(const float* weight, int out_channels, int group_in, int taps, int groups, int threads, float* packed) {
    const int group_out = out_channels / groups, units = ceil_div(group_out, kBlock);
    const std::ptrdiff_t out_floats = std::ptrdiff_t(group_in) * taps;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int i = 0; i < groups * units; ++i) {
        const int group = i / units, first = i % units * kBlock;
        pack_unit(weight + (group * group_out + first) * out_floats, std::min(kBlock, group_out - first), group_in, taps,
                  group * group_in, packed + i * out_floats * kBlock);
    }
}

}  // namespace den
