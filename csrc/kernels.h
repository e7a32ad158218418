// What a kernel is given, and the table of kernels that each instruction set fills in for each element type.
//
// Elements are float or bf16; sums, scales and shifts are float. The kernels work in 32-bit *words*: one float, or two
// neighbouring bf16 channels, which are multiplied and added as a pair.
//
// Activations that a direct convolution reads, and those between two convolutions, lie in scratch as a *blocked map*, [C/b][row][column][b], with the zero padding
// around them: the pixels of a register tile are then a constant distance apart, whatever the channel count. A block
// is a cache line: b is 16 floats or 32 bf16. With a column stride s the columns are kept in s phases (column x at phase
// x % s, place x / s), so that strided convolutions read neighbours too.
#pragma once

#include <cstddef>
#include <cstdint>


namespace den {

// The upper half of a float. An odd number of channels ends in a pair whose second element is 0.
struct bf16 {
    std::uint16_t bits;
};

constexpr int kBlock = 16;                                   // outputs in a block of packed weights
template <class T> constexpr int kWord = 4 / sizeof(T);      // channels in a word
template <class T> constexpr int kMapBlock = 64 / sizeof(T);  // channels in a block of a map; also a row of weights

constexpr int kHeldWeights = 1 << 20;  // bytes of weights that stay in the second cache while maps pass

struct TapRange {
    int begin, end;
};

// One convolution over some output rows and some output channels of one sample. All distances count elements.
template <class T>
struct BasicConvPass {
    // Input: output pixel (y, x), tap t, channel c is at  in + y*in_row + x*in_pixel + tap[t] + (c/b)*in_block + c%b.
    const T* in;
    std::ptrdiff_t in_row, in_pixel, in_block;
    const std::ptrdiff_t* tap;
    int taps;
    // Of each output row, the taps that are not all zeros (above or below the image); null: all taps of all rows.
    const TapRange* row_taps;
    // Of each tap: -1 or 1 where it reads padding from the first or the last output column, else 0; null: not known.
    const signed char* tap_edges;
    // Weights as packed by pack.h.
    const T* weight;
    int groups;
    int group_in, group_out;    // channels of one group, as packed
    int active_in, active_out;  // of them, those read and those produced
    // Epilogue: relu(acc * mul[c] + add[c] + residual). mul and add are readable for 16 floats beyond the last channel.
    const float* mul;
    const float* add;
    const T* residual;  // addressed like out, or null
    bool relu;
    // Output: pixel (y, x), channel c is at  out + y*out_row + out_col[x] + (c/b)*out_block + c%b.
    T* out;
    std::ptrdiff_t out_row, out_block;
    const std::ptrdiff_t* out_col;
    bool whole_blocks;  // the last block may be written beyond active_out (scratch), or not (a tensor)
    int width;          // pixels of an output row
};

// Copies rows of one NHWC image into a blocked map, through relu(x * mul + add) when mul is given. The last vector of
// channels is filled up with zeros.
template <class T>
struct BasicMapLoad {
    const T* in;
    std::ptrdiff_t in_row, in_pixel;  // elements between rows and between pixels
    int width, channels;
    const float* mul;
    const float* add;
    T* out;
    std::ptrdiff_t out_row, out_block;
    const std::ptrdiff_t* out_col;  // negative: no tap reads this column
    const char* row_read;           // 0: no tap reads this row
};

// The average over the pixels of one NHWC image, of relu(x * mul + add) when mul is given, else of x.
template <class T>
struct BasicPool {
    const T* in;
    int pixels, channels;
    const float* mul;
    const float* add;
    T* out;  // [channels]
};

// The shortcut without parameters of one NHWC image: the average over windows of stride x stride pixels (of those inside
// it, at the lower and right border), then channels of zeros.
template <class T>
struct BasicShortcut {
    const T* in;
    int height, width, channels, stride;
    T* out;
    int out_width, out_channels;
};

// The largest of each 3x3 window, at a stride of 2, of one NHWC image; windows reach one pixel beyond its borders.
template <class T>
struct BasicMaxPool {
    const T* in;
    int height, width, channels;
    T* out;
    int out_width;
};

template <class T>
struct WinogradKernels;  // winograd.h

template <class T>
struct BasicKernels {
    // Output rows [row0, row1) of output blocks [unit0, unit1); a unit is one block of 16 output channels of a group.
    void (*conv)(const BasicConvPass<T>& pass, int unit0, int unit1, int row0, int row1);
    void (*load)(const BasicMapLoad<T>& load, int row0, int row1);
    void (*pool)(const BasicPool<T>& pool);
    void (*shortcut)(const BasicShortcut<T>& shortcut, int row0, int row1);  // of the output
    void (*max_pool)(const BasicMaxPool<T>& pool, int row0, int row1);       // of the output
    const WinogradKernels<T>* winograd;
    // Whether `conv` multiplies tiles (AMX), so fast that Winograd's transforms do not pay and that waiting counts.
    bool tiles;
};

using ConvPass = BasicConvPass<float>;
using MapLoad = BasicMapLoad<float>;
using Kernels = BasicKernels<float>;

}  // namespace den
