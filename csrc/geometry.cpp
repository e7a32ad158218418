#include "geometry.h"

#include <algorithm>

namespace den {

BlockedMap::BlockedMap(const ConvShape& conv, Pair slack) : conv_(conv), slack_(slack) {
    const int columns = conv.width + 2 * conv.padding.x + slack.x, phases = conv.stride.x;
    const std::ptrdiff_t phase_pitch = std::ptrdiff_t(ceil_div(columns, phases)) * kBlock;
    rows_ = conv.height + 2 * conv.padding.y + slack.y;
    row_pitch_ = phases * phase_pitch;
    block_pitch_ = rows_ * row_pitch_;
    floats_ = std::size_t(ceil_div(conv.in_channels, kBlock)) * block_pitch_;

    std::vector<char> phase_read(phases, 0), row_phase_read(conv.stride.y, 0);
    for (int ky = 0; ky < conv.kernel.y; ++ky) {
        row_phase_read[ky * conv.dilation.y % conv.stride.y] = 1;
        for (int kx = 0; kx < conv.kernel.x; ++kx) {
            const int x = kx * conv.dilation.x;
            phase_read[x % phases] = 1;
            taps_.push_back(ky * conv.dilation.y * row_pitch_ + (x % phases) * phase_pitch + (x / phases) * kBlock);
        }
    }
    for (int y = 0; y < rows_; ++y) read_rows_.push_back(row_phase_read[y % conv.stride.y]);
    for (int x = 0; x < columns; ++x) {
        columns_.push_back((x % phases) * phase_pitch + (x / phases) * kBlock);
        read_columns_.push_back(phase_read[x % phases] ? columns_.back() : -1);
    }
}

void BlockedMap::zero_border(float* map, int channels) const {
    const int top = conv_.padding.y, left = conv_.padding.x, columns = int(columns_.size());
    const int bottom = top + slack_.y, right = left + slack_.x;
    for (int block = 0; block < ceil_div(channels, kBlock); ++block) {
        float* base = map + block * block_pitch_;
        std::fill_n(base, top * row_pitch_, 0.0f);
        std::fill_n(base + (rows_ - bottom) * row_pitch_, bottom * row_pitch_, 0.0f);
        for (int row = top; row < rows_ - bottom; ++row) {
            float* line = base + row * row_pitch_;
            for (int i = 0; i < left; ++i) std::fill_n(line + columns_[i], kBlock, 0.0f);
            for (int i = 0; i < right; ++i) std::fill_n(line + columns_[columns - 1 - i], kBlock, 0.0f);
        }
    }
}

ConvPass BlockedMap::pass(const float* map, const float* weight, int active_in, int active_out) const {
    ConvPass pass{};
    pass.in = map;
    pass.in_row = conv_.stride.y * row_pitch_;
    pass.in_block = block_pitch_;
    pass.tap = taps_.data();
    pass.taps = conv_.taps();
    pass.weight = weight;
    pass.group_in = conv_.group_in();
    pass.group_out = conv_.group_out();
    pass.active_in = conv_.groups == 1 ? active_in : conv_.group_in();
    pass.active_out = conv_.groups == 1 ? active_out : conv_.group_out();
    pass.width = conv_.out_width();
    return pass;
}

std::vector<std::ptrdiff_t> nhwc_columns(int width, int channels) {
    std::vector<std::ptrdiff_t> columns(width);
    for (int x = 0; x < width; ++x) columns[x] = std::ptrdiff_t(x) * channels;
    return columns;
}

}  // namespace den
