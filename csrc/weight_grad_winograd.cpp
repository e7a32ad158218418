// The weight gradient of a 3x3 convolution of stride 1 by Winograd's F(3x3, 4x4). With the matrices of F(4x4, 3x3),
//
//     dw = G^T [ sum over tiles of (B^T d B) * (A dy A^T) ] G,
//
// d a tile of 6x6 inputs, dy its 4x4 gradients: 36 multiplications for 144. For each of the 36 places in a tile the sum
// is a matrix product over tiles, which the micro-kernel of the direct gradient computes with tiles for pixels.
#include <algorithm>

#include "dispatch.h"
#include "schedule.h"
#include "weight_grad_group.h"

namespace den {

namespace {

constexpr int kPlaces = 36;
// Tiles that one pass sums in registers: 32 outputs and 16 inputs of them stay in a first cache of 32 KB.
constexpr int kStripTiles = 128;
constexpr int kTaskOutputs = 32;
// Transformed maps kept at a time: in the third cache; of one place, in the second.
constexpr std::size_t kChunkFloats = std::size_t(1) << 20;
// Fewer tiles than this in a batch do not repay the passes over 36 sums for each pair of channels.
constexpr int kFewestTiles = 64;

int tiles_along(int size) { return ceil_div(size, 4); }

class Runner {
public:
    explicit Runner(const WeightGradGroup& group)
        : group_(group), kernels_(training_kernels()), tiles_{tiles_along(group.shape.out_height()), tiles_along(group.shape.out_width())},
          x_map_(x_shape(group.shape, tiles_)), grad_map_(grad_shape(group.shape, tiles_)) {
        strip_samples_ = std::max(1, kStripTiles / tiles());
        const std::size_t sample = std::size_t(kPlaces) * tiles() * kBlock * (group.in_blocks() + group.out_blocks());
        const std::size_t fitting = std::max(kChunkFloats, sum_floats()) / sample;
        slots_ = std::min(round_up(int(std::max<std::size_t>(1, fitting)), strip_samples_), std::max(1, group.samples()));
        // Places an odd number of cache lines apart: powers of two would meet in the same sets of a cache.
        x_block_ = grad_block_ = std::ptrdiff_t(slots_) * tiles() * kBlock;
        x_place_ = odd_lines(group.in_blocks() * x_block_), grad_place_ = odd_lines(group.out_blocks() * grad_block_);
    }

    int tiles() const { return tiles_.y * tiles_.x; }  // of a sample
    int slots() const { return slots_; }
    std::size_t block_floats() const { return std::size_t(kPlaces) * kBlock * kBlock; }
    std::size_t row_floats() const { return group_.in_blocks() * block_floats(); }
    std::size_t sum_floats() const { return group_.out_blocks() * row_floats(); }
    std::size_t chunk_floats() const { return kPlaces * (x_place_ + grad_place_); }
    std::size_t map_floats() const { return std::max(x_map_.floats(), grad_map_.floats()); }
    int out_tasks() const { return ceil_div(group_.widest_out, kTaskOutputs); }
    int in_tasks() const { return ceil_div(group_.widest_in, kBlock); }

    // The transformed map of the i-th sample, at place `slot` of the chunk, through a map of the thread's own.
    void transform_x(float* map, float* chunk, int i, int slot) const {
        x_map_.zero_border(map, group_.in[i]);
        group_.load_x(x_map_, map, i, kBlock, 0, group_.shape.height);
        const Pair border = x_map_.conv().padding, padding = group_.shape.padding;
        TileTransform pass{};
        pass.in = map + (border.y - padding.y) * x_map_.row_pitch() + (border.x - padding.x) * kBlock;
        pass.in_row = x_map_.row_pitch(), pass.in_block = x_map_.block_pitch();
        pass.out = chunk + std::ptrdiff_t(slot) * tiles() * kBlock;
        pass.out_place = x_place_, pass.out_block = x_block_;
        pass.tiles_y = tiles_.y, pass.tiles_x = tiles_.x, pass.blocks = ceil_div(group_.in[i], kBlock);
        kernels_.transform_input(pass);
    }

    void transform_grad(float* map, float* chunk, int i, int slot) const {
        grad_map_.zero_border(map, group_.out[i]);
        group_.load_grad(grad_map_, map, i, kBlock, 0, group_.shape.out_height());
        TileTransform pass{};
        pass.in = grad_map_.image(map) + grad_map_.columns()[0];
        pass.in_row = grad_map_.row_pitch(), pass.in_block = grad_map_.block_pitch();
        pass.out = chunk + kPlaces * x_place_ + std::ptrdiff_t(slot) * tiles() * kBlock;
        pass.out_place = grad_place_, pass.out_block = grad_block_;
        pass.tiles_y = tiles_.y, pass.tiles_x = tiles_.x, pass.blocks = ceil_div(group_.out[i], kBlock);
        kernels_.transform_grad(pass);
    }

    // Adds the samples [first, last) to the sums of one place and 32 outputs.
    void add(const float* chunk, int first, int last, int place, int out_task, float* sums) const {
        const int o = out_task * kTaskOutputs;
        const float* x = chunk + place * x_place_;
        const float* grad = chunk + kPlaces * x_place_ + place * grad_place_ + (o / kBlock) * grad_block_;
        float* to = sums + (o / kBlock) * row_floats() + std::ptrdiff_t(place) * kBlock * kBlock;
        if (first == 0)
            for (int b = o / kBlock; b < std::min((o + kTaskOutputs) / kBlock, group_.out_blocks()); ++b)
                for (int i = 0; i < in_tasks(); ++i)
                    std::fill_n(to + (b - o / kBlock) * row_floats() + i * block_floats(), kBlock * kBlock, 0.0f);
        for (int s = first; s < last; s += strip_samples_)
            for (int tile = 0; tile < tiles(); tile += strip_samples_ > 1 ? tiles() : kStripTiles) {
                const int end = std::min(s + strip_samples_, last);
                for (int i = 0; i < in_tasks(); ++i) add_strip(x, grad, first, s, end, tile, o, i, to);
            }
    }

    // From the sums of places to those of taps, for a block of outputs.
    void finish(float* sums, int out_block) const {
        for (int i = 0; i < in_tasks(); ++i)
            kernels_.transform_weight(sums + out_block * row_floats() + i * block_floats());
    }

private:
    static ConvShape map_shape(int channels, int height, int width, Pair border) {
        return {channels, channels, 1, height, width, {1, 1}, {1, 1}, border, {1, 1}};
    }
    // Maps with zeros wherever a tile reads beyond them.
    static ConvShape x_shape(const ConvShape& s, Pair tiles) {
        return map_shape(s.in_channels, s.height, s.width,
                         {std::max(s.padding.y, 4 * tiles.y + 2 - s.padding.y - s.height),
                          std::max(s.padding.x, 4 * tiles.x + 2 - s.padding.x - s.width)});
    }
    static ConvShape grad_shape(const ConvShape& s, Pair tiles) {
        return map_shape(s.out_channels, s.out_height(), s.out_width(),
                         {4 * tiles.y - s.out_height(), 4 * tiles.x - s.out_width()});
    }
    static std::ptrdiff_t odd_lines(std::ptrdiff_t floats) { return (floats / kBlock | 1) * kBlock; }

    // One strip, from tile `tile` of its samples on, and one block of inputs: samples that ran equally many of these
    // channels go together.
    void add_strip(const float* x, const float* grad, int first, int begin, int end, int tile, int o, int in_task,
                   float* to) const {
        const std::ptrdiff_t no_tap = 0;
        WeightGradPass pass{};
        pass.grad_block = grad_block_;
        pass.tap = &no_tap;
        pass.taps = 1;
        pass.rows = 1;
        pass.dweight = to + in_task * block_floats();
        pass.dweight_block = row_floats();
        const auto outputs = [&](int j) { return std::min(group_.out[j] - o, kTaskOutputs); };
        const auto inputs = [&](int j) { return std::min(group_.in[j] - in_task * kBlock, kBlock); };
        for (int j = begin; j < end;) {
            int next = j + 1;
            while (next < end && outputs(next) == outputs(j) && inputs(next) == inputs(j)) ++next;
            pass.outputs = outputs(j), pass.inputs = inputs(j);
            if (pass.outputs > 0 && pass.inputs > 0) {
                const std::ptrdiff_t place = (std::ptrdiff_t(j - first) * tiles() + tile) * kBlock;
                const float* grad_row = grad + place;
                const float* x_row = x + in_task * x_block_ + place;
                pass.grad = &grad_row, pass.x = &x_row;
                pass.width = strip_samples_ > 1 ? (next - j) * tiles() : std::min(kStripTiles, tiles() - tile);
                kernels_.weight_grad(pass);
            }
            j = next;
        }
    }

    const WeightGradGroup& group_;
    const TrainingKernels& kernels_;
    Pair tiles_;  // of a map
    BlockedMap x_map_, grad_map_;
    int strip_samples_, slots_;
    std::ptrdiff_t x_block_, grad_block_, x_place_, grad_place_;
};

}  // namespace

bool winograd_suits(const WeightGrad& args) {
    const ConvShape& s = args.shape;
    const bool plain = s.kernel.y == 3 && s.kernel.x == 3 && s.stride.y == 1 && s.stride.x == 1 && s.dilation.y == 1 &&
                       s.dilation.x == 1 && s.group_in() >= kBlock && s.group_out() >= kBlock;
    if (!plain) return false;
    const double tiles = double(tiles_along(s.out_height())) * tiles_along(s.out_width());
    const double pixels = double(s.out_height()) * s.out_width();
    return tiles * args.samples >= kFewestTiles && 16 * tiles <= 2 * pixels;
}

void winograd_weight_grad(const WeightGradGroup& group) {
    const Runner run(group);
    const int threads = group.args.threads, samples = group.samples();
    float* sums = scratch(Scratch::kWork, run.sum_floats() + run.chunk_floats() + threads * run.map_floats());
    float* chunk = sums + run.sum_floats();
    float* maps = chunk + run.chunk_floats();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* map = maps + thread_index() * run.map_floats();
        for (int first = 0; first < samples; first += run.slots()) {
            const int last = std::min(samples, first + run.slots());
#pragma omp for schedule(dynamic, 1)
            for (int i = 2 * first; i < 2 * last; ++i) {
                if (i % 2 == 0)
                    run.transform_x(map, chunk, i / 2, i / 2 - first);
                else
                    run.transform_grad(map, chunk, i / 2, i / 2 - first);
            }
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < kPlaces * run.out_tasks(); ++i)
                run.add(chunk, first, last, i / run.out_tasks(), i % run.out_tasks(), sums);
        }
#pragma omp for schedule(dynamic, 1)
        for (int b = 0; b < group.out_blocks(); ++b) {
            if (b * kBlock < group.widest_out) run.finish(sums, b);
            group.store(sums, run.block_floats(), b);
        }
    }
}

}  // namespace den
