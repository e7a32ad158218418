#include "weight_grad.h"

#include <algorithm>

#include "dispatch.h"
#include "schedule.h"
#include "weight_grad_group.h"

namespace den {

namespace {

// Pixels that one pass sums in registers. What it reads of them, 32 outputs and 16 inputs, stays in a first cache of
// 32 KB over all taps; each pass reads and writes its block of dweight once.
constexpr int kStripPixels = 128;
constexpr int kTaskOutputs = 32;
// Maps kept at a time, for each thread: in the second cache and the thread's share of the third.
constexpr std::size_t kChunkFloats = std::size_t(1) << 19;

// Any convolution. Samples are summed in *strips* of kStripPixels: rows of one sample, or a few whole small samples.
class Runner {
public:
    explicit Runner(const WeightGradGroup& group)
        : group_(group), kernels_(training_kernels()), shape_(group.shape), x_map_(shape_), grad_map_(gradient_map(shape_)) {
        const int pixels = shape_.out_height() * shape_.out_width();
        strip_samples_ = std::max(1, kStripPixels / pixels);
        strip_rows_ = strip_samples_ > 1 ? shape_.out_height() : std::max(1, kStripPixels / shape_.out_width());
    }

    int strip_samples() const { return strip_samples_; }
    std::size_t slot_floats() const { return x_map_.floats() + grad_map_.floats(); }
    std::size_t block_floats() const { return std::size_t(shape_.taps()) * kBlock * kBlock; }
    std::size_t sum_floats() const { return group_.out_blocks() * row_floats(); }
    std::size_t row_floats() const { return group_.in_blocks() * block_floats(); }  // of one block of outputs
    // Blocks of dweight that some sample reaches, as tasks.
    int out_tasks() const { return ceil_div(group_.widest_out, kTaskOutputs); }
    int in_tasks() const { return ceil_div(group_.widest_in, kBlock); }
    int taps() const { return shape_.taps(); }

    void zero_border(float* slot) const { x_map_.zero_border(slot, shape_.in_channels); }

    // Part `part` of `parts` of the maps of the i-th sample.
    void load(float* slot, int i, int part, int parts) const {
        const int height = shape_.height, out_height = shape_.out_height();
        group_.load_x(x_map_, slot, i, kBlock, height * part / parts, height * (part + 1) / parts);
        // In a strip of several samples, blocks that one of them did not run are read beside those of others.
        group_.load_grad(grad_map_, slot + x_map_.floats(), i, strip_samples_ > 1 ? kTaskOutputs : kBlock,
                         out_height * part / parts, out_height * (part + 1) / parts);
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
        pass.dweight_block = row_floats();
        pass.dweight = sums + (o / kBlock) * row_floats() + in_task * block_floats() + std::size_t(tap0) * kBlock * kBlock;
        const std::ptrdiff_t x_row = shape_.stride.y * x_map_.row_pitch(), grad_row = grad_map_.row_pitch();
        for (int s = first; s < last; s += strip_samples_)
            for (int row = 0; row < shape_.out_height(); row += strip_rows_) {
                grad_rows.clear(), x_rows.clear();
                pass.outputs = pass.inputs = 0;
                for (int j = s; j < std::min(s + strip_samples_, last); ++j) {
                    const int outputs = group_.out[j] - o, inputs = group_.in[j] - i;
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

private:
    static ConvShape gradient_map(const ConvShape& s) {
        return {s.out_channels, s.out_channels, 1, s.out_height(), s.out_width(), {1, 1}, {1, 1}, {0, 0}, {1, 1}};
    }

    const WeightGradGroup& group_;
    const TrainingKernels& kernels_;
    const ConvShape& shape_;
    BlockedMap x_map_, grad_map_;
    int strip_samples_, strip_rows_;
};

void direct_weight_grad(const WeightGradGroup& group) {
    const Runner run(group);
    const int threads = group.args.threads, samples = group.samples();
    const std::size_t floats = run.slot_floats();
    const int fitting = int(std::max<std::size_t>(1, threads * kChunkFloats / floats));
    const int slots = std::min(round_up(fitting, run.strip_samples()), std::max(1, samples));
    float* sums = scratch(Scratch::kWork, run.sum_floats() + slots * floats);
    float* maps = sums + run.sum_floats();
    // Taps apart only where the blocks alone are too few for the threads.
    const int blocks = run.out_tasks() * run.in_tasks();
    const bool enough = threads == 1 || blocks >= 4 * threads || blocks == 0;
    const int tap_parts = enough ? 1 : std::min(run.taps(), ceil_div(4 * threads, blocks));

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<const float*> grad_rows, x_rows;
#pragma omp for schedule(static) nowait
        for (int b = 0; b < group.out_blocks(); ++b) std::fill_n(sums + b * run.row_floats(), run.row_floats(), 0.0f);
#pragma omp for schedule(static)
        for (int s = 0; s < slots; ++s) run.zero_border(maps + s * floats);
        for (int first = 0; first < samples; first += slots) {
            const int count = std::min(slots, samples - first), parts = threads == 1 ? 1 : ceil_div(4 * threads, count);
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < count * parts; ++i)
                run.load(maps + i / parts * floats, first + i / parts, i % parts, parts);
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < blocks * tap_parts; ++i) {
                const int part = i % tap_parts, block = i / tap_parts;
                run.add(maps, first, first + count, block / run.in_tasks(), block % run.in_tasks(),
                        run.taps() * part / tap_parts, run.taps() * (part + 1) / tap_parts, sums, grad_rows, x_rows);
            }
        }
#pragma omp for schedule(static)
        for (int b = 0; b < group.out_blocks(); ++b) group.store(sums, run.block_floats(), b);
    }
}

}  // namespace

void weight_grad(const WeightGrad& given) {
    WeightGrad args = given;
    args.threads = std::max(1, given.threads);
    for (int g = 0; g < args.shape.groups; ++g) {
        const WeightGradGroup group(args, g);
        if (winograd_suits(args))
            winograd_weight_grad(group);
        else
            direct_weight_grad(group);
    }
}

void bias_grad(const ConvShape& shape, const float* grad, const int* out_width, int samples, int threads, float* dbias) {
    const int outputs = shape.out_channels;
    const std::ptrdiff_t pixels = std::ptrdiff_t(shape.out_height()) * shape.out_width();
    float* sums = scratch(Scratch::kWork, std::size_t(samples) * outputs);
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
