#include "weight_grad_group.h"

#include <algorithm>
#include <cstdint>

#include "dispatch.h"

namespace den {

WeightGradGroup::WeightGradGroup(const WeightGrad& weight_grad, int which)
    : args(weight_grad), group(which), shape(weight_grad.shape) {
    shape.in_channels = args.shape.group_in(), shape.out_channels = args.shape.group_out(), shape.groups = 1;
    const auto active = [which](int width, int channels) { return std::clamp(width - which * channels, 0, channels); };
    const auto in_of = [&](int n) { return active(args.in_width[n], shape.in_channels); };
    const auto out_of = [&](int n) { return active(args.out_width[n], shape.out_channels); };
    for (int n = 0; n < args.samples; ++n)
        if (in_of(n) > 0 && out_of(n) > 0) sample.push_back(n);
    std::stable_sort(sample.begin(), sample.end(), [&](int a, int b) {
        return std::int64_t(in_of(a)) * out_of(a) > std::int64_t(in_of(b)) * out_of(b);
    });
    for (int n : sample) {
        in.push_back(in_of(n)), out.push_back(out_of(n));
        widest_in = std::max(widest_in, in.back()), widest_out = std::max(widest_out, out.back());
    }
}

namespace {

void load_map(const BlockedMap& map, float* to, const float* from, int n, int channels, int pixel, int whole, int row0,
              int row1) {
    const ConvShape& s = map.conv();
    const MapLoad load = map.load(to, from + std::ptrdiff_t(n) * s.height * s.width * pixel, pixel, channels);
    kernels().load(load, row0, row1);
    const int end = std::min(round_up(channels, whole), round_up(s.in_channels, kBlock));
    for (int c = channels; c < end; c = round_up(c + 1, kBlock))
        for (int row = row0; row < row1; ++row) {
            float* line = load.out + (c / kBlock) * load.out_block + row * load.out_row + c % kBlock;
            for (int col = 0; col < s.width; ++col)
                if (load.out_col[col] >= 0) std::fill_n(line + load.out_col[col], kBlock - c % kBlock, 0.0f);
        }
}

}  // namespace

void WeightGradGroup::load_x(const BlockedMap& map, float* to, int i, int whole, int row0, int row1) const {
    load_map(map, to, args.x + group * shape.in_channels, sample[i], in[i], args.shape.in_channels, whole, row0, row1);
}

void WeightGradGroup::load_grad(const BlockedMap& map, float* to, int i, int whole, int row0, int row1) const {
    load_map(map, to, args.grad + group * shape.out_channels, sample[i], out[i], args.shape.out_channels, whole, row0,
             row1);
}

void WeightGradGroup::store(const float* sums, std::size_t block_floats, int out_block) const {
    const int outputs = shape.out_channels, inputs = shape.in_channels, taps = shape.taps();
    for (int o = out_block * kBlock; o < std::min(outputs, (out_block + 1) * kBlock); ++o) {
        float* to = args.dweight + std::ptrdiff_t(group * outputs + o) * inputs * taps;
        const int reached = o < widest_out ? widest_in : 0;
        for (int i0 = 0; i0 < reached; i0 += kBlock) {
            const float* from = sums + (std::size_t(out_block) * in_blocks() + i0 / kBlock) * block_floats + o % kBlock;
            for (int i = 0; i < std::min(kBlock, reached - i0); ++i)
                for (int t = 0; t < taps; ++t) to[(i0 + i) * taps + t] = from[(t * kBlock + i) * kBlock];
        }
        std::fill_n(to + std::ptrdiff_t(reached) * taps, std::ptrdiff_t(inputs - reached) * taps, 0.0f);
    }
}

}  // namespace den
