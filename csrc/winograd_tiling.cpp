#include "winograd_tiling.h"

#include <algorithm>

#include "dispatch.h"

namespace den {

namespace {

constexpr int kChunkFloats = 96 * 1024;  // of V
constexpr int kFewestTiles = 32;  // of a chunk
constexpr int kTeamTiles = 16;

}  // namespace

template <class T>
int WinogradTiling<T>::tiles() const {
    return ceil_div(conv_.out_height(), tile_) * ceil_div(conv_.out_width(), tile_);
}

template <class T>
int WinogradTiling<T>::words() const {
    return ceil_div(conv_.group_in(), winograd_word<T>(tile_));
}

template <class T>
Pair WinogradTiling<T>::slack() const {
    const int height = conv_.out_height(), width = conv_.out_width();
    return {round_up(height, tile_) - height, round_up(width, tile_) - width};
}

template <class T>
int WinogradTiling<T>::chunk() const {
    return std::max(kFewestTiles, kChunkFloats / (winograd_points(tile_) * words()));
}

template <class T>
int WinogradTiling<T>::team() const {
    return ceil_div(kTeamTiles, tiles());
}

template <class T>
std::size_t WinogradTiling<T>::chunk_floats(int samples) const {
    const int most = std::min(chunk(), samples * tiles());
    return winograd_v_floats(tile_, words(), most) + winograd_product_floats<T>(tile_, most);
}

template <class T>
std::vector<WinogradTile<T>> WinogradTiling<T>::tiles_of(const std::vector<WinogradTile<T>>& samples, int first,
                                                         int last) const {
    const int cols = ceil_div(conv_.out_width(), tile_), each = tiles();
    std::size_t sample = first / each;
    int row = first % each / cols * tile_, col = first % cols * tile_;
    std::vector<WinogradTile<T>> tiles;
    tiles.reserve(last - first);
    for (int t = first; t < last; ++t) {
        tiles.push_back(samples[sample]);
        tiles.back().row = row, tiles.back().col = col;
        col += tile_;
        if (col >= conv_.out_width()) col = 0, row += tile_;
        if (row >= conv_.out_height()) row = 0, ++sample;
    }
    return tiles;
}

template <class T>
WinogradPass<T> WinogradTiling<T>::pass(const BasicBlockedMap<T>& map, const float* weight, float* v, int tiles) const {
    WinogradPass<T> pass{};
    pass.tile = tile_;
    pass.in_row = map.row_pitch();
    pass.in_pixel = kMapBlock<T>;
    pass.in_block = map.block_pitch();
    pass.in_height = round_up(conv_.out_height(), tile_) + 2;
    pass.in_width = round_up(conv_.out_width(), tile_) + 2;
    pass.v = v;
    pass.v_block = std::ptrdiff_t(tiles) * kBlock;
    pass.v_point = winograd_pitch(std::ptrdiff_t(round_up(words(), kBlock)) * tiles);
    pass.weight = weight;
    pass.weight_point = std::ptrdiff_t(words()) * kWinogradGroup;
    pass.weight_group = winograd_points(tile_) * pass.weight_point;
    pass.height = conv_.out_height();
    pass.width = conv_.out_width();
    return pass;
}

template <class T>
void WinogradTiling<T>::read_images(WinogradPass<T>& pass) const {
    pass.in_row = std::ptrdiff_t(conv_.width) * conv_.in_channels;
    pass.in_pixel = conv_.in_channels;
    pass.in_block = kMapBlock<T>;
    pass.in_height = conv_.height, pass.in_width = conv_.width;
    pass.pad_y = conv_.padding.y, pass.pad_x = conv_.padding.x;
}

template <class T>
void WinogradTiling<T>::convolve(const WinogradPass<T>& pass, const WinogradTile<T>* tiles, int count, int group0,
                                 int group1) const {
    const WinogradKernels<T>& winograd = *kernels<T>().winograd;
    winograd.input(pass, tiles, 0, count);
    winograd.output(pass, tiles, 0, count, group0, group1,
                    pass.v + winograd_v_floats(tile_, words(), count));
}

template class WinogradTiling<float>;
template class WinogradTiling<bf16>;

}  // namespace den
