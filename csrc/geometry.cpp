#include "geometry.h"

#include <algorithm>
#include <tuple>

namespace den {

template <class T>
BasicBlockedMap<T>::BasicBlockedMap(const ConvShape& conv, Pair slack, bool lines)
    : conv_(conv), slack_(slack), lines_(lines), rows_(conv.height + 2 * conv.padding.y + slack.y) {
    if (lines)
        place_lines();
    else
        place_blocks();
    const int columns = lines ? 1 : conv.kernel.x;  // taps of a row
    for (int y = 0; y < conv.out_height(); ++y) {
        const int top = y * conv.stride.y - conv.padding.y;  // image row that the first tap reads
        int begin = 0, end = conv.kernel.y;
        while (begin < end && top + begin * conv.dilation.y < 0) ++begin;
        while (begin < end && top + (end - 1) * conv.dilation.y >= conv.height) --end;
        row_taps_.push_back({begin * columns, end * columns});
    }
    std::vector<char> row_phase_read(conv.stride.y, 0);
    for (int ky = 0; ky < conv.kernel.y; ++ky) row_phase_read[ky * conv.dilation.y % conv.stride.y] = 1;
    for (int y = 0; y < rows_; ++y) read_rows_.push_back(row_phase_read[y % conv.stride.y]);
}

template <class T>
void BasicBlockedMap<T>::place_blocks() {
    constexpr int block = kMapBlock<T>;
    const ConvShape& conv = conv_;
    const int columns = conv.width + 2 * conv.padding.x + slack_.x, phases = conv.stride.x;
    const std::ptrdiff_t phase_pitch = std::ptrdiff_t(ceil_div(columns, phases)) * block;
    row_pitch_ = phases * phase_pitch;
    // An odd number of cache lines: the blocks of a pixel would else often fall into one set of the cache.
    block_pitch_ = rows_ * row_pitch_ + (rows_ * row_pitch_ / block % 2 == 0 ? block : 0);
    floats_ = std::size_t(ceil_div(conv.in_channels, block)) * block_pitch_ / kWord<T>;

    std::vector<char> phase_read(phases, 0);
    for (int ky = 0; ky < conv.kernel.y; ++ky)
        for (int kx = 0; kx < conv.kernel.x; ++kx) {
            const int x = kx * conv.dilation.x;
            phase_read[x % phases] = 1;
            const int last = (conv.out_width() - 1) * conv.stride.x + x - conv.padding.x;  // column of the image
            tap_edges_.push_back(x < conv.padding.x ? -1 : last >= conv.width ? 1 : 0);
            taps_.push_back(ky * conv.dilation.y * row_pitch_ + (x % phases) * phase_pitch + (x / phases) * block);
        }
    for (int x = 0; x < columns; ++x) {
        columns_.push_back((x % phases) * phase_pitch + (x / phases) * block);
        read_columns_.push_back(phase_read[x % phases] ? columns_.back() : -1);
    }
}

template <class T>
void BasicBlockedMap<T>::place_lines() {
    constexpr int block = kMapBlock<T>;
    const int columns = conv_.width + 2 * conv_.padding.x;
    // The last word of an odd number of channels reaches one beyond: the next pixel's first, times a weight of 0.
    row_pitch_ = round_up(columns * conv_.in_channels + kWord<T> - 1, block);
    block_pitch_ = block;  // channels of a tap follow each other
    floats_ = std::size_t(rows_) * row_pitch_ / kWord<T>;
    for (int ky = 0; ky < conv_.kernel.y; ++ky) taps_.push_back(ky * row_pitch_), tap_edges_.push_back(0);
    for (int x = 0; x < columns; ++x) columns_.push_back(std::ptrdiff_t(x) * conv_.in_channels);
    read_columns_ = columns_;
}

template <class T>
void BasicBlockedMap<T>::zero_beside_lines(T* map) const {
    const int rows = conv_.padding.y, left = conv_.padding.x * conv_.in_channels, filled = conv_.width * conv_.in_channels;
    std::fill_n(map, rows * row_pitch_, T{});
    std::fill_n(map + (rows_ - rows) * row_pitch_, rows * row_pitch_, T{});
    for (int row = rows; row < rows_ - rows; ++row) {
        T* line = map + row * row_pitch_;
        std::fill_n(line, left, T{});
        std::fill_n(line + left + filled, row_pitch_ - left - filled, T{});
    }
}

template <class T>
bool BasicBlockedMap<T>::lies_as(const BasicBlockedMap& other) const {
    const auto size = [](const BasicBlockedMap& map) {
        const ConvShape& conv = map.conv_;
        return std::make_tuple(conv.in_channels, conv.height, conv.width, conv.padding.y, conv.padding.x, map.slack_.y,
                               map.slack_.x, map.lines_, map.row_pitch_, map.block_pitch_, map.columns_.size());
    };
    return size(*this) == size(other) && columns_ == other.columns_;
}

template <class T>
void BasicBlockedMap<T>::zero_border(T* map, int channels) const {
    constexpr int block = kMapBlock<T>;
    if (lines_) {
        if (channels > 0) zero_beside_lines(map);
        return;
    }
    const int top = conv_.padding.y, left = conv_.padding.x, columns = int(columns_.size());
    const int bottom = top + slack_.y, right = left + slack_.x;
    for (int b = 0; b < ceil_div(channels, block); ++b) {
        T* base = map + b * block_pitch_;
        std::fill_n(base, top * row_pitch_, T{});
        std::fill_n(base + (rows_ - bottom) * row_pitch_, bottom * row_pitch_, T{});
        for (int row = top; row < rows_ - bottom; ++row) {
            T* line = base + row * row_pitch_;
            for (int i = 0; i < left; ++i) std::fill_n(line + columns_[i], block, T{});
            for (int i = 0; i < right; ++i) std::fill_n(line + columns_[columns - 1 - i], block, T{});
        }
    }
}

template <class T>
BasicMapLoad<T> BasicBlockedMap<T>::load(T* map, const T* image, int pixel, int channels) const {
    BasicMapLoad<T> load{};
    load.in = image;
    load.in_row = std::ptrdiff_t(conv_.width) * pixel;
    load.in_pixel = pixel;
    load.width = conv_.width;
    load.channels = channels;
    load.out = this->image(map);
    load.out_row = row_pitch_;
    load.out_block = block_pitch_;
    load.out_col = read_columns();
    load.row_read = read_rows();
    if (lines_) load.width = 1, load.channels = conv_.width * channels;  // a whole line at once
    return load;
}

template <class T>
BasicConvPass<T> BasicBlockedMap<T>::pass(const T* map, const T* weight, int active_in, int active_out) const {
    BasicConvPass<T> pass{};
    pass.in = map;
    pass.in_row = conv_.stride.y * row_pitch_;
    pass.in_pixel = kMapBlock<T>;
    pass.in_block = block_pitch_;
    pass.tap = taps_.data();
    pass.taps = conv_.taps();
    pass.row_taps = row_taps_.data();
    pass.tap_edges = tap_edges_.data();
    pass.weight = weight;
    pass.groups = conv_.groups;
    pass.group_in = conv_.group_in();
    pass.group_out = conv_.group_out();
    pass.active_in = conv_.groups == 1 ? active_in : conv_.group_in();
    pass.active_out = conv_.groups == 1 ? active_out : conv_.group_out();
    pass.width = conv_.out_width();
    if (lines_) {
        pass.in_pixel = conv_.stride.x * conv_.in_channels;
        pass.taps = conv_.kernel.y;
        pass.group_in = pass.active_in = conv_.kernel.x * conv_.in_channels;
    }
    return pass;
}

template class BasicBlockedMap<float>;
template class BasicBlockedMap<bf16>;

std::vector<std::ptrdiff_t> nhwc_columns(int width, int channels) {
    std::vector<std::ptrdiff_t> columns(width);
    for (int x = 0; x < width; ++x) columns[x] = std::ptrdiff_t(x) * channels;
    return columns;
}

}  // namespace den
