// Arguments as Python hands them over, addresses and names of types, and checks of what it could not see: values read from
// memory (levels, order, widths), and how weights were packed. A check throws std::invalid_argument with what is wrong and
// what would be right.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "residual_block.h"

namespace den {

using Ints = std::vector<int>;
using Addresses = std::vector<std::uintptr_t>;

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

[[noreturn]] void fail(const std::string& message);
// "name[i]", to begin a message with.
std::string entry(const char* name, int i);

// Calls run(T{}) for the element type that PyTorch calls `dtype`.
template <class Run>
void with_element(const std::string& dtype, Run run) {
    if (dtype == "float32")
        run(float{});
    else if (dtype == "bfloat16")
        run(bf16{});
    else
        fail("dtype is " + dtype + "; it must be float32 or bfloat16");
}

// Of each sample.
void check_widths(const char* name, const int* width, int samples, int channels, int groups);
// Of each level: ascending, and at least `least`.
void check_levels(const char* name, const int* widths, int levels, int channels, int groups, int least);
// Levels and order of a plan.
void check_plan(const ResidualBlock& block);

// Values of packed weights.
std::size_t packed_values(const std::string& dtype, int out_channels, int group_in, int taps, int groups);
std::size_t winograd_packed_values(const std::string& dtype, int tile, int out_channels, int group_in, int groups);
// The `winograd` that weights of this many values were packed with (the sizes differ); throws if with none.
int packed_as(const std::string& dtype, std::int64_t values, int i, int in_channels, const BlockConv& conv);

}  // namespace den
