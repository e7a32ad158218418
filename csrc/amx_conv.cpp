// The direct convolution of bf16 in products of AMX tiles.
//
// A blocked map has pixels of 64 bytes next to each other and packed weights have rows of 64 bytes (kernels.h, pack.h): both
// are tiles as they lie. P tiles of pixels by N of 16 outputs are summed together over (block of 32 input channels, tap).
// A ragged last block of channels has tiles of its own size, so that nothing beyond a width is read.
//
// The epilogue of one group of tiles runs in the pauses of the next one's products, which take other units of the core.
#include "amx_conv.h"

#include "amx_epilogue.h"
#include "amx_tiles.h"

namespace {

constexpr int kChannels = den::kMapBlock<bf16>;  // input channels of a whole tile
constexpr int kRowBytes = 64;

// The input channels of a group: whole blocks, then a ragged one.
struct Depth {
    int blocks, ragged;  // active: how many whole ones, and channels of the ragged one
    int ragged_words;    // of it as packed

    explicit Depth(const ConvPass& pass) {
        blocks = pass.active_in / kChannels, ragged = pass.active_in % kChannels;
        ragged_words = ceil_div(smaller(kChannels, pass.group_in - blocks * kChannels), 2);
    }
    // Whether tiles of two sizes are needed.
    bool mixed() const { return blocks > 0 && ragged > 0; }
    int steps(den::TapRange taps) const { return (blocks + (ragged > 0)) * (taps.end - taps.begin); }
};

// How the registers are used, and how many tiles of pixels (most) and of outputs are summed together.
//
// A product takes 16 cycles, a load 8: with at least three sums none waits for another's end. Where a pixel is read by
// several taps, so from the first cache, one tile of weights serves as many tiles of pixels as there are registers for; in a
// 1x1, which reads it from the second, each tile of pixels serves two of outputs.
enum class Plan { kTaps, kPlain, kMixed };
template <Plan plan> struct Registers;
template <> struct Registers<Plan::kTaps> { static constexpr int most = 5, outputs = 1, pixels = 5, weights = 7; };
template <> struct Registers<Plan::kPlain> { static constexpr int most = 2, outputs = 2, pixels = 4, weights = 6; };
// Of each size one register.
template <> struct Registers<Plan::kMixed> { static constexpr int most = 4, outputs = 1, pixels = 4, weights = 6; };

template <Plan plan>
amx::Config config_of(const Depth& depth, int rows) {
    using R = Registers<plan>;
    amx::Config config;
    const int ragged = ceil_div(depth.ragged, 2), whole = kChannels / 2;
    for (int sum = 0; sum < R::pixels; ++sum) config.set(sum, rows, kRowBytes);
    for (int tile = R::pixels; tile < 8; ++tile) {
        const bool second = plan == Plan::kMixed ? (tile - R::pixels) % 2 : depth.blocks == 0;
        const int words = second ? ragged : whole;
        if (tile < R::weights)
            config.set(tile, rows, words * 4);
        else
            config.set(tile, words, kRowBytes);
    }
    return config;
}

// The numbers below N, as a type.
template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
    using type = Indices<I...>;
};

// Where the tiles of a step begin.
template <int P>
struct Factors {
    const bf16* in[P];
    std::ptrdiff_t pixel;         // bytes from pixel to pixel
    std::ptrdiff_t weight_block;  // elements from 16 outputs to the next
};

// Asks for the weights of some steps later, into the second cache: no prefetcher is as fast as tiles.
template <int N>
inline __attribute__((always_inline)) void ask_ahead(const bf16* w, std::ptrdiff_t weight_block) {
    constexpr std::ptrdiff_t row = kRowBytes / sizeof(bf16), ahead = 16 * 16 * row;
    for (int v = 0; v < N; ++v)
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) __builtin_prefetch(w + v * weight_block + ahead + i * row, 0, 2);
}

// The products at one tap of one block of channels. second: the ragged one of Plan::kMixed.
template <Plan plan, int P, bool second, int... I>
inline __attribute__((always_inline)) void add_step(const Factors<P>& f, std::ptrdiff_t x, const bf16* w, Indices<I...>) {
    using R = Registers<plan>;
    constexpr bool mixed = plan == Plan::kMixed;
    constexpr int N = R::outputs, weights = R::weights + (mixed && second);
    amx::load<weights>(w, kRowBytes);
    ask_ahead<N>(w, f.weight_block);
    if constexpr (N == 2) amx::load<weights + 1>(w + f.weight_block, kRowBytes);
    (
        [&]() __attribute__((always_inline)) {
            constexpr int pixels = R::pixels + (mixed ? second : I % 2);
            amx::load<pixels>(f.in[I] + x, f.pixel);
            amx::add_product<I * N, pixels, weights>();
            if constexpr (N == 2) amx::add_product<I * N + 1, pixels, weights + 1>();
        }(),
        ...);
}

template <int... I>
inline __attribute__((always_inline)) void clear_all(Indices<I...>) {
    (amx::clear<I>(), ...);
}

template <int N, int... I>
inline __attribute__((always_inline)) void store_all(float* sums, Indices<I...>) {
    (amx::store<I>(sums + (I / N * kTileRows * N + I % N) * kTileOutputs, N * kTileOutputs * 4), ...);
}

// sums[P][16][N][16] of the convolution over a group's taps; between its products a piece of `before` after the other.
template <Plan plan, int P>
void multiply(const ConvPass& pass, const PixelGroup& group, const Depth& depth, const bf16* weight, std::ptrdiff_t first_in,
              Epilogue& before) {
    constexpr int N = Registers<plan>::outputs;
    constexpr std::ptrdiff_t row = kRowBytes / sizeof(bf16);  // of weights
    constexpr std::ptrdiff_t tap_weights = kChannels / 2 * row;
    const typename MakeIndices<P>::type all{};
    Factors<P> f;
    for (int p = 0; p < P; ++p) f.in[p] = group.in[p];
    f.pixel = pass.in_pixel * std::ptrdiff_t(sizeof(bf16));
    f.weight_block = weight_block_of(pass);
    const std::ptrdiff_t *tap = pass.tap + group.taps.begin, *end = pass.tap + group.taps.end;
    const int pieces = before.pieces(), steps = depth.steps(group.taps);
    const int pause = pieces < steps ? steps / (pieces + 1) : 1;
    int left = pause;
    const auto rest = [&]() __attribute__((always_inline)) {
        if (--left == 0) before.finish_piece(), left = pause;
    };
    const bf16* w = weight + group.taps.begin * tap_weights;
    std::ptrdiff_t x = first_in;
    clear_all(typename MakeIndices<P * N>::type{});
    for (int b = 0; b < depth.blocks; ++b, x += pass.in_block, w += pass.taps * tap_weights) {
        amx::keep_vectors_awake();
        const bf16* of_tap = w;
        for (const std::ptrdiff_t* t = tap; t != end; ++t, of_tap += tap_weights) {
            add_step<plan, P, false>(f, x + *t, of_tap, all);
            rest();
        }
    }
    if (depth.ragged) {
        const std::ptrdiff_t words = depth.ragged_words * row;
        const bf16* of_tap = weight + depth.blocks * pass.taps * tap_weights + group.taps.begin * words;
        for (const std::ptrdiff_t* t = tap; t != end; ++t, of_tap += words) {
            add_step<plan, P, true>(f, x + *t, of_tap, all);
            rest();
        }
    }
    before.finish();
    store_all<N>(before.sums, typename MakeIndices<P * N>::type{});
}

// The convolution of one pass.
template <Plan plan>
class Conv {
public:
    using R = Registers<plan>;

    Conv(const ConvPass& pass, const Depth& depth) : pass_(pass), depth_(depth), epilogue_(pass) {}

    // Outputs [unit0, unit1) of 16, at some of the pixels.
    void run(int unit0, int unit1, const PixelGroups& pixels) {
        // A pixel that one tap reads is best read, and written, once. Not if all weights pass by for each group of pixels.
        const std::ptrdiff_t weight_bytes = std::ptrdiff_t(unit1 - unit0) * weight_block_of(pass_) * sizeof(bf16);
        if (plan == Plan::kPlain && weight_bytes <= den::kHeldWeights) {
            for (int g = 0; g < pixels.count; ++g)
                each_output(unit0, unit1, [&](const TileAt<bf16>& at) { add(at, pixels, pixels.groups[g]); });
        } else {
            each_output(unit0, unit1, [&](const TileAt<bf16>& at) {
                for (int g = 0; g < pixels.count; ++g) add(at, pixels, pixels.groups[g]);
            });
        }
        epilogue_.finish();
    }

private:
    // Calls take(place) for outputs that are summed together.
    template <class Take>
    void each_output(int unit0, int unit1, const Take& take) const {
        const int units = ceil_div(pass_.group_out, den::kBlock), active = ceil_div(pass_.active_out, den::kBlock);
        for (int unit = unit0, some; unit < unit1; unit += some) {
            const int group = unit / active, first = unit % active;
            some = smaller(smaller(R::outputs, unit1 - unit), active - first);
            TileAt<bf16> at{};
            at.weight = pass_.weight + ((std::ptrdiff_t)group * units + first) * weight_block_of(pass_);
            at.first_in = group * pass_.group_in;
            at.first_out = group * pass_.group_out + first * den::kBlock;
            at.lanes_out = lanes_written(pass_, some * kTileOutputs, pass_.active_out - first * den::kBlock);
            take(at);
        }
    }

    void add(const TileAt<bf16>& at, const PixelGroups& pixels, const PixelGroup& group) {
        switch (group.tiles) {
            case 1: return tiles<1>(at, pixels, group);
            case 2: return tiles<2>(at, pixels, group);
            case 3: return tiles<smaller(3, R::most)>(at, pixels, group);
            case 4: return tiles<smaller(4, R::most)>(at, pixels, group);
            default: return tiles<R::most>(at, pixels, group);
        }
    }

    template <int P>
    void tiles(const TileAt<bf16>& at, const PixelGroups& pixels, const PixelGroup& group) {
        const std::ptrdiff_t first_in = at.first_in / kChannels * pass_.in_block + at.first_in % kChannels;
        multiply<plan, P>(pass_, group, depth_, at.weight, first_in, epilogue_);
        epilogue_.begin(at, R::outputs, pixels.pieces + group.first_piece, pixels.pieces + group.last_piece);
    }

    const ConvPass& pass_;
    const Depth& depth_;
    Epilogue epilogue_;  // of the group before
};

template <Plan plan>
void convolve(const ConvPass& pass, const Depth& depth, int unit0, int unit1, int row0, int row1) {
    const Lines lines(pass, row0, row1);
    Conv<plan> conv(pass, depth);
    PixelGroups pixels;
    amx::configure(config_of<plan>(depth, lines.rows));
    const int total = lines.tiles(), parts = ceil_div(total, PixelGroups::kMostTiles);
    for (int part = 0; part < parts; ++part) {
        pixels.fill(pass, lines, total * part / parts, total * (part + 1) / parts, Registers<plan>::most);
        conv.run(unit0, unit1, pixels);
    }
    amx::release();
}

// Whether the outputs, in units of 16, come in pairs.
bool in_pairs(const ConvPass& pass, int unit0, int unit1) {
    return unit0 % 2 == 0 && unit1 % 2 == 0 && (pass.groups == 1 || ceil_div(pass.active_out, den::kBlock) % 2 == 0);
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
    if (unit0 >= unit1 || row0 >= row1) return;
    const Depth depth(pass);
    if (!suits(pass))
        kernels_bf16_avx512_bf16.conv(pass, unit0, unit1, row0, row1);
    else if (depth.mixed())
        convolve<Plan::kMixed>(pass, depth, unit0, unit1, row0, row1);
    else if (pass.taps == 1 && in_pairs(pass, unit0, unit1))
        convolve<Plan::kPlain>(pass, depth, unit0, unit1, row0, row1);
    else
        convolve<Plan::kTaps>(pass, depth, unit0, unit1, row0, row1);
}

}  // namespace den
