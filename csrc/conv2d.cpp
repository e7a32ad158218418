#include "conv2d.h"

#include <algorithm>
#include <numeric>

#include "dispatch.h"
#include "pack.h"
#include "schedule.h"
#include "winograd_conv2d.h"

namespace den {

namespace {

bool is_plain_1x1(const ConvShape& s) {
    return s.taps() == 1 && s.stride.y == 1 && s.stride.x == 1 && s.padding.y == 0 && s.padding.x == 0;
}

template <class T>
class Runner {
public:
    Runner(const Conv2d<T>& args, const T* packed, const float* ones, const float* bias)
        : args_(args), kernels_(kernels<T>()), map_(args.shape), band_(band_shape(args.shape)), packed_(packed), ones_(ones), bias_(bias),
          out_columns_(nhwc_columns(args.shape.out_width(), args.shape.out_channels)) {}

    // Memory for the map of a sample that one thread computes, a band of rows after the other, and of a shared one.
    std::size_t own_floats() const { return band_.floats(); }
    std::size_t shared_floats() const { return map_.floats(); }

    int in_width(int n) const { return args_.in_width[n]; }
    int out_width(int n) const { return args_.out_width[n]; }
    int computed(int n) const { return args_.computed(n); }

    // A cost for every sample that has something to write, even when nothing is to be multiplied.
    double cost(int n) const {
        const ConvShape& s = args_.shape;
        const double pixels = double(s.out_height()) * s.out_width();
        return s.macs_per_channel_pair() * in_width(n) * out_width(n) / s.groups + pixels * s.out_channels;
    }

    Cut cut(int n, int parts) const { return Cut(args_.shape, computed(n), parts); }

    // The steps of a shared sample, whose map holds the whole image.
    void zero_borders(T* map) const { map_.zero_border(map, args_.shape.in_channels); }
    void load_rows(T* map, int n, int row0, int row1) const { load_rows(map_, map, n, 0, row0, row1); }
    void conv(const T* map, int n, int unit0, int unit1, int row0, int row1) const {
        conv(map_, map, n, 0, unit0, unit1, row0, row1);
    }

    void zero_own_borders(T* map) const { band_.zero_border(map, args_.shape.in_channels); }

    void whole_sample(T* map, int n) const {
        const ConvShape& s = args_.shape;
        const int height = s.out_height();
        if (units(n) == 0) return fill_rest(n, 0, height);
        const int reach = s.dilation.y * (s.kernel.y - 1) + 1 - s.padding.y;
        for (int row0 = 0, loaded = 0; row0 < height; row0 += band_rows(s)) {
            const int row1 = std::min(row0 + band_rows(s), height);
            const int origin = reads_rows_once(s) ? row0 : 0;
            if (origin) loaded = origin * s.stride.y;
            const int needed = std::min((row1 - 1) * s.stride.y + reach, s.height);
            if (needed > loaded) load_rows(band_, map, n, origin, loaded, needed);
            loaded = std::max(loaded, needed);
            conv(band_, map, n, origin, 0, units(n), row0, row1);
            fill_rest(n, row0, row1);
        }
    }

    void fill_rest(int n, int row0, int row1) const { args_.fill_rest(n, row0, row1); }
    int units(int n) const { return args_.shape.units(computed(n)); }

private:
    // A plain 1x1 convolution reads the image itself, unless its channels end in half a pair.
    bool reads_image(int n) const { return is_plain_1x1(args_.shape) && in_width(n) % kWord<T> == 0; }

    static bool reads_rows_once(const ConvShape& s) { return s.kernel.y == 1 && s.padding.y == 0; }

    // Output rows of a band: as many as read and write about a quarter of the L2 cache.
    static int band_rows(const ConvShape& s) {
        constexpr double kBytes = 256 << 10;
        const double row_in = double(s.stride.y) * (s.width + 2 * s.padding.x) * round_up(s.in_channels, kMapBlock<T>);
        const double row = (row_in + double(s.out_width()) * s.out_channels) * sizeof(T);
        const int most = std::max(1, int(kBytes / row)), rows = s.out_height();
        return round_up(ceil_div(rows, ceil_div(rows, most)), 2);
    }

    // What the map of a thread's own samples holds: a band where no row is read twice, so that it stays in the cache;
    // else the image, filled from the top as the bands go down.
    static ConvShape band_shape(const ConvShape& s) {
        ConvShape band = s;
        if (reads_rows_once(s)) band.height = std::min(s.height, band_rows(s) * s.stride.y);
        return band;
    }

    // Image rows [row0, row1) into a map whose first row is that which output row `origin` reads first.
    void load_rows(const BasicBlockedMap<T>& to, T* map, int n, int origin, int row0, int row1) const {
        const ConvShape& s = args_.shape;
        if (reads_image(n)) return;
        const int first = origin * s.stride.y;
        const T* image = args_.x + (std::ptrdiff_t(n) * s.height + first) * s.width * s.in_channels;
        kernels_.load(to.load(map, image, s.in_channels, in_width(n)), row0 - first, row1 - first);
    }

    // Output rows [row0, row1) from such a map.
    void conv(const BasicBlockedMap<T>& from, const T* map, int n, int origin, int unit0, int unit1, int row0,
              int row1) const {
        const ConvShape& s = args_.shape;
        BasicConvPass<T> pass = from.pass(map, packed_, in_width(n), computed(n));
        if (reads_image(n)) {
            pass.in_pixel = s.in_channels;
            pass.in_row = std::ptrdiff_t(s.width) * s.in_channels;
            pass.in_block = kMapBlock<T>;
            pass.in = args_.x + std::ptrdiff_t(n) * s.height * s.width * s.in_channels + origin * pass.in_row;
        }
        pass.mul = ones_;
        pass.add = bias_;
        pass.out_row = std::ptrdiff_t(s.out_width()) * s.out_channels;
        const std::ptrdiff_t first = args_.out_offset(n) + origin * pass.out_row;
        pass.residual = args_.residual ? args_.residual + first : nullptr;
        pass.out = args_.out + first;
        pass.out_block = kMapBlock<T>;
        pass.out_col = out_columns_.data();
        kernels_.conv(pass, unit0, unit1, row0 - origin, row1 - origin);
    }


    const Conv2d<T>& args_;
    const BasicKernels<T>& kernels_;
    BasicBlockedMap<T> map_, band_;
    const T* packed_;
    const float* ones_;
    const float* bias_;
    std::vector<std::ptrdiff_t> out_columns_;
};

// A 1x1 convolution sees no rows: those of a small image are joined to longer ones, which split into better tiles.
ConvShape joined_rows(ConvShape s) {
    constexpr int kEnough = 48;  // pixels
    if (!is_plain_1x1(s)) return s;
    int rows = 1;
    while (rows < s.height && (rows * s.width < kEnough || s.height % rows)) ++rows;
    s.width *= rows;
    s.height /= rows;
    return s;
}

}  // namespace

template <class T>
void Conv2d<T>::fill_rest(int n, int row0, int row1) const {
    const int from = computed(n), width = out_width[n], channels = shape.out_channels;
    if (from == channels) return;
    const std::ptrdiff_t first = out_offset(n) + std::ptrdiff_t(row0) * shape.out_width() * channels;
    const std::ptrdiff_t pixels = std::ptrdiff_t(row1 - row0) * shape.out_width();
    T* pixel = out + first;
    for (std::ptrdiff_t i = 0; i < pixels; ++i, pixel += channels) {
        if (residual) {
            std::copy_n(residual + first + i * channels + from, channels - from, pixel + from);
            continue;
        }
        if (bias && from < width)
            std::copy(bias + from, bias + width, pixel + from);
        else
            std::fill(pixel + from, pixel + std::max(from, width), T{});
        std::fill_n(pixel + width, channels - width, T{});
    }
}

template <class T>
void conv2d(const Conv2d<T>& given) {
    if (winograd_suits(given)) return winograd_conv2d(given);
    Conv2d<T> args = given;
    args.shape = joined_rows(given.shape);
    const ConvShape& shape = args.shape;
    const int out_height = shape.out_height(), threads = std::max(1, args.threads);
    if (args.samples == 0 || out_height <= 0 || shape.out_width() <= 0) return;

    std::vector<float> ones(shape.out_channels + kBlock, 1.0f), bias(shape.out_channels + kBlock, 0.0f);
    if (args.bias) std::transform(args.bias, args.bias + shape.out_channels, bias.begin(), [](T b) { return to_float(b); });

    // Memory: packed weights, one workspace a thread, one a shared sample.
    const std::size_t weight_floats =
        packed_elements<T>(shape.out_channels, shape.group_in(), shape.taps(), shape.groups) / kWord<T>;
    const Runner<T> sizes(args, nullptr, nullptr, nullptr);
    std::vector<int> order(args.samples);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return sizes.cost(a) > sizes.cost(b); });
    std::vector<double> cost;
    for (int n : order) cost.push_back(sizes.cost(n));
    const int whole = count_whole(cost, threads), shared = args.samples - whole;
    const int parts = shared ? ceil_div(2 * threads, shared) : 1;
    const std::size_t own_floats = sizes.own_floats(), shared_floats = sizes.shared_floats();
    float* memory = scratch(Scratch::kWork, weight_floats + (whole ? threads : 0) * own_floats + shared * shared_floats);
    float* const own_memory = memory + weight_floats;
    float* const shared_memory = own_memory + (whole ? threads : 0) * own_floats;
    T* const packed = elements<T>(memory);
    pack_weight(args.weight, shape.out_channels, shape.group_in(), shape.taps(), shape.groups, threads, packed);

    const Runner<T> run(args, packed, ones.data(), bias.data());
    std::vector<Cut> cuts;
    for (int s = 0; s < shared; ++s) cuts.push_back(run.cut(order[whole + s], parts));

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        T* map = elements<T>(own_memory + thread_index() * own_floats);
        bool bordered = false;
#pragma omp for schedule(dynamic, 1) nowait
        for (int i = 0; i < whole; ++i) {
            if (!bordered) run.zero_own_borders(map);  // once: samples only write inside
            bordered = true;
            run.whole_sample(map, order[i]);
        }
        if (shared) {
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < shared * parts; ++i) {
                T* of = elements<T>(shared_memory + i / parts * shared_floats);
                const int n = order[whole + i / parts], part = i % parts;
                if (part == 0) run.zero_borders(of);
                run.load_rows(of, n, shape.height * part / parts, shape.height * (part + 1) / parts);
                run.fill_rest(n, out_height * part / parts, out_height * (part + 1) / parts);
            }
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < shared * parts; ++i) {
                const int s = i / parts;
                for (int p = i % parts; p < cuts[s].parts(); p += parts)
                    run.conv(elements<T>(shared_memory + s * shared_floats), order[whole + s], cuts[s].unit0(p), cuts[s].unit1(p),
                             cuts[s].row0(p), cuts[s].row1(p));
            }
        }
    }
}

template void conv2d(const Conv2d<float>&);
template void conv2d(const Conv2d<bf16>&);

}  // namespace den
