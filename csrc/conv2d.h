// The elastic convolution: each sample reads and produces its own number of channels. T is float or bf16.
#pragma once

#include <algorithm>

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

    // Where sample n begins in the output and the residual.
    std::ptrdiff_t out_offset(int n) const {
        return std::ptrdiff_t(n) * shape.out_height() * shape.out_width() * shape.out_channels;
    }
    // Output channels that anything is multiplied for. With groups, an active output group whose inputs are not active
    // is its bias alone.
    int computed(int n) const {
        if (shape.groups == 1) return in_width[n] > 0 ? out_width[n] : 0;
        return std::min(out_width[n], in_width[n] / shape.group_in() * shape.group_out());
    }
    // The other channels of some output rows: the residual, or bias alone and then zeros beyond the width.
    void fill_rest(int n, int row0, int row1) const;
};

template <class T>
void conv2d(const Conv2d<T>& args);

}  // namespace den
