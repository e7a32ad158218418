// The direct convolution of bf16 in products of AMX tiles.
//
// A blocked map has pixels of 64 bytes next to each other and packed weights have rows of 64 bytes (kernels.h, pack.h): both
// are tiles as they lie. P tiles of pixels by N of 16 outputs are summed together, P * N <= 4, over (block of 32 input
// channels, tap); then the epilogue, from memory. A ragged last block of channels has tiles of its own size, so that
// nothing beyond a width is read.
#include "amx_conv.h"

#include "amx_tiles.h"
#include "conv_tile.h"

namespace {

using den::bf16;
using ConvPass = den::BasicConvPass<bf16>;

constexpr int kRows = 16;                          // most pixels of a tile
constexpr int kOutputs = Vec::lanes;               // outputs of a tile
constexpr int kChannels = den::kMapBlock<bf16>;    // input channels of a whole tile
constexpr int kRowBytes = 64;
constexpr int kMostTiles = 4;                      // of sums
// Registers: 0 to 3 sums, 4 and 5 pixels, 6 and 7 weights.
constexpr int kPixels = 4, kWeights = 6;

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline int smaller(int a, int b) { return a < b ? a : b; }

// The input channels of a group: whole blocks, then a ragged one.
struct Depth {
    int blocks, ragged;                  // active: how many whole ones, and channels of the ragged one
    int ragged_words;                    // of it as packed

    explicit Depth(const ConvPass& pass) {
        blocks = pass.active_in / kChannels, ragged = pass.active_in % kChannels;
        const int packed = smaller(kChannels, pass.group_in - blocks * kChannels);
        ragged_words = ceil_div(packed, 2);
    }
    // Whether tiles of two sizes are needed.
    bool mixed() const { return blocks > 0 && ragged > 0; }
    int words() const { return ceil_div(ragged, 2); }
};

// Where the pixels of a pass lie, as lines of which tiles are pieces. A place is  row * pitch + column; columns from `width`
// on are the map's padding, computed and dropped: that is cheaper than short tiles where rows are short.
struct Lines {
    int count, length, pitch;
    int rows;     // of a tile
    bool joined;  // rows of the image, in one line

    Lines(const ConvPass& pass, int height) {
        const Lines apart(height, pass.width, pass.width, false);
        *this = apart;
        const std::ptrdiff_t pixels = pass.in_pixel ? pass.in_row / pass.in_pixel : 0;
        if (pass.in_row % pass.in_pixel || pixels < pass.width) return;
        const Lines together(1, int((height - 1) * pixels) + pass.width, int(pixels), true);
        if (together.cost() < apart.cost()) *this = together;
    }
    int tiles() const { return ceil_div(length, rows); }  // of a line

private:
    Lines(int count, int length, int pitch, bool joined) : count(count), length(length), pitch(pitch), joined(joined) {
        rows = ceil_div(length, ceil_div(length, kRows));
    }
    // In cycles a product, as measured: a row takes one, and a short tile waits for its loads.
    double cost() const { return double(count) * tiles() * (rows + 1.5 > 14 ? rows + 1.5 : 14); }
};

struct PixelTile {
    const bf16* in;
    int place;
    int skip;  // pixels that the tile before has
};

inline PixelTile pixel_tile(const ConvPass& pass, const Lines& lines, int row0, int index) {
    const int line = index / lines.tiles(), piece = index % lines.tiles() * lines.rows;
    const int start = smaller(piece, lines.length - lines.rows);
    return {pass.in + (row0 + line) * pass.in_row + start * pass.in_pixel, (row0 + line) * lines.pitch + start, piece - start};
}

inline amx::Config config_of(const Depth& depth, int rows) {
    amx::Config config;
    for (int sum = 0; sum < kMostTiles; ++sum) config.set(sum, rows, kRowBytes);
    for (int i = 0; i < 2; ++i) {
        // One size: two registers each of pixels and weights. Two sizes: one each of both.
        const int words = depth.ragged && (i == 1 || !depth.mixed()) ? depth.words() : kChannels / 2;
        config.set(kPixels + i, rows, words * 4);
        config.set(kWeights + i, words, kRowBytes);
    }
    return config;
}

// What P tiles of pixels and N of outputs multiply.
template <int P>
struct Factors {
    const bf16* in[P];
    std::ptrdiff_t pixel;         // bytes from pixel to pixel
    const bf16* weight;
    std::ptrdiff_t weight_block;  // elements from 16 outputs to the next
};

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
    using type = Indices<I...>;
};

// Adds the products at one tap of one block of channels.
template <int P, int N, int... I>
inline __attribute__((always_inline)) void add_step(const Factors<P>& f, std::ptrdiff_t x, const bf16* w, Indices<I...>) {
    amx::load<kWeights>(w, kRowBytes);
    if constexpr (N == 2) amx::load<kWeights + 1>(w + f.weight_block, kRowBytes);
    (
        [&]() __attribute__((always_inline)) {
            amx::load<kPixels + I % 2>(f.in[I] + x, f.pixel);
            amx::add_product<I * N, kPixels + I % 2, kWeights>();
            if constexpr (N == 2) amx::add_product<I * N + 1, kPixels + I % 2, kWeights + 1>();
        }(),
        ...);
}

// The same with register kPixels + R and kWeights + R alone.
template <int P, int N, int R, int Output, int... I>
inline __attribute__((always_inline)) void add_output(const Factors<P>& f, std::ptrdiff_t x, const bf16* w, Indices<I...>) {
    amx::load<kWeights + R>(w + Output * f.weight_block, kRowBytes);
    (
        [&]() __attribute__((always_inline)) {
            amx::load<kPixels + R>(f.in[I] + x, f.pixel);
            amx::add_product<I * N + Output, kPixels + R, kWeights + R>();
        }(),
        ...);
}

template <int P, int N, int R>
inline __attribute__((always_inline)) void add_step_alone(const Factors<P>& f, std::ptrdiff_t x, const bf16* w) {
    using All = typename MakeIndices<P>::type;
    add_output<P, N, R, 0>(f, x, w, All{});
    if constexpr (N == 2) add_output<P, N, R, 1>(f, x, w, All{});
}

template <int... I>
inline __attribute__((always_inline)) void clear_all(Indices<I...>) {
    (amx::clear<I>(), ...);
}

template <int P, int N, int... I>
inline __attribute__((always_inline)) void store_all(float* sums, Indices<I...>) {
    (amx::store<I>(sums + (I / N * kRows * N + I % N) * kOutputs, N * kOutputs * 4), ...);
}

// sums[P][16][N][16] of the convolution over these taps.
template <int P, int N>
void multiply(const ConvPass& pass, const Factors<P>& f, const Depth& depth, den::TapRange taps, float* sums) {
    using All = typename MakeIndices<P>::type;
    using Sums = typename MakeIndices<P * N>::type;
    constexpr std::ptrdiff_t row = kRowBytes / sizeof(bf16);  // of weights
    clear_all(Sums{});
    const std::ptrdiff_t* tap = pass.tap;
    const bf16* w = f.weight;
    const std::ptrdiff_t tap_weights = kChannels / 2 * row;
    const bool mixed = depth.mixed();
    std::ptrdiff_t x = 0;
    for (int b = 0; b < depth.blocks; ++b, x += pass.in_block, w += pass.taps * tap_weights)
        for (int t = taps.begin; t < taps.end; ++t) {
            if (mixed)
                add_step_alone<P, N, 0>(f, x + tap[t], w + t * tap_weights);
            else
                add_step<P, N>(f, x + tap[t], w + t * tap_weights, All{});
        }
    if (depth.ragged)
        for (int t = taps.begin; t < taps.end; ++t) {
            const bf16* last = w + t * depth.ragged_words * row;
            if (mixed)
                add_step_alone<P, N, 1>(f, x + tap[t], last);
            else
                add_step<P, N>(f, x + tap[t], last, All{});
        }
    store_all<P, N>(sums, Sums{});
}

// relu(sum * mul + add + residual) of `count` pixels of a row, every output of N vectors written. sums: [pixel][N][16].
template <int N>
void finish_row(const ConvPass& pass, const TileAt<bf16>& at, int count, const float* sums) {
    using Reg = Vec::Reg;
    const Reg floor = floor_of<Vec>(pass);
    Reg mul[N], add[N];
    for (int v = 0; v < N; ++v) {
        mul[v] = Vec::load(pass.mul + at.first_out + v * kOutputs);
        add[v] = Vec::load(pass.add + at.first_out + v * kOutputs);
    }
    const Offsets<N> offset = offsets<bf16, Vec, N>(pass, at);
    const std::ptrdiff_t first = at.row * pass.out_row + channel_at(pass, at.first_out);
    const std::ptrdiff_t* column = pass.out_col + at.col;
    const auto every_pixel = [&](auto value_of) __attribute__((always_inline)) {
        for (int q = 0; q < count; ++q, sums += N * kOutputs)
#pragma GCC unroll 2
            for (int v = 0; v < N; ++v) {
                const std::ptrdiff_t place = first + column[q] + offset.of[v];
                const Reg value = Vec::fma(Vec::load(sums + v * kOutputs), mul[v], add[v]);
                Vec::store(pass.out + place, Vec::at_least(floor, value_of(value, place)));
            }
    };
    if (pass.residual)
        every_pixel([&](Reg value, std::ptrdiff_t place) { return Vec::add(value, Vec::load(pass.residual + place)); });
    else
        every_pixel([](Reg value, std::ptrdiff_t) { return value; });
}

// The epilogue of one tile of pixels, row by row, without what the tile before had and what is padding.
template <int N>
void finish(const ConvPass& pass, TileAt<bf16> at, const Lines& lines, const PixelTile& tile, const float* sums) {
    const bool whole = at.lanes_out == N * kOutputs && in_one_piece<bf16, Vec>(pass, at);
    for (int q = tile.skip; q < lines.rows;) {
        at.row = (tile.place + q) / lines.pitch, at.col = (tile.place + q) % lines.pitch;
        const int left = lines.rows - q, count = smaller(left, pass.width - at.col);
        const float* of_row = sums + q * N * kOutputs;
        if (count > 0 && whole)
            finish_row<N>(pass, at, count, of_row);
        else if (count > 0)
            finish_ragged<bf16, Vec, N>(pass, at, 1, count, of_row);
        q += smaller(left, lines.pitch - at.col);
    }
}

// P tiles of pixels from `index` on.
template <int P, int N>
void tiles(const ConvPass& pass, const TileAt<bf16>& at, const Lines& lines, const Depth& depth, int row0, int index) {
    PixelTile pixels[P];
    Factors<P> factors;
    den::TapRange taps{pass.taps, 0};
    for (int p = 0; p < P; ++p) {
        pixels[p] = pixel_tile(pass, lines, row0, index + p);
        factors.in[p] = pixels[p].in + at.first_in / kChannels * pass.in_block + at.first_in % kChannels;
        // Taps that lie in the padding add zeros where rows that need them share the tile.
        const bool all = lines.joined || !pass.row_taps;
        const den::TapRange of_row = all ? den::TapRange{0, pass.taps} : pass.row_taps[pixels[p].place / lines.pitch];
        taps.begin = smaller(taps.begin, of_row.begin);
        taps.end = taps.end > of_row.end ? taps.end : of_row.end;
    }
    factors.pixel = pass.in_pixel * std::ptrdiff_t(sizeof(bf16));
    factors.weight = at.weight;
    factors.weight_block = weight_block_of(pass);
    alignas(64) float sums[P * kRows * N * kOutputs];
    multiply<P, N>(pass, factors, depth, taps, sums);
    for (int p = 0; p < P; ++p) finish<N>(pass, at, lines, pixels[p], sums + p * kRows * N * kOutputs);
}

// All pixels of 16 or 32 outputs.
template <int N>
void outputs(const ConvPass& pass, const TileAt<bf16>& at, const Lines& lines, const Depth& depth, int row0) {
    const int total = lines.count * lines.tiles();
    int i = 0;
    for (; i + kMostTiles / N <= total; i += kMostTiles / N) tiles<kMostTiles / N, N>(pass, at, lines, depth, row0, i);
    if constexpr (N == 1) {
        if (total - i == 3) tiles<3, N>(pass, at, lines, depth, row0, i);
        if (total - i == 2) tiles<2, N>(pass, at, lines, depth, row0, i);
    }
    if (total - i == 1) tiles<1, N>(pass, at, lines, depth, row0, i);
}

// Whether the channels are whole pairs, and those of a group lie in one block or begin with one.
bool suits(const ConvPass& pass) {
    const bool pairs = pass.active_in % 2 == 0 || pass.active_in == pass.group_in;
    const bool placed = pass.groups == 1 || pass.group_in % kChannels == 0 || kChannels % pass.group_in == 0;
    return pairs && placed && pass.active_in > 0;
}

}  // namespace

namespace den {

extern const BasicKernels<bf16> kernels_bf16_avx512_bf16;

void amx_conv(const BasicConvPass<bf16>& pass, int unit0, int unit1, int row0, int row1) {
    const int units = ceil_div(pass.group_out, kBlock), active_units = ceil_div(pass.active_out, kBlock);
    if (!suits(pass)) return kernels_bf16_avx512_bf16.conv(pass, unit0, unit1, row0, row1);
    if (unit0 >= unit1 || row0 >= row1) return;
    const Lines lines(pass, row1 - row0);
    const Depth depth(pass);
    const std::ptrdiff_t weight_block = weight_block_of(pass);
    amx::configure(config_of(depth, lines.rows));
    for (int unit = unit0; unit < unit1;) {
        const int group = unit / active_units, first = unit % active_units;
        TileAt<bf16> at{};
        at.weight = pass.weight + ((std::ptrdiff_t)group * units + first) * weight_block;
        at.first_in = group * pass.group_in;
        at.first_out = group * pass.group_out + first * kBlock;
        const int left = pass.active_out - first * kBlock;
        const bool pair = first % 2 == 0 && unit + 1 < unit1 && left > kBlock;
        at.lanes_out = lanes_written(pass, pair ? 2 * kOutputs : kOutputs, left);
        if (pair)
            outputs<2>(pass, at, lines, depth, row0);
        else
            outputs<1>(pass, at, lines, depth, row0);
        unit += pair ? 2 : 1;
    }
    amx::release();
}

}  // namespace den
