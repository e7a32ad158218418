// The output's transform, and the epilogue behind it.
#pragma once

#include "winograd_input.h"

namespace {

constexpr int kGroup = den::kWinogradGroup;

// Where a vector of channels of a tile's outputs lies: of one pixel, and of the first.
struct Places {
    std::ptrdiff_t first, row;
    const std::ptrdiff_t* column;
};

// relu(values + residual) for the first rows x cols pixels of a tile, `left` channels of each.
template <int M>
__attribute__((noinline)) void finish_part(const Pass& pass, const Tile& tile, const float (&values)[M * M][kLanes],
                                           const Places& at, int left, int rows, int cols) {
    const float lowest = pass.relu ? 0.0f : -__builtin_inff();
    const Reg floor = Vec::broadcast(&lowest);
    for (int y = 0; y < rows; ++y)
        for (int x = 0; x < cols; ++x) {
            const std::ptrdiff_t place = at.first + y * at.row + at.column[x];
            Element* out = tile.out + place;
            Reg value = Vec::load(values[y * M + x]);
            if (left >= kLanes) {
                if (tile.residual) value = Vec::add(value, Vec::load(tile.residual + place));
                Vec::store(out, Vec::at_least(floor, value));
                continue;
            }
            Element line[kLanes] = {};
            if (tile.residual) {
                for (int i = 0; i < left; ++i) line[i] = tile.residual[place + i];
                value = Vec::add(value, Vec::load(line));
            }
            Vec::store(line, Vec::at_least(floor, value));
            for (int i = 0; i < left; ++i) out[i] = line[i];
            if (pass.whole_blocks) out[left] = Element{};
        }
}

// relu(value + residual) for all pixels of a tile. All of the residual is read before anything is written: rows of a map are
// often a multiple of 4 KiB apart, and a load that follows a store to the same place of a page waits for it.
template <int M>
inline __attribute__((always_inline)) void finish_tile(const Pass& pass, const Tile& tile, Reg (&value)[M * M],
                                                       const Places& at) {
    const float lowest = pass.relu ? 0.0f : -__builtin_inff();
    const Reg floor = Vec::broadcast(&lowest);
    std::ptrdiff_t column[M];
#pragma GCC unroll 4
    for (int x = 0; x < M; ++x) column[x] = at.column[x];
    if (tile.residual) {
        const Element* residual = tile.residual + at.first;
#pragma GCC unroll 4
        for (int y = 0; y < M; ++y, residual = opaque(residual + at.row))
#pragma GCC unroll 4
            for (int x = 0; x < M; ++x) value[y * M + x] = Vec::add(value[y * M + x], Vec::load(residual + column[x]));
    }
    Element* out = tile.out + at.first;
#pragma GCC unroll 4
    for (int y = 0; y < M; ++y, out = opaque(out + at.row))
#pragma GCC unroll 4
        for (int x = 0; x < M; ++x) Vec::store(out + column[x], Vec::at_least(floor, value[y * M + x]));
}

// The outputs of one tile, a vector of channels at a time.
template <int M>
void output_tile(const Pass& pass, const Tile& tile, int group, const float* products) {
    constexpr int side = Transform<Vec, M>::side;
    const int first = group * kGroup;
    const int count = tile.active_out - first < kGroup ? tile.active_out - first : kGroup;
    const int rows = pass.height - tile.row < M ? pass.height - tile.row : M;
    const int cols = pass.width - tile.col < M ? pass.width - tile.col : M;
    for (int c = 0; c < count; c += kLanes) {
        const float* m = products + c;
        Reg half[M * side];  // A^T M
#pragma GCC unroll 6
        for (int x = 0; x < side; ++x) {
            Reg column[side];
#pragma GCC unroll 6
            for (int y = 0; y < side; ++y) column[y] = Vec::load(m + (y * side + x) * kGroup);
            Transform<Vec, M>::output(column, 1, half + x, side);
        }
        const Reg mul = Vec::load(tile.mul + first + c), add = Vec::load(tile.add + first + c);
        Reg value[M * M];
#pragma GCC unroll 4
        for (int y = 0; y < M; ++y) {
            Transform<Vec, M>::output(half + y * side, 1, value + y * M, 1);
#pragma GCC unroll 4
            for (int x = 0; x < M; ++x) value[y * M + x] = Vec::fma(value[y * M + x], mul, add);
        }
        const int channel = first + c, left = count - c;
        const Places at{(channel / kMapBlock) * pass.out_block + channel % kMapBlock + tile.row * pass.out_row, pass.out_row,
                        pass.out_col + tile.col};
        // In scratch a vector may be written beyond the active channels, but an odd number of them ends in a zero, for
        // the pairs of a direct convolution.
        const bool whole = left >= kLanes || (pass.whole_blocks && left % den::kWord<Element> == 0);
        if (whole && rows == M && cols == M) {
            finish_tile<M>(pass, tile, value, at);
        } else {
            alignas(64) float values[M * M][kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < M * M; ++i) Vec::store(values[i], value[i]);
            finish_part<M>(pass, tile, values, at, whole ? kLanes : left, rows, cols);
        }
    }
}

}  // namespace
