// The kernels of one instruction set for one element type: compiled once for each, with the matching compiler flags,
// DEN_ISA_<ISA>, DEN_ISA=<isa> and DEN_ELEMENT=float or bf16.
//
// No standard library here: its inline functions would be merged across instruction sets by the linker.
#include "kernels.h"

#include "conv_kernels.h"

namespace {

using MapLoad = den::BasicMapLoad<Element>;

// `count` channels, at most a vector of them, through relu(x * mul + add); zeros fill up the vector.
inline void activate(const Element* x, const float* mul, const float* add, int count, Element* out) {
    float scale[Vec::lanes] = {}, shift[Vec::lanes] = {};
    Element line[Vec::lanes] = {};
    for (int i = 0; i < count; ++i) line[i] = x[i], scale[i] = mul[i], shift[i] = add[i];
    const Vec::Reg value = Vec::fma(Vec::load(line), Vec::load(scale), Vec::load(shift));
    Vec::store(out, Vec::at_least(Vec::zero(), value));
}

// Some vectors of channels of a row, inside a block, from channel c on, through relu(x * mul + add).
template <int vectors>
void activate_row(const MapLoad& load, const Element* line, Element* out_line, int c) {
    Vec::Reg mul[vectors], add[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
        mul[v] = Vec::load(load.mul + c + v * Vec::lanes);
        add[v] = Vec::load(load.add + c + v * Vec::lanes);
    }
    constexpr int block = den::kMapBlock<Element>;
    line += c, out_line += c / block * load.out_block + c % block;
    for (int col = 0; col < load.width; ++col, line += load.in_pixel) {
        const std::ptrdiff_t place = load.out_col[col];
        if (place < 0) continue;
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
            const Vec::Reg value = Vec::fma(Vec::load(line + v * Vec::lanes), mul[v], add[v]);
            Vec::store(out_line + place + v * Vec::lanes, Vec::at_least(Vec::zero(), value));
        }
    }
}

// `channels` channels of a row as they are, inside a block, from channel c on.
template <int channels>
void copy_row(const MapLoad& load, const Element* line, Element* out_line, int c) {
    constexpr int block = den::kMapBlock<Element>;
    line += c, out_line += c / block * load.out_block + c % block;
    for (int col = 0; col < load.width; ++col, line += load.in_pixel)
        if (load.out_col[col] >= 0) __builtin_memcpy(out_line + load.out_col[col], line, sizeof(Element) * channels);
}

// The channels of a row from c on, fewer than a vector.
void load_ragged(const MapLoad& load, const Element* line, Element* out_line, int c) {
    constexpr int block = den::kMapBlock<Element>;
    const int left = load.channels - c;
    line += c, out_line += c / block * load.out_block + c % block;
    for (int col = 0; col < load.width; ++col, line += load.in_pixel) {
        if (load.out_col[col] < 0) continue;
        Element* out = out_line + load.out_col[col];
        if (load.mul) {
            activate(line, load.mul + c, load.add + c, left, out);
        } else {
            for (int i = 0; i < left; ++i) out[i] = line[i];
            if (left % den::kWord<Element>) out[left] = Element{};
        }
    }
}

void load(const MapLoad& load, int row0, int row1) {
    constexpr int step = Vec::lanes, block = den::kMapBlock<Element>;
    for (int row = row0; row < row1; ++row) {
        if (!load.row_read[row]) continue;
        const Element* line = load.in + row * load.in_row;
        Element* out_line = load.out + row * load.out_row;
        int c = 0;
        if (load.mul) {
            for (; c + block <= load.channels; c += block) activate_row<block / step>(load, line, out_line, c);
            for (; c + step <= load.channels; c += step) activate_row<1>(load, line, out_line, c);
        } else {
            for (; c + block <= load.channels; c += block) copy_row<block>(load, line, out_line, c);
            for (; c + step <= load.channels; c += step) copy_row<step>(load, line, out_line, c);
        }
        if (c < load.channels) load_ragged(load, line, out_line, c);
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
const BasicKernels<Element> DEN_TABLE = {conv, load, pool, shortcut, max_pool, &DEN_WINOGRAD, false};

}  // namespace den
