// The elastic convolution: each sample reads and produces its own number of channels.
#pragma once

#include "geometry.h"

namespace den {

struct Conv2d {
    ConvShape shape;
    const float* x;       // NHWC
    const float* weight;  // OIHW, as PyTorch keeps it
    const float* bias;    // [out_channels], or null
    const float* residual;  // like out, added to it, or null; a sample that reads no channel is its residual, bit for bit
    float* out;           // NHWC; channels beyond a sample's out_width are written 0 (or the residual)
    int samples;
    const int* in_width;   // [samples], whole groups
    const int* out_width;  // [samples], whole groups
    int threads;
};

void conv2d(const Conv2d& args);

}  // namespace den
