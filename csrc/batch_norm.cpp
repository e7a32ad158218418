#include "batch_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "geometry.h"
#include "schedule.h"

namespace den {

namespace {

// Pixels summed in one float; these sums are then added in double.
constexpr int kChunkPixels = 256;

using Doubles = std::vector<double>;
using Floats = std::vector<float>;

// The samples in chunks of pixels: what threads take, and what has sums of its own.
class Chunks {
public:
    explicit Chunks(const BatchNorm& norm) : norm_(norm), per_sample_(ceil_div(norm.pixels, kChunkPixels)) {
        sum_ = scratch(Scratch::kWork, 2 * std::size_t(count()) * norm.channels);
        product_ = sum_ + std::size_t(count()) * norm.channels;
    }

    int count() const { return norm_.samples * per_sample_; }
    int sample(int i) const { return i / per_sample_; }
    int width(int i) const { return norm_.width[sample(i)]; }
    std::size_t row(int i) const { return std::size_t(norm_.row[sample(i)]) * norm_.channels; }
    int pixels(int i) const { return std::min(kChunkPixels, norm_.pixels - i % per_sample_ * kChunkPixels); }
    std::ptrdiff_t offset(int i) const {
        return (std::ptrdiff_t(sample(i)) * norm_.pixels + i % per_sample_ * kChunkPixels) * norm_.channels;
    }
    const float* first(int i) const { return norm_.x + offset(i); }
    float* sum(int i) const { return sum_ + std::size_t(i) * norm_.channels; }
    float* product(int i) const { return product_ + std::size_t(i) * norm_.channels; }

    NormPass pass(int i) const {
        NormPass pass{};
        pass.x = first(i);
        pass.pixel = norm_.channels;
        pass.pixels = pixels(i);
        pass.channels = width(i);
        pass.relu = norm_.relu;
        pass.sum = sum(i);
        pass.product = product(i);
        return pass;
    }

    void zero_rest(float* out, int i) const {
        const int from = width(i), channels = norm_.channels;
        if (from == channels) return;
        float* pixel = out + offset(i);
        if (from == 0) {
            std::fill_n(pixel, std::ptrdiff_t(pixels(i)) * channels, 0.0f);
            return;
        }
        for (int p = 0; p < pixels(i); ++p, pixel += channels) std::fill_n(pixel + from, channels - from, 0.0f);
    }

private:
    const BatchNorm& norm_;
    int per_sample_;
    float *sum_, *product_;
};

std::size_t table_size(const BatchNorm& norm) { return std::size_t(norm.rows) * norm.channels; }

// What every channel is multiplied by, [rows, channels].
Floats scales(const BatchNorm& norm) {
    Floats scale(table_size(norm));
    for (std::size_t i = 0; i < scale.size(); ++i)
        scale[i] = float((norm.weight ? norm.weight[i] : 1.0f) / std::sqrt(double(norm.var[i]) + norm.eps));
    return scale;
}

Floats biases(const BatchNorm& norm) {
    return norm.bias ? Floats(norm.bias, norm.bias + table_size(norm)) : Floats(table_size(norm), 0.0f);
}

// Mean, variance and count of every row and channel from the sums of the chunks, in their order.
void statistics(const BatchNorm& norm, const Chunks& chunks) {
    const std::size_t size = table_size(norm);
    Doubles elements(size, 0.0), mean(size, 0.0), square(size, 0.0);
    std::fill_n(norm.count, size, 0.0f);
    for (int n = 0; n < norm.samples; ++n)
        for (int c = 0; c < norm.width[n]; ++c) norm.count[std::size_t(norm.row[n]) * norm.channels + c] += 1;
    for (int i = 0; i < chunks.count(); ++i) {
        const float *first = chunks.first(i), *sum = chunks.sum(i);
        const std::size_t row = chunks.row(i);
        const double pixels = chunks.pixels(i);
        for (int c = 0; c < chunks.width(i); ++c) {
            elements[row + c] += pixels;
            mean[row + c] += pixels * first[c] + sum[c];
        }
    }
    for (std::size_t i = 0; i < size; ++i) mean[i] /= std::max(1.0, elements[i]);
    for (int i = 0; i < chunks.count(); ++i) {
        const float *first = chunks.first(i), *sum = chunks.sum(i), *product = chunks.product(i);
        const std::size_t row = chunks.row(i);
        const double pixels = chunks.pixels(i);
        for (int c = 0; c < chunks.width(i); ++c) {
            // Sum of (x - mean)^2 from the sums of x - first and of its square.
            const double apart = first[c] - mean[row + c];
            square[row + c] += product[c] + apart * (2 * double(sum[c]) + pixels * apart);
        }
    }
    for (std::size_t i = 0; i < size; ++i) {
        norm.mean[i] = float(mean[i]);
        norm.var[i] = float(std::max(0.0, square[i]) / std::max(1.0, elements[i]));
    }
}

}  // namespace

void batch_norm(const BatchNorm& norm, float* y) {
    const TrainingKernels& kernel = training_kernels();
    const Chunks chunks(norm);
    const int count = chunks.count(), threads = std::max(1, norm.threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) if (threads > 1)
    for (int i = 0; i < count; ++i)
        if (chunks.width(i) > 0) kernel.norm_sums(chunks.pass(i));
    statistics(norm, chunks);
    const Floats scale = scales(norm), bias = biases(norm);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) if (threads > 1)
    for (int i = 0; i < count; ++i) {
        NormPass pass = chunks.pass(i);
        pass.out = y + chunks.offset(i);
        pass.mean = norm.mean + chunks.row(i);
        pass.scale = scale.data() + chunks.row(i);
        pass.bias = bias.data() + chunks.row(i);
        if (pass.channels > 0) kernel.norm_apply(pass);
        chunks.zero_rest(y, i);
    }
}

void batch_norm_backward(const BatchNorm& norm, const float* grad, float* dx, float* dweight, float* dbias) {
    const TrainingKernels& kernel = training_kernels();
    const Chunks chunks(norm);
    const int count = chunks.count(), threads = std::max(1, norm.threads);
    const std::size_t size = table_size(norm);
    const Floats scale = scales(norm), bias = biases(norm);
    const auto pass_of = [&](int i) {
        NormPass pass = chunks.pass(i);
        pass.grad = grad + chunks.offset(i);
        pass.mean = norm.mean + chunks.row(i);
        pass.scale = scale.data() + chunks.row(i);
        pass.bias = bias.data() + chunks.row(i);
        return pass;
    };
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) if (threads > 1)
    for (int i = 0; i < count; ++i)
        if (chunks.width(i) > 0) kernel.norm_grad_sums(pass_of(i));

    Doubles sum(size, 0.0), product(size, 0.0);
    for (int i = 0; i < count; ++i)
        for (int c = 0; c < chunks.width(i); ++c) {
            sum[chunks.row(i) + c] += chunks.sum(i)[c];
            product[chunks.row(i) + c] += chunks.product(i)[c];
        }
    Floats by_x(size), constant(size);
    for (std::size_t i = 0; i < size; ++i) {
        const double elements = std::max(1.0, double(norm.count[i]) * norm.pixels);
        const double variance = double(norm.var[i]) + norm.eps;
        dweight[i] = float(product[i] / std::sqrt(variance));
        dbias[i] = float(sum[i]);
        by_x[i] = float(-scale[i] * product[i] / variance / elements);
        constant[i] = float(-scale[i] * sum[i] / elements);
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) if (threads > 1)
    for (int i = 0; i < count; ++i) {
        NormPass pass = pass_of(i);
        pass.out = dx + chunks.offset(i);
        pass.by_x = by_x.data() + chunks.row(i);
        pass.constant = constant.data() + chunks.row(i);
        if (pass.channels > 0) kernel.norm_grad_apply(pass);
        chunks.zero_rest(dx, i);
    }
}

}  // namespace den
