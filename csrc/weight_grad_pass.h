// What the kernels of the weight gradient are given.
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

// Tiles of a blocked map to the places of Winograd's F(3x3, 4x4): tile (y, x) of 16 channels begins at
// in + 4 * (y * in_row + 16 * x), and its place p goes to out + p * out_place + 16 * (y * tiles_x + x).
struct TileTransform {
    const float* in;
    std::ptrdiff_t in_row, in_block;
    float* out;
    std::ptrdiff_t out_place, out_block;
    int tiles_y, tiles_x, blocks;
};

}  // namespace den
