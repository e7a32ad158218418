// The gradients of the elastic convolution.
#pragma once

#include "geometry.h"

namespace den {

struct Conv2dBackward {
    ConvShape shape;     // of the forward convolution
    const float* grad;    // NHWC, of the output; channels beyond a sample's out_width are not read
    const float* x;       // NHWC; channels beyond a sample's in_width are not read
    const float* weight;  // OIHW
    float* dx;            // NHWC, or null; channels beyond a sample's in_width are written 0
    float* dweight;       // OIHW, or null
    float* dbias;         // [out_channels], or null
    int samples;
    const int* in_width;   // [samples], whole groups
    const int* out_width;  // [samples], whole groups
    int threads;
};

void conv2d_backward(const Conv2dBackward& args);

}  // namespace den
