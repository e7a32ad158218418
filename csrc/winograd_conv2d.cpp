#include "winograd_conv2d.h"

#include <algorithm>
#include <numeric>

#include "dispatch.h"
#include "schedule.h"
#include "winograd_tiling.h"

namespace den {

namespace {

constexpr int kTile = 4;
constexpr int kFewestTiles = 32;     // in the batch
constexpr int kFewestChannels = 16;  // in and out

template <class T>
class Runner {
public:
    Runner(const Conv2d<T>& args, int team)
        : args_(args), kernels_(kernels<T>()), tiling_(kTile, args.shape), map_(args.shape, tiling_.slack()), team_(team),
          ones_(args.shape.out_channels + kBlock, 1.0f), bias_(args.shape.out_channels + kBlock, 0.0f),
          out_columns_(nhwc_columns(args.shape.out_width(), args.shape.out_channels)) {
        if (args.bias)
            std::transform(args.bias, args.bias + args.shape.out_channels, bias_.begin(), [](T b) { return to_float(b); });
    }

    std::size_t weight_floats() const {
        return winograd_packed_words<T>(kTile, args_.shape.out_channels, args_.shape.in_channels);
    }
    // Of one thread: V and products of a chunk of tiles, and the maps of a team if it needs any.
    std::size_t bench_floats() const { return tiling_.chunk_floats(team_) + (reads_x() ? 0 : team_ * map_.floats()); }

    void zero_borders(float* bench) const {
        if (reads_x()) return;
        for (int s = 0; s < team_; ++s) map_.zero_border(map(bench, s), args_.shape.in_channels);
    }

    void run(const int* samples, int count, const float* weight, float* bench) const {
        std::vector<WinogradTile<T>> computed;
        for (int s = 0; s < count; ++s) {
            const int n = samples[s];
            args_.fill_rest(n, 0, args_.shape.out_height());
            if (args_.computed(n) == 0) continue;
            if (!reads_x()) load(n, map(bench, s));
            computed.push_back(tile_of(n, reads_x() ? x(n) : map(bench, s)));
        }
        const int total = int(computed.size()) * tiling_.tiles(), chunks = ceil_div(total, tiling_.chunk());
        for (int c = 0; c < chunks; ++c) {
            const std::vector<WinogradTile<T>> some =
                tiling_.tiles_of(computed, total * c / chunks, total * (c + 1) / chunks);
            const int tiles = int(some.size());
            tiling_.convolve(pass_of(weight, bench, tiles), some.data(), tiles, 0, tiling_.groups());
        }
    }

private:
    // Whether tiles are read from the images themselves.
    bool reads_x() const { return args_.shape.in_channels % kBlock == 0; }
    const T* x(int n) const {
        const ConvShape& s = args_.shape;
        return args_.x + std::ptrdiff_t(n) * s.height * s.width * s.in_channels;
    }
    T* map(float* bench, int s) const { return elements<T>(bench + tiling_.chunk_floats(team_) + s * map_.floats()); }

    void load(int n, T* to) const {
        const ConvShape& s = args_.shape;
        kernels_.load(map_.load(to, x(n), s.in_channels, args_.in_width[n]), 0, s.height);
    }

    WinogradTile<T> tile_of(int n, const T* from) const {
        WinogradTile<T> tile{};
        tile.in = from;
        tile.out = args_.out + args_.out_offset(n);
        tile.residual = args_.residual ? args_.residual + args_.out_offset(n) : nullptr;
        tile.mul = ones_.data();
        tile.add = bias_.data();
        tile.active_in = args_.in_width[n];
        tile.active_out = args_.out_width[n];
        return tile;
    }

    WinogradPass<T> pass_of(const float* weight, float* v, int tiles) const {
        const ConvShape& s = args_.shape;
        WinogradPass<T> pass = tiling_.pass(map_, weight, v, tiles);
        if (reads_x()) tiling_.read_images(pass);
        pass.out_row = std::ptrdiff_t(s.out_width()) * s.out_channels;
        pass.out_block = kMapBlock<T>;
        pass.out_col = out_columns_.data();
        return pass;
    }

    const Conv2d<T>& args_;
    const BasicKernels<T>& kernels_;
    WinogradTiling<T> tiling_;
    BasicBlockedMap<T> map_;
    int team_;
    std::vector<float> ones_, bias_;
    std::vector<std::ptrdiff_t> out_columns_;
};

}  // namespace

template <class T>
bool winograd_suits(const Conv2d<T>& args) {
    const ConvShape& s = args.shape;
    if (kernels<T>().tiles) return false;
    if (s.kernel.y != 3 || s.kernel.x != 3 || s.stride.y != 1 || s.stride.x != 1 || s.dilation.y != 1 ||
        s.dilation.x != 1 || s.groups != 1 || std::min(s.in_channels, s.out_channels) < kFewestChannels)
        return false;
    // A map of one or two rows would fill little of its tiles.
    return std::min(s.out_height(), s.out_width()) > 2 &&
           args.samples * WinogradTiling<T>(kTile, s).tiles() >= kFewestTiles;
}

template <class T>
void winograd_conv2d(const Conv2d<T>& args) {
    const ConvShape& shape = args.shape;
    const int threads = std::max(1, args.threads);
    // Dearest first; a team for every thread, if there are as many samples.
    std::vector<int> order(args.samples);
    std::iota(order.begin(), order.end(), 0);
    const auto cost = [&](int n) { return double(args.in_width[n]) * args.out_width[n]; };
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return cost(a) > cost(b); });
    const int team = std::max(1, std::min(WinogradTiling<T>(kTile, shape).team(), args.samples / (2 * threads)));
    const int teams = ceil_div(args.samples, team);

    const Runner<T> run(args, team);
    const std::size_t floats = run.bench_floats();
    float* weight = scratch(Scratch::kWork, run.weight_floats() + threads * floats);
    float* benches = weight + run.weight_floats();
    winograd_pack(kTile, args.weight, shape.out_channels, shape.in_channels, threads, weight);

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* bench = benches + thread_index() * floats;
        bool bordered = false;
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < teams; ++i) {
            if (!bordered) run.zero_borders(bench);  // once: samples only write inside
            bordered = true;
            run.run(order.data() + i * team, std::min(team, args.samples - i * team), weight, bench);
        }
    }
}

template bool winograd_suits(const Conv2d<float>&);
template bool winograd_suits(const Conv2d<bf16>&);
template void winograd_conv2d(const Conv2d<float>&);
template void winograd_conv2d(const Conv2d<bf16>&);

}  // namespace den
