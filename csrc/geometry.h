// Elements as floats; shapes: one convolution's sizes, the blocked map that it reads, and where its taps lie in that map.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace den {

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline int round_up(int a, int b) { return ceil_div(a, b) * b; }
inline std::size_t round_up(std::size_t a, int b) { return (a + b - 1) / b * b; }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    const std::uint32_t bits = std::uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
// Rounds to nearest even; a NaN stays one.
template <>
inline bf16 from_float<bf16>(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const std::uint32_t rounded = x != x ? bits | 0x400000u : bits + ((bits >> 16) & 1) + 0x7fffu;
    return {std::uint16_t(rounded >> 16)};
}

struct Pair {
    int y, x;
};

struct ConvShape {
    int in_channels, out_channels, groups;
    int height, width;  // of the input
    Pair kernel, stride, padding, dilation;

    int taps() const { return kernel.y * kernel.x; }
    int group_in() const { return in_channels / groups; }
    int group_out() const { return out_channels / groups; }
    int out_height() const { return (height + 2 * padding.y - dilation.y * (kernel.y - 1) - 1) / stride.y + 1; }
    int out_width() const { return (width + 2 * padding.x - dilation.x * (kernel.x - 1) - 1) / stride.x + 1; }
    double macs_per_channel_pair() const { return double(out_height()) * out_width() * taps(); }
    // Units (blocks of 16 output channels of a group) when active_out channels of all groups together are produced.
    int units(int active_out) const {
        const int active_groups = groups == 1 ? 1 : active_out / group_out();
        return active_groups * ceil_div(groups == 1 ? active_out : group_out(), kBlock);
    }
};

// Whether a convolution's map is best kept as lines, [row][column][channel], of which the columns under the kernel are
// the channels of one tap: a few channels would leave most of a block empty, and each tap a sum of a few products. Where
// every sample reads all channels.
inline bool keeps_lines(int channels, int groups, int kernel) { return channels <= 4 && groups == 1 && kernel > 1; }

// The zero-padded map that a convolution reads, blocked (see kernels.h) or kept as lines, without its memory.
template <class T>
class BasicBlockedMap {
public:
    // `slack`: rows and columns of zeros behind the padding, for tiles that reach beyond the map. With lines, neither
    // slack nor dilation.
    explicit BasicBlockedMap(const ConvShape& conv, Pair slack = {0, 0}, bool lines = false);

    std::size_t floats() const { return floats_; }  // of memory, whatever T is
    const ConvShape& conv() const { return conv_; }
    const std::vector<std::ptrdiff_t>& taps() const { return taps_; }
    std::ptrdiff_t row_pitch() const { return row_pitch_; }
    std::ptrdiff_t block_pitch() const { return block_pitch_; }
    // Where the image begins, and the offset of each of its columns.
    T* image(T* map) const { return map + conv_.padding.y * row_pitch_; }
    const std::ptrdiff_t* columns() const { return columns_.data() + conv_.padding.x; }
    // The same, negative for a column that no tap reads; and for each row of the image whether any does (strided 1x1
    // convolutions read one pixel in four).
    const std::ptrdiff_t* read_columns() const { return read_columns_.data() + conv_.padding.x; }
    const char* read_rows() const { return read_rows_.data() + conv_.padding.y; }

    // Whether image and zeros are where they are in the other.
    bool lies_as(const BasicBlockedMap& other) const;

    // Writes the zeros around the image of the first `channels` channels (lines: of all). Nothing else ever writes them.
    void zero_border(T* map, int channels) const;

    // The load of the first `channels` channels of an NHWC image of `pixel` channels into a map, without a norm.
    BasicMapLoad<T> load(T* map, const T* image, int pixel, int channels) const;

    // The pass of this convolution over a filled map, its output and epilogue still to be set. active_in and
    // active_out count channels of all groups together; with groups they are whole groups.
    BasicConvPass<T> pass(const T* map, const T* weight, int active_in, int active_out) const;

private:
    void place_blocks();
    void place_lines();
    void zero_beside_lines(T* map) const;

    ConvShape conv_;
    Pair slack_;
    bool lines_;
    int rows_;
    std::ptrdiff_t row_pitch_, block_pitch_;
    std::size_t floats_;
    std::vector<std::ptrdiff_t> columns_, read_columns_, taps_;
    std::vector<char> read_rows_;
    std::vector<TapRange> row_taps_;
    std::vector<signed char> tap_edges_;
};

using BlockedMap = BasicBlockedMap<float>;

// Column offsets of an NHWC row.
std::vector<std::ptrdiff_t> nhwc_columns(int width, int channels);

}  // namespace den
