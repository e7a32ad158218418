// What a kernel of the weight gradient is given.
#pragma once

#include <cstddef>

namespace den {

// Adds to a block of dweight the products of gradient and input over some rows of pixels, which may belong to several
// samples. Both are blocked maps (see kernels.h): pixel `col` of row r is 16 * col floats from grad[r] and x[r]. Of a
// block of 16, inputs and outputs that the sample did not run hold zeros.
struct WeightGradPass {
    const float* const* grad;  // [rows], at the pass's first block of output channels
    const float* const* x;     // [rows], at its block of input channels, tap offset 0
    int rows, width;
    int outputs, inputs;  // channels to cover: any number of outputs, at most 16 inputs
    std::ptrdiff_t grad_block;  // floats between blocks of output channels
    const std::ptrdiff_t* tap;
    int taps;
    // [block of 16 outputs][tap][16 inputs][16 outputs]
    float* dweight;
    std::ptrdiff_t dweight_block;  // floats between blocks of outputs
};

}  // namespace den
