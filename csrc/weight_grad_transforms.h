// The transforms of Winograd's weight gradient, F(3x3, 4x4) with the points 0, 1, -1, 2, -2 and infinity: 16 channels at
// a time, along columns and then along rows.
#pragma once

#include "kernels.h"
#include "vec.h"
#include "weight_grad_pass.h"

namespace {

template <class V>
[[gnu::always_inline]] inline typename V::Reg times(float factor, typename V::Reg a, typename V::Reg b) {
    return V::fma(V::broadcast(&factor), a, b);  // factor * a + b
}

// B^T d
struct InputPoints {
    static constexpr int from = 6;

    template <class V>
    [[gnu::always_inline]] static void run(const typename V::Reg* d, typename V::Reg* t) {
        using Reg = typename V::Reg;
        t[0] = times<V>(4, d[0], times<V>(-5, d[2], d[4]));
        const Reg even = times<V>(-4, d[2], d[4]), odd = times<V>(-4, d[1], d[3]);
        t[1] = V::add(even, odd), t[2] = V::sub(even, odd);
        const Reg difference = V::sub(d[4], d[2]), twice = V::sub(d[3], d[1]);
        t[3] = times<V>(2, twice, difference), t[4] = times<V>(-2, twice, difference);
        t[5] = times<V>(4, d[1], times<V>(-5, d[3], d[5]));
    }
};

// A y
struct GradPoints {
    static constexpr int from = 4;

    template <class V>
    [[gnu::always_inline]] static void run(const typename V::Reg* y, typename V::Reg* t) {
        using Reg = typename V::Reg;
        t[0] = y[0];
        const Reg even = V::add(y[0], y[2]), odd = V::add(y[1], y[3]);
        t[1] = V::add(even, odd), t[2] = V::sub(even, odd);
        const Reg even2 = times<V>(4, y[2], y[0]), half = times<V>(4, y[3], y[1]);
        t[3] = times<V>(2, half, even2), t[4] = times<V>(-2, half, even2);
        t[5] = y[3];
    }
};

// G^T u
template <class V>
[[gnu::always_inline]] inline void weight_points(const typename V::Reg* u, typename V::Reg* g) {
    using Reg = typename V::Reg;
    const Reg zero = V::zero();
    const Reg sum1 = V::add(u[1], u[2]), sum2 = V::add(u[3], u[4]);
    const Reg sixth = times<V>(-1.0f / 6, sum1, zero);
    g[0] = times<V>(0.25f, u[0], times<V>(1.0f / 24, sum2, sixth));
    g[1] = times<V>(1.0f / 6, V::sub(u[2], u[1]), times<V>(1.0f / 12, V::sub(u[3], u[4]), zero));
    g[2] = V::add(u[5], times<V>(1.0f / 6, sum2, sixth));
}

template <class V, class Points>
void transform_tiles(const den::TileTransform& pass) {
    using Reg = typename V::Reg;
    constexpr int kBlock = den::kBlock, From = Points::from;
    for (int block = 0; block < pass.blocks; ++block)
        for (int ty = 0; ty < pass.tiles_y; ++ty)
            for (int tx = 0; tx < pass.tiles_x; ++tx)
                for (int lane = 0; lane < kBlock; lane += V::lanes) {
                    const float* in = pass.in + block * pass.in_block + 4 * ty * pass.in_row + 4 * tx * kBlock + lane;
                    float* out = pass.out + block * pass.out_block + (ty * pass.tiles_x + tx) * kBlock + lane;
                    if (lane == 0)  // 36 streams of stores: more than the hardware prefetches
#pragma GCC unroll 1
                        for (int p = 0; p < 36; ++p) __builtin_prefetch(out + p * pass.out_place + 2 * kBlock, 1);
                    alignas(64) Reg half[6][From];
#pragma GCC unroll 6
                    for (int x = 0; x < From; ++x) {
                        Reg column[From], t[6];
#pragma GCC unroll 6
                        for (int y = 0; y < From; ++y) column[y] = V::load(in + y * pass.in_row + x * kBlock);
                        Points::template run<V>(column, t);
#pragma GCC unroll 6
                        for (int y = 0; y < 6; ++y) half[y][x] = t[y];
                    }
#pragma GCC unroll 1
                    for (int y = 0; y < 6; ++y) {
                        Reg t[6];
                        Points::template run<V>(half[y], t);
#pragma GCC unroll 6
                        for (int x = 0; x < 6; ++x) V::store(out + (6 * y + x) * pass.out_place, t[x]);
                    }
                }
}

// In place, [36 places][16 inputs][16 outputs] -> [9 taps][16 inputs][16 outputs].
template <class V>
void transform_weight(float* block) {
    using Reg = typename V::Reg;
    constexpr int kSquare = den::kBlock * den::kBlock;
    for (int at = 0; at < kSquare; at += V::lanes) {
        Reg half[3][6];
        for (int x = 0; x < 6; ++x) {
            Reg column[6], g[3];
            for (int y = 0; y < 6; ++y) column[y] = V::load(block + (6 * y + x) * kSquare + at);
            weight_points<V>(column, g);
            for (int y = 0; y < 3; ++y) half[y][x] = g[y];
        }
        for (int y = 0; y < 3; ++y) {
            Reg g[3];
            weight_points<V>(half[y], g);
            for (int x = 0; x < 3; ++x) V::store(block + (3 * y + x) * kSquare + at, g[x]);
        }
    }
}

}  // namespace
