// The kernels of one instruction set for one element type: compiled once for each, with the matching compiler flags,
// DEN_ISA_<ISA>, DEN_ISA=<isa> and DEN_ELEMENT=float or bf16.
//
// No standard library here: its inline functions would be merged across instruction sets by the linker.
#include "kernels.h"

#include "conv_tile.h"

namespace {

using den::bf16;
using Element = DEN_ELEMENT;
using TileAtElement = TileAt<Element>;
using Tile = TileFn<Element>;
using ConvPass = den::BasicConvPass<Element>;
using MapLoad = den::BasicMapLoad<Element>;

// Register tiles by output vectors (NV). Enough independent accumulators to hide the latency of a multiply-add, as
// many pixels as the registers hold: each load of weights is used once a pixel.
#if defined(DEN_512)
using Vec = Vec16;
template <int NV> struct Shape;
template <> struct Shape<1> { static constexpr int rows = 2, cols = 8; };
template <> struct Shape<2> { static constexpr int rows = 1, cols = 12; };
template <> struct Shape<3> { static constexpr int rows = 1, cols = 8; };
template <> struct Shape<4> { static constexpr int rows = 1, cols = 6; };
// Rows that give short tiles would read the weights of four vectors too often.
inline int most_vectors(int width) { return width < 3 * Shape<4>::cols ? 3 : 4; }
#elif defined(DEN_ISA_AVX2)
using Vec = Vec8;
template <int NV> struct Shape;
template <> struct Shape<1> { static constexpr int rows = 2, cols = 6; };
template <> struct Shape<2> { static constexpr int rows = 1, cols = 6; };
inline int most_vectors(int) { return 2; }
#else
using Vec = Vec4;
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

// Tiles that are computed together, segment by segment of input channels: the weights of a segment stay in the first cache
// over all of them. The sums wait in memory between their segments, and lose nothing there.
template <class V, int NV>
class Band {
public:
    Band(const ConvPass& pass, const TileAtElement& at) : pass_(pass), at_(at) {}

    void add(Tile tile, const Element* in, int row, int col, den::TapRange taps) {
        if (count_ == kTiles) run();
        placed_[count_++] = {tile, in, row, col, taps};
    }

    void run() {
        constexpr int block = den::kMapBlock<Element>;
        const int segment = blocks() * block;
        int begin = 0, end;
        do {
            end = (at_.first_in + begin + segment) / block * block - at_.first_in;
            TileAtElement at = at_;
            at.opens = begin == 0, at.closes = end >= pass_.active_in;
            if (at.closes) end = pass_.active_in;
            at.weight += (std::ptrdiff_t)begin * (block / den::kWord<Element>) * pass_.taps;
            at.first_in += begin, at.packed_in -= begin, at.channels = end - begin;
            for (int i = 0; i < count_; ++i) {
                const Placed& p = placed_[i];
                at.in = p.in, at.row = p.row, at.col = p.col, at.taps = p.taps, at.sums = sums_ + i * kSums;
                p.tile(pass_, at);
            }
            begin = end;
        } while (begin < pass_.active_in);
        count_ = 0;
    }

private:
    // Blocks of input channels whose weights about fill a first cache. All of a 1x1, which gains nothing by less.
    int blocks() const {
        constexpr int bytes = 32 * 1024;
        const int of_block = pass_.taps * NV * V::lanes * den::kBlock * (int)sizeof(float);
        if (count_ == 1 || pass_.taps == 1) return pass_.active_in;
        return of_block < bytes ? bytes / of_block : 1;
    }

    struct Placed {
        Tile tile;
        const Element* in;
        int row, col;
        den::TapRange taps;
    };
    static constexpr int kTiles = 32, kSums = Shape<NV>::rows * Shape<NV>::cols * NV * V::lanes;
    const ConvPass& pass_;
    const TileAtElement& at_;
    Placed placed_[kTiles];
    int count_ = 0;
    alignas(64) float sums_[kTiles * kSums];
};

template <class V, int NV>
void tile_rows(const ConvPass& pass, const TileAtElement& at, int row0, int row1) {
    // Two vectors by twelve pixels leave few instructions to hide the registers behind that a distance takes.
    constexpr int map_pixel = NV == 2 ? den::kMapBlock<Element> : 0;
    static constexpr Tiles<V, NV> of_map{Int<map_pixel>{}}, of_any{Int<0>{}};
    const Tiles<V, NV>& tiles = pass.in_pixel == map_pixel ? of_map : of_any;
    constexpr int rows = Tiles<V, NV>::rows, cols = Tiles<V, NV>::cols;
    // An even split: 16 pixels by tiles of up to 6 go as 6, 5, 5, not 6, 6, 4.
    const int count = (pass.width + cols - 1) / cols;
    const int narrow = pass.width / count, wider = pass.width % count;
    Band<V, NV> band(pass, at);
    for (int row = row0; row < row1;) {
        const den::TapRange taps = taps_of(pass, row);
        // Rows with other taps go alone, so that the sum of an output is the same in every tile.
        const int height = row + rows <= row1 && same(taps, taps_of(pass, row + rows - 1)) ? rows : 1;
        const Tile* set = height == rows ? tiles.whole : tiles.single;
        const Element* in = pass.in + row * pass.in_row;
        for (int i = 0, col = 0; i < count; ++i) {
            const int q = narrow + (i < wider);
            band.add(set[q - 1], in + col * pass.in_pixel, row, col, taps);
            col += q;
        }
        row += height;
    }
    band.run();
}

inline int vectors_of(int channels) { return (channels + Vec::lanes - 1) / Vec::lanes; }

// How many of the vectors left the next tile takes: as many as it can, but none is left alone.
inline int next_vectors(int left, int most) {
    if (left <= most) return left;
    return left == most + 1 && most > 2 ? most - 1 : most;
}

// Output channels that a tile of `lanes` writes when `left` are active. In scratch it may write beyond them, but an odd
// number ends in a zero, for the pairs of the next convolution.
inline int lanes_written(const ConvPass& pass, int lanes, int left) {
    if (left >= lanes) return lanes;
    return pass.whole_blocks && left % den::kWord<Element> == 0 ? lanes : left;
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
            at.packed_in = pass.group_in;
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

// `count` channels, at most a vector of them, through relu(x * mul + add); zeros fill up the vector.
inline void activate(const Element* x, const float* mul, const float* add, int count, Element* out) {
    float scale[Vec::lanes] = {}, shift[Vec::lanes] = {};
    Element line[Vec::lanes] = {};
    for (int i = 0; i < count; ++i) line[i] = x[i], scale[i] = mul[i], shift[i] = add[i];
    const Vec::Reg value = Vec::fma(Vec::load(line), Vec::load(scale), Vec::load(shift));
    Vec::store(out, Vec::at_least(Vec::zero(), value));
}

void load(const MapLoad& load, int row0, int row1) {
    constexpr int step = Vec::lanes, block = den::kMapBlock<Element>;
    for (int row = row0; row < row1; ++row) {
        if (!load.row_read[row]) continue;
        const Element* line = load.in + row * load.in_row;
        Element* out_line = load.out + row * load.out_row;
        for (int col = 0; col < load.width; ++col) {
            if (load.out_col[col] < 0) continue;
            const Element* x = line + col * load.in_pixel;
            Element* out = out_line + load.out_col[col];
            int c = 0;
            if (load.mul) {
                for (; c + step <= load.channels; c += step) {
                    const Vec::Reg value = Vec::fma(Vec::load(x + c), Vec::load(load.mul + c), Vec::load(load.add + c));
                    Vec::store(out + (c / block) * load.out_block + c % block, Vec::at_least(Vec::zero(), value));
                }
                if (c < load.channels)
                    activate(x + c, load.mul + c, load.add + c, load.channels - c,
                             out + (c / block) * load.out_block + c % block);
            } else {
                for (; c + block <= load.channels; c += block)
                    __builtin_memcpy(out + (c / block) * load.out_block, x + c, sizeof(Element) * block);
                if (c < load.channels) {
                    Element* last = out + (c / block) * load.out_block - c;
                    for (; c + step <= load.channels; c += step)
                        __builtin_memcpy(last + c, x + c, sizeof(Element) * step);
                    for (; c < load.channels; ++c) last[c] = x[c];
                    if (c % den::kWord<Element>) last[c] = Element{};
                }
            }
        }
    }
}

// The average of NV vectors of channels, summed in the order of the pixels; `read` makes a vector of a pixel's channels.
template <int NV, class Read>
inline __attribute__((always_inline)) void average_of(const den::BasicPool<Element>& pool, int c, Read read,
                                                      Vec::Reg (&average)[NV]) {
    const float one_of = 1.0f / (float)pool.pixels;
    const Vec::Reg share = Vec::broadcast(&one_of);
    Vec::Reg sum[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[v] = Vec::zero();
    const Element* x = pool.in + c;
    for (int p = 0; p < pool.pixels; ++p, x += pool.channels)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[v] = Vec::add(sum[v], read(x, v));
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) average[v] = Vec::fma(sum[v], share, Vec::zero());
}

// NV vectors of channels from c on.
template <int NV>
inline void pool_vectors(const den::BasicPool<Element>& pool, int c) {
    Vec::Reg average[NV];
    const auto plain = [](const Element* x, int v) { return Vec::load(x + v * Vec::lanes); };
    const auto activated = [&](const Element* x, int v) {
        const int at = v * Vec::lanes;
        const Vec::Reg mul = Vec::load(pool.mul + c + at), add = Vec::load(pool.add + c + at);
        return Vec::at_least(Vec::zero(), Vec::fma(Vec::load(x + at), mul, add));
    };
    if (pool.mul)
        average_of<NV>(pool, c, activated, average);
    else
        average_of<NV>(pool, c, plain, average);
    for (int v = 0; v < NV; ++v) Vec::store(pool.out + c + v * Vec::lanes, average[v]);
}

// The same for the last `count` channels, fewer than a vector.
void pool_ragged(const den::BasicPool<Element>& pool, int c, int count) {
    Vec::Reg average[1];
    Element line[Vec::lanes] = {};
    float scale[Vec::lanes] = {}, shift[Vec::lanes] = {};
    for (int i = 0; i < count && pool.mul; ++i) scale[i] = pool.mul[c + i], shift[i] = pool.add[c + i];
    const Vec::Reg mul = Vec::load(scale), add = Vec::load(shift);
    average_of<1>(pool, c, [&](const Element* x, int) {
        for (int i = 0; i < count; ++i) line[i] = x[i];
        const Vec::Reg value = Vec::load(line);
        return pool.mul ? Vec::at_least(Vec::zero(), Vec::fma(value, mul, add)) : value;
    }, average);
    Vec::store(line, average[0]);
    for (int i = 0; i < count; ++i) pool.out[c + i] = line[i];
}

void pool(const den::BasicPool<Element>& pool) {
    constexpr int vectors = 4;
    int c = 0;
    for (; c + vectors * Vec::lanes <= pool.channels; c += vectors * Vec::lanes) pool_vectors<vectors>(pool, c);
    for (; c + Vec::lanes <= pool.channels; c += Vec::lanes) pool_vectors<1>(pool, c);
    if (c < pool.channels) pool_ragged(pool, c, pool.channels - c);
}

// The average of `rows` x `cols` pixels, a vector of channels at a time.
inline void average_window(const Element* x, std::ptrdiff_t in_row, std::ptrdiff_t in_pixel, int rows, int cols, int channels,
                           Element* out) {
    const float pixels = (float)(rows * cols);
    const Vec::Reg count = Vec::broadcast(&pixels);
    for (int c = 0; c < channels; c += Vec::lanes) {
        const int left = channels - c;
        Element line[Vec::lanes] = {};
        const auto read = [&](const Element* from) {
            if (left >= Vec::lanes) return Vec::load(from);
            for (int i = 0; i < left; ++i) line[i] = from[i];
            return Vec::load(line);
        };
        Vec::Reg sum = Vec::zero();
        for (int y = 0; y < rows; ++y)
            for (int col = 0; col < cols; ++col) sum = Vec::add(sum, read(x + y * in_row + col * in_pixel + c));
        sum = Vec::div(sum, count);
        if (left >= Vec::lanes) {
            Vec::store(out + c, sum);
        } else {
            Vec::store(line, sum);
            for (int i = 0; i < left; ++i) out[c + i] = line[i];
        }
    }
}

void shortcut(const den::BasicShortcut<Element>& s, int row0, int row1) {
    const int channels = s.channels < s.out_channels ? s.channels : s.out_channels;
    const std::ptrdiff_t in_row = (std::ptrdiff_t)s.width * s.channels;
    Element* out = s.out + (std::ptrdiff_t)row0 * s.out_width * s.out_channels;
    for (int row = row0; row < row1; ++row) {
        const int y = row * s.stride, rows = s.height - y < s.stride ? s.height - y : s.stride;
        for (int col = 0; col < s.out_width; ++col, out += s.out_channels) {
            const int x = col * s.stride, cols = s.width - x < s.stride ? s.width - x : s.stride;
            average_window(s.in + y * in_row + (std::ptrdiff_t)x * s.channels, in_row, s.channels, rows, cols, channels, out);
            __builtin_memset(out + channels, 0, sizeof(Element) * (s.out_channels - channels));
        }
    }
}

// `count` channels of the largest of rows [y0, y1) and columns [x0, x1); count: a vector, or fewer.
inline Vec::Reg largest(const den::BasicMaxPool<Element>& p, int y0, int y1, int x0, int x1, int c, int count) {
    Vec::Reg most{};
    for (int y = y0; y < y1; ++y)
        for (int x = x0; x < x1; ++x) {
            const Element* from = p.in + ((std::ptrdiff_t)y * p.width + x) * p.channels + c;
            Element line[Vec::lanes] = {};
            if (count < Vec::lanes) {
                for (int i = 0; i < count; ++i) line[i] = from[i];
                from = line;
            }
            const Vec::Reg value = Vec::load(from);
            most = y == y0 && x == x0 ? value : Vec::larger(most, value);
        }
    return most;
}

void max_pool(const den::BasicMaxPool<Element>& p, int row0, int row1) {
    const auto begin = [](int at) { return at > 0 ? 2 * at - 1 : 0; };
    const auto end = [](int at, int size) { return 2 * at + 2 < size ? 2 * at + 2 : size; };
    Element* out = p.out + (std::ptrdiff_t)row0 * p.out_width * p.channels;
    for (int row = row0; row < row1; ++row)
        for (int col = 0; col < p.out_width; ++col, out += p.channels)
            for (int c = 0; c < p.channels; c += Vec::lanes) {
                const int count = p.channels - c < Vec::lanes ? p.channels - c : Vec::lanes;
                const Vec::Reg most = largest(p, begin(row), end(row, p.height), begin(col), end(col, p.width), c, count);
                if (count == Vec::lanes) {
                    Vec::store(out + c, most);
                    continue;
                }
                Element line[Vec::lanes];
                Vec::store(line, most);
                for (int i = 0; i < count; ++i) out[c + i] = line[i];
            }
}

#define DEN_CONCAT(table, element, isa) table##_##element##_##isa
#define DEN_NAME(table, element, isa) DEN_CONCAT(table, element, isa)
#define DEN_TABLE DEN_NAME(kernels, DEN_ELEMENT, DEN_ISA)
#define DEN_WINOGRAD DEN_NAME(winograd, DEN_ELEMENT, DEN_ISA)

}  // namespace

namespace den {

extern const WinogradKernels<Element> DEN_WINOGRAD;
extern const BasicKernels<Element> DEN_TABLE;
const BasicKernels<Element> DEN_TABLE = {conv, load, pool, shortcut, max_pool, &DEN_WINOGRAD};

}  // namespace den
