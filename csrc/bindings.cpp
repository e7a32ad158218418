// The Python face of the CPU kernels: addresses and sizes in, nothing out. Shapes, dtypes and strides were checked by the
// caller (den_kernels/backends/cpu.py); values read from memory (levels, widths, order) are checked here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "conv2d.h"
#include "dispatch.h"
#include "pack.h"
#include "residual_block.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

std::string entry(const char* name, int i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

void check_widths(const char* name, const int* width, int samples, int channels, int groups) {
    const int step = groups > 1 ? channels / groups : 1;
    for (int n = 0; n < samples; ++n) {
        const std::string is = entry(name, n) + " is " + std::to_string(width[n]);
        if (width[n] < 0 || width[n] > channels)
            fail(is + "; it must be between 0 and the " + std::to_string(channels) + " channels of the tensor");
        if (width[n] % step != 0)
            fail(is + "; with groups=" + std::to_string(groups) + " it must be a multiple of " + std::to_string(step) +
                 " channels");
    }
}

void check_block(const den::ResidualBlock& block, int hidden) {
    // A hidden channel belongs to a group of each convolution that reads or writes it.
    for (const den::BlockConv& conv : block.convs) check_widths("widths", block.widths, block.levels, hidden, conv.groups);
    for (int l = 1; l < block.levels; ++l)
        if (block.widths[l] < block.widths[l - 1])
            fail(entry("widths", l) + " is " + std::to_string(block.widths[l]) + "; it must be at least " +
                 entry("widths", l - 1) + ", which is " + std::to_string(block.widths[l - 1]));
    for (int n = 0; n < block.samples; ++n)
        if (block.level[n] < 0 || block.level[n] >= block.levels)
            fail(entry("level", n) + " is " + std::to_string(block.level[n]) + "; it must be between 0 and " +
                 std::to_string(block.levels - 1));
    std::vector<char> seen(block.samples, 0);
    for (int i = 0; i < block.samples; ++i) {
        const int n = block.order[i];
        if (n < 0 || n >= block.samples || seen[n])
            fail(entry("order", i) + " is " + std::to_string(n) + "; order must hold each of the " +
                 std::to_string(block.samples) + " samples once");
        seen[n] = 1;
    }
}

// Calls run(T{}) for the element type that PyTorch calls `dtype`.
template <class Run>
void with_element(const std::string& dtype, Run run) {
    if (dtype == "float32")
        run(float{});
    else if (dtype == "bfloat16")
        run(den::bf16{});
    else
        fail("dtype is " + dtype + "; it must be float32 or bfloat16");
}

using Ints = std::vector<int>;
using Addresses = std::vector<std::uintptr_t>;

template <class T>
void conv2d_of(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t out, std::uintptr_t in_width,
               std::uintptr_t out_width, const Ints& sizes, const Ints& window, int threads) {
    if (sizes.size() != 6 || window.size() != 8) fail("sizes must hold 6 integers and window 8");
    den::Conv2d<T> args{};
    args.samples = sizes[0];
    args.shape = {sizes[1],
                  sizes[4],
                  sizes[5],
                  sizes[2],
                  sizes[3],
                  {window[0], window[1]},
                  {window[2], window[3]},
                  {window[4], window[5]},
                  {window[6], window[7]}};
    args.x = at<const T>(x);
    args.weight = at<const T>(weight);
    args.bias = at<const T>(bias);
    args.out = at<T>(out);
    args.threads = threads;
    const den::ConvShape& s = args.shape;
    Ints full_in, full_out;
    if (in_width) {
        args.in_width = at<const int>(in_width);
        check_widths("in_width", args.in_width, args.samples, s.in_channels, s.groups);
    } else {
        full_in.assign(args.samples, s.in_channels);
        args.in_width = full_in.data();
    }
    if (out_width) {
        args.out_width = at<const int>(out_width);
        check_widths("out_width", args.out_width, args.samples, s.out_channels, s.groups);
    } else {
        full_out.assign(args.samples, s.out_channels);
        args.out_width = full_out.data();
    }
    py::gil_scoped_release release;
    den::conv2d(args);
}

void conv2d(const std::string& dtype, std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t out,
            std::uintptr_t in_width, std::uintptr_t out_width, const Ints& sizes, const Ints& window, int threads) {
    with_element(dtype, [&](auto element) {
        conv2d_of<decltype(element)>(x, weight, bias, out, in_width, out_width, sizes, window, threads);
    });
}

void residual_block(std::uintptr_t x, std::uintptr_t out, std::uintptr_t level, std::uintptr_t order,
                    std::uintptr_t widths, const Addresses& weight, const Addresses& scale, const Addresses& shift,
                    std::uintptr_t pre_scale, std::uintptr_t pre_shift, const Ints& sizes, const Ints& kernel,
                    const Ints& stride, const Ints& groups, bool relu, int threads) {
    if (sizes.size() != 7) fail("sizes must hold 7 integers");
    den::ResidualBlock block{};
    block.x = at<const float>(x);
    block.out = at<float>(out);
    block.samples = sizes[0], block.channels = sizes[1], block.height = sizes[2], block.width = sizes[3];
    const int hidden = sizes[4], out_channels = sizes[5];
    block.levels = sizes[6];
    block.level = at<const int>(level);
    block.order = at<const int>(order);
    block.widths = at<const int>(widths);
    const std::size_t k = weight.size();
    if (scale.size() != k || shift.size() != k || kernel.size() != k || stride.size() != k || groups.size() != k)
        fail("weight, scale, shift, kernel_size, stride and groups must have one entry a convolution");
    for (std::size_t i = 0; i < k; ++i)
        block.convs.push_back({at<const float>(weight[i]), at<const float>(scale[i]), at<const float>(shift[i]),
                               i + 1 < k ? hidden : out_channels, kernel[i], stride[i], groups[i]});
    block.pre_scale = at<const float>(pre_scale);
    block.pre_shift = at<const float>(pre_shift);
    block.relu = relu;
    block.threads = threads;
    check_block(block, hidden);
    py::gil_scoped_release release;
    den::residual_block(block);
}

void pack_weight(const std::string& dtype, std::uintptr_t weight, std::uintptr_t packed, int out_channels, int group_in,
                 int taps, int groups, int threads) {
    py::gil_scoped_release release;
    with_element(dtype, [&](auto element) {
        using T = decltype(element);
        den::pack_weight(at<const T>(weight), out_channels, group_in, taps, groups, threads, at<T>(packed));
    });
}

std::size_t packed_elements(const std::string& dtype, int out_channels, int group_in, int taps, int groups) {
    std::size_t elements = 0;
    with_element(dtype, [&](auto element) {
        elements = den::packed_elements<decltype(element)>(out_channels, group_in, taps, groups);
    });
    return elements;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of den_kernels; see den_kernels/backends/cpu.py.";
    m.def("conv2d", &conv2d);
    m.def("residual_block", &residual_block);
    m.def("pack_weight", &pack_weight);
    m.def("packed_elements", &packed_elements, py::arg("dtype"), py::arg("out_channels"), py::arg("group_in"),
          py::arg("taps"), py::arg("groups"));
    m.def("supported_isas", &den::supported_isas, "Instruction sets that this machine runs, best first.");
    m.def("set_isa", &den::set_isa, py::arg("name"),
          "Use the kernels of this instruction set; returns the name of those used before.");
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
}
