// The micro-kernel: a register tile of R x Q output pixels by NV vectors of output channels.
//
// For each input channel of each tap: NV loads of weights, R*Q broadcasts of x, R*Q*NV multiply-adds. Each output is
// summed in one fixed order (block of input channels, tap, channel) by one accumulator, whatever the shape of the tile
// that it falls into: splitting the work differently over threads changes no bit.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

// The place of one tile in its pass.
struct TileAt {
    const float* in;      // first pixel, channel block 0, tap offset 0
    const float* weight;  // first vector of the tile
    int first_in;         // first input channel of the group
    int first_out;        // first output channel of the tile
    int lanes_out;        // output channels to write: fewer than the tile has at a ragged end
    int row, col;
};

using TileFn = void (*)(const den::ConvPass&, const TileAt&);

// Where the output channels of a tile begin, from the start of a pixel.
inline std::ptrdiff_t out_block(const den::ConvPass& pass, const TileAt& at) {
    return (at.first_out / den::kBlock) * pass.out_block + at.first_out % den::kBlock;
}

// Asks for the lines that the epilogue will read and write: they left the cache long ago, or were never in it, and the
// sums take long enough to fetch them.
template <class V, int NV>
void prefetch(const den::ConvPass& pass, const TileAt& at, int rows, int cols) {
    constexpr int per_block = den::kBlock / V::lanes;
    const float* from = (pass.residual ? pass.residual : pass.out) + out_block(pass, at);
    for (int r = 0; r < rows; ++r)
        for (int q = 0; q < cols; ++q) {
            const float* pixel = from + (at.row + r) * pass.out_row + pass.out_col[at.col + q];
            for (int v = 0; v < NV; v += per_block) __builtin_prefetch(pixel + (v / per_block) * pass.out_block, 1);
        }
}

// The epilogue of a tile: relu(sum * mul + add + residual).
template <class V, int NV>
void finish(const den::ConvPass& pass, const TileAt& at, int rows, int cols, float* sums) {
    using Reg = typename V::Reg;
    constexpr int kBlock = den::kBlock;
    constexpr int per_block = kBlock / V::lanes;
    Reg mul[NV], add[NV];
    for (int v = 0; v < NV; ++v) {
        mul[v] = V::load(pass.mul + at.first_out + v * V::lanes);
        add[v] = V::load(pass.add + at.first_out + v * V::lanes);
    }
    const float lowest = pass.relu ? 0.0f : -__builtin_inff();
    const Reg floor = V::broadcast(&lowest);
    // Whole vectors go straight out unless the channels are ragged or straddle two blocks of a blocked map.
    const bool straight = at.lanes_out == NV * V::lanes &&
                          (pass.out_block == kBlock || at.first_out % V::lanes == 0);
    const std::ptrdiff_t block = out_block(pass, at);
    for (int r = 0; r < rows; ++r)
        for (int q = 0; q < cols; ++q, sums += NV * V::lanes) {
            const std::ptrdiff_t pixel = (at.row + r) * pass.out_row + pass.out_col[at.col + q];
            if (straight) {
                const float* residual = pass.residual ? pass.residual + pixel + block : nullptr;
                float* out = pass.out + pixel + block;
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) {
                    const std::ptrdiff_t place = (v / per_block) * pass.out_block + (v % per_block) * V::lanes;
                    Reg value = V::fma(V::load(sums + v * V::lanes), mul[v], add[v]);
                    if (residual) value = V::add(value, V::load(residual + place));
                    V::store(out + place, V::at_least(floor, value));
                }
                continue;
            }
            for (int v = 0; v < NV; ++v)
                V::store(sums + v * V::lanes, V::fma(V::load(sums + v * V::lanes), mul[v], add[v]));
            for (int i = 0; i < at.lanes_out; ++i) {
                const int c = at.first_out + i;
                const std::ptrdiff_t place = pixel + (c / kBlock) * pass.out_block + c % kBlock;
                float value = sums[i];
                if (pass.residual) value += pass.residual[place];
                pass.out[place] = value < lowest ? lowest : value;
            }
        }
}

template <class V, int NV, int R, int Q>
void tile(const den::ConvPass& pass, const TileAt& at) {
    using Reg = typename V::Reg;
    constexpr int kBlock = den::kBlock;
    constexpr int per_block = kBlock / V::lanes;
    const std::ptrdiff_t weight_block = (std::ptrdiff_t)pass.taps * pass.group_in * kBlock;
    const std::ptrdiff_t in_row = pass.in_row;

    prefetch<V, NV>(pass, at, R, Q);
    Reg acc[R * Q][NV];
#pragma GCC unroll 32
    for (int p = 0; p < R * Q; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[p][v] = V::zero();

    const float* weight = at.weight;
    for (int done = 0; done < pass.active_in;) {
        // A run of input channels inside one block; a group may begin in the middle of a block.
        const int c0 = at.first_in + done;
        const int room = kBlock - c0 % kBlock;
        const int packed = room < pass.group_in - done ? room : pass.group_in - done;
        const int run = packed < pass.active_in - done ? packed : pass.active_in - done;
        const float* in = at.in + (c0 / kBlock) * pass.in_block + c0 % kBlock;
        for (int t = 0; t < pass.taps; ++t) {
            const float* x = in + pass.tap[t];
            const float* w = weight;
            for (int c = 0; c < run; ++c, ++x, w += kBlock) {
                Reg k[NV];
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v)
                    k[v] = V::load(w + (v / per_block) * weight_block + (v % per_block) * V::lanes);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
                    for (int q = 0; q < Q; ++q) {
                        const Reg b = V::broadcast(x + r * in_row + q * kBlock);
#pragma GCC unroll 4
                        for (int v = 0; v < NV; ++v) acc[r * Q + q][v] = V::fma(b, k[v], acc[r * Q + q][v]);
                    }
            }
            weight += (std::ptrdiff_t)packed * kBlock;
        }
        done += packed;
    }

    // The epilogue runs from memory, in a loop over pixels: a small part of the work, and unrolled it would be most of
    // the code.
    alignas(64) float sums[R * Q][NV * V::lanes];
#pragma GCC unroll 32
    for (int p = 0; p < R * Q; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) V::store(sums[p] + v * V::lanes, acc[p][v]);
    finish<V, NV>(pass, at, R, Q, sums[0]);
}

}  // namespace
