// What a kernel is given, and the table of kernels that each instruction set fills in.
//
// Activations that a convolution reads lie in scratch as a *blocked map*, [C/16][row][column][16], with the zero
// padding around them: the pixels of a register tile are then a constant distance apart, whatever the channel count.
// With a column stride s the columns are kept in s phases (column x at phase x % s, place x / s), so that strided
// convolutions read neighbours too.
#pragma once

#include <cstddef>

#include "batch_norm_pass.h"
#include "weight_grad_pass.h"

namespace den {

constexpr int kBlock = 16;  // channels in a block, of activations and of packed weights

// One convolution over some output rows and some output channels of one sample.
struct ConvPass {
    // Input: output pixel (y, x), tap t, channel c is at  in + y*in_row + x*16 + tap[t] + (c/16)*in_block + c%16.
    const float* in;
    std::ptrdiff_t in_row, in_block;
    const std::ptrdiff_t* tap;
    int taps;
    // Weights as packed by pack.h.
    const float* weight;
    int group_in, group_out;    // channels of one group, as packed
    int active_in, active_out;  // of them, those read and those produced
    // Epilogue: relu(acc * mul[c] + add[c] + residual). mul and add are readable for 16 floats beyond the last channel.
    const float* mul;
    const float* add;
    const float* residual;  // addressed like out, or null
    bool relu;
    // Output: pixel (y, x), channel c is at  out + y*out_row + out_col[x] + (c/16)*out_block + c%16.
    float* out;
    std::ptrdiff_t out_row, out_block;
    const std::ptrdiff_t* out_col;
    bool whole_blocks;  // the last block may be written beyond active_out (scratch), or not (a tensor)
    int width;          // pixels of an output row
};

// Copies rows of one NHWC image into a blocked map, through relu(x * mul + add) when mul is given.
struct MapLoad {
    const float* in;
    std::ptrdiff_t in_row, in_pixel;  // floats between rows and between pixels
    int width, channels;
    const float* mul;
    const float* add;
    float* out;
    std::ptrdiff_t out_row, out_block;
    const std::ptrdiff_t* out_col;  // negative: no tap reads this column
    const char* row_read;           // 0: no tap reads this row
};

struct Kernels {
    const char* name;
    // Output rows [row0, row1) of output blocks [unit0, unit1); a unit is one block of 16 output channels of a group.
    void (*conv)(const ConvPass& pass, int unit0, int unit1, int row0, int row1);
    void (*load)(const MapLoad& load, int row0, int row1);
    void (*weight_grad)(const WeightGradPass& pass);
    // Winograd's weight gradient: inputs and gradients to places, sums of places to taps.
    void (*transform_input)(const TileTransform& pass);
    void (*transform_grad)(const TileTransform& pass);
    void (*transform_weight)(float* block);
    // Batch norm: sums, then results; forward and backward.
    void (*norm_sums)(const NormPass& pass);
    void (*norm_apply)(const NormPass& pass);
    void (*norm_grad_sums)(const NormPass& pass);
    void (*norm_grad_apply)(const NormPass& pass);
};

}  // namespace den
