// The fully connected layer behind a network's pool.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels.h"
#include "residual_block.h"

namespace den {

// out = scale * (weight x) + shift, for samples that are the pixels of one image: its weights are read once.
template <class T>
class Linear {
public:
    // Of a batch of so many samples. The layer is a direct 1x1 convolution of one level.
    Linear(const BlockConv& layer, int channels, int samples);

    // Elements from one sample's features to the next: whole words, of which the last may end in a zero.
    int pitch() const { return pitch_; }
    std::size_t features_floats() const { return std::size_t(samples_) * pitch_ / kWord<T>; }
    // The calling thread's part; all of a team's threads call it. features: [samples, pitch]; out: [samples, out_channels].
    void work(const T* features, T* out, int threads) const;

private:
    int channels_, out_channels_, samples_, pitch_;
    const T* weight_;
    std::vector<float> scale_, shift_;  // padded for whole-vector loads
    std::vector<std::ptrdiff_t> out_columns_;
};

}  // namespace den
