// Winograd convolution F(m x m, 3x3), m = 2 or 4: an m x m tile of outputs from (m + 2)^2 multiplications a channel pair,
// where a direct 3x3 takes 9 m^2 (Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016).
//
//   V = B^T d B    of each tile d of the input, for each channel         ("points": its (m + 2)^2 entries)
//   M = V U        for each point, a matrix product over input channels: [tiles x in] [in x out]
//   Y = A^T M A    of each tile, for each output channel, then the epilogue
//
// V, U and M are float, but for bf16 maps in tiles of 2, whose V and U are pairs of bf16 channels, multiplied as pairs:
// twice the rate and half the memory. (Tiles of 4 would lose too many digits in bf16: their transforms amplify rounding.)
//
// Tiles of several samples, of whatever levels, are multiplied together: they share the weights in cache. Each output is
// summed over input channels in their order by one accumulator, so a sample's result does not depend on its company.
#pragma once

#include <cstddef>

#include "kernels.h"

namespace den {

constexpr int kWinogradGroup = 32;  // output channels multiplied together
// Floats from one tile's products to the next's, by the type of V: of all points, and a line, for not all tiles to meet in few
// cache sets.
template <class P>
constexpr int kWinogradTileProducts = (kWord<P> == 1 ? 36 : 16) * kWinogradGroup + 16;

inline int winograd_points(int tile) { return (tile + 2) * (tile + 2); }
inline int winograd_groups(int channels) { return (channels + kWinogradGroup - 1) / kWinogradGroup; }

// Channels in a word of V and U for maps of T: see kernels.h.
template <class T>
inline int winograd_word(int tile) {
    return tile == 2 ? kWord<T> : 1;
}

// One tile of one sample.
template <class T>
struct WinogradTile {
    const T* in;            // the sample's image, or its blocked map
    T* out;                 // the sample's output, addressed as BasicConvPass addresses it
    const T* residual;      // addressed like out, or null
    const float* mul;       // epilogue of the sample's level: relu(y * mul[c] + add[c] + residual)
    const float* add;
    int row, col;               // first output pixel
    int active_in, active_out;  // channels read and produced
};

// A convolution of some tiles. Neighbours in the list that have equal active channels are multiplied together.
template <class T>
struct WinogradPass {
    int tile;  // m
    // Input: pixel (y, x) of a tile's square, channel c is element  (row + y)*in_row + (col + x)*in_pixel + (c/b)*in_block +
    // c%b  of its `in`, where (row, col) is the tile's place less the padding; or zero, outside of in_height rows and
    // in_width columns. A blocked map has its zeros in itself, and no padding here.
    std::ptrdiff_t in_row, in_pixel, in_block;
    int in_height, in_width, pad_y, pad_x;
    const float* in_mul;  // each pixel is read through relu(x * mul[c] + add[c]); null: as it is
    const float* in_add;
    // V, counted in 32-bit words: point p, word c of tile t is at  v + p*v_point + (c/16)*v_block + t*16 + c%16.
    float* v;
    std::ptrdiff_t v_point, v_block;
    // Weights as packed by winograd_pack, counted in words.
    const float* weight;
    std::ptrdiff_t weight_group, weight_point;
    int height, width;  // of the output: tiles at the lower and right border may reach beyond
    bool relu;
    std::ptrdiff_t out_row, out_block;
    const std::ptrdiff_t* out_col;
    bool whole_blocks;  // the last block may be written beyond active_out (scratch), or not (a tensor)
};

// The kernels of one instruction set.
template <class T>
struct WinogradKernels {
    // V of tiles [tile0, tile1) of the list, for their active input channels.
    void (*input)(const WinogradPass<T>& pass, const WinogradTile<T>* tiles, int tile0, int tile1);
    // Output channel groups [group0, group1) of tiles [tile0, tile1), from their V. `products` is scratch for
    // winograd_product_floats(tile, tile1 - tile0): M, [tile][point][32].
    void (*output)(const WinogradPass<T>& pass, const WinogradTile<T>* tiles, int tile0, int tile1, int group0,
                   int group1, float* products);
    // U of one group of output channels, of which `outs` exist, as winograd_pack lays it out; weight: its first row.
    void (*weights)(int tile, const T* weight_OIHW, int outs, int in_channels, float* packed);
};

// Floats between the points of an array of `floats` each: never a multiple of 4 KiB, which would put the points of a
// tile into one cache set.
inline std::ptrdiff_t winograd_pitch(std::ptrdiff_t floats) { return floats + 16; }
// `words`: of input channels.
std::size_t winograd_v_floats(int tile, int words, int tiles);
template <class T>
inline std::size_t winograd_product_floats(int tile, int tiles) {
    return std::size_t(tiles) * (winograd_word<T>(tile) == 1 ? kWinogradTileProducts<float> : kWinogradTileProducts<T>);
}

// Weights [out/32][point][word of in][32]. A nested width is a prefix of both dimensions, so one packing serves every
// level. Output channels are padded with zeros to 32, input channels to whole words. Counted in words. Convolution groups
// follow each other, each packed as a convolution of its own; their channels must be whole blocks of the maps.
template <class T>
std::size_t winograd_packed_words(int tile, int out_channels, int in_channels);
template <class T>
inline bool winograd_takes(int groups, int group_out, int group_in) {
    return groups == 1 || (group_out % kMapBlock<T> == 0 && group_in % kMapBlock<T> == 0);
}
template <class T>
void winograd_pack(int tile, const T* weight_OIHW, int out_channels, int in_channels, int threads, float* packed);

}  // namespace den
