// The elastic convolution: each sample reads and produces its own number of channels. T is float or bf16.
#pragma once

#include "geometry.h"

namespace den {

template <class T>
struct Conv2d {
    ConvShape shape;
    const T* x;         // NHWC
    const T* weight;    // OIHW, as PyTorch keeps it
    const T* bias;      // [out_channels], or null
    const T* residual;  // like out, added to it, or null; a sample that reads no channel is its residual, bit for bit
    T* out;             // NHWC; channels beyond a sample's out_width are written 0 (or the residual)
    int samples;
    const int* in_width;   // [samples], whole groups
    const int* out_width;  // [samples], whole groups
    int threads;
};

template <class T>
void conv2d(const Conv2d<T>& args);

}  // namespace den
