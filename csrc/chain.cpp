#include "chain.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "dispatch.h"
#include "layers_job.h"
#include "linear.h"
#include "plan.h"
#include "schedule.h"

namespace den {

namespace {

constexpr int kHeader = 3;       // integers in front of those of the layers
constexpr int kLayer = 10;       // integers of a layer, in front of those of its convolutions
constexpr int kConvolution = 4;  // integers of each convolution

// Height and width of what a layer's convolutions make.
Pair output_map(const ResidualBlock& layer) {
    Pair map{layer.height, layer.width};
    for (const BlockConv& conv : layer.convs) map = {ceil_div(map.y, conv.stride), ceil_div(map.x, conv.stride)};
    return map;
}

// Elements of so many pixels of each sample, in whole cache lines.
template <class T>
std::size_t output_size(const ResidualBlock& layer, int pixels) {
    return round_up(std::size_t(layer.samples) * pixels * layer.convs.back().out_channels, kMapBlock<T>);
}

// What the next layer reads, and its pixels.
void* result(const ResidualBlock& layer) { return layer.max_pool ? layer.pooled : layer.out; }
int result_pixels(const ResidualBlock& layer) {
    const Pair map = output_map(layer);
    return layer.max_pool ? ceil_div(map.y, 2) * ceil_div(map.x, 2) : map.y * map.x;
}

// Whether a layer may overwrite the map that it reads.
bool works_in_place(const ResidualBlock& layer) {
    const bool strided = std::any_of(layer.convs.begin(), layer.convs.end(), [](const BlockConv& c) { return c.stride != 1; });
    return layer.shortcut && !strided && layer.channels == layer.convs.back().out_channels;
}

// Where each layer reads and writes. Of layers that work in place, the last run writes `out` itself where no pool follows;
// those before it take turns in two buffers. x is never written, unless it is `out`.
template <class T>
void set_places(std::vector<ResidualBlock>& layers, bool pooled, const T* x, T* out) {
    std::size_t direct = layers.size(), most = 0, unpooled = 0;
    if (!pooled)
        for (direct -= 1; direct > 0 && works_in_place(layers[direct]);) --direct;
    for (std::size_t b = 0; b < layers.size(); ++b) {
        if (b < direct) most = std::max(most, output_size<T>(layers[b], result_pixels(layers[b])));
        const Pair map = output_map(layers[b]);
        if (layers[b].max_pool) unpooled = std::max(unpooled, output_size<T>(layers[b], map.y * map.x));
    }
    T* buffer = elements<T>(scratch(Scratch::kMaps, (2 * most + unpooled) / kWord<T>));
    int turn = 0;
    for (std::size_t b = 0; b < layers.size(); ++b) {
        ResidualBlock& layer = layers[b];
        layer.x = b ? result(layers[b - 1]) : x;
        void* place = b >= direct ? out : b && works_in_place(layer) ? result(layers[b - 1]) : buffer + most * (turn++ % 2);
        layer.out = layer.max_pool ? buffer + 2 * most : place;
        layer.pooled = place;
    }
}

// The calling thread's part of the max pool behind a layer, some rows at a time.
template <class T>
void pool_largest(const ResidualBlock& layer) {
    const Pair map = output_map(layer);
    const int channels = layer.convs.back().out_channels, rows = ceil_div(map.y, 2), cols = ceil_div(map.x, 2);
    const int parts = std::min(layer.threads, rows);
    const T* in = static_cast<const T*>(layer.out);
    T* out = static_cast<T*>(layer.pooled);
#pragma omp for schedule(static)
    for (int i = 0; i < layer.samples * parts; ++i) {
        const int n = i / parts, part = i % parts;
        kernels<T>().max_pool({in + std::ptrdiff_t(n) * map.y * map.x * channels, map.y, map.x, channels,
                               out + std::ptrdiff_t(n) * rows * cols * channels, cols},
                              rows * part / parts, rows * (part + 1) / parts);
    }
}

// The calling thread's part of the pool behind the last layer; `pitch` elements from one sample's to the next.
template <class T>
void average(const ResidualBlock& last, const GlobalPool& pool, T* out, int pitch) {
    const int channels = last.convs.back().out_channels;
    const int pixels = result_pixels(last);
    const T* maps = static_cast<const T*>(result(last));
#pragma omp for schedule(static)
    for (int n = 0; n < last.samples; ++n) {
        T* features = out + std::ptrdiff_t(n) * pitch;
        std::fill(features + channels, features + pitch, T{});
        kernels<T>().pool({maps + std::ptrdiff_t(n) * pixels * channels, pixels, channels, pool.scale, pool.shift, features});
    }
}

}  // namespace

template <class T>
bool SizedLayers<T>::made_for(const SizedLayers& other) const {
    return kernels == other.kernels && channels == other.channels && height == other.height && width == other.width &&
           x_is_out == other.x_is_out;
}

Chain::Chain(const std::string& dtype, const Addresses& addresses, const std::vector<std::int64_t>& spec)
    : dtype_(dtype), pooled_(spec.at(0)) {
    const int* widths = at<const int>(addresses.at(0));
    const float* norms = at<const float>(addresses.at(1));  // those in front of layers come before all other tables
    const float* tables = norms;
    std::size_t weight = 2, s = kHeader;
    for (std::size_t l = s; l < spec.size(); l += kLayer + kConvolution * spec[l])
        if (spec[l + 5]) tables += 2 * spec[l + 1];
    const auto take = [&](std::size_t floats) { return std::exchange(tables, tables + floats); };
    while (s < spec.size()) {
        const int convs = int(spec[s]), in_channels = int(spec[s + 1]), hidden = int(spec[s + 2]);
        const int out_channels = int(spec[s + 3]), levels = int(spec[s + 4]);
        const bool pre = spec[s + 5], relu = spec[s + 6], projection = spec[s + 7], shortcut = spec[s + 8];
        const std::int64_t* of = spec.data() + s + kLayer;
        ResidualBlock layer{};
        layer.levels = levels;
        layer.relu = relu;
        layer.shortcut = shortcut;
        layer.max_pool = spec[s + 9];
        layer.widths = widths;
        for (int i = 0; i < convs; ++i) {
            layer.convs.push_back({at<const void>(addresses.at(weight++)), nullptr, nullptr,
                                   i + 1 < convs ? hidden : out_channels, int(of[i]), int(of[convs + i]),
                                   int(of[2 * convs + i]), 0});
            values_.push_back(of[3 * convs + i]);
        }
        for (BlockConv& conv : layer.convs) conv.scale = take(std::size_t(levels) * conv.out_channels);
        for (BlockConv& conv : layer.convs) conv.shift = take(std::size_t(levels) * conv.out_channels);
        if (pre) {
            layer.pre_scale = std::exchange(norms, norms + in_channels);
            layer.pre_shift = std::exchange(norms, norms + in_channels);
        }
        if (projection) {
            layer.projection = {at<const void>(addresses.at(weight++)), nullptr, nullptr, out_channels, 1, 1, 1, 0};
            layer.projection.scale = take(std::size_t(levels) * out_channels);
            layer.projection.shift = take(std::size_t(levels) * out_channels);
        }
        widths += levels;
        s += kLayer + kConvolution * convs;
        layers_.push_back(std::move(layer));
    }
    if (spec[2] && !layers_.empty()) {
        head_ = layers_.back().convs;
        layers_.pop_back();
    }
    if (layers_.empty()) fail("a chain has no layers; it must have at least one");
    if (pooled_ && spec[1]) {
        const int channels = layers_.back().convs.back().out_channels;
        pool_.scale = take(channels), pool_.shift = take(channels);
    }
}

int Chain::choices() const {
    return int(std::count_if(layers_.begin(), layers_.end(), [](const ResidualBlock& l) { return l.levels > 1; }));
}

template <class T>
std::unique_ptr<SizedLayers<T>> Chain::take(const SizedLayers<T>& wanted) const {
    IdleLayers<T>& idle = std::get<IdleLayers<T>>(idle_);
    const std::lock_guard<std::mutex> lock(idle.mutex);
    const auto found = std::find_if(idle.sized.begin(), idle.sized.end(), [&](const auto& s) { return s->made_for(wanted); });
    if (found == idle.sized.end()) return nullptr;
    std::unique_ptr<SizedLayers<T>> sized = std::move(*found);
    idle.sized.erase(found);
    return sized;
}

template <class T>
void Chain::give_back(std::unique_ptr<SizedLayers<T>> sized) const {
    constexpr std::size_t kMost = 8;  // a chain meets few sizes, and few calls at a time
    IdleLayers<T>& idle = std::get<IdleLayers<T>>(idle_);
    const std::lock_guard<std::mutex> lock(idle.mutex);
    if (idle.sized.size() == kMost) idle.sized.erase(idle.sized.begin());
    idle.sized.push_back(std::move(sized));
}

std::vector<ResidualBlock> Chain::layers_for(int channels, int height, int width) const {
    std::vector<ResidualBlock> layers = layers_;
    auto values = values_.begin();
    for (ResidualBlock& layer : layers) {
        layer.channels = channels, layer.height = height, layer.width = width;
        const int hidden = layer.convs.front().out_channels;
        for (std::size_t i = 0; i < layer.convs.size(); ++i) {
            BlockConv& conv = layer.convs[i];
            conv.lines = !layer.shortcut && keeps_lines(channels, conv.groups, conv.kernel);
            conv.winograd = packed_as(dtype_, *values++, int(i), i ? hidden : channels, conv);
            height = ceil_div(height, conv.stride), width = ceil_div(width, conv.stride);
        }
        if (layer.max_pool) height = ceil_div(height, 2), width = ceil_div(width, 2);
        channels = layer.convs.back().out_channels;
    }
    for (const BlockConv& head : head_) packed_as(dtype_, *values, 0, channels, head);
    return layers;
}

Ints Chain::plan(const std::int64_t* level, int samples) const {
    const int blocks = choices();
    int levels = 1;
    for (const ResidualBlock& layer : layers_) levels = std::max(levels, layer.levels);
    const std::size_t entries = std::size_t(blocks) * samples;
    Ints plan(2 * entries), count(std::size_t(blocks) * levels);
    plan_levels(level, samples, blocks, levels, plan.data(), plan.data() + entries, count.data());
    return plan;
}

template <class T>
void Chain::run_as(const T* x, T* out, const int* level, const int* order, const Ints& sizes, int threads) const {
    const int samples = sizes[0];
    const SizedLayers<T> wanted{&kernels<T>(), sizes[1], sizes[2], sizes[3], x == out, {}, {}};
    std::unique_ptr<SizedLayers<T>> sized = take(wanted);
    const bool fresh = !sized;
    if (fresh) {
        sized = std::make_unique<SizedLayers<T>>(wanted);
        sized->layers = layers_for(sizes[1], sizes[2], sizes[3]);
    }
    std::vector<ResidualBlock>& layers = sized->layers;
    Ints only_level(samples, 0), any_order(samples);
    std::iota(any_order.begin(), any_order.end(), 0);
    for (ResidualBlock& layer : layers) {
        const bool choice = layer.levels > 1;
        layer.samples = samples, layer.threads = threads;
        layer.level = choice ? level : only_level.data(), layer.order = choice ? order : any_order.data();
        if (choice) level += samples, order += samples;
        check_plan(layer);
        // A hidden channel belongs to a group of each convolution that reads or writes it.
        if (layer.shortcut)
            for (const BlockConv& conv : layer.convs)
                check_levels("widths", layer.widths, layer.levels, layer.convs.front().out_channels, conv.groups, 0);
    }
    set_places(layers, pooled_, x, out);
    if (fresh) {
        sized->runners.reserve(layers.size());
        for (const ResidualBlock& layer : layers) sized->runners.emplace_back(layer);
    }
    // Samples that are near each other begin with one thread, as in the loops over samples.
    std::vector<int> owner(samples);
    for (int n = 0; n < samples; ++n) owner[n] = int((long long)n * threads / samples);
    std::vector<LayersJob<T>> jobs;
    jobs.reserve(layers.size());
    const BlockRunner<T>*next = sized->runners.data(), *const end = next + sized->runners.size();
    for (const BlockRunner<T>* first = next; first != end; first = next) {
        next = LayersJob<T>::last_of(first, end);
        if (LayersJob<T> job(first, next, owner); !job.empty()) jobs.push_back(std::move(job));
    }
    const JobMemory memory(jobs, threads);
    std::vector<Linear<T>> head;
    const int channels = layers.back().convs.back().out_channels;
    for (const BlockConv& layer : head_) head.emplace_back(layer, channels, samples);
    T* features = head.empty() ? out : elements<T>(scratch(Scratch::kFeatures, head[0].features_floats()));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        for (const LayersJob<T>& job : jobs) {
            job.work(memory.own(), memory.shared());
            if (job.last_layer().max_pool) pool_largest<T>(job.last_layer());
        }
        if (pooled_) average(layers.back(), pool_, features, head.empty() ? channels : head[0].pitch());
        for (const Linear<T>& linear : head) linear.work(features, out, threads);
    }
    give_back(std::move(sized));
}

void Chain::run(std::uintptr_t x, std::uintptr_t out, std::uintptr_t level, std::uintptr_t order, const Ints& sizes,
                int threads) const {
    if (sizes.size() != 4) fail("sizes must hold 4 integers");
    with_element(dtype_, [&](auto element) {
        using T = decltype(element);
        Ints planned;
        const int *levels = at<const int>(level), *orders = at<const int>(order);
        if (level && !order) {
            planned = plan(at<const std::int64_t>(level), sizes[0]);
            levels = planned.data(), orders = levels + planned.size() / 2;
        }
        run_as(at<const T>(x), at<T>(out), levels, orders, sizes, std::max(1, threads));
    });
}

}  // namespace den
