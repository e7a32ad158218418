// Weights as the kernels read them.
#pragma once

#include <cstddef>

#include "geometry.h"

namespace den {

// [group][out/16] { run of input channels inside one activation block { tap { word of the run { 16 outputs }}}}.
// For one group of floats that is [out/16][in/16][tap][16][16], of bf16 [out/16][in/32][tap][16 pairs][16][2]: a nested
// width is a prefix in both dimensions, so one packing serves every level. Output channels are padded with zeros to 16
// in each group; input channels are padded to whole words. With groups, a group must be whole words.
template <class T>
std::size_t packed_elements(int out_channels, int group_in, int taps, int groups);

template <class T>
void pack_weight(const T* weight_OIHW, int out_channels, int group_in, int taps, int groups, int threads, T* packed);

}  // namespace den
