// The micro-kernel: a register tile of R x Q output pixels by NV vectors of output channels.
//
// For each word of input channels of each tap: NV loads of weights, R*Q broadcasts of x, R*Q*NV multiply-adds. Each
// output is summed in one fixed order (block of input channels, tap, channel) by one accumulator, whatever the shape of
// the tile that it falls into: splitting the work differently over threads changes no bit.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

// The place of one tile in its pass.
template <class T>
struct TileAt {
    const T* in;      // first pixel, channel block 0, tap offset 0
    const T* weight;  // first vector of the tile
    int first_in;     // first input channel of the group
    int first_out;    // first output channel of the tile
    int lanes_out;    // output channels to write: fewer than the tile has at a ragged end
    int row, col;
    den::TapRange taps;  // of its rows
};

template <class T>
using TileFn = void (*)(const den::BasicConvPass<T>&, const TileAt<T>&);

// Where an output channel lies, from the start of a pixel.
template <class T>
inline std::ptrdiff_t channel_at(const den::BasicConvPass<T>& pass, int channel) {
    const unsigned c = channel, block = den::kMapBlock<T>;
    return (std::ptrdiff_t)(c / block) * pass.out_block + c % block;
}

// From one block of 16 packed outputs to the next.
template <class T>
inline std::ptrdiff_t weight_block_of(const den::BasicConvPass<T>& pass) {
    constexpr int word = den::kWord<T>;
    return (std::ptrdiff_t)pass.taps * ((pass.group_in + word - 1) / word) * den::kMapBlock<T>;
}

// From a tile's first vector of output channels to each.
template <int NV>
struct Offsets {
    std::ptrdiff_t of[NV];
};

template <class T, class V, int NV>
inline __attribute__((always_inline)) Offsets<NV> offsets(const den::BasicConvPass<T>& pass, const TileAt<T>& at) {
    Offsets<NV> offset;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
        offset.of[v] = channel_at(pass, at.first_out + v * V::lanes) - channel_at(pass, at.first_out);
    return offset;
}

// Output channels that a tile of `lanes` writes when `left` are active. In scratch it may write beyond them, but an odd
// number ends in a zero, for the pairs of the next convolution.
template <class T>
inline int lanes_written(const den::BasicConvPass<T>& pass, int lanes, int left) {
    if (left >= lanes) return lanes;
    return pass.whole_blocks && left % den::kWord<T> == 0 ? lanes : left;
}

// Asks for the lines that the epilogue will read and write: they left the cache long ago, or were never in it, and the
// sums take long enough to fetch them.
template <class T, class V, int NV, int R, int Q>
inline __attribute__((always_inline)) void prefetch(const den::BasicConvPass<T>& pass, const TileAt<T>& at) {
    constexpr int step = den::kMapBlock<T> / V::lanes > 0 ? den::kMapBlock<T> / V::lanes : 1;  // vectors in a line
    const T* row = (pass.residual ? pass.residual : pass.out) + channel_at(pass, at.first_out) + at.row * pass.out_row;
    const std::ptrdiff_t out_row = pass.out_row, *column = pass.out_col + at.col;
    const Offsets<NV> offset = offsets<T, V, NV>(pass, at);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r, row += out_row)
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q) {
            const T* pixel = row + column[q];
#pragma GCC unroll 4
            for (int v = 0; v < NV; v += step) __builtin_prefetch(pixel + offset.of[v], 1);
        }
}

// Whether a vector of output channels lies in one piece: it may straddle two blocks of a blocked map.
template <class T, class V>
inline bool in_one_piece(const den::BasicConvPass<T>& pass, const TileAt<T>& at) {
    return pass.out_block == den::kMapBlock<T> || at.first_out % V::lanes == 0;
}

template <class V, class T>
inline typename V::Reg floor_of(const den::BasicConvPass<T>& pass) {
    const float lowest = pass.relu ? 0.0f : -__builtin_inff();
    return V::broadcast(&lowest);
}

// The epilogue of a tile, relu(sum * mul + add + residual), where every vector is written whole: from the registers.
template <class T, class V, int NV, int R, int Q>
inline __attribute__((always_inline)) void finish_whole(const den::BasicConvPass<T>& pass, const TileAt<T>& at,
                                                        const typename V::Reg (&sum)[R * Q][NV]) {
    using Reg = typename V::Reg;
    const Reg floor = floor_of<V>(pass);
    const float *mul = pass.mul + at.first_out, *add = pass.add + at.first_out;
    const std::ptrdiff_t out_row = pass.out_row, *column = pass.out_col + at.col;
    const std::ptrdiff_t first = channel_at(pass, at.first_out) + at.row * out_row;
    const Offsets<NV> offset = offsets<T, V, NV>(pass, at);
    T* out = pass.out + first;
    const auto every_pixel = [&](auto value_of) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
            for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) {
                    const std::ptrdiff_t place = r * out_row + column[q] + offset.of[v];
                    const Reg value = V::fma(sum[r * Q + q][v], V::load(mul + v * V::lanes), V::load(add + v * V::lanes));
                    V::store(out + place, V::at_least(floor, value_of(value, place)));
                }
    };
    if (pass.residual) {
        const T* residual = pass.residual + first;
        every_pixel([&](Reg value, std::ptrdiff_t place) { return V::add(value, V::load(residual + place)); });
    } else {
        every_pixel([](Reg value, std::ptrdiff_t) { return value; });
    }
}

// The same where channels are ragged or in two pieces: from memory, in loops.
template <class T, class V, int NV>
void finish_ragged(const den::BasicConvPass<T>& pass, const TileAt<T>& at, int rows, int cols, const float* sums) {
    constexpr int lanes = V::lanes, block = den::kMapBlock<T>;
    const typename V::Reg floor = floor_of<V>(pass);
    for (int r = 0; r < rows; ++r)
        for (int q = 0; q < cols; ++q, sums += NV * lanes) {
            const std::ptrdiff_t pixel = (at.row + r) * pass.out_row + pass.out_col[at.col + q];
            for (int v = 0; v * lanes < at.lanes_out; ++v) {
                const int c = at.first_out + v * lanes, left = at.lanes_out - v * lanes;
                const int count = left < lanes ? left : lanes;
                // Channels from `turn` on lie in the next block, `gap` further than they would in this one.
                const int room = in_one_piece<T, V>(pass, at) ? count : block - c % block;
                const int turn = room < count ? room : count;
                const std::ptrdiff_t place = pixel + channel_at(pass, c), gap = place + pass.out_block - block;
                T line[lanes] = {};
                typename V::Reg value = V::fma(V::load(sums + v * lanes), V::load(pass.mul + c), V::load(pass.add + c));
                if (pass.residual) {
                    for (int i = 0; i < turn; ++i) line[i] = pass.residual[place + i];
                    for (int i = turn; i < count; ++i) line[i] = pass.residual[gap + i];
                    value = V::add(value, V::load(line));
                }
                V::store(line, V::at_least(floor, value));
                for (int i = 0; i < turn; ++i) pass.out[place + i] = line[i];
                for (int i = turn; i < count; ++i) pass.out[gap + i] = line[i];
                // The next convolution reads whole pairs.
                if (den::kWord<T> == 2 && pass.whole_blocks && count % 2) pass.out[pixel + channel_at(pass, c + count)] = T{};
            }
        }
}

// Copies one row of weights, NV vectors of pairs, with zeros for the second of each pair.
template <class V, int NV, class T>
void first_of_pairs(const T* weight, std::ptrdiff_t weight_block, T* half) {
    constexpr int per_block = den::kBlock / V::lanes, pairs = V::lanes;
    for (int v = 0; v < NV; ++v)
        for (int i = 0; i < pairs; ++i) {
            half[(v * pairs + i) * 2] = weight[(v / per_block) * weight_block + ((v % per_block) * pairs + i) * 2];
            half[(v * pairs + i) * 2 + 1] = T{};
        }
}

// Pixel: elements from one pixel of x to the next, or 0: what the pass says. Known when compiled, it takes no registers;
// else it takes so many that the loop over taps keeps its own in memory.
template <class T, class V, int NV, int R, int Q, int Pixel>
void tile(const den::BasicConvPass<T>& pass, const TileAt<T>& at) {
    using P = Product<V, T>;
    constexpr int word = den::kWord<T>, block = den::kMapBlock<T>;  // a row of 16 weight words is as long as a block
    constexpr int per_block = den::kBlock / V::lanes;
    const std::ptrdiff_t weight_block = weight_block_of(pass);
    const std::ptrdiff_t in_row = pass.in_row, in_pixel = Pixel ? Pixel : pass.in_pixel;

    prefetch<T, V, NV, R, Q>(pass, at);
    typename V::Reg acc[R * Q][NV];
#pragma GCC unroll 32
    for (int p = 0; p < R * Q; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[p][v] = V::zero();

    // The pixels [Q0, Q1) of each row with `count` words of x, and the weights at w.
    const auto multiply = [&](auto from, auto to, const T* x, const T* w, int count, std::ptrdiff_t next_vectors)
                              __attribute__((always_inline)) {
        constexpr int q0 = decltype(from)::value, q1 = decltype(to)::value;
        // A pointer each: with a distance in a second register, a multiply-add that reads memory splits in two.
        const T* row[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) row[r] = x + r * in_row;
        for (int c = 0; c < count; ++c, w += block) {
#pragma GCC unroll 2
            for (int step = 0; step < P::steps; ++step) {
                // Words are loaded anew in each step: kept from the first, they would take all registers.
                if constexpr (P::steps > 1) __asm__("" : "+r"(w));
                typename P::Reg k[NV];
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v)
                    k[v] = P::weights(w + (v / per_block) * next_vectors + (v % per_block) * V::lanes * word, step);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    __asm__("" : "+r"(row[r]));
#pragma GCC unroll 32
                    for (int q = q0; q < q1; ++q)
                        add_products<V>(row[r] + q * in_pixel, k, step, r * Q + q, acc[r * Q + q]);
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) row[r] += word;
        }
    };

    const bool first_column = at.col == 0 && pass.tap_edges, last_column = at.col + Q == pass.width && pass.tap_edges;
    const T* weight = at.weight;
    // An image that is read as it lies, once, is in no cache yet: the lines of the next tile are asked for.
    const bool first_reading = pass.in_block == block && pass.taps == 1 && at.first_out == 0;
    const auto next_tile = [&](const T* x) __attribute__((always_inline)) {
        for (int r = 0; r < R; ++r)
            for (int q = 0; q < Q; ++q) __builtin_prefetch(x + r * in_row + (Q + q) * in_pixel, 0, 2);
    };
    int done = 0;
    // Whole blocks of a 1x1 without padding: sixteen words are so few that what the loop below asks of each block shows.
    if (pass.taps == 1 && at.taps.end == 1 && !(pass.tap_edges && pass.tap_edges[0]) && at.first_in % block == 0) {
        const T* x = at.in + at.first_in / block * pass.in_block + pass.tap[0];
        for (; done + block <= pass.active_in; done += block, x += pass.in_block, weight += block * (block / word)) {
            if (first_reading) next_tile(x);
            multiply(Int<0>{}, Int<Q>{}, x, weight, block / word, weight_block);
        }
    }
    while (done < pass.active_in) {
        // A run of input channels inside one block; a group may begin in the middle of a block.
        const int c0 = at.first_in + done;
        const int room = block - c0 % block;
        const int packed = room < pass.group_in - done ? room : pass.group_in - done;
        const int run = packed < pass.active_in - done ? packed : pass.active_in - done;
        // An odd width ends inside a pair of packed weights, of which the second must not be read.
        const int halves = run < packed ? run % word : 0;
        const int words = halves ? run / word : (run + word - 1) / word;
        const T* in = at.in + (c0 / block) * pass.in_block + c0 % block;
        const std::ptrdiff_t tap_weights = (std::ptrdiff_t)((packed + word - 1) / word) * block;
        for (int t = at.taps.begin; t < at.taps.end; ++t) {
            const T* x = in + pass.tap[t];
            const T* w = weight + t * tap_weights;
            if (first_reading) next_tile(x);
            std::ptrdiff_t next_vectors = weight_block;
            int count = words;
            alignas(64) T half[word == 1 ? 1 : NV * V::lanes * word];
            for (int part = 0; part <= halves; ++part) {
                if constexpr (word > 1) if (part == 1) {
                    first_of_pairs<V, NV>(w, weight_block, half);
                    w = half, next_vectors = block, count = 1;
                }
                // A pixel whose tap lies in the padding is left out.
                if (Q > 1 && first_column && pass.tap_edges[t] < 0)
                    multiply(Int<Q == 1 ? 0 : 1>{}, Int<Q>{}, x, w, count, next_vectors);
                else if (Q > 1 && last_column && pass.tap_edges[t] > 0)
                    multiply(Int<0>{}, Int<Q == 1 ? 1 : Q - 1>{}, x, w, count, next_vectors);
                else
                    multiply(Int<0>{}, Int<Q>{}, x, w, count, next_vectors);
                x += count * word, w += count * block;
            }
        }
        weight += pass.taps * tap_weights;
        done += packed;
    }

    if (at.lanes_out == NV * V::lanes && in_one_piece<T, V>(pass, at)) {
        // Its addresses are worked out again: kept from the prefetch, they would take the registers of the loops.
        finish_whole<T, V, NV, R, Q>(*opaque(&pass), *opaque(&at), acc);
        return;
    }
    alignas(64) float sums[R * Q][NV * V::lanes];
#pragma GCC unroll 32
    for (int p = 0; p < R * Q; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) V::store(sums[p] + v * V::lanes, acc[p][v]);
    finish_ragged<T, V, NV>(pass, at, R, Q, sums[0]);
}

}  // namespace
