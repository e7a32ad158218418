// The Winograd kernels of one instruction set for one element type: compiled once for each, as kernels.cpp is.
//
// No standard library here: its inline functions would be merged across instruction sets by the linker.
#include "winograd_input.h"
#include "winograd_output.h"

namespace {

// Tiles of a product of NV vectors: with two, as many as the registers hold.
#if defined(DEN_512)
template <int NV> constexpr int kMaxTiles = NV == 1 ? 16 : 12;
#else
template <int NV> constexpr int kMaxTiles = 6;
#endif

// The part of the next point's weights that a product asks for, `step` bytes (at most two lines) with each of its own words.
// Large weights come from memory: asked for in all products of a point alike, they come while there is work to do.
struct Ahead {
    const char* line;
    int step;
};

// The product of R tiles by NV vectors of output channels at one point, over `channels` input channels.
template <class P, int NV, int R>
void product(const float* words, std::ptrdiff_t v_block, int channels, const float* weight_words, Ahead ahead, float* out) {
    using Words = Product<Vec, P>;
    constexpr int word = den::kWord<P>;
    const P* v = reinterpret_cast<const P*>(words);
    const P* weight = reinterpret_cast<const P*>(weight_words);
    Reg acc[R][NV];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) acc[r][n] = Vec::zero();

    const auto step = [&](const P* x, const P* w) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int half = 0; half < Words::steps; ++half) {
            typename Words::Reg k[NV];
#pragma GCC unroll 2
            for (int n = 0; n < NV; ++n) k[n] = Words::weights(w + n * kLanes * word, half);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) add_products<Vec>(x + r * kBlock * word, k, half, r, acc[r]);
        }
    };
    const int whole = channels / word;
    // What each word asks for. lines: of the next point's weights. squares: of V, where a point of it outgrows the first cache
    // beside the weights: lines of the next block, or of the next tiles' first.
    const auto all_words = [&](auto lines, auto squares) __attribute__((always_inline)) {
        const char* line = ahead.line;
        for (int c0 = 0; c0 < whole; c0 += kBlock) {
            const int run = whole - c0 < kBlock ? whole - c0 : kBlock;
            const P* x = v + c0 / kBlock * v_block * word;
            const P* next = c0 + kBlock < whole ? x + v_block * word : v + R * kBlock * word;
            for (int c = 0; c < run; ++c, x += word, weight += kGroup * word) {
                __builtin_prefetch(line, 0, 2);
                if (decltype(lines)::value == 2) __builtin_prefetch(line + 64, 0, 2);
                line += ahead.step;
                if (decltype(squares)::value) {
                    __builtin_prefetch(next, 0, 3);
                    next += kBlock * word;
                }
                step(x, weight);
            }
        }
    };
    const bool far = whole > 4 * kBlock;
    if (ahead.step > 64)
        far ? all_words(Int<2>{}, Int<1>{}) : all_words(Int<2>{}, Int<0>{});
    else
        far ? all_words(Int<1>{}, Int<1>{}) : all_words(Int<1>{}, Int<0>{});
    if (channels % word) {
        // The second weight of the last pair belongs to a channel that is not active.
        P row[NV * kLanes * word];
        for (int i = 0; i < NV * kLanes * word; ++i) row[i] = i % word ? P{} : weight[i];
        step(v + (whole / kBlock * v_block + whole % kBlock) * word, row);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) Vec::store(out + r * den::kWinogradTileProducts<P> + n * kLanes, acc[r][n]);
}

using ProductFn = void (*)(const float*, std::ptrdiff_t, int, const float*, Ahead, float*);

template <class P, int NV>
struct Products {
    ProductFn of[kMaxTiles<NV> + 1];

    template <int R>
    constexpr void fill() {
        of[R] = product<P, NV, R>;
        if constexpr (R > 1) fill<R - 1>();
    }
    constexpr Products() : of{} { fill<kMaxTiles<NV>>(); }
};

// Tiles [first, first + count) of a pass, which have equal channels, in a group of output channels.
struct Run {
    int first, count;
    int channels, vectors;  // read, and made of this group
    int parts, fewer, more;  // products that its tiles are cut into: of `fewer` tiles each, the first `more` of one more
};

// Of as few products as the registers allow.
inline Run run_of(int first, int count, int channels, int vectors) {
    const int most = vectors == 1 ? kMaxTiles<1> : kMaxTiles<2>;
    const int parts = (count + most - 1) / most;
    return {first, count, channels, vectors, parts, count / parts, count % parts};
}

// M of one run at one point. Advances `ahead` over what its products asked for.
template <class P>
void multiply(const Pass& pass, const Run& run, const float* v, const float* weight, float* out, Ahead& ahead) {
    static constexpr Products<P, 1> one;
    static constexpr Products<P, 2> two;
    const std::ptrdiff_t asked = (std::ptrdiff_t)(run.channels / den::kWord<P>) * ahead.step;
    for (int i = 0; i < run.parts; ++i) {
        const int rows = run.fewer + (i < run.more);
        for (int n = 0; n < run.vectors; n += 2) {
            const auto* product = n + 2 <= run.vectors ? two.of : one.of;
            product[rows](v, pass.v_block, run.channels, weight + n * kLanes, ahead, out + n * kLanes);
            ahead.line += asked;
        }
        v += rows * kBlock;
        out += rows * den::kWinogradTileProducts<P>;
    }
}

// M of all runs, point by point: what one run read of the weights is in the cache for the next.
template <class P>
void multiply_runs(const Pass& pass, const Run* runs, int count, int tile0, const float* weight, float* products) {
    int most = 0, words = 0;  // words of a point that are read, and all that its products go through
    for (int r = 0; r < count; ++r) {
        const int of_run = (runs[r].channels + den::kWord<P> - 1) / den::kWord<P>;
        most = of_run > most ? of_run : most;
        words += of_run * runs[r].parts * ((runs[r].vectors + 1) / 2);
    }
    const int row = kGroup * sizeof(float);
    const int points = den::winograd_points(pass.tile);
    for (int p = 0; p < points; ++p) {
        const float* w = weight + p * pass.weight_point;
        Ahead ahead{reinterpret_cast<const char*>(w + pass.weight_point), (row * most + words - 1) / words};
        for (int r = 0; r < count; ++r)
            multiply<P>(pass, runs[r], pass.v + p * pass.v_point + runs[r].first * kBlock, w,
                        products + p * kGroup + (runs[r].first - tile0) * den::kWinogradTileProducts<P>, ahead);
    }
}

template <int M>
void output_groups(const Pass& pass, const Tile* tiles, int tile0, int tile1, int group0, int group1, float* products) {
    using P = typename Points<M>::Type;
    for (int group = group0; group < group1; ++group) {
        const int first = group * kGroup;
        constexpr int kRuns = 32;
        Run runs[kRuns];
        int count = 0;
        for (int t = tile0; t < tile1;) {
            int end = t + 1;
            const int in = tiles[t].active_in, out = tiles[t].active_out;
            while (end < tile1 && tiles[end].active_in == in && tiles[end].active_out == out) ++end;
            if (out > first) {
                const int channels = out - first < kGroup ? out - first : kGroup;
                runs[count++] = run_of(t, end - t, in, (channels + kLanes - 1) / kLanes);
            }
            t = end;
            if (count && (count == kRuns || t == tile1)) {
                multiply_runs<P>(pass, runs, count, tile0, pass.weight + group * pass.weight_group, products);
                count = 0;
            }
        }
        for (int t = tile0; t < tile1; ++t)
            if (tiles[t].active_out > first)
                output_tile<M>(pass, tiles[t], group, products + (t - tile0) * den::kWinogradTileProducts<P>);
    }
}

void output(const Pass& pass, const Tile* tiles, int tile0, int tile1, int group0, int group1, float* products) {
    const auto groups = pass.tile == 4 ? output_groups<4> : output_groups<2>;
    groups(pass, tiles, tile0, tile1, group0, group1, products);
}

inline float widened(float x) { return x; }
inline float widened(bf16 x) {
    const std::uint32_t bits = (std::uint32_t)x.bits << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

// A vector of outputs into element `place` of each word of a row of weights.
inline void store_word(float* row, int, Reg values) { Vec::store(row, values); }
inline void store_word(bf16* row, int place, Reg values) {
    bf16 line[kLanes];
    Vec::store(line, values);
    for (int i = 0; i < kLanes; ++i) row[2 * i + place] = line[i];
}

// U of a group of output channels: for each input channel the nine taps side by side, then G g G^T a vector of outputs at
// a time.
template <int M>
void weight_group(const Element* weight, int outs, int in_channels, float* packed) {
    using P = typename Points<M>::Type;
    constexpr int side = Transform<Vec, M>::side, word = den::kWord<P>;
    const std::ptrdiff_t point = (std::ptrdiff_t)((in_channels + word - 1) / word) * kGroup * word;
    P* to = reinterpret_cast<P*>(packed);
    alignas(64) float taps[9][kGroup] = {};
    for (int in = 0; in < in_channels; ++in) {
        for (int o = 0; o < outs; ++o) {
            const Element* w = weight + ((std::ptrdiff_t)o * in_channels + in) * 9;
            for (int t = 0; t < 9; ++t) taps[t][o] = widened(w[t]);
        }
        for (int c = 0; c < kGroup; c += kLanes) {
            Reg rows[side * 3];  // G g
#pragma GCC unroll 3
            for (int x = 0; x < 3; ++x) {
                const Reg column[3] = {Vec::load(taps[x] + c), Vec::load(taps[3 + x] + c), Vec::load(taps[6 + x] + c)};
                Transform<Vec, M>::weight(column, 1, rows + x, 3);
            }
            P* row = to + ((std::ptrdiff_t)(in / word) * kGroup + c) * word;
#pragma GCC unroll 6
            for (int y = 0; y < side; ++y) {
                Reg points[side];
                Transform<Vec, M>::weight(rows + y * 3, 1, points, 1);
#pragma GCC unroll 6
                for (int x = 0; x < side; ++x) store_word(row + (y * side + x) * point, in % word, points[x]);
            }
        }
    }
    // The other halves of the last pairs.
    if (in_channels % word)
        for (int p = 1; p <= side * side; ++p)
            for (int o = 0; o < kGroup; ++o) to[p * point - 1 - 2 * o] = P{};
}

void weights(int tile, const Element* weight, int outs, int in_channels, float* packed) {
    if (tile == 4)
        weight_group<4>(weight, outs, in_channels, packed);
    else
        weight_group<2>(weight, outs, in_channels, packed);
}

#define DEN_CONCAT(element, isa) winograd_##element##_##isa
#define DEN_NAME(element, isa) DEN_CONCAT(element, isa)
#define DEN_TABLE DEN_NAME(DEN_ELEMENT, DEN_ISA)

}  // namespace

namespace den {

extern const WinogradKernels<Element> DEN_TABLE;
const WinogradKernels<Element> DEN_TABLE = {input, output, weights};

}  // namespace den
