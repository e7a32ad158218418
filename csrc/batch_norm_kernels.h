// Batch norm over the pixels of one sample: sums in registers, a few vectors of channels at a time; then the result, a
// pixel at a time. Both are limited by memory.
#pragma once

#include "batch_norm_pass.h"
#include "vec.h"

namespace {

// One lane, for the channels behind the last whole vector.
struct Scalar {
    using Reg = float;
    static constexpr int lanes = 1;
    static Reg zero() { return 0.0f; }
    static Reg load(const float* p) { return *p; }
    static void store(float* p, Reg a) { *p = a; }
    static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
    static Reg add(Reg a, Reg b) { return a + b; }
    static Reg sub(Reg a, Reg b) { return a - b; }
    static Reg at_least(Reg low, Reg a) { return a < low ? low : a; }
    static Reg where_positive(Reg y, Reg a) { return y <= 0 ? 0.0f : a; }
};

// The gradient that relu(y) lets through: all of it where y is above 0, or not a number.
template <class V>
typename V::Reg let_through(const den::NormPass& pass, int c, typename V::Reg centred, typename V::Reg grad) {
    if (!pass.relu) return grad;
    return V::where_positive(V::fma(centred, V::load(pass.scale + c), V::load(pass.bias + c)), grad);
}

template <class V, int NV>
void norm_sums_block(const den::NormPass& pass, int c) {
    using Reg = typename V::Reg;
    Reg first[NV], sum[NV], square[NV];
    const float* x = pass.x + c;
    for (int v = 0; v < NV; ++v) first[v] = V::load(x + v * V::lanes), sum[v] = square[v] = V::zero();
    for (std::ptrdiff_t p = 0; p < pass.pixels; ++p, x += pass.pixel)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            const Reg d = V::sub(V::load(x + v * V::lanes), first[v]);
            sum[v] = V::add(sum[v], d);
            square[v] = V::fma(d, d, square[v]);
        }
    for (int v = 0; v < NV; ++v) {
        V::store(pass.sum + c + v * V::lanes, sum[v]);
        V::store(pass.product + c + v * V::lanes, square[v]);
    }
}

template <class V, int NV>
void norm_grad_sums_block(const den::NormPass& pass, int c) {
    using Reg = typename V::Reg;
    Reg mean[NV], sum[NV], product[NV];
    for (int v = 0; v < NV; ++v) mean[v] = V::load(pass.mean + c + v * V::lanes), sum[v] = product[v] = V::zero();
    std::ptrdiff_t at = c;
    for (std::ptrdiff_t p = 0; p < pass.pixels; ++p, at += pass.pixel)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            const Reg d = V::sub(V::load(pass.x + at + v * V::lanes), mean[v]);
            const Reg g = let_through<V>(pass, c + v * V::lanes, d, V::load(pass.grad + at + v * V::lanes));
            sum[v] = V::add(sum[v], g);
            product[v] = V::fma(g, d, product[v]);
        }
    for (int v = 0; v < NV; ++v) {
        V::store(pass.sum + c + v * V::lanes, sum[v]);
        V::store(pass.product + c + v * V::lanes, product[v]);
    }
}

template <class V>
void norm_apply_vector(const den::NormPass& pass, std::ptrdiff_t at, int c) {
    const typename V::Reg centred = V::sub(V::load(pass.x + at + c), V::load(pass.mean + c));
    const typename V::Reg y = V::fma(centred, V::load(pass.scale + c), V::load(pass.bias + c));
    V::store(pass.out + at + c, pass.relu ? V::at_least(V::zero(), y) : y);
}

template <class V>
void norm_grad_apply_vector(const den::NormPass& pass, std::ptrdiff_t at, int c) {
    using Reg = typename V::Reg;
    const Reg centred = V::sub(V::load(pass.x + at + c), V::load(pass.mean + c));
    const Reg g = let_through<V>(pass, c, centred, V::load(pass.grad + at + c));
    const Reg rest = V::fma(centred, V::load(pass.by_x + c), V::load(pass.constant + c));
    V::store(pass.out + at + c, V::fma(g, V::load(pass.scale + c), rest));
}

template <class V>
void norm_sums(const den::NormPass& pass) {
    int c = 0;
    for (; c + 4 * V::lanes <= pass.channels; c += 4 * V::lanes) norm_sums_block<V, 4>(pass, c);
    for (; c + V::lanes <= pass.channels; c += V::lanes) norm_sums_block<V, 1>(pass, c);
    for (; c < pass.channels; ++c) norm_sums_block<Scalar, 1>(pass, c);
}

template <class V>
void norm_grad_sums(const den::NormPass& pass) {
    int c = 0;
    for (; c + 4 * V::lanes <= pass.channels; c += 4 * V::lanes) norm_grad_sums_block<V, 4>(pass, c);
    for (; c + V::lanes <= pass.channels; c += V::lanes) norm_grad_sums_block<V, 1>(pass, c);
    for (; c < pass.channels; ++c) norm_grad_sums_block<Scalar, 1>(pass, c);
}

template <class V>
void norm_apply(const den::NormPass& pass) {
    std::ptrdiff_t at = 0;
    for (std::ptrdiff_t p = 0; p < pass.pixels; ++p, at += pass.pixel) {
        int c = 0;
        for (; c + V::lanes <= pass.channels; c += V::lanes) norm_apply_vector<V>(pass, at, c);
        for (; c < pass.channels; ++c) norm_apply_vector<Scalar>(pass, at, c);
    }
}

template <class V>
void norm_grad_apply(const den::NormPass& pass) {
    std::ptrdiff_t at = 0;
    for (std::ptrdiff_t p = 0; p < pass.pixels; ++p, at += pass.pixel) {
        int c = 0;
        for (; c + V::lanes <= pass.channels; c += V::lanes) norm_grad_apply_vector<V>(pass, at, c);
        for (; c < pass.channels; ++c) norm_grad_apply_vector<Scalar>(pass, at, c);
    }
}

}  // namespace
