// What the ways to compute a weight gradient share: one group of channels as a problem of its own.
#pragma once

#include <vector>

#include "geometry.h"
#include "weight_grad.h"

namespace den {

// The samples that run any of the group's channels, by descending work. Everything that decides the order of a sum is
// here or in the shape: never threads, nor how many maps fit the memory.
struct WeightGradGroup {
    WeightGradGroup(const WeightGrad& args, int group);

    const WeightGrad& args;
    int group;
    ConvShape shape;  // of the group, ungrouped
    std::vector<int> sample, in, out;  // with the channels that each reads and produces
    int widest_in = 0, widest_out = 0;

    int samples() const { return int(sample.size()); }
    int out_blocks() const { return ceil_div(shape.out_channels, kBlock); }
    int in_blocks() const { return ceil_div(shape.in_channels, kBlock); }

    // Rows of the i-th sample's x or gradient into a map, and zeros behind its last channel up to a multiple of `whole`.
    void load_x(const BlockedMap& map, float* to, int i, int whole, int row0, int row1) const;
    void load_grad(const BlockedMap& map, float* to, int i, int whole, int row0, int row1) const;

    // A block of 16 outputs into dweight, from sums [block of outputs][block of inputs]{[tap][16 inputs][16 outputs], up
    // to block_floats}; 0 where no sample ran.
    void store(const float* sums, std::size_t block_floats, int out_block) const;
};

// 3x3 of stride 1 by Winograd's F(3x3, 4x4): a quarter of the multiplications.
bool winograd_suits(const WeightGrad& args);
void winograd_weight_grad(const WeightGradGroup& group);

}  // namespace den
