// The Python face of the CPU kernels: addresses and sizes in, nothing out. Shapes, dtypes and strides were checked by the
// caller (den_kernels/backends/cpu.py); values read from memory (levels, widths, order) are checked here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "batch_norm.h"
#include "conv2d.h"
#include "conv2d_backward.h"
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

using Ints = std::vector<int>;
using Addresses = std::vector<std::uintptr_t>;

den::ConvShape conv_shape(const Ints& sizes, const Ints& window) {
    if (sizes.size() != 6 || window.size() != 8) fail("sizes must hold 6 integers and window 8");
    return {sizes[1],
            sizes[4],
            sizes[5],
            sizes[2],
            sizes[3],
            {window[0], window[1]},
            {window[2], window[3]},
            {window[4], window[5]},
            {window[6], window[7]}};
}

// The widths at `address`, checked; `full`, filled with `channels`, where there are none.
const int* widths_or_full(const char* name, std::uintptr_t address, int samples, int channels, int groups, Ints& full) {
    if (!address) {
        full.assign(samples, channels);
        return full.data();
    }
    check_widths(name, at<const int>(address), samples, channels, groups);
    return at<const int>(address);
}

void conv2d(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t residual, std::uintptr_t out,
            std::uintptr_t in_width, std::uintptr_t out_width, const Ints& sizes, const Ints& window, int threads) {
    den::Conv2d args{};
    args.shape = conv_shape(sizes, window);
    args.samples = sizes[0];
    args.x = at<const float>(x);
    args.weight = at<const float>(weight);
    args.bias = at<const float>(bias);
    args.residual = at<const float>(residual);
    args.out = at<float>(out);
    args.threads = threads;
    const den::ConvShape& s = args.shape;
    Ints full_in, full_out;
    args.in_width = widths_or_full("in_width", in_width, args.samples, s.in_channels, s.groups, full_in);
    args.out_width = widths_or_full("out_width", out_width, args.samples, s.out_channels, s.groups, full_out);
    py::gil_scoped_release release;
    den::conv2d(args);
}

void conv2d_backward(std::uintptr_t grad, std::uintptr_t x, std::uintptr_t weight, std::uintptr_t dx,
                     std::uintptr_t dweight, std::uintptr_t dbias, std::uintptr_t in_width, std::uintptr_t out_width,
                     const Ints& sizes, const Ints& window, int threads) {
    den::Conv2dBackward args{};
    args.shape = conv_shape(sizes, window);
    args.samples = sizes[0];
    args.grad = at<const float>(grad);
    args.x = at<const float>(x);
    args.weight = at<const float>(weight);
    args.dx = at<float>(dx);
    args.dweight = at<float>(dweight);
    args.dbias = at<float>(dbias);
    args.threads = threads;
    const den::ConvShape& s = args.shape;
    Ints full_in, full_out;
    args.in_width = widths_or_full("in_width", in_width, args.samples, s.in_channels, s.groups, full_in);
    args.out_width = widths_or_full("out_width", out_width, args.samples, s.out_channels, s.groups, full_out);
    py::gil_scoped_release release;
    den::conv2d_backward(args);
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

// Addresses: x, row, width, weight, bias, mean, var, count. Sizes: samples, channels, pixels, rows.
den::BatchNorm norm_of(const Addresses& a, const Ints& sizes, double eps, bool relu, int threads, Ints& row, Ints& width) {
    if (a.size() != 8 || sizes.size() != 4) fail("a norm takes 8 addresses and 4 sizes");
    den::BatchNorm norm{};
    norm.x = at<const float>(a[0]);
    norm.samples = sizes[0], norm.channels = sizes[1], norm.pixels = sizes[2], norm.rows = sizes[3];
    row.assign(norm.samples, 0);
    norm.row = a[1] ? at<const int>(a[1]) : row.data();
    for (int n = 0; n < norm.samples; ++n)
        if (norm.row[n] < 0 || norm.row[n] >= norm.rows)
            fail(entry("row", n) + " is " + std::to_string(norm.row[n]) + "; it must be between 0 and " +
                 std::to_string(norm.rows - 1));
    norm.width = widths_or_full("width", a[2], norm.samples, norm.channels, 1, width);
    norm.weight = at<const float>(a[3]);
    norm.bias = at<const float>(a[4]);
    norm.mean = at<float>(a[5]), norm.var = at<float>(a[6]), norm.count = at<float>(a[7]);
    norm.eps = eps;
    norm.relu = relu;
    norm.threads = threads;
    return norm;
}

void batch_norm(const Addresses& addresses, const Ints& sizes, double eps, bool relu, int threads, std::uintptr_t y) {
    Ints row, width;
    const den::BatchNorm norm = norm_of(addresses, sizes, eps, relu, threads, row, width);
    py::gil_scoped_release release;
    den::batch_norm(norm, at<float>(y));
}

void batch_norm_backward(const Addresses& addresses, const Ints& sizes, double eps, bool relu, int threads,
                         std::uintptr_t grad, std::uintptr_t dx, std::uintptr_t dweight, std::uintptr_t dbias) {
    Ints row, width;
    const den::BatchNorm norm = norm_of(addresses, sizes, eps, relu, threads, row, width);
    py::gil_scoped_release release;
    den::batch_norm_backward(norm, at<const float>(grad), at<float>(dx), at<float>(dweight), at<float>(dbias));
}

void pack_weight(std::uintptr_t weight, std::uintptr_t packed, int out_channels, int group_in, int taps, int groups,
                 int threads) {
    py::gil_scoped_release release;
    den::pack_weight(at<const float>(weight), out_channels, group_in, taps, groups, threads, at<float>(packed));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of den_kernels; see den_kernels/backends/cpu.py.";
    m.def("conv2d", &conv2d);
    m.def("conv2d_backward", &conv2d_backward);
    m.def("batch_norm", &batch_norm);
    m.def("batch_norm_backward", &batch_norm_backward);
    m.def("residual_block", &residual_block);
    m.def("pack_weight", &pack_weight);
    m.def("packed_floats", &den::packed_floats, py::arg("out_channels"), py::arg("group_in"), py::arg("taps"),
          py::arg("groups"));
    m.def("supported_isas", &den::supported_isas, "Instruction sets that this machine runs, best first.");
    m.def("set_isa", &den::set_isa, py::arg("name"),
          "Use the kernels of this instruction set; returns the name of those used before.");
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
}
