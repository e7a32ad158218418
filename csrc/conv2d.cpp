#include "conv2d.h"

#include <algorithm>
#include <numeric>

#include "dispatch.h"
#include "pack.h"
#include "schedule.h"

namespace den {

namespace {

class Runner {
public:
    Runner(const Conv2d& args, const float* packed, const float* ones, const float* bias)
        : args_(args), kernels_(kernels()), map_(args.shape), packed_(packed), ones_(ones), bias_(bias),
          out_columns_(nhwc_columns(args.shape.out_width(), args.shape.out_channels)) {}

    std::size_t workspace_floats() const { return map_.floats(); }

    int in_width(int n) const { return args_.in_width[n]; }
    int out_width(int n) const { return args_.out_width[n]; }
    // Output channels that anything is multiplied for. With groups, an active output group whose inputs are not active
    // is its bias alone.
    int computed(int n) const {
        const ConvShape& s = args_.shape;
        if (s.groups == 1) return in_width(n) > 0 ? out_width(n) : 0;
        return std::min(out_width(n), in_width(n) / s.group_in() * s.group_out());
    }

    // A cost for every sample that has something to write, even when nothing is to be multiplied.
    double cost(int n) const {
        const ConvShape& s = args_.shape;
        const double pixels = double(s.out_height()) * s.out_width();
        return s.macs_per_channel_pair() * in_width(n) * out_width(n) / s.groups + pixels * s.out_channels;
    }

    Cut cut(int n, int parts) const { return Cut(args_.shape, in_width(n), computed(n), parts); }

    void zero_borders(float* map) const { map_.zero_border(map, args_.shape.in_channels); }

    void load_rows(float* map, int n, int row0, int row1) const {
        const ConvShape& s = args_.shape;
        MapLoad load{};
        load.in_row = std::ptrdiff_t(s.width) * s.in_channels;
        load.in = args_.x + n * load.in_row * s.height;
        load.in_pixel = s.in_channels;
        load.width = s.width;
        load.channels = in_width(n);
        load.out = map_.image(map);
        load.out_row = map_.row_pitch();
        load.out_block = map_.block_pitch();
        load.out_col = map_.read_columns();
        load.row_read = map_.read_rows();
        kernels_.load(load, row0, row1);
    }

    void conv(const float* map, int n, int unit0, int unit1, int row0, int row1) const {
        const ConvShape& s = args_.shape;
        ConvPass pass = map_.pass(map, packed_, in_width(n), computed(n));
        pass.mul = ones_;
        pass.add = bias_;
        pass.residual = args_.residual ? args_.residual + offset(n) : nullptr;
        pass.out = args_.out + offset(n);
        pass.out_row = std::ptrdiff_t(s.out_width()) * s.out_channels;
        pass.out_block = kBlock;
        pass.out_col = out_columns_.data();
        kernels_.conv(pass, unit0, unit1, row0, row1);
    }

    // The output channels that no multiplication reaches: the residual, or bias alone and then zeros beyond the width.
    void fill_rest(int n, int row0, int row1) const {
        const ConvShape& s = args_.shape;
        const int from = computed(n), width = out_width(n), channels = s.out_channels;
        if (from == channels) return;
        const std::ptrdiff_t first = std::ptrdiff_t(row0) * s.out_width() * channels;
        const std::ptrdiff_t pixels = std::ptrdiff_t(row1 - row0) * s.out_width();
        float* pixel = args_.out + offset(n) + first;
        if (args_.residual) {
            const float* residual = args_.residual + offset(n) + first;
            for (std::ptrdiff_t i = 0; i < pixels; ++i, pixel += channels, residual += channels)
                std::copy_n(residual + from, channels - from, pixel + from);
            return;
        }
        for (std::ptrdiff_t i = 0; i < pixels; ++i, pixel += channels) {
            if (from < width) std::copy_n(bias_ + from, width - from, pixel + from);
            std::fill_n(pixel + width, channels - width, 0.0f);
        }
    }

    int units(int n) const { return args_.shape.units(computed(n)); }

private:
    std::ptrdiff_t offset(int n) const {
        const ConvShape& s = args_.shape;
        return std::ptrdiff_t(n) * s.out_height() * s.out_width() * s.out_channels;
    }

    const Conv2d& args_;
    const Kernels& kernels_;
    BlockedMap map_;
    const float* packed_;
    const float* ones_;
    const float* bias_;
    std::vector<std::ptrdiff_t> out_columns_;
};

}  // namespace

void conv2d(const Conv2d& args) {
    const ConvShape& shape = args.shape;
    const int out_height = shape.out_height(), threads = std::max(1, args.threads);
    if (args.samples == 0 || out_height <= 0 || shape.out_width() <= 0) return;

    std::vector<float> ones(shape.out_channels + kBlock, 1.0f), bias(shape.out_channels + kBlock, 0.0f);
    if (args.bias) std::copy_n(args.bias, shape.out_channels, bias.begin());

    // Memory: packed weights, one workspace a thread, one a shared sample.
    const std::size_t weight_floats =
        packed_floats(shape.out_channels, shape.group_in(), shape.taps(), shape.groups);
    const Runner sizes(args, nullptr, nullptr, nullptr);
    std::vector<int> order(args.samples);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return sizes.cost(a) > sizes.cost(b); });
    std::vector<double> cost;
    for (int n : order) cost.push_back(sizes.cost(n));
    const int whole = count_whole(cost, threads), shared = args.samples - whole;
    const int parts = shared ? ceil_div(2 * threads, shared) : 1;
    const std::size_t floats = sizes.workspace_floats();
    float* packed = scratch(weight_floats + ((whole ? threads : 0) + shared) * floats);
    float* memory = packed + weight_floats;
    float* shared_memory = memory + (whole ? threads : 0) * floats;
    pack_weight(args.weight, shape.out_channels, shape.group_in(), shape.taps(), shape.groups, threads, packed);

    const Runner run(args, packed, ones.data(), bias.data());
    std::vector<Cut> cuts;
    for (int s = 0; s < shared; ++s) cuts.push_back(run.cut(order[whole + s], parts));

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* map = memory + thread_index() * floats;
        bool bordered = false;
#pragma omp for schedule(dynamic, 1) nowait
        for (int i = 0; i < whole; ++i) {
            const int n = order[i];
            run.fill_rest(n, 0, out_height);
            if (run.units(n) == 0) continue;
            if (!bordered) run.zero_borders(map);  // once: samples only write inside
            bordered = true;
            run.load_rows(map, n, 0, shape.height);
            run.conv(map, n, 0, run.units(n), 0, out_height);
        }
        if (shared) {
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < shared * parts; ++i) {
                float* of = shared_memory + i / parts * floats;
                const int n = order[whole + i / parts], part = i % parts;
                if (part == 0) run.zero_borders(of);
                run.load_rows(of, n, shape.height * part / parts, shape.height * (part + 1) / parts);
                run.fill_rest(n, out_height * part / parts, out_height * (part + 1) / parts);
            }
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < shared * parts; ++i) {
                const int s = i / parts;
                for (int p = i % parts; p < cuts[s].parts(); p += parts)
                    run.conv(shared_memory + s * floats, order[whole + s], cuts[s].unit0(p), cuts[s].unit1(p),
                             cuts[s].row0(p), cuts[s].row1(p));
            }
        }
    }
}

}  // namespace den
