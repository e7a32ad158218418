// The input's transform, and the names that the Winograd kernels share.
#pragma once

#include "kernels.h"
#include "vec.h"
#include "winograd.h"
#include "winograd_transforms.h"

namespace {

using Element = DEN_ELEMENT;
using Pass = den::WinogradPass<Element>;
using Tile = den::WinogradTile<Element>;
using Reg = Vec::Reg;
constexpr int kLanes = Vec::lanes;
constexpr int kBlock = den::kBlock;                  // words in a block of V
constexpr int kMapBlock = den::kMapBlock<Element>;  // channels in a block of a map

// What V and U hold for tiles of M outputs a side.
template <int M>
struct Points {
    using Type = float;
};
template <>
struct Points<2> {
    using Type = Element;
};

// V of one tile from a vector of channels of its square, read(y, x); `to`: where its first point lies. Lines of the next tile
// are asked for: V is too large for the first cache, and its stores would wait.
template <int M, class P, class Read>
inline __attribute__((always_inline)) void transform_square(const Pass& pass, P* to, Read read) {
    constexpr int side = Transform<Vec, M>::side, word = den::kWord<P>;
    const std::ptrdiff_t point = pass.v_point * word;
    Reg rows[side * side];  // B^T d
#pragma GCC unroll 6
    for (int x = 0; x < side; ++x) {
        Reg column[side];
#pragma GCC unroll 6
        for (int y = 0; y < side; ++y) column[y] = read(y, x);
        Transform<Vec, M>::input(column, 1, rows + x, side);
    }
#pragma GCC unroll 6
    for (int y = 0; y < side; ++y) {
        Reg points[side];
        Transform<Vec, M>::input(rows + y * side, 1, points, 1);
#pragma GCC unroll 6
        for (int x = 0; x < side; ++x) {
            // Three points by one pointer: 36 addresses, each worked out, would be a third of the instructions.
            const int p = y * side + x;
            if (p > 0 && p % 3 == 0) to = opaque(to + 3 * point);
            P* place = to + p % 3 * point;
            __builtin_prefetch(place + kBlock * word, 1);
            Vec::store(place, points[x]);
        }
    }
}

// Where an input channel lies, from the start of a pixel.
inline std::ptrdiff_t channel_at(const Pass& pass, int c) { return (c / kMapBlock) * pass.in_block + c % kMapBlock; }

// Tiles side by side, whose squares are copied together where they are copied.
constexpr int kRowTiles = 4;

// Copies `columns` columns of Side rows of the input, from (row, col) on, the vector of channels at c: `activated` of what
// lies inside, zeros for the rest. Of each pixel what lies `ahead` is asked for: this is the first to read it for long.
template <int Side, class Activated>
inline __attribute__((always_inline)) void copy_squares(const Pass& pass, const Element* in, int row, int col, int columns,
                                                        int c, std::ptrdiff_t ahead, float* squares, Activated activated) {
    std::ptrdiff_t pixel = row * pass.in_row + col * pass.in_pixel + channel_at(pass, c);
    for (int x = col; x < col + columns; ++x, pixel += pass.in_pixel, squares += kLanes) {
        const bool column_inside = x >= 0 && x < pass.in_width;
#pragma GCC unroll 6
        for (int y = 0; y < Side; ++y) {
            const bool inside = column_inside && row + y >= 0 && row + y < pass.in_height;
            __builtin_prefetch(in + (pixel + y * pass.in_row + ahead), 0, 2);
            const Reg value = inside ? activated(Vec::load(in + (pixel + y * pass.in_row))) : Vec::zero();
            Vec::store(squares + y * columns * kLanes, value);
        }
    }
}

template <int Side>
void copy_squares(const Pass& pass, const Element* in, int row, int col, int columns, int c, std::ptrdiff_t ahead,
                  float* squares) {
    if (pass.in_mul) {
        const Reg mul = Vec::load(pass.in_mul + c), add = Vec::load(pass.in_add + c);
        copy_squares<Side>(pass, in, row, col, columns, c, ahead, squares, [=](Reg x) __attribute__((always_inline)) {
            return Vec::at_least(Vec::zero(), Vec::fma(x, mul, add));
        });
    } else {
        copy_squares<Side>(pass, in, row, col, columns, c, ahead, squares,
                           [](Reg x) __attribute__((always_inline)) { return x; });
    }
}

// Whether a tile's square is read as it lies: all inside the input, and no norm in front.
inline bool reads_as_it_lies(const Pass& pass, const Tile& tile) {
    if (pass.in_mul) return false;
    const int row = tile.row - pass.pad_y, col = tile.col - pass.pad_x, side = pass.tile + 2;
    return row >= 0 && col >= 0 && row + side <= pass.in_height && col + side <= pass.in_width;
}

// V of `count` tiles side by side.
template <int M>
void input_row(const Pass& pass, const Tile& tile, int count, bool as_it_lies, float* words) {
    using P = typename Points<M>::Type;
    constexpr int side = M + 2, word = den::kWord<P>, block = kBlock * word;
    const int row = tile.row - pass.pad_y, col = tile.col - pass.pad_x, columns = M * count + 2;
    alignas(64) float squares[side * (M * kRowTiles + 2) * kLanes];
    P* v = reinterpret_cast<P*>(words);
    for (int c = 0; c < tile.active_in; c += kLanes) {
        P* to = v + (c / block) * pass.v_block * word + c % block;
        if (as_it_lies) {
            const Element* d = tile.in + row * pass.in_row + col * pass.in_pixel + channel_at(pass, c);
            for (int t = 0; t < count; ++t, to += block, d += M * pass.in_pixel)
                transform_square<M>(pass, to, [&](int y, int x) __attribute__((always_inline)) {
                    return Vec::load(d + y * pass.in_row + x * pass.in_pixel);
                });
        } else {
            // The next channels, or the first of the tiles to the right.
            const std::ptrdiff_t next = c + kLanes < tile.active_in ? channel_at(pass, c + kLanes) : M * count * pass.in_pixel;
            copy_squares<side>(pass, tile.in, row, col, columns, c, next - channel_at(pass, c), squares);
            const float* d = squares;
            for (int t = 0; t < count; ++t, to += block, d += M * kLanes)
                transform_square<M>(pass, to, [&](int y, int x) __attribute__((always_inline)) {
                    return Vec::load(d + (y * columns + x) * kLanes);
                });
        }
    }
    // The other halves of the last pairs.
    if (const int c = tile.active_in; c % word)
        for (int t = 0; t < count; ++t)
            for (int p = 0; p < side * side; ++p)
                v[(c / block) * pass.v_block * word + t * block + c % block + p * pass.v_point * word] = P{};
}

void input(const Pass& pass, const Tile* tiles, int tile0, int tile1) {
    for (int t = tile0; t < tile1;) {
        const Tile& first = tiles[t];
        const bool as_it_lies = reads_as_it_lies(pass, first);
        int end = t + 1;
        while (end < tile1 && end < t + kRowTiles && tiles[end].in == first.in && tiles[end].row == first.row &&
               reads_as_it_lies(pass, tiles[end]) == as_it_lies)
            ++end;
        if (pass.tile == 4)
            input_row<4>(pass, first, end - t, as_it_lies, pass.v + t * kBlock);
        else
            input_row<2>(pass, first, end - t, as_it_lies, pass.v + t * kBlock);
        t = end;
    }
}

}  // namespace
