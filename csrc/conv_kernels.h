// The convolution of a pass in register tiles: their shapes, the tiles of rows, the output vectors.
#pragma once

#include "conv_tile.h"

namespace {

using Element = DEN_ELEMENT;
using TileAtElement = TileAt<Element>;
using Tile = TileFn<Element>;
using ConvPass = den::BasicConvPass<Element>;

// Register tiles by output vectors (NV). Enough independent accumulators to hide the latency of a multiply-add, as
// many pixels as the registers hold: each load of weights is used once a pixel.
#if defined(DEN_512)
template <int NV> struct Shape;
template <> struct Shape<1> { static constexpr int rows = 2, cols = 8; };
template <> struct Shape<2> { static constexpr int rows = 1, cols = 12; };
template <> struct Shape<3> { static constexpr int rows = 1, cols = 8; };
template <> struct Shape<4> { static constexpr int rows = 1, cols = 6; };
// Rows that give short tiles would read the weights of four vectors too often.
inline int most_vectors(int width) { return width < 3 * Shape<4>::cols ? 3 : 4; }
#elif defined(DEN_ISA_AVX2)
template <int NV> struct Shape;
template <> struct Shape<1> { static constexpr int rows = 2, cols = 6; };
template <> struct Shape<2> { static constexpr int rows = 1, cols = 6; };
inline int most_vectors(int) { return 2; }
#else
template <int NV> struct Shape;
template <> struct Shape<1> { static constexpr int rows = 2, cols = 4; };
template <> struct Shape<2> { static constexpr int rows = 1, cols = 6; };
inline int most_vectors(int) { return 2; }
#endif

// Tiles of every width up to the largest, for the whole row height and for a single last row.
template <class V, int NV>
struct Tiles {
    static constexpr int rows = Shape<NV>::rows, cols = Shape<NV>::cols;
    Tile whole[cols], single[cols];

    template <int Pixel, int Q>
    constexpr void fill() {
        whole[Q - 1] = tile<Element, V, NV, rows, Q, Pixel>;
        single[Q - 1] = tile<Element, V, NV, 1, Q, Pixel>;
        if constexpr (Q > 1) fill<Pixel, Q - 1>();
    }
    template <int Pixel>
    constexpr explicit Tiles(Int<Pixel>) : whole{}, single{} { fill<Pixel, cols>(); }
};

inline den::TapRange taps_of(const ConvPass& pass, int row) {
    return pass.row_taps ? pass.row_taps[row] : den::TapRange{0, pass.taps};
}

inline bool same(den::TapRange a, den::TapRange b) { return a.begin == b.begin && a.end == b.end; }

template <class V, int NV>
void tile_rows(const ConvPass& pass, TileAtElement at, int row0, int row1) {
    constexpr int map_pixel = den::kMapBlock<Element>;
    static constexpr Tiles<V, NV> of_map{Int<map_pixel>{}}, of_any{Int<0>{}};
    const Tiles<V, NV>& tiles = pass.in_pixel == map_pixel ? of_map : of_any;
    constexpr int rows = Tiles<V, NV>::rows, cols = Tiles<V, NV>::cols;
    // An even split: 16 pixels by tiles of up to 6 go as 6, 5, 5, not 6, 6, 4.
    const int count = (pass.width + cols - 1) / cols;
    const int narrow = pass.width / count, wider = pass.width % count;
    for (int row = row0; row < row1;) {
        at.taps = taps_of(pass, row);
        // Rows with other taps go alone, so that the sum of an output is the same in every tile.
        const int height = row + rows <= row1 && same(at.taps, taps_of(pass, row + rows - 1)) ? rows : 1;
        const Tile* set = height == rows ? tiles.whole : tiles.single;
        const Element* in = pass.in + row * pass.in_row;
        at.row = row;
        at.col = 0;
        for (int i = 0; i < count; ++i) {
            const int q = narrow + (i < wider);
            at.in = in + at.col * pass.in_pixel;
            set[q - 1](pass, at);
            at.col += q;
        }
        row += height;
    }
}

inline int vectors_of(int channels) { return (channels + Vec::lanes - 1) / Vec::lanes; }

// How many of the vectors left the next tile takes: as many as it can, but none is left alone.
inline int next_vectors(int left, int most) {
    if (left <= most) return left;
    return left == most + 1 && most > 2 ? most - 1 : most;
}

void conv(const ConvPass& pass, int unit0, int unit1, int row0, int row1) {
    constexpr int per_block = den::kBlock / Vec::lanes, word = den::kWord<Element>;
    const int units = (pass.group_out + den::kBlock - 1) / den::kBlock;  // of one group
    const int active_units = (pass.active_out + den::kBlock - 1) / den::kBlock;
    const std::ptrdiff_t weight_block = weight_block_of(pass);
    for (int unit = unit0; unit < unit1;) {
        const int group = unit / active_units, first = unit % active_units;
        const int last = first + (unit1 - unit) < active_units ? first + (unit1 - unit) : active_units;
        const int end = last * per_block < vectors_of(pass.active_out) ? last * per_block : vectors_of(pass.active_out);
        for (int v = first * per_block; v < end;) {
            const int nv = next_vectors(end - v, most_vectors(pass.width));
            const int out = v * Vec::lanes;  // within the group
            const int left = pass.active_out - out;
            TileAtElement at{};
            at.weight = pass.weight + ((std::ptrdiff_t)group * units + out / den::kBlock) * weight_block +
                        out % den::kBlock * word;
            at.first_in = group * pass.group_in;
            at.first_out = group * pass.group_out + out;
            at.lanes_out = lanes_written(pass, nv * Vec::lanes, left);
#if defined(DEN_512)
            if (nv == 1 && left <= Vec8::lanes) {
                // Half a vector: 8 lanes do the same work at twice the rate where 512-bit units are paired.
                at.lanes_out = lanes_written(pass, Vec8::lanes, left);
                tile_rows<Vec8, 1>(pass, at, row0, row1);
            } else if (nv == 4)
                tile_rows<Vec, 4>(pass, at, row0, row1);
            else if (nv == 3)
                tile_rows<Vec, 3>(pass, at, row0, row1);
            else
#endif
            if (nv == 2)
                tile_rows<Vec, 2>(pass, at, row0, row1);
            else
                tile_rows<Vec, 1>(pass, at, row0, row1);
            v += nv;
        }
        unit += last - first;
    }
}

}  // namespace
