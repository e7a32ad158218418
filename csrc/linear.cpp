#include "linear.h"

#include <algorithm>

#include "dispatch.h"
#include "geometry.h"

namespace den {

template <class T>
Linear<T>::Linear(const BlockConv& layer, int channels, int samples)
    : channels_(channels), out_channels_(layer.out_channels), samples_(samples), pitch_(round_up(channels, kWord<T>)),
      weight_(static_cast<const T*>(layer.weight)), scale_(layer.scale, layer.scale + out_channels_),
      shift_(layer.shift, layer.shift + out_channels_), out_columns_(nhwc_columns(samples, out_channels_)) {
    scale_.resize(round_up(out_channels_, kBlock) + kBlock);
    shift_.resize(scale_.size());
}

template <class T>
void Linear<T>::work(const T* features, T* out, int threads) const {
    const std::ptrdiff_t only_tap = 0;
    BasicConvPass<T> pass{};
    pass.in = features;
    pass.in_pixel = pitch_;
    pass.in_block = kMapBlock<T>;
    pass.tap = &only_tap;
    pass.taps = 1;
    pass.weight = weight_;
    pass.group_in = pass.active_in = channels_;
    pass.group_out = pass.active_out = out_channels_;
    pass.mul = scale_.data();
    pass.add = shift_.data();
    pass.out = out;
    pass.out_block = kMapBlock<T>;
    pass.out_col = out_columns_.data();
    pass.width = samples_;
    const int units = ceil_div(out_channels_, kBlock), parts = std::min(threads, units);
#pragma omp for schedule(static)
    for (int part = 0; part < parts; ++part)
        kernels<T>().conv(pass, units * part / parts, units * (part + 1) / parts, 0, 1);
}

template class Linear<float>;
template class Linear<bf16>;

}  // namespace den
