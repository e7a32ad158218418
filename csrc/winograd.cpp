#include "winograd.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "geometry.h"

namespace den {

namespace {

// G of F(m x m, 3x3): the weights' transform is U = G g G^T.
constexpr double kG2[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
constexpr double kG4[6][3] = {{1. / 4, 0, 0},           {-1. / 6, -1. / 6, -1. / 6}, {-1. / 6, 1. / 6, -1. / 6},
                              {1. / 24, 1. / 12, 1. / 6}, {1. / 24, -1. / 12, 1. / 6}, {0, 0, 1}};

}  // namespace

std::size_t winograd_v_floats(int tile, int channels, int tiles) {
    return winograd_points(tile) * std::size_t(winograd_pitch(std::ptrdiff_t(round_up(channels, kBlock)) * tiles));
}

std::size_t winograd_product_floats(int tile, int tiles) {
    return winograd_points(tile) * std::size_t(winograd_pitch(std::ptrdiff_t(kWinogradGroup) * tiles));
}

std::size_t winograd_packed_floats(int tile, int out_channels, int in_channels) {
    if (tile != 2 && tile != 4)
        throw std::invalid_argument("winograd is " + std::to_string(tile) + "; it must be 2 or 4 outputs a side");
    return std::size_t(winograd_points(tile)) * round_up(out_channels, kWinogradGroup) * in_channels;
}

void winograd_pack(int tile, const float* weight, int out_channels, int in_channels, int threads, float* packed) {
    const int side = tile + 2, points = side * side;
    const double(*g)[3] = tile == 4 ? kG4 : kG2;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int out = 0; out < round_up(out_channels, kWinogradGroup); ++out) {
        float* to = packed + std::ptrdiff_t(out / kWinogradGroup) * points * in_channels * kWinogradGroup +
                    out % kWinogradGroup;
        for (int in = 0; in < in_channels; ++in, to += kWinogradGroup) {
            double rows[6][3] = {};  // G g
            if (out < out_channels) {
                const float* w = weight + (std::ptrdiff_t(out) * in_channels + in) * 9;
                for (int p = 0; p < side; ++p)
                    for (int x = 0; x < 3; ++x) rows[p][x] = g[p][0] * w[x] + g[p][1] * w[3 + x] + g[p][2] * w[6 + x];
            }
            for (int p = 0; p < points; ++p) {
                const double* row = rows[p / side];
                const double* column = g[p % side];
                to[std::ptrdiff_t(p) * in_channels * kWinogradGroup] =
                    float(row[0] * column[0] + row[1] * column[1] + row[2] * column[2]);
            }
        }
    }
}

}  // namespace den
