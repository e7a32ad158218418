#include "weight_grad.h"

#include <algorithm>
#include <cstdint>

#include "dispatch.h"
#include "schedule.h"

namespace den {

namespace {

// Pixels that one pass sums in registers. What it reads of them, 32 outputs and 16 inputs, stays in a first cache of
// 32 KB over all taps; each pass reads and writes its block of dweight once.
constexpr int kStripPixels = 128;
constexpr int kTaskOutputs = 32;
// Maps kept at a time, for each thread: in the second cache and the thread's share of the third.
constexpr std::size_t kChunkFloats = std::size_t(1) << 19;

ConvShape gradient_map(const ConvShape& s) {
    return {s.out_channels, s.out_channels, 1, s.out_height(), s.out_width(), {1, 1}, {1, 1}, {0, 0}, {1, 1}};
}

// One group of channels: an ungrouped problem. Samples are taken by descending work, those without any left out, in
// *strips* of kStripPixels: rows of one sample, or a few whole small samples. Strips depend on shapes and widths alone,
// and every block of dweight adds them in order: neither threads nor how many maps fit the memory change a bit.
class Runner {
public:
    Runner(const WeightGrad& args, int group)
        : args_(args), kernels_(kernels()), group_(group), shape_(args.shape) {
        shape_.in_channels = args.shape.group_in(), shape_.out_channels = args.shape.group_out(), shape_.groups = 1;
        x_map_ = BlockedMap(shape_);
        grad_map_ = BlockedMap(gradient_map(shape_));
        for (int n = 0; n < args.samples; ++n)
            if (in(n) > 0 && out(n) > 0) samples_.push_back(n);
        std::stable_sort(samples_.begin(), samples_.end(), [&](int a, int b) {
            return std::int64_t(in(a)) * out(a) > std::int64_t(in(b)) * out(b);
        });
        for (int n : samples_) widest_in_ = std::max(widest_in_, in(n)), widest_out_ = std::max(widest_out_, out(n));
        const int pixels = shape_.out_height() * shape_.out_width();
        strip_samples_ = std::max(1, kStripPixels / pixels);
        strip_rows_ = strip_samples_ > 1 ? shape_.out_height() : std::max(1, kStripPixels / shape_.out_width());
    }

    int samples() const { return int(samples_.size()); }
    int strip_samples() const { return strip_samples_; }
    std::size_t slot_floats() const { return x_map_.floats() + grad_map_.floats(); }
    int out_blocks() const { return ceil_div(shape_.out_channels, kBlock); }
    int in_blocks() const { return ceil_div(shape_.in_channels, kBlock); }
    std::size_t block_floats() const { return std::size_t(shape_.taps()) * kBlock * kBlock; }
    std::size_t sum_floats() const { return out_blocks() * in_blocks() * block_floats(); }
    // Blocks of dweight that some sample reaches, as tasks.
    int out_tasks() const { return ceil_div(widest_out_, kTaskOutputs); }
    int in_tasks() const { return ceil_div(widest_in_, kBlock); }
    int taps() const { return shape_.taps(); }

    void zero_border(float* slot) const { x_map_.zero_border(slot, shape_.in_channels); }

    // Part `part` of `parts` of the maps of the i-th sample.
    void load(float* slot, int i, int part, int parts) const {
        const int n = samples_[i], height = shape_.height, out_height = shape_.out_height();
        copy(x_map_, slot, args_.x + group_ * shape_.in_channels, n, in(n), args_.shape.in_channels, kBlock,
             height * part / parts, height * (part + 1) / parts);
        copy(grad_map_, slot + x_map_.floats(), args_.grad + group_ * shape_.out_channels, n, out(n),
             args_.shape.out_channels, strip_samples_ > 1 ? kTaskOutputs : kBlock, out_height * part / parts,
             out_height * (part + 1) / parts);
    }

    // Adds the samples [first, last), whose maps lie in consecutive slots, to one block of sums.
    void add(const float* slots, int first, int last, int out_task, int in_task, int tap0, int tap1, float* sums,
             std::vector<const float*>& grad_rows, std::vector<const float*>& x_rows) const {
        const int o = out_task * kTaskOutputs, i = in_task * kBlock;
        WeightGradPass pass{};
        pass.width = shape_.out_width();
        pass.grad_block = grad_map_.block_pitch();
        pass.tap = x_map_.taps().data() + tap0;
        pass.taps = tap1 - tap0;
        pass.dweight_block = in_blocks() * block_floats();
        pass.dweight = sums + (o / kBlock) * pass.dweight_block + in_task * block_floats() +
                       std::ptrdiff_t(tap0) * kBlock * kBlock;
        const std::ptrdiff_t x_row = shape_.stride.y * x_map_.row_pitch(), grad_row = grad_map_.row_pitch();
        for (int s = first; s < last; s += strip_samples_)
            for (int row = 0; row < shape_.out_height(); row += strip_rows_) {
                grad_rows.clear(), x_rows.clear();
                pass.outputs = pass.inputs = 0;
                for (int j = s; j < std::min(s + strip_samples_, last); ++j) {
                    const int outputs = out(samples_[j]) - o, inputs = in(samples_[j]) - i;
                    if (outputs <= 0 || inputs <= 0) continue;
                    pass.outputs = std::max(pass.outputs, std::min(outputs, kTaskOutputs));
                    pass.inputs = std::max(pass.inputs, std::min(inputs, kBlock));
                    const float* x = slots + (j - first) * slot_floats();
                    const float* grad = x + x_map_.floats() + (o / kBlock) * grad_map_.block_pitch();
                    x += in_task * x_map_.block_pitch();
                    for (int r = row; r < std::min(row + strip_rows_, shape_.out_height()); ++r)
                        grad_rows.push_back(grad + r * grad_row), x_rows.push_back(x + r * x_row);
                }
                if (grad_rows.empty()) continue;
                pass.grad = grad_rows.data(), pass.x = x_rows.data(), pass.rows = int(grad_rows.size());
                kernels_.weight_grad(pass);
            }
    }

    // The sums of one block of outputs, in the weight's order.
    void store(const float* sums, int out_block) const {
        const int outputs = shape_.out_channels, inputs = shape_.in_channels, taps = shape_.taps();
        for (int o = out_block * kBlock; o < std::min(outputs, (out_block + 1) * kBlock); ++o) {
            float* to = args_.dweight + std::ptrdiff_t(group_ * outputs + o) * inputs * taps;
            const int reached = o < widest_out_ ? widest_in_ : 0;
            for (int i0 = 0; i0 < reached; i0 += kBlock) {
                const float* from = sums + (std::ptrdiff_t(out_block) * in_blocks() + i0 / kBlock) * block_floats() + o % kBlock;
                for (int i = 0; i < std::min(kBlock, reached - i0); ++i)
                    for (int t = 0; t < taps; ++t) to[(i0 + i) * taps + t] = from[(t * kBlock + i) * kBlock];
            }
            std::fill_n(to + std::ptrdiff_t(reached) * taps, std::ptrdiff_t(inputs - reached) * taps, 0.0f);
        }
    }

private:
    int in(int n) const { return active(args_.in_width[n], args_.shape.group_in()); }
    int out(int n) const { return active(args_.out_width[n], args_.shape.group_out()); }
    int active(int width, int group_width) const { return std::clamp(width - group_ * group_width, 0, group_width); }

    // Rows of `channels` channels of sample n into a map, and zeros behind them up to a whole multiple of `whole`.
    void copy(const BlockedMap& map, float* to, const float* from, int n, int channels, int pixel, int whole, int row0,
              int row1) const {
        const ConvShape& s = map.conv();
        MapLoad load{};
        load.in_row = std::ptrdiff_t(s.width) * pixel;
        load.in = from + n * load.in_row * s.height;
        load.in_pixel = pixel;
        load.width = s.width;
        load.channels = channels;
        load.out = map.image(to);
        load.out_row = map.row_pitch();
        load.out_block = map.block_pitch();
        load.out_col = map.read_columns();
        load.row_read = map.read_rows();
        kernels_.load(load, row0, row1);
        const int end = std::min(round_up(channels, whole), round_up(s.in_channels, kBlock));
        for (int c = channels; c < end; c = round_up(c + 1, kBlock))
            for (int row = row0; row < row1; ++row) {
                float* line = load.out + (c / kBlock) * load.out_block + row * load.out_row + c % kBlock;
                for (int col = 0; col < s.width; ++col)
                    if (load.out_col[col] >= 0) std::fill_n(line + load.out_col[col], kBlock - c % kBlock, 0.0f);
            }
    }

    const WeightGrad& args_;
    const Kernels& kernels_;
    int group_;
    ConvShape shape_;  // of one group
    BlockedMap x_map_{{1, 1, 1, 1, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}}}, grad_map_ = x_map_;
    std::vector<int> samples_;
    int widest_in_ = 0, widest_out_ = 0;
    int strip_samples_, strip_rows_;
};

void one_group(const WeightGrad& args, int group) {
    const Runner run(args, group);
    const int threads = std::max(1, args.threads), samples = run.samples();
    const int fitting = int(std::max<std::size_t>(1, threads * kChunkFloats / run.slot_floats()));
    const int slots = std::min(round_up(fitting, run.strip_samples()), std::max(1, samples));
    const std::size_t floats = run.slot_floats();
    float* sums = scratch(run.sum_floats() + slots * floats);
    float* maps = sums + run.sum_floats();
    // Taps apart only where the blocks alone are too few for the threads.
    const int blocks = run.out_tasks() * run.in_tasks();
    const int tap_parts = threads == 1 || blocks >= 4 * threads ? 1 : std::min(run.taps(), ceil_div(4 * threads, std::max(1, blocks)));
    const int tasks = blocks * tap_parts;

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<const float*> grad_rows, x_rows;
#pragma omp for schedule(static) nowait
        for (int b = 0; b < run.out_blocks(); ++b)
            std::fill_n(sums + b * (run.sum_floats() / run.out_blocks()), run.sum_floats() / run.out_blocks(), 0.0f);
#pragma omp for schedule(static)
        for (int s = 0; s < slots; ++s) run.zero_border(maps + s * floats);
        for (int first = 0; first < samples; first += slots) {
            const int count = std::min(slots, samples - first), parts = threads == 1 ? 1 : ceil_div(4 * threads, count);
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < count * parts; ++i)
                run.load(maps + i / parts * floats, first + i / parts, i % parts, parts);
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < tasks; ++i) {
                const int part = i % tap_parts, block = i / tap_parts;
                run.add(maps, first, first + count, block / run.in_tasks(), block % run.in_tasks(),
                        run.taps() * part / tap_parts, run.taps() * (part + 1) / tap_parts, sums, grad_rows, x_rows);
            }
        }
#pragma omp for schedule(static)
        for (int b = 0; b < run.out_blocks(); ++b) run.store(sums, b);
    }
}

}  // namespace

void weight_grad(const WeightGrad& args) {
    for (int group = 0; group < args.shape.groups; ++group) one_group(args, group);
}

void bias_grad(const ConvShape& shape, const float* grad, const int* out_width, int samples, int threads, float* dbias) {
    const int outputs = shape.out_channels;
    const std::ptrdiff_t pixels = std::ptrdiff_t(shape.out_height()) * shape.out_width();
    float* sums = scratch(std::size_t(samples) * outputs);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int n = 0; n < samples; ++n) {
        const float* pixel = grad + n * pixels * outputs;
        float* sum = sums + std::ptrdiff_t(n) * outputs;
        std::fill_n(sum, outputs, 0.0f);
        for (std::ptrdiff_t p = 0; p < pixels; ++p, pixel += outputs)
            for (int o = 0; o < out_width[n]; ++o) sum[o] += pixel[o];
    }
    std::fill_n(dbias, outputs, 0.0f);
    for (int n = 0; n < samples; ++n)
        for (int o = 0; o < outputs; ++o) dbias[o] += sums[std::ptrdiff_t(n) * outputs + o];
}

}  // namespace den
