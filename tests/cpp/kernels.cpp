// The kernels without Python, for machines that have none (an emulated aarch64): convolutions and residual blocks of
// random shapes, widths and levels against plain loops in double. Inactive input channels and the output hold NaN
// before the call. One, two and three threads must give the same bits.
//
// Link with every object of the extension but bindings.cpp's; .ci/aarch64 does.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/conv2d.h"
#include "../../csrc/dispatch.h"
#include "../../csrc/pack.h"
#include "../../csrc/residual_block.h"
#include "../../csrc/winograd.h"

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
std::mt19937 engine(1);

int pick(int low, int high) { return low + int(engine() % unsigned(high - low + 1)); }
template <class T>
T one_of(std::initializer_list<T> values) {
    return values.begin()[pick(0, int(values.size()) - 1)];
}

Floats normal(std::size_t count, float scale = 1) {
    std::normal_distribution<float> draw(0, scale);
    Floats values(count);
    for (float& value : values) value = draw(engine);
    return values;
}

// One sample, x and the result NHWC, weight OIHW; channels beyond the widths are not read and come out 0.
Doubles convolve(const Doubles& x, const Floats& weight, const den::ConvShape& s, int in_width, int out_width) {
    const int height = s.out_height(), width = s.out_width();
    Doubles out(std::size_t(height) * width * s.out_channels, 0.0);
    for (int row = 0; row < height; ++row)
        for (int col = 0; col < width; ++col)
            for (int o = 0; o < out_width; ++o)
                for (int i = 0; i < s.group_in(); ++i)
                    for (int ky = 0; ky < s.kernel.y; ++ky)
                        for (int kx = 0; kx < s.kernel.x; ++kx) {
                            const int c = o / s.group_out() * s.group_in() + i;
                            const int y = row * s.stride.y + ky * s.dilation.y - s.padding.y;
                            const int x0 = col * s.stride.x + kx * s.dilation.x - s.padding.x;
                            if (c >= in_width || y < 0 || y >= s.height || x0 < 0 || x0 >= s.width) continue;
                            out[(std::size_t(row) * width + col) * s.out_channels + o] +=
                                x[(std::size_t(y) * s.width + x0) * s.in_channels + c] *
                                weight[((std::size_t(o) * s.group_in() + i) * s.kernel.y + ky) * s.kernel.x + kx];
                        }
    return out;
}

bool close(const float* actual, const Doubles& expected) {
    for (std::size_t i = 0; i < expected.size(); ++i)
        if (!(std::abs(actual[i] - expected[i]) <= 1e-4 + 1e-4 * std::abs(expected[i]))) {
            std::printf("value %zu is %g, expected %g\n", i, double(actual[i]), expected[i]);
            return false;
        }
    return true;
}

bool same_bits(const Floats& a, const Floats& b) {
    return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

bool conv2d_case() {
    const int groups = one_of({1, 1, 1, 2, 3});
    den::ConvShape s{};
    s.in_channels = groups * one_of({1, 3, 8, 11, 16, 24});
    s.out_channels = groups * one_of({1, 5, 8, 16, 20, 40});
    s.groups = groups;
    s.kernel = one_of<den::Pair>({{1, 1}, {3, 3}, {2, 3}, {5, 1}});
    s.stride = one_of<den::Pair>({{1, 1}, {1, 1}, {2, 2}, {3, 1}});
    s.dilation = one_of<den::Pair>({{1, 1}, {1, 1}, {2, 3}});
    s.padding = {pick(0, 2), pick(0, 2)};
    s.height = s.dilation.y * (s.kernel.y - 1) + 1 + pick(0, 9);
    s.width = s.dilation.x * (s.kernel.x - 1) + 1 + pick(0, 9);
    const int samples = pick(1, 4);
    const std::size_t in_floats = std::size_t(s.height) * s.width * s.in_channels;
    const std::size_t out_floats = std::size_t(s.out_height()) * s.out_width() * s.out_channels;

    const Floats weight = normal(std::size_t(s.out_channels) * s.group_in() * s.taps(), 0.1f);
    const Floats bias = normal(s.out_channels);
    Floats x = normal(samples * in_floats);
    std::vector<int> in_width, out_width;
    std::vector<Doubles> expected;
    for (int n = 0; n < samples; ++n) {
        in_width.push_back(groups == 1 ? pick(0, s.in_channels) : s.group_in() * pick(0, groups));
        out_width.push_back(groups == 1 ? pick(0, s.out_channels) : s.group_out() * pick(0, groups));
        const auto image = x.begin() + n * in_floats;
        expected.push_back(convolve(Doubles(image, image + in_floats), weight, s, in_width[n], out_width[n]));
        for (std::size_t i = 0; i < out_floats; ++i)
            if (int(i % s.out_channels) < out_width[n]) expected[n][i] += bias[i % s.out_channels];
        for (std::size_t i = 0; i < in_floats; ++i)
            if (int(i % s.in_channels) >= in_width[n]) image[i] = kNaN;
    }

    Floats first;
    for (int threads = 1; threads <= 3; ++threads) {
        Floats out(samples * out_floats, kNaN);
        den::Conv2d<float> args{};
        args.shape = s;
        args.x = x.data(), args.weight = weight.data(), args.bias = bias.data(), args.out = out.data();
        args.samples = samples;
        args.in_width = in_width.data(), args.out_width = out_width.data();
        args.threads = threads;
        den::conv2d(args);
        for (int n = 0; n < samples; ++n)
            if (!close(out.data() + n * out_floats, expected[n])) return false;
        if (threads == 1) first = out;
        if (!same_bits(out, first)) return std::printf("%d threads give other bits than one\n", threads), false;
    }
    return true;
}

// Stride 1 and equal channels: the shortcut is x.
bool residual_block_case() {
    const int channels = one_of({3, 8, 16, 20, 32}), hidden = one_of({4, 16, 20, 48}), samples = pick(1, 5);
    const bool bottleneck = pick(0, 1), preactivation = pick(0, 1), relu = pick(0, 1);
    const int height = pick(1, 11), width = pick(1, 11);
    const std::size_t floats = std::size_t(height) * width * channels;
    std::vector<int> widths{0, pick(0, hidden), hidden};
    std::vector<int> level, order(samples);
    for (int n = 0; n < samples; ++n) level.push_back(pick(0, 2));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return level[a] > level[b]; });

    const std::vector<int> kernels = bottleneck ? std::vector<int>{1, 3, 1} : std::vector<int>{3, 3};
    const std::size_t convs = kernels.size();
    std::vector<den::ConvShape> shapes;
    std::vector<int> winograd;
    std::vector<Floats> weight, packed, scale, shift;
    for (std::size_t i = 0; i < convs; ++i) {
        const int in = i == 0 ? channels : hidden, out = i + 1 == convs ? channels : hidden;
        const int kernel = kernels[i], pad = kernel / 2;
        shapes.push_back({in, out, 1, height, width, {kernel, kernel}, {1, 1}, {pad, pad}, {1, 1}});
        const int taps = kernel * kernel;
        weight.push_back(normal(std::size_t(out) * in * taps, 1 / std::sqrt(float(in * taps))));
        winograd.push_back(kernel == 3 ? one_of({0, 2, 4}) : 0);
        if (winograd[i]) {
            packed.emplace_back(den::winograd_packed_words<float>(winograd[i], out, in));
            den::winograd_pack(winograd[i], weight[i].data(), out, in, 1, packed[i].data());
        } else {
            packed.emplace_back(den::packed_elements<float>(out, in, taps, 1));
            den::pack_weight(weight[i].data(), out, in, taps, 1, 1, packed[i].data());
        }
        scale.push_back(normal(widths.size() * out));
        shift.push_back(normal(widths.size() * out));
    }
    const Floats x = normal(samples * floats), pre_scale = normal(channels), pre_shift = normal(channels);

    std::vector<Doubles> expected;
    for (int n = 0; n < samples; ++n) {
        const Doubles image(x.begin() + n * floats, x.begin() + (n + 1) * floats);
        expected.push_back(image);
        const int active = widths[level[n]];
        if (active == 0) continue;
        Doubles h = image;
        for (std::size_t i = 0; preactivation && i < floats; ++i)
            h[i] = std::max(0.0, h[i] * pre_scale[i % channels] + pre_shift[i % channels]);
        for (std::size_t i = 0; i < convs; ++i) {
            const bool last = i + 1 == convs;
            const int out = shapes[i].out_channels;
            h = convolve(h, weight[i], shapes[i], i == 0 ? channels : active, last ? channels : active);
            for (std::size_t p = 0; p < h.size(); ++p) {
                const std::size_t at = std::size_t(level[n]) * out + p % out;
                h[p] = h[p] * scale[i][at] + shift[i][at];
                if (!last) h[p] = std::max(0.0, h[p]);
            }
        }
        for (std::size_t p = 0; p < floats; ++p) {
            expected[n][p] += h[p];
            if (relu) expected[n][p] = std::max(0.0, expected[n][p]);
        }
    }

    Floats first;
    for (int threads = 1; threads <= 3; ++threads) {
        Floats out(samples * floats, kNaN);
        den::ResidualBlock block{};
        block.x = x.data(), block.out = out.data();
        block.samples = samples, block.channels = channels, block.height = height, block.width = width;
        block.level = level.data(), block.order = order.data();
        block.widths = widths.data(), block.levels = int(widths.size());
        for (std::size_t i = 0; i < convs; ++i) {
            den::BlockConv conv{};
            conv.weight = packed[i].data(), conv.scale = scale[i].data(), conv.shift = shift[i].data();
            conv.out_channels = shapes[i].out_channels, conv.kernel = kernels[i], conv.stride = 1, conv.groups = 1;
            conv.winograd = winograd[i];
            block.convs.push_back(conv);
        }
        if (preactivation) block.pre_scale = pre_scale.data(), block.pre_shift = pre_shift.data();
        block.relu = relu;
        block.threads = threads;
        den::residual_block<float>(block);
        for (int n = 0; n < samples; ++n)
            if (!close(out.data() + n * floats, expected[n])) return false;
        if (threads == 1) first = out;
        if (!same_bits(out, first)) return std::printf("%d threads give other bits than one\n", threads), false;
    }
    return true;
}

}  // namespace

int main() {
    constexpr int cases = 100;
    for (const std::string& isa : den::supported_isas()) {
        den::set_isa(isa);
        for (int i = 0; i < cases; ++i) {
            if (!conv2d_case()) return std::printf("%s: conv2d case %d failed\n", isa.c_str(), i), 1;
            if (!residual_block_case()) return std::printf("%s: residual_block case %d failed\n", isa.c_str(), i), 1;
        }
        std::printf("%s: %d convolutions and %d residual blocks agree with the loops\n", isa.c_str(), cases, cases);
    }
}
