// What the kernels of batch norm are given: some pixels of one sample.
#pragma once

#include <cstddef>

namespace den {

struct NormPass {
    const float* x;         // NHWC
    const float* grad;      // like x: of the output (backward)
    float* out;             // like x: the output (forward), the gradient of x (backward)
    std::ptrdiff_t pixel;   // floats between pixels
    std::ptrdiff_t pixels;
    int channels;           // those that take part
    bool relu;
    // Tables by channel. y = (x - mean) * scale + bias.
    const float* mean;
    const float* scale;
    const float* bias;
    // Backward: with g = grad where relu let it pass, dx = scale * g + by_x * (x - mean) + constant.
    const float* by_x;
    const float* constant;
    // Sums by channel, written. Forward: of x - x0 and (x - x0)^2, x0 the first pixel; backward: of g and g * (x - mean).
    float* sum;
    float* product;
};

}  // namespace den
