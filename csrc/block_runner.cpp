#include "block_runner.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace den {

namespace {

constexpr int kFewestTiles = 6;  // that share a group of output channels

// Where to cut a list of things of these costs for pieces of about equal cost: pieces + 1 places.
std::vector<int> even_cuts(const std::vector<double>& cost, int pieces) {
    std::vector<double> before(1, 0.0);
    for (double c : cost) before.push_back(before.back() + c);
    std::vector<int> cuts;
    for (int p = 0; p <= pieces; ++p)
        cuts.push_back(int(std::lower_bound(before.begin(), before.end() - 1, before.back() * p / pieces * (1 - 1e-9)) - before.begin()));
    return cuts;
}

// Of a tile's output channels [first, last): products, and transforms as four more channels each way.
template <class T>
double cost_of(const WinogradTile<T>& tile, int first, int last) {
    const double outs = std::max(0, std::min(tile.active_out, last) - first);
    return outs > 0 ? tile.active_in * outs + 4.0 * (tile.active_in + outs) : 0;
}

// Whether any of these numbers of channels ends inside a word.
template <class T>
bool has_half_words(const int* widths, int levels) {
    return widths && std::any_of(widths, widths + levels, [](int width) { return width % kWord<T> != 0; });
}

}  // namespace

template <class T>
BlockRunner<T>::BlockRunner(const ResidualBlock& block) : block_(block), kernels_(kernels<T>()) {
    int channels = block.channels, height = block.height, width = block.width;
    for (const BlockConv& conv : block.convs) {
        const int pad = conv.kernel / 2, m = conv.winograd;
        ConvShape shape{channels,         conv.out_channels,          conv.groups, height, width,
                        {conv.kernel, conv.kernel}, {conv.stride, conv.stride}, {pad, pad},  {1, 1}};
        const Pair slack = m ? WinogradTiling<T>(m, shape).slack() : Pair{0, 0};
        if (maps_.empty()) reads_x_ = can_read_x(shape);
        maps_.emplace_back(shape, slack, conv.lines);
        map_at_.push_back(workspace_floats_);
        // A multiple of a cache line, like all that follows.
        if (map_at_.size() > 1 || !reads_x_) workspace_floats_ += maps_.back().floats();
        scale_at_.push_back(workspace_floats_);
        workspace_floats_ += 2 * scale_floats(conv);
        if (m) team_ = std::max(team_, WinogradTiling<T>(m, shape).team());
        channels = conv.out_channels, height = shape.out_height(), width = shape.out_width();
        pool_ *= conv.stride;
    }
    out_channels_ = channels, out_height_ = height, out_width_ = width;
    out_columns_ = nhwc_columns(width, channels);
    if (block.projection.weight)
        projection_.emplace_back(ConvShape{block.channels, channels, 1, height, width, {1, 1}, {1, 1}, {0, 0}, {1, 1}});
    // Of equal shapes the shortcut is x itself (a strided block of a map of one pixel too).
    plain_shortcut_ = block.shortcut && projection_.empty() && height == block.height && width == block.width &&
                      channels == block.channels;
}

template <class T>
std::size_t BlockRunner<T>::weight_bytes() const {
    std::size_t bytes = 0;
    for (const BasicBlockedMap<T>& map : maps_) {
        const ConvShape& conv = map.conv();
        bytes += sizeof(T) * conv.out_channels * conv.group_in() * conv.taps();
    }
    return bytes;
}

template <class T>
bool BlockRunner<T>::lays_out_as(const BlockRunner& other) const {
    if (this == &other) return true;
    const auto alike = [](const BasicBlockedMap<T>& a, const BasicBlockedMap<T>& b) { return a.lies_as(b); };
    return map_at_ == other.map_at_ && reads_x_ == other.reads_x_ &&
           std::equal(maps_.begin(), maps_.end(), other.maps_.begin(), other.maps_.end(), alike);
}

template <class T>
bool BlockRunner<T>::can_read_x(const ConvShape& first) const {
    // In place a projection overwrites x before the first convolution; else only the last one writes, of two or three.
    if (block_.projection.weight && block_.x == block_.out) return false;
    if (block_.convs[0].winograd) return block_.channels % kBlock == 0;  // it reads whole vectors
    return first.kernel.y == 1 && first.stride.y == 1 && first.groups == 1 && !block_.pre_scale &&
           block_.channels % kWord<T> == 0 && !has_half_words<T>(block_.in_widths, block_.levels);
}

template <class T>
std::size_t BlockRunner<T>::bench_floats() const {
    std::size_t most = projection_.empty() ? 0 : projection_[0].floats() + 2 * scale_floats(block_.projection);
    for (int i = 0; i < convs(); ++i)
        if (is_winograd(i)) most = std::max(most, tiling(i).chunk_floats(block_.samples));
    return most;
}

template <class T>
double BlockRunner<T>::cost(int n) const {
    // A transform takes about as long as four more channels to multiply with.
    constexpr double kTransform = 4;
    double macs = 0;
    for (int i = 0; i < convs(); ++i) {
        const ConvShape& conv = maps_[i].conv();
        const double in = active_in(i, n), out = active_out(i, n);
        if (is_winograd(i))
            macs += winograd_points(block_.convs[i].winograd) * tiling(i).tiles() *
                    (in * out / conv.groups + kTransform * (in + out));
        else
            macs += conv.macs_per_channel_pair() * in * out / conv.groups;
    }
    return macs;
}

template <class T>
void BlockRunner<T>::zero_borders(float* workspace) const {
    for (int i = reads_x(); i < convs(); ++i) maps_[i].zero_border(map(workspace, i), maps_[i].conv().in_channels);
}

template <class T>
void BlockRunner<T>::zero_part(float* workspace, int n, int part, int parts) const {
    for (int i = reads_x(); i < convs(); ++i) {
        const int blocks = ceil_div(active_in(i, n), kMapBlock<T>);
        const int first = blocks * part / parts, last = blocks * (part + 1) / parts;
        maps_[i].zero_border(map(workspace, i) + first * maps_[i].block_pitch(), (last - first) * kMapBlock<T>);
    }
}

template <class T>
void BlockRunner<T>::load_scales(float* workspace, int n) const {
    for (int i = 0; i < convs(); ++i) {
        const BlockConv& conv = block_.convs[i];
        const std::size_t row = std::size_t(block_.level[n]) * conv.out_channels;
        float* to = workspace + scale_at_[i];
        std::copy_n(conv.scale + row, conv.out_channels, to);
        std::copy_n(conv.shift + row, conv.out_channels, to + scale_floats(conv));
    }
}

template <class T>
void BlockRunner<T>::load_rows(float* workspace, int n, int row0, int row1) const {
    BasicMapLoad<T> load = maps_[0].load(map(workspace, 0), x(n), block_.channels, active_in(0, n));
    load.mul = block_.pre_scale, load.add = block_.pre_shift;
    kernels_.load(load, row0, row1);
}

template <class T>
void BlockRunner<T>::shortcut(int n, int part, int parts, float* bench) const {
    const int row0 = out_height_ * part / parts, row1 = out_height_ * (part + 1) / parts;
    if (plain_shortcut_) {
        const std::ptrdiff_t row = std::ptrdiff_t(out_width_) * out_channels_;
        std::copy_n(x(n) + row0 * row, (row1 - row0) * row, out(n) + row0 * row);
    } else if (projection_.empty()) {
        kernels_.shortcut({x(n), block_.height, block_.width, block_.channels, pool_, out(n), out_width_, out_channels_}, row0,
                          row1);
    } else if (block_.x == block_.out) {
        // Another part's pixels are not to be written while that reads them.
        project(n, 0, projection_[0].conv().units(out_channels_), row0, row1, bench);
    } else {
        const Cut cut(projection_[0].conv(), out_channels_, parts);
        for (int p = part; p < cut.parts(); p += parts)
            project(n, cut.unit0(p), cut.unit1(p), cut.row0(p), cut.row1(p), bench);
    }
}

template <class T>
void BlockRunner<T>::prepare_output(int n, int part, int parts, float* bench) const {
    if (block_.shortcut) {
        if (!plain_shortcut_) shortcut(n, part, parts, bench);
        return;
    }
    const int made = active_out(convs() - 1, n);
    if (made == out_channels_) return;
    const int row0 = out_height_ * part / parts, row1 = out_height_ * (part + 1) / parts;
    T* pixel = out(n) + std::ptrdiff_t(row0) * out_width_ * out_channels_;
    for (int i = (row1 - row0) * out_width_; i > 0; --i, pixel += out_channels_)
        std::fill_n(pixel + made, out_channels_ - made, T{});
}

template <class T>
void BlockRunner<T>::project(int n, int unit0, int unit1, int row0, int row1, float* bench) const {
    const BasicBlockedMap<T>& map = projection_[0];
    const BlockConv& conv = block_.projection;
    T* in = elements<T>(bench);
    float* mul = bench + map.floats();
    float* add = mul + scale_floats(conv);
    const std::size_t row = std::size_t(block_.level[n]) * conv.out_channels;
    std::copy_n(conv.scale + row, conv.out_channels, mul);
    std::copy_n(conv.shift + row, conv.out_channels, add);
    // Of x the pixels that it reads, next to each other.
    BasicMapLoad<T> load = map.load(in, x(n), block_.channels, block_.channels);
    load.in_pixel = std::ptrdiff_t(pool_) * block_.channels;
    load.in_row = load.in_pixel * block_.width;
    kernels_.load(load, row0, row1);
    BasicConvPass<T> pass = map.pass(in, static_cast<const T*>(conv.weight), block_.channels, out_channels_);
    pass.mul = mul;
    pass.add = add;
    pass.out = out(n);
    pass.out_row = std::ptrdiff_t(out_width_) * out_channels_;
    pass.out_block = kMapBlock<T>;
    pass.out_col = out_columns_.data();
    kernels_.conv(pass, unit0, unit1, row0, row1);
}

template <class T>
void BlockRunner<T>::prepare_part(float* workspace, int n, int part, int parts, float* bench) const {
    zero_part(workspace, n, part, parts);
    if (part == 0) load_scales(workspace, n);
    if (!reads_x())
        load_rows(workspace, n, block_.height * part / parts, block_.height * (part + 1) / parts);
    prepare_output(n, part, parts, bench);
}

// Convolution i of sample n: into the next map, or into the output with the shortcut added.
template <class T>
void BlockRunner<T>::conv(float* workspace, int i, int n, int unit0, int unit1, int row0, int row1) const {
    const BlockConv& conv = block_.convs[i];
    BasicConvPass<T> pass = maps_[i].pass(map(workspace, i), static_cast<const T*>(conv.weight), active_in(i, n), active_out(i, n));
    if (i == 0 && reads_x()) {
        pass.in = x(n);
        pass.in_row = std::ptrdiff_t(block_.width) * block_.channels;
        pass.in_pixel = block_.channels;
        pass.in_block = kMapBlock<T>;
    }
    pass.mul = workspace + scale_at_[i];
    pass.add = pass.mul + scale_floats(conv);
    if (i + 1 < convs()) {
        const BasicBlockedMap<T>& next = maps_[i + 1];
        pass.relu = true;
        pass.out = next.image(map(workspace, i + 1));
        pass.out_row = next.row_pitch();
        pass.out_block = next.block_pitch();
        pass.out_col = next.columns();
        pass.whole_blocks = conv.groups == 1;  // with groups another group's channels may follow in the block
    } else {
        pass.relu = block_.relu;
        pass.out = out(n);
        pass.residual = residual(n);
        pass.out_row = std::ptrdiff_t(out_width_) * out_channels_;
        pass.out_block = kMapBlock<T>;
        pass.out_col = out_columns_.data();
        pass.whole_blocks = false;
    }
    kernels_.conv(pass, unit0, unit1, row0, row1);
}

template <class T>
std::vector<WinogradTile<T>> BlockRunner<T>::sample_tiles(int i, int group, float* workspaces, const int* samples,
                                                          int count) const {
    const BlockConv& conv = block_.convs[i];
    const ConvShape& shape = maps_[i].conv();
    // Groups are whole blocks of the maps (winograd.h).
    const int first_in = group * shape.group_in(), first_out = group * shape.group_out();
    const bool of_x = i == 0 && reads_x();
    const std::ptrdiff_t in = of_x ? first_in : first_in / kMapBlock<T> * maps_[i].block_pitch();
    std::vector<WinogradTile<T>> tiles;
    tiles.reserve(count);
    for (int s = 0; s < count; ++s) {
        float* workspace = workspaces + s * workspace_floats_;
        const int n = samples[s];
        if (first_in >= active_in(i, n) || first_out >= active_out(i, n)) continue;
        WinogradTile<T> tile{};
        tile.in = (of_x ? x(n) : map(workspace, i)) + in;
        tile.mul = workspace + scale_at_[i] + first_out;
        tile.add = tile.mul + scale_floats(conv);
        if (i + 1 < convs()) {
            tile.out = maps_[i + 1].image(map(workspace, i + 1)) + first_out / kMapBlock<T> * maps_[i + 1].block_pitch();
        } else {
            tile.out = out(n) + first_out;
            tile.residual = block_.shortcut ? residual(n) + first_out : nullptr;
        }
        tile.active_in = conv.groups == 1 ? active_in(i, n) : shape.group_in();
        tile.active_out = conv.groups == 1 ? active_out(i, n) : shape.group_out();
        tiles.push_back(tile);
    }
    return tiles;
}

template <class T>
WinogradPass<T> BlockRunner<T>::winograd_pass(int i, int group, float* v, int tiles) const {
    const BlockConv& conv = block_.convs[i];
    const ConvShape& shape = maps_[i].conv();
    const std::size_t group_words = winograd_packed_words<T>(conv.winograd, shape.group_out(), shape.group_in());
    WinogradPass<T> pass = tiling(i).pass(maps_[i], static_cast<const float*>(conv.weight) + group * group_words, v, tiles);
    if (i == 0 && reads_x()) {
        tiling(i).read_images(pass);
        if (block_.pre_scale) {
            pass.in_mul = block_.pre_scale + group * shape.group_in();
            pass.in_add = block_.pre_shift + group * shape.group_in();
        }
    }
    if (i + 1 < convs()) {
        const BasicBlockedMap<T>& next = maps_[i + 1];
        pass.relu = true;
        pass.out_row = next.row_pitch();
        pass.out_block = next.block_pitch();
        pass.out_col = next.columns();
        pass.whole_blocks = true;
    } else {
        pass.relu = block_.relu;
        pass.out_row = std::ptrdiff_t(out_width_) * out_channels_;
        pass.out_block = kMapBlock<T>;
        pass.out_col = out_columns_.data();
        pass.whole_blocks = false;
    }
    return pass;
}

template <class T>
void BlockRunner<T>::winograd_tiles(int i, int group, const WinogradTile<T>* tiles, int count, int group0, int group1,
                                    float* bench) const {
    const int chunks = ceil_div(count, tiling(i).chunk());
    for (int c = 0; c < chunks; ++c) {
        const int first = count * c / chunks, some = count * (c + 1) / chunks - first;
        tiling(i).convolve(winograd_pass(i, group, bench, some), tiles + first, some, group0, group1);
    }
}

template <class T>
void BlockRunner<T>::run_team(float* workspaces, const int* samples, int count, float* bench) const {
    for (int s = 0; s < count; ++s) {
        float* workspace = workspaces + s * workspace_floats_;
        load_scales(workspace, samples[s]);
        if (!reads_x()) load_rows(workspace, samples[s], 0, block_.height);
        prepare_output(samples[s], 0, 1, bench);
    }
    for (int i = 0; i < convs(); ++i) {
        if (!is_winograd(i)) {
            const ConvShape& shape = maps_[i].conv();
            for (int s = 0; s < count; ++s)
                conv(workspaces + s * workspace_floats_, i, samples[s], 0, shape.units(active_out(i, samples[s])), 0,
                     shape.out_height());
            continue;
        }
        for (int group = 0; group < block_.convs[i].groups; ++group) {
            const std::vector<WinogradTile<T>> of_each = sample_tiles(i, group, workspaces, samples, count);
            const int total = int(of_each.size()) * tiling(i).tiles();
            winograd_tiles(i, group, tiling(i).tiles_of(of_each, 0, total).data(), total, 0, tiling(i).groups(), bench);
        }
    }
}

template <class T>
void BlockRunner<T>::shared_winograd(int i, float* workspaces, const std::vector<int>& samples, float* bench,
                                     int threads) const {
    for (int group = 0; group < block_.convs[i].groups; ++group) {
        const std::vector<WinogradTile<T>> of_each = sample_tiles(i, group, workspaces, samples.data(), int(samples.size()));
        int widest = 0;
        for (const WinogradTile<T>& tile : of_each) widest = std::max(widest, tile.active_out);
        // What every thread reads is to be the smaller of weights and transformed tiles.
        const bool by_tiles = int(of_each.size()) * tiling(i).tiles() >= widest;
        // Static: a thread meets the rows, or the channels, that it wrote.
#pragma omp for schedule(static) nowait
        for (int piece = 0; piece < threads; ++piece) {
            if (by_tiles)
                tiles_piece(i, group, of_each, piece, threads, bench);
            else
                channels_piece(i, group, of_each, widest, piece, threads, bench);
        }
    }
#pragma omp barrier
}

template <class T>
void BlockRunner<T>::tiles_piece(int i, int group, const std::vector<WinogradTile<T>>& samples, int piece, int pieces,
                                 float* bench) const {
    const int each = tiling(i).tiles();
    double total = 0;
    for (const WinogradTile<T>& tile : samples) total += each * cost_of(tile, 0, tile.active_out);
    // Where piece p begins: at the fewest tiles that cost p / pieces of the total. A sample's cost the same.
    const auto first_tile = [&](int p) {
        double before = total * p / pieces;
        int first = 0;
        for (const WinogradTile<T>& tile : samples) {
            const double cost = cost_of(tile, 0, tile.active_out);
            const int some = std::min(each, int(std::ceil(before / cost - 1e-9)));
            if (some <= 0) break;
            first += some, before -= some * cost;
        }
        return first;
    };
    const int first = first_tile(piece), last = first_tile(piece + 1);
    winograd_tiles(i, group, tiling(i).tiles_of(samples, first, last).data(), last - first, 0, tiling(i).groups(), bench);
}

template <class T>
void BlockRunner<T>::channels_piece(int i, int group, const std::vector<WinogradTile<T>>& samples, int widest, int piece,
                                    int pieces, float* bench) const {
    const std::vector<WinogradTile<T>> all = tiling(i).tiles_of(samples, 0, int(samples.size()) * tiling(i).tiles());
    // Units of work: groups of output channels, each cut into parts by tiles where else they would not come out even.
    const int total = int(all.size()), groups = winograd_groups(widest);
    const int parts = std::min(pieces / std::gcd(groups, pieces), ceil_div(total, kFewestTiles));
    std::vector<double> cost;  // [group][part]
    for (int unit = 0; unit < groups * parts; ++unit) {
        const int first = unit / parts * kWinogradGroup, part = unit % parts;
        double sum = 0;
        for (int t = total * part / parts; t < total * (part + 1) / parts; ++t)
            sum += cost_of(all[t], first, first + kWinogradGroup);
        cost.push_back(sum);
    }
    const std::vector<int> cuts = even_cuts(cost, pieces);
    for (int part = 0; part < parts; ++part) {
        // The groups g whose unit g * parts + part is this piece's.
        const int group0 = (cuts[piece] + parts - 1 - part) / parts, group1 = (cuts[piece + 1] + parts - 1 - part) / parts;
        const int first = total * part / parts, some = total * (part + 1) / parts - first;
        if (group0 < group1) winograd_tiles(i, group, all.data() + first, some, group0, group1, bench);
    }
}

template class BlockRunner<float>;
template class BlockRunner<bf16>;

}  // namespace den
