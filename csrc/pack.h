// Weights as the kernels read them.
#pragma once

#include <cstddef>

#include "geometry.h"

namespace den {

// [group][out/16] { run of input channels inside one activation block { tap { channel of the run { 16 outputs }}}}.
// For one group that is [out/16][in/16][tap][16][16]: a nested width is a prefix in both dimensions, so one packing
// serves every level. Output channels are padded with zeros to 16 in each group; input channels are not padded.
std::size_t packed_floats(int out_channels, int group_in, int taps, int groups);

void pack_weight(const float* weight_OIHW, int out_channels, int group_in, int taps, int groups, int threads, float* packed);

}  // namespace den
