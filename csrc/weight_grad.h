// The weight gradient of the elastic convolution: each sample adds to the channels that it ran.
#pragma once

#include "geometry.h"

namespace den {

struct WeightGrad {
    ConvShape shape;   // of the forward convolution
    const float* grad;  // NHWC, of the output; channels beyond a sample's out_width are not read
    const float* x;     // NHWC; channels beyond a sample's in_width are not read
    float* dweight;     // OIHW; written whole, 0 where no sample ran
    int samples;
    const int* in_width;   // [samples], whole groups
    const int* out_width;  // [samples], whole groups
    int threads;
};

// Deterministic: the sums and their order depend on the shapes and widths alone, not on the number of threads.
void weight_grad(const WeightGrad& args);

// dbias[o] = sum of grad over the pixels of the samples that ran output channel o. As deterministic.
void bias_grad(const ConvShape& shape, const float* grad, const int* out_width, int samples, int threads, float* dbias);

}  // namespace den
