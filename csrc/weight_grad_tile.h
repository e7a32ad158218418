// The micro-kernel of the weight gradient: a register tile of NI input channels by NV vectors of output channels, for
// one tap.
//
// For each pixel: NV loads of the gradient, NI broadcasts of x, NI*NV multiply-adds. Each element is summed over the
// rows and columns of the pass by one accumulator, which is then added to dweight: the order does not depend on the
// tile's shape.
#pragma once

#include "kernels.h"
#include "vec.h"
#include "weight_grad_pass.h"

namespace {

template <class V, int NV, int NI>
void weight_grad_tile(const den::WeightGradPass& pass, std::ptrdiff_t tap, int first_vector, int first_input,
                      float* dweight) {
    using Reg = typename V::Reg;
    constexpr int kBlock = den::kBlock, per_block = kBlock / V::lanes;
    std::ptrdiff_t place[NV], to[NV];
    for (int v = 0; v < NV; ++v) {
        const int block = (first_vector + v) / per_block, lane = (first_vector + v) % per_block * V::lanes;
        place[v] = block * pass.grad_block + lane;
        to[v] = block * pass.dweight_block + first_input * kBlock + lane;
    }
    Reg acc[NI][NV];
#pragma GCC unroll 16
    for (int i = 0; i < NI; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[i][v] = V::zero();
    for (int row = 0; row < pass.rows; ++row) {
        const float* x = pass.x[row] + tap + first_input;
        const float* grad = pass.grad[row];
        for (const float* end = x + (std::ptrdiff_t)pass.width * kBlock; x < end; x += kBlock, grad += kBlock) {
            Reg g[NV];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) g[v] = V::load(grad + place[v]);
#pragma GCC unroll 16
            for (int i = 0; i < NI; ++i) {
                const Reg b = V::broadcast(x + i);
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) acc[i][v] = V::fma(b, g[v], acc[i][v]);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < NI; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            float* sum = dweight + to[v] + i * kBlock;
            V::store(sum, V::add(V::load(sum), acc[i][v]));
        }
}

using WeightGradFn = void (*)(const den::WeightGradPass&, std::ptrdiff_t, int, int, float*);

template <class V, int NV, int MaxInputs>
struct WeightGradTiles {
    WeightGradFn of[MaxInputs];

    template <int NI>
    constexpr void fill() {
        of[NI - 1] = weight_grad_tile<V, NV, NI>;
        if constexpr (NI > 1) fill<NI - 1>();
    }
    constexpr WeightGradTiles() : of{} { fill<MaxInputs>(); }
};

// All taps and inputs of NV vectors of outputs: the rows of the gradient and of x stay in the first cache.
template <class V, int NV, int MaxInputs>
void weight_grad_vectors(const den::WeightGradPass& pass, int first_vector) {
    static constexpr WeightGradTiles<V, NV, MaxInputs> tiles;
    const int count = (pass.inputs + MaxInputs - 1) / MaxInputs;
    const int narrow = pass.inputs / count, wider = pass.inputs % count;
    for (int t = 0; t < pass.taps; ++t) {
        float* dweight = pass.dweight + (std::ptrdiff_t)t * den::kBlock * den::kBlock;
        for (int i = 0, input = 0; i < count; ++i) {
            const int inputs = narrow + (i < wider);
            tiles.of[inputs - 1](pass, pass.tap[t], first_vector, input, dweight);
            input += inputs;
        }
    }
}

}  // namespace
