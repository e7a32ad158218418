#include "pack.h"

#include <algorithm>
#include <vector>

namespace den {

template <class T>
std::size_t packed_elements(int out_channels, int group_in, int taps, int groups) {
    return std::size_t(groups) * round_up(out_channels / groups, kBlock) * round_up(group_in, kWord<T>) * taps;
}

namespace {

// One block of 16 output channels, of which `outs` exist.
template <class T>
void pack_unit(const T* weight, int outs, int group_in, int taps, int first_in, T* packed) {
    constexpr int word = kWord<T>, block = kMapBlock<T>;
    // The 16 rows of a run are first laid side by side: in the tensor they are often a power of two apart, and would
    // evict each other from the cache. A zero row stands for outputs that do not exist, a zero column for half a pair.
    const int pitch = (block + word) * taps;
    std::vector<T> rows(std::size_t(kBlock) * pitch, T{});
    for (int done = 0; done < group_in;) {
        const int run = std::min(block - (first_in + done) % block, group_in - done);
        for (int o = 0; o < outs; ++o) {
            const T* from = weight + (std::ptrdiff_t(o) * group_in + done) * taps;
            std::copy_n(from, run * taps, rows.begin() + o * pitch);
            std::fill_n(rows.begin() + o * pitch + run * taps, word * taps, T{});
        }
        for (int t = 0; t < taps; ++t)
            for (int c = 0; c < run; c += word) {
                const T* from = rows.data() + c * taps + t;
                for (int o = 0; o < kBlock; ++o, from += pitch, packed += word) {
                    if (taps == 1)
                        std::copy_n(from, word, packed);  // as one word
                    else
                        for (int i = 0; i < word; ++i) packed[i] = from[i * taps];
                }
            }
        done += run;
    }
}

}  // namespace

template <class T>
void pack_weight(const T* weight, int out_channels, int group_in, int taps, int groups, int threads, T* packed) {
    const int group_out = out_channels / groups, units = ceil_div(group_out, kBlock);
    const std::ptrdiff_t out_elements = std::ptrdiff_t(group_in) * taps;
    const std::ptrdiff_t unit_elements = std::ptrdiff_t(round_up(group_in, kWord<T>)) * taps * kBlock;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int i = 0; i < groups * units; ++i) {
        const int group = i / units, first = i % units * kBlock;
        pack_unit(weight + (group * group_out + first) * out_elements, std::min(kBlock, group_out - first), group_in,
                  taps, group * group_in, packed + i * unit_elements);
    }
}

template std::size_t packed_elements<float>(int, int, int, int);
template std::size_t packed_elements<bf16>(int, int, int, int);
template void pack_weight(const float*, int, int, int, int, int, float*);
template void pack_weight(const bf16*, int, int, int, int, int, bf16*);

}  // namespace den
