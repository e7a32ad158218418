// Batch norm over the samples that ran a channel, with rows of statistics (one a level), and a ReLU behind it.
#pragma once

namespace den {

struct BatchNorm {
    const float* x;  // NHWC; channels beyond a sample's width are not read
    int samples, channels, pixels, rows;
    const int* row;       // [samples], below `rows`
    const int* width;     // [samples], at most the channels
    const float* weight;  // [rows, channels], or null: 1
    const float* bias;    // [rows, channels], or null: 0
    double eps;
    bool relu;
    float* mean;   // [rows, channels], 0 where no sample ran
    float* var;    // [rows, channels], biased; 0 where no sample ran
    float* count;  // [rows, channels], of samples
    int threads;
};

// Writes the statistics and y = relu?((x - mean) / sqrt(var + eps) * weight + bias), 0 beyond a sample's width.
void batch_norm(const BatchNorm& norm, float* y);

// From the statistics and the gradient of y: dx (0 beyond a sample's width), dweight and dbias [rows, channels].
void batch_norm_backward(const BatchNorm& norm, const float* grad, float* dx, float* dweight, float* dbias);

// Both give the same bits whatever the number of threads.

}  // namespace den
