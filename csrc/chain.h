// The layers of a frozen network one after the other in one call.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "block_runner.h"
#include "checks.h"
#include "residual_block.h"

namespace den {

// What ends a network: the average over all pixels of relu(scale * x + shift), or of x itself.
struct GlobalPool {
    const float* scale;  // [channels], or null
    const float* shift;
};

// The layers of a chain for images of one size, with all that does not depend on the batch. For one call at a time.
template <class T>
struct SizedLayers {
    // What they were made for. x_is_out: whether the first layer writes what it reads.
    const BasicKernels<T>* kernels;
    int channels, height, width;
    bool x_is_out;

    std::vector<ResidualBlock> layers;
    std::vector<BlockRunner<T>> runners;

    bool made_for(const SizedLayers& other) const;
};

// Those that no call uses at the moment.
template <class T>
struct IdleLayers {
    std::mutex mutex;
    std::vector<std::unique_ptr<SizedLayers<T>>> sized;
};

// Layers (residual blocks, and convolutions without a shortcut), perhaps a pool behind them and a fully connected layer
// behind that, as Python holds them: addresses and sizes, no values. What is between layers is scratch memory. Throws
// std::invalid_argument for values that do not fit.
class Chain {
public:
    // As den_kernels/chain.py flattens a chain.
    Chain(const std::string& dtype, const Addresses& addresses, const std::vector<std::int64_t>& spec);

    // Layers with more than one level: those that levels are chosen for.
    int choices() const;
    // level, order: int [choices, samples]; or order 0, and level int64 [samples, choices]. sizes: samples, channels, height
    // and width of x. With a pool `out` is [samples, channels], else the last layer's map.
    void run(std::uintptr_t x, std::uintptr_t out, std::uintptr_t level, std::uintptr_t order, const Ints& sizes,
             int threads) const;

private:
    template <class T>
    std::unique_ptr<SizedLayers<T>> take(const SizedLayers<T>& wanted) const;
    template <class T>
    void give_back(std::unique_ptr<SizedLayers<T>> sized) const;
    // Layers for images of that size; x and out of each are set later.
    std::vector<ResidualBlock> layers_for(int channels, int height, int width) const;
    // The plan of levels [samples, choices]: level and order, [choices, samples] each, one behind the other.
    Ints plan(const std::int64_t* level, int samples) const;
    template <class T>
    void run_as(const T* x, T* out, const int* level, const int* order, const Ints& sizes, int threads) const;

    std::string dtype_;
    std::vector<ResidualBlock> layers_;
    std::vector<std::int64_t> values_;  // of each packed weight
    bool pooled_;
    GlobalPool pool_{};
    std::vector<BlockConv> head_;  // behind the pool: one, or none
    mutable std::tuple<IdleLayers<float>, IdleLayers<bf16>> idle_;
};

}  // namespace den
