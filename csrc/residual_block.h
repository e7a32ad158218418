// A whole residual block, or a convolution with what stands behind it, in one call, for inference.
#pragma once

#include <vector>

namespace den {

struct BlockConv {
    const void* weight;  // packed: T by pack.h, or float by winograd.h where winograd is set
    const float* scale;   // [levels, out_channels]
    const float* shift;   // [levels, out_channels]
    int out_channels, kernel, stride, groups;
    int winograd;  // outputs a side of its tiles (3x3, stride 1, one group), or 0: direct
    bool lines = false;  // direct, and packed for a map kept as lines (geometry.h)
};

// out = shortcut(x) + conv_k(... relu(conv_1(h))), h = x or relu(pre_scale * x + pre_shift); each convolution is followed
// by the scale and shift of the sample's level. Samples of width 0: out = shortcut(x), nothing else.
struct ResidualBlock {
    const void* x;  // T, NHWC
    void* out;      // T, NHWC; may be x when the shapes agree
    int samples, channels, height, width;
    const int* level;   // [samples], below `levels`
    const int* order;   // [samples], a permutation
    const int* widths;  // [levels], ascending, at most the hidden channels; whole groups
    int levels;
    std::vector<BlockConv> convs;
    // The shortcut as a 1x1 convolution of the block's stride, at every level, or (no weight) the one without parameters:
    // average pooling and zero channels.
    BlockConv projection;
    const float* pre_scale;  // [channels], or null
    const float* pre_shift;
    bool relu;
    int threads;
    // A single convolution without a shortcut: out = conv(x), relu behind it. Input channels read and output channels made
    // at each level, [levels], above 0; those beyond are not read, and made 0.
    bool shortcut = true;
    const int* in_widths = nullptr;
    const int* out_widths = nullptr;
    // In a chain: where the 3x3 max pool of stride 2 behind `out` goes, if there is one.
    bool max_pool = false;
    void* pooled = nullptr;
};

// T: float or bf16, the elements of maps and of weights packed for direct convolution.
template <class T>
void residual_block(const ResidualBlock& block);

}  // namespace den
