// The Python face of the CPU kernels: addresses and sizes in, nothing out. Shapes, dtypes and strides were checked by the
// caller (den_kernels/backends/cpu/); values read from memory (levels, widths, order) are checked here, by checks.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>

#include "batch_norm.h"
#include "chain.h"
#include "checks.h"
#include "conv2d.h"
#include "conv2d_backward.h"
#include "dispatch.h"
#include "pack.h"
#include "plan.h"
#include "residual_block.h"
#include "winograd.h"

namespace py = pybind11;

namespace {

using den::Addresses;
using den::at;
using den::entry;
using den::fail;
using den::Ints;
using den::with_element;

bool winograd_wins(const std::string& dtype) {
    bool wins = false;
    with_element(dtype, [&](auto element) { wins = !den::kernels<decltype(element)>().tiles; });
    return wins;
}

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
    den::check_widths(name, at<const int>(address), samples, channels, groups);
    return at<const int>(address);
}

template <class T>
void conv2d_of(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t residual, std::uintptr_t out,
               std::uintptr_t in_width, std::uintptr_t out_width, const Ints& sizes, const Ints& window, int threads) {
    den::Conv2d<T> args{};
    args.shape = conv_shape(sizes, window);
    args.samples = sizes[0];
    args.x = at<const T>(x);
    args.weight = at<const T>(weight);
    args.bias = at<const T>(bias);
    args.residual = at<const T>(residual);
    args.out = at<T>(out);
    args.threads = threads;
    const den::ConvShape& s = args.shape;
    Ints full_in, full_out;
    args.in_width = widths_or_full("in_width", in_width, args.samples, s.in_channels, s.groups, full_in);
    args.out_width = widths_or_full("out_width", out_width, args.samples, s.out_channels, s.groups, full_out);
    py::gil_scoped_release release;
    den::conv2d(args);
}

// sizes: samples, blocks, levels.
void plan(std::uintptr_t level, const Ints& sizes, std::uintptr_t level_BN, std::uintptr_t order, std::uintptr_t count) {
    if (sizes.size() != 3) fail("sizes must hold 3 integers");
    den::plan_levels(at<const std::int64_t>(level), sizes[0], sizes[1], sizes[2], at<int>(level_BN), at<int>(order),
                     at<int>(count));
}

// A convolution with packed weights, a scale and shift by level and perhaps a ReLU. addresses: x, out, level, order,
// in_widths, out_widths (0: all channels), weight, scale, shift. sizes: samples, input channels, height, width, output
// channels, levels, kernel, stride, groups. values: of the packed weight.
void fused_conv2d(const std::string& dtype, const Addresses& a, const Ints& sizes, std::int64_t values, bool relu,
                  int threads) {
    if (a.size() != 9 || sizes.size() != 9) fail("a fused convolution takes 9 addresses and 9 sizes");
    den::ResidualBlock block{};
    block.x = at<const void>(a[0]), block.out = at<void>(a[1]);
    block.level = at<const int>(a[2]), block.order = at<const int>(a[3]);
    block.in_widths = at<const int>(a[4]), block.out_widths = at<const int>(a[5]);
    block.samples = sizes[0], block.channels = sizes[1], block.height = sizes[2], block.width = sizes[3];
    block.levels = sizes[5];
    den::BlockConv conv{at<const void>(a[6]), at<const float>(a[7]), at<const float>(a[8]),
                        sizes[4], sizes[6], sizes[7], sizes[8], 0};
    conv.lines = !block.in_widths && den::keeps_lines(block.channels, conv.groups, conv.kernel);
    conv.winograd = den::packed_as(dtype, values, 0, block.channels, conv);
    block.convs = {conv};
    block.relu = relu;
    block.threads = threads;
    block.shortcut = false;
    if (block.in_widths) den::check_levels("in_widths", block.in_widths, block.levels, block.channels, conv.groups, 1);
    if (block.out_widths) den::check_levels("out_widths", block.out_widths, block.levels, conv.out_channels, conv.groups, 1);
    den::check_plan(block);
    py::gil_scoped_release release;
    with_element(dtype, [&](auto element) { den::residual_block<decltype(element)>(block); });
}

void conv2d(const std::string& dtype, std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias,
            std::uintptr_t residual, std::uintptr_t out, std::uintptr_t in_width, std::uintptr_t out_width,
            const Ints& sizes, const Ints& window, int threads) {
    with_element(dtype, [&](auto element) {
        conv2d_of<decltype(element)>(x, weight, bias, residual, out, in_width, out_width, sizes, window, threads);
    });
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

void pack_weight(const std::string& dtype, std::uintptr_t weight, std::uintptr_t packed, int out_channels, int group_in,
                 int taps, int groups, int threads) {
    py::gil_scoped_release release;
    with_element(dtype, [&](auto element) {
        using T = decltype(element);
        den::pack_weight(at<const T>(weight), out_channels, group_in, taps, groups, threads, at<T>(packed));
    });
}

void winograd_pack(const std::string& dtype, int tile, std::uintptr_t weight, std::uintptr_t packed, int out_channels,
                   int group_in, int groups, int threads) {
    py::gil_scoped_release release;
    with_element(dtype, [&](auto element) {
        using T = decltype(element);
        const int group_out = out_channels / groups;
        for (int g = 0; g < groups; ++g)
            den::winograd_pack(tile, at<const T>(weight) + std::ptrdiff_t(g) * group_out * group_in * 9, group_out, group_in,
                               threads, at<float>(packed) + g * den::winograd_packed_words<T>(tile, group_out, group_in));
    });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of den_kernels; see den_kernels/backends/cpu/.";
    m.def("conv2d", &conv2d);
    py::class_<den::Chain>(m, "Chain")
        .def(py::init<const std::string&, const Addresses&, const std::vector<std::int64_t>&>(), py::arg("dtype"),
             py::arg("addresses"), py::arg("spec"))
        .def_property_readonly("choices", &den::Chain::choices)
        .def("run", &den::Chain::run, py::call_guard<py::gil_scoped_release>());
    m.def("fused_conv2d", &fused_conv2d);
    m.def("conv2d_backward", &conv2d_backward);
    m.def("batch_norm", &batch_norm);
    m.def("batch_norm_backward", &batch_norm_backward);
    m.def("plan", &plan);
    m.def("pack_weight", &pack_weight);
    m.def("winograd_pack", &winograd_pack);
    m.def("winograd_packed_elements", &den::winograd_packed_values, py::arg("dtype"), py::arg("tile"),
          py::arg("out_channels"), py::arg("group_in"), py::arg("groups"));
    m.def("packed_elements", &den::packed_values, py::arg("dtype"), py::arg("out_channels"), py::arg("group_in"),
          py::arg("taps"), py::arg("groups"));
    m.def("supported_isas", &den::supported_isas, "Instruction sets that this machine runs, best first.");
    m.def("winograd_wins", &winograd_wins, py::arg("dtype"),
          "Whether the kernels in use compute a 3x3 of stride 1 faster by Winograd's algorithm.");
    m.def("set_isa", &den::set_isa, py::arg("name"),
          "Use the kernels of this instruction set; returns the name of those used before.");
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
}
