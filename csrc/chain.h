// The layers of a frozen network one after the other in one call.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "checks.h"
#include "residual_block.h"

namespace den {

// What ends a network: the average over all pixels of relu(scale * x + shift), or of x itself.
struct GlobalPool {
    const float* scale;  // [channels], or null
    const float* shift;
};

// Layers (residual blocks, and convolutions without a shortcut) from x to out; their own x and out are set here. With a
// pool `out` is [samples, channels], else the last layer's map. What is between them is scratch memory.
template <class T>
void run_layers(std::vector<ResidualBlock>& layers, const GlobalPool* pool, const T* x, T* out);

// A chain as Python holds it: addresses and sizes, no values. Throws std::invalid_argument for values that do not fit.
class Chain {
public:
    // As den_kernels/chain.py flattens a chain.
    Chain(const std::string& dtype, const Addresses& addresses, const std::vector<std::int64_t>& spec);

    // Layers with more than one level: those that levels are chosen for.
    int choices() const;
    // level, order: [choices, samples]. sizes: samples, channels, height and width of x.
    void run(std::uintptr_t x, std::uintptr_t out, std::uintptr_t level, std::uintptr_t order, const Ints& sizes,
             int threads) const;

private:
    std::string dtype_;
    std::vector<ResidualBlock> layers_;
    std::vector<std::int64_t> values_;  // of each packed weight
    bool pooled_;
    GlobalPool pool_{};
};

}  // namespace den
