#include "winograd.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "geometry.h"

namespace den {

std::size_t winograd_v_floats(int tile, int words, int tiles) {
    return winograd_points(tile) * std::size_t(winograd_pitch(std::ptrdiff_t(round_up(words, kBlock)) * tiles));
}

template <class T>
std::size_t winograd_packed_words(int tile, int out_channels, int in_channels) {
    if (tile != 2 && tile != 4)
        throw std::invalid_argument("winograd is " + std::to_string(tile) + "; it must be 2 or 4 outputs a side");
    return std::size_t(winograd_points(tile)) * round_up(out_channels, kWinogradGroup) *
           ceil_div(in_channels, winograd_word<T>(tile));
}

template <class T>
void winograd_pack(int tile, const T* weight, int out_channels, int in_channels, int threads, float* packed) {
    const std::ptrdiff_t group_words = winograd_packed_words<T>(tile, kWinogradGroup, in_channels);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int group = 0; group < winograd_groups(out_channels); ++group) {
        const int first = group * kWinogradGroup;
        kernels<T>().winograd->weights(tile, weight + std::ptrdiff_t(first) * in_channels * 9,
                                       std::min(kWinogradGroup, out_channels - first), in_channels,
                                       packed + group * group_words);
    }
}

template std::size_t winograd_packed_words<float>(int, int, int);
template std::size_t winograd_packed_words<bf16>(int, int, int);
template void winograd_pack(int, const float*, int, int, int, float*);
template void winograd_pack(int, const bf16*, int, int, int, float*);

}  // namespace den
