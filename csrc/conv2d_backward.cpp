#include "conv2d_backward.h"

#include <algorithm>

#include "conv2d.h"
#include "dispatch.h"
#include "pack.h"
#include "schedule.h"
#include "weight_grad.h"

namespace den {

namespace {

// The taps of one dimension that reach the pixels i of dx with (i + padding) % stride == phase. Pixel number t of them
// is first + t * stride, and takes the gradient's pixel start + t - back[j] times tap[j].
struct Phase {
    int first = 0, count = 0, start = 0;
    std::vector<int> tap, back;

    Phase(int size, int kernel, int stride, int padding, int dilation, int phase) {
        start = (padding - phase + stride - 1) / stride;
        first = start * stride + phase - padding;
        if (first < size) count = (size - 1 - first) / stride + 1;
        for (int k = 0; k < kernel; ++k)
            if (k * dilation % stride == phase) tap.push_back(k), back.push_back((k * dilation - phase) / stride);
    }
    // Pixels of zeros that are read before and behind a gradient of `grad_size`.
    int border(int grad_size) const {
        if (tap.empty() || count == 0) return 0;
        return std::max({0, back.back() - start, start + count - back.front() - grad_size});
    }
    // For pixel t, the entries of `tap` whose pixel of the gradient exists.
    TapRange inside(int t, int grad_size) const {
        int begin = 0, end = int(tap.size());
        while (begin < end && start + t - back[begin] >= grad_size) ++begin;
        while (begin < end && start + t - back[end - 1] < 0) --end;
        return {begin, end};
    }
};

std::vector<Phase> phases(int size, int kernel, int stride, int padding, int dilation) {
    std::vector<Phase> result;
    for (int p = 0; p < stride; ++p) result.emplace_back(size, kernel, stride, padding, dilation, p);
    return result;
}

// Weights of the convolution from grad to dx: [in_channels][out_channels of the group][the given taps].
void transpose_weight(const ConvShape& s, const float* weight, const std::vector<int>& taps, int threads, float* to) {
    const int group_in = s.group_in(), group_out = s.group_out(), all = s.taps(), some = int(taps.size());
    const int blocks = ceil_div(group_in, kBlock);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int b = 0; b < s.groups * blocks; ++b) {
        const int group = b / blocks, i0 = b % blocks * kBlock, i1 = std::min(group_in, i0 + kBlock);
        for (int o = 0; o < group_out; ++o)
            for (int i = i0; i < i1; ++i) {
                const float* from = weight + (std::ptrdiff_t(group * group_out + o) * group_in + i) * all;
                float* row = to + (std::ptrdiff_t(group * group_in + i) * group_out + o) * some;
                for (int t = 0; t < some; ++t) row[t] = from[taps[t]];
            }
    }
}

// Stride 1: an elastic convolution of the gradient with the transposed and flipped weights.
void data_grad_as_convolution(const Conv2dBackward& args) {
    const ConvShape& s = args.shape;
    std::vector<int> flipped;
    for (int t = s.taps() - 1; t >= 0; --t) flipped.push_back(t);
    float* weight = scratch(Scratch::kTransposed, std::size_t(s.in_channels) * s.group_out() * s.taps());
    transpose_weight(s, args.weight, flipped, args.threads, weight);
    Conv2d<float> conv{};
    conv.shape = {s.out_channels,
                  s.in_channels,
                  s.groups,
                  s.out_height(),
                  s.out_width(),
                  s.kernel,
                  {1, 1},
                  {s.dilation.y * (s.kernel.y - 1) - s.padding.y, s.dilation.x * (s.kernel.x - 1) - s.padding.x},
                  s.dilation};
    conv.x = args.grad;
    conv.weight = weight;
    conv.out = args.dx;
    conv.samples = args.samples;
    conv.in_width = args.out_width;
    conv.out_width = args.in_width;
    conv.threads = args.threads;
    conv2d(conv);
}

// Any stride: each phase of dx is a stride-1 convolution of the gradient with the taps that reach it, written to every
// stride-th pixel of dx. All read one padded map of the gradient.
class PhaseRunner {
public:
    explicit PhaseRunner(const Conv2dBackward& args)
        : args_(args), kernels_(kernels()), map_(gradient(args.shape)),
          ones_(args.shape.in_channels + kBlock, 1.0f), zeros_(args.shape.in_channels + kBlock, 0.0f) {
        const ConvShape& s = args.shape;
        for (const Phase& y : phases(s.height, s.kernel.y, s.stride.y, s.padding.y, s.dilation.y))
            for (const Phase& x : phases(s.width, s.kernel.x, s.stride.x, s.padding.x, s.dilation.x)) {
                if (y.count == 0 || x.count == 0) continue;
                if (y.tap.empty() || x.tap.empty()) {
                    untouched_ = true;  // such as three pixels in four behind a 1x1 convolution of stride 2
                    continue;
                }
                Pass pass{y, x, {}, {}, {}, {}, packed_floats_};
                for (std::size_t ky = 0; ky < y.tap.size(); ++ky)
                    for (std::size_t kx = 0; kx < x.tap.size(); ++kx) {
                        pass.taps.push_back(y.tap[ky] * s.kernel.x + x.tap[kx]);
                        pass.offsets.push_back(-y.back[ky] * map_.row_pitch() - x.back[kx] * kBlock);
                    }
                const int across = int(x.tap.size());
                for (int t = 0; t < y.count; ++t) {
                    const TapRange rows = y.inside(t, s.out_height());
                    pass.row_taps.push_back({rows.begin * across, rows.end * across});
                }
                for (int t = 0; t < x.count; ++t)
                    pass.columns.push_back(std::ptrdiff_t(x.first + t * s.stride.x) * s.in_channels);
                packed_floats_ += packed_elements<float>(s.in_channels, s.group_out(), int(pass.taps.size()), s.groups);
                passes_.push_back(std::move(pass));
            }
    }

    std::size_t packed_floats() const { return packed_floats_; }
    std::size_t map_floats() const { return map_.floats(); }

    void pack(float* packed) {
        packed_ = packed;
        const ConvShape& s = args_.shape;
        float* transposed = scratch(Scratch::kTransposed, std::size_t(s.in_channels) * s.group_out() * s.taps());
        for (const Pass& pass : passes_) {
            transpose_weight(s, args_.weight, pass.taps, args_.threads, transposed);
            pack_weight(transposed, s.in_channels, s.group_out(), int(pass.taps.size()), s.groups, args_.threads,
                        packed + pass.weight);
        }
    }

    // Part `part` of `parts` of the rows of every phase of sample n, through a map of the thread's own.
    void run(float* map, int n, int part, int parts) const {
        const ConvShape& s = args_.shape;
        const ConvShape& g = map_.conv();
        const int read = active_out(n), written = active_in(n);
        float* dx = args_.dx + std::ptrdiff_t(n) * s.height * s.width * s.in_channels;
        const int row0 = s.height * part / parts, row1 = s.height * (part + 1) / parts;
        fill(dx, row0, row1, untouched_ || read == 0 ? 0 : written);
        if (read == 0 || written == 0) return;
        const float* grad = args_.grad + std::ptrdiff_t(n) * g.height * g.width * s.out_channels;
        kernels_.load(map_.load(map, grad, s.out_channels, read), 0, g.height);
        for (const Pass& at : passes_) {
            ConvPass pass = map_.pass(map, packed_ + at.weight, read, written);
            pass.in = map_.image(map) + map_.columns()[0] + at.y.start * map_.row_pitch() + at.x.start * kBlock;
            pass.tap = at.offsets.data();
            pass.taps = int(at.taps.size());
            pass.row_taps = at.row_taps.data();
            pass.tap_edges = nullptr;
            pass.mul = ones_.data();
            pass.add = zeros_.data();
            pass.out = dx + std::ptrdiff_t(at.y.first) * s.width * s.in_channels;
            pass.out_row = std::ptrdiff_t(s.stride.y) * s.width * s.in_channels;
            pass.out_block = kBlock;
            pass.out_col = at.columns.data();
            pass.width = at.x.count;
            // The rows of this phase among the part's.
            const int begin = std::clamp(ceil_div(std::max(0, row0 - at.y.first), s.stride.y), 0, at.y.count);
            const int end = std::clamp(ceil_div(std::max(0, row1 - at.y.first), s.stride.y), 0, at.y.count);
            kernels_.conv(pass, 0, g.units(written), begin, end);
        }
    }

    void zero_border(float* map) const { map_.zero_border(map, map_.conv().in_channels); }

private:
    struct Pass {
        Phase y, x;
        std::vector<int> taps;
        std::vector<std::ptrdiff_t> offsets, columns;
        std::vector<TapRange> row_taps;
        std::size_t weight;  // where its packed weights begin
    };

    // The map of the gradient with zeros wherever a phase reads beyond it.
    static ConvShape gradient(const ConvShape& s) {
        Pair border{0, 0};
        for (const Phase& p : phases(s.height, s.kernel.y, s.stride.y, s.padding.y, s.dilation.y))
            border.y = std::max(border.y, p.border(s.out_height()));
        for (const Phase& p : phases(s.width, s.kernel.x, s.stride.x, s.padding.x, s.dilation.x))
            border.x = std::max(border.x, p.border(s.out_width()));
        return {s.out_channels, s.in_channels, s.groups, s.out_height(), s.out_width(), {1, 1}, {1, 1}, border, {1, 1}};
    }

    // Channels that multiply: with groups, those of the groups active on both sides.
    int active_groups(int n) const {
        return std::min(args_.in_width[n] / args_.shape.group_in(), args_.out_width[n] / args_.shape.group_out());
    }
    int active_in(int n) const {
        return args_.shape.groups == 1 ? args_.in_width[n] : active_groups(n) * args_.shape.group_in();
    }
    int active_out(int n) const {
        return args_.shape.groups == 1 ? args_.out_width[n] : active_groups(n) * args_.shape.group_out();
    }

    // Zeros from channel `first` on.
    void fill(float* dx, int row0, int row1, int first) const {
        const ConvShape& s = args_.shape;
        float* pixel = dx + std::ptrdiff_t(row0) * s.width * s.in_channels;
        for (std::ptrdiff_t i = 0; i < std::ptrdiff_t(row1 - row0) * s.width; ++i, pixel += s.in_channels)
            std::fill_n(pixel + first, s.in_channels - first, 0.0f);
    }

    const Conv2dBackward& args_;
    const Kernels& kernels_;
    BlockedMap map_;
    std::vector<float> ones_, zeros_;
    std::vector<Pass> passes_;
    std::size_t packed_floats_ = 0;
    const float* packed_ = nullptr;
    bool untouched_ = false;  // some pixels of dx are reached by no tap
};

void data_grad_by_phases(const Conv2dBackward& args) {
    PhaseRunner run(args);
    const int threads = args.threads;
    const std::size_t floats = run.map_floats();
    float* packed = scratch(Scratch::kWork, round_up(run.packed_floats(), kBlock) + threads * floats);
    float* memory = packed + round_up(run.packed_floats(), kBlock);
    run.pack(packed);
    const int parts = args.samples >= 2 * threads ? 1 : ceil_div(2 * threads, args.samples);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* map = memory + thread_index() * floats;
        run.zero_border(map);
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < args.samples * parts; ++i) run.run(map, i / parts, i % parts, parts);
    }
}

void data_grad(const Conv2dBackward& args) {
    const ConvShape& s = args.shape;
    // A padding beyond the kernel's reach would be a negative one of the transposed convolution.
    const bool convolution = s.stride.y == 1 && s.stride.x == 1 && s.padding.y <= s.dilation.y * (s.kernel.y - 1) &&
                             s.padding.x <= s.dilation.x * (s.kernel.x - 1);
    if (convolution)
        data_grad_as_convolution(args);
    else
        data_grad_by_phases(args);
}

}  // namespace

void conv2d_backward(const Conv2dBackward& given) {
    Conv2dBackward args = given;
    args.threads = std::max(1, given.threads);
    if (args.samples == 0) return;
    if (args.dx) data_grad(args);
    if (args.dweight)
        weight_grad({args.shape, args.grad, args.x, args.dweight, args.samples, args.in_width, args.out_width, args.threads});
    if (args.dbias) bias_grad(args.shape, args.grad, args.out_width, args.samples, args.threads, args.dbias);
}

}  // namespace den
