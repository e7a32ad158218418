#include "residual_block.h"

#include <algorithm>

#include "dispatch.h"
#include "geometry.h"
#include "schedule.h"

namespace den {

namespace {

// The geometry of a block and the steps of one sample. A sample works in a *workspace*: the blocked map that each
// convolution reads (the intermediate maps never leave it, and it fits the cache), and the scale and shift of the
// sample's level, padded for whole-vector loads.
class Runner {
public:
    explicit Runner(const ResidualBlock& block) : block_(block), kernels_(kernels()) {
        int channels = block.channels, height = block.height, width = block.width;
        for (const BlockConv& conv : block.convs) {
            const int pad = conv.kernel / 2;
            ConvShape shape{channels,         conv.out_channels,          conv.groups, height, width,
                            {conv.kernel, conv.kernel}, {conv.stride, conv.stride}, {pad, pad},  {1, 1}};
            maps_.emplace_back(shape);
            map_at_.push_back(workspace_floats_);
            workspace_floats_ += maps_.back().floats();  // a multiple of a cache line, like all that follows
            scale_at_.push_back(workspace_floats_);
            workspace_floats_ += 2 * scale_floats(conv);
            channels = conv.out_channels, height = shape.out_height(), width = shape.out_width();
            pool_ *= conv.stride;
        }
        out_channels_ = channels, out_height_ = height, out_width_ = width;
        out_columns_ = nhwc_columns(width, channels);
        // Of equal shapes the shortcut is x itself (a strided block of a map of one pixel too).
        plain_shortcut_ = height == block.height && width == block.width && channels == block.channels;
    }

    std::size_t workspace_floats() const { return workspace_floats_; }
    int convs() const { return int(maps_.size()); }
    int hidden(int n) const { return block_.widths[block_.level[n]]; }
    bool shortcut_is_output() const { return plain_shortcut_ && block_.out == block_.x; }

    double cost(int n) const {
        double macs = 0;
        for (int i = 0; i < convs(); ++i) {
            const ConvShape& conv = maps_[i].conv();
            macs += conv.macs_per_channel_pair() * active_in(i, n) * active_out(i, n) / conv.groups;
        }
        return macs;
    }

    Cut cut(int i, int n, int parts) const { return Cut(maps_[i].conv(), active_in(i, n), active_out(i, n), parts); }

    void zero_borders(float* workspace) const {
        for (int i = 0; i < convs(); ++i) maps_[i].zero_border(workspace + map_at_[i], maps_[i].conv().in_channels);
    }

    void load_scales(float* workspace, int n) const {
        for (int i = 0; i < convs(); ++i) {
            const BlockConv& conv = block_.convs[i];
            const std::size_t row = std::size_t(block_.level[n]) * conv.out_channels;
            float* to = workspace + scale_at_[i];
            std::copy_n(conv.scale + row, conv.out_channels, to);
            std::copy_n(conv.shift + row, conv.out_channels, to + scale_floats(conv));
        }
    }

    void load_rows(float* workspace, int n, int row0, int row1) const {
        const BlockedMap& map = maps_[0];
        const std::ptrdiff_t in_row = std::ptrdiff_t(block_.width) * block_.channels;
        MapLoad load{};
        load.in = block_.x + n * in_row * block_.height;
        load.in_row = in_row;
        load.in_pixel = block_.channels;
        load.width = block_.width;
        load.channels = block_.channels;
        load.mul = block_.pre_scale;
        load.add = block_.pre_shift;
        load.out = map.image(workspace + map_at_[0]);
        load.out_row = map.row_pitch();
        load.out_block = map.block_pitch();
        load.out_col = map.read_columns();
        load.row_read = map.read_rows();
        kernels_.load(load, row0, row1);
    }

    // Convolution i of sample n: into the next map, or into the output with the shortcut added.
    void conv(float* workspace, int i, int n, int unit0, int unit1, int row0, int row1) const {
        const BlockConv& conv = block_.convs[i];
        ConvPass pass = maps_[i].pass(workspace + map_at_[i], conv.weight, active_in(i, n), active_out(i, n));
        pass.mul = workspace + scale_at_[i];
        pass.add = pass.mul + scale_floats(conv);
        if (i + 1 < convs()) {
            const BlockedMap& next = maps_[i + 1];
            pass.relu = true;
            pass.out = next.image(workspace + map_at_[i + 1]);
            pass.out_row = next.row_pitch();
            pass.out_block = next.block_pitch();
            pass.out_col = next.columns();
            pass.whole_blocks = conv.groups == 1;  // with groups another group's channels may follow in the block
        } else {
            const std::ptrdiff_t image = std::ptrdiff_t(out_height_) * out_width_ * out_channels_;
            pass.relu = block_.relu;
            pass.out = block_.out + n * image;
            // A shortcut of another shape was put into the output before.
            pass.residual = plain_shortcut_ ? block_.x + n * image : pass.out;
            pass.out_row = std::ptrdiff_t(out_width_) * out_channels_;
            pass.out_block = kBlock;
            pass.out_col = out_columns_.data();
            pass.whole_blocks = false;
        }
        kernels_.conv(pass, unit0, unit1, row0, row1);
    }

    // out rows = shortcut(x): average pooling (partial windows divide by what is inside), then zero channels.
    void shortcut(int n, int row0, int row1) const {
        const std::ptrdiff_t out_row = std::ptrdiff_t(out_width_) * out_channels_;
        const std::ptrdiff_t in_row = std::ptrdiff_t(block_.width) * block_.channels;
        const float* x = block_.x + n * in_row * block_.height;
        float* out = block_.out + n * out_row * out_height_;
        if (plain_shortcut_) {
            std::copy_n(x + row0 * in_row, (row1 - row0) * in_row, out + row0 * out_row);
            return;
        }
        const int channels = std::min(block_.channels, out_channels_);
        for (int row = row0; row < row1; ++row)
            for (int col = 0; col < out_width_; ++col) {
                float* to = out + row * out_row + std::ptrdiff_t(col) * out_channels_;
                const int y0 = row * pool_, y1 = std::min(y0 + pool_, block_.height);
                const int x0 = col * pool_, x1 = std::min(x0 + pool_, block_.width);
                const float inside = float((y1 - y0) * (x1 - x0));
                std::fill_n(to, out_channels_, 0.0f);
                for (int y = y0; y < y1; ++y)
                    for (int c0 = x0; c0 < x1; ++c0) {
                        const float* from = x + y * in_row + std::ptrdiff_t(c0) * block_.channels;
                        for (int c = 0; c < channels; ++c) to[c] += from[c];
                    }
                for (int c = 0; c < channels; ++c) to[c] /= inside;
            }
    }

    void whole_sample(float* workspace, int n) const {
        load_scales(workspace, n);
        load_rows(workspace, n, 0, block_.height);
        if (!plain_shortcut_) shortcut(n, 0, out_height_);
        for (int i = 0; i < convs(); ++i)
            conv(workspace, i, n, 0, maps_[i].conv().units(active_out(i, n)), 0, maps_[i].conv().out_height());
    }

    // Before the convolutions of a shared sample: part `part` of `parts`.
    void prepare_part(float* workspace, int n, int part, int parts) const {
        if (part == 0) {
            zero_borders(workspace);
            load_scales(workspace, n);
        }
        load_rows(workspace, n, block_.height * part / parts, block_.height * (part + 1) / parts);
        if (!plain_shortcut_) shortcut(n, out_height_ * part / parts, out_height_ * (part + 1) / parts);
    }

    int out_height() const { return out_height_; }

private:
    static std::size_t scale_floats(const BlockConv& conv) { return round_up(conv.out_channels, kBlock) + kBlock; }
    int active_in(int i, int n) const { return i == 0 ? block_.channels : hidden(n); }
    int active_out(int i, int n) const { return i + 1 == convs() ? out_channels_ : hidden(n); }

    const ResidualBlock& block_;
    const Kernels& kernels_;
    std::vector<BlockedMap> maps_;  // read by convolution i
    std::vector<std::size_t> map_at_, scale_at_;
    std::size_t workspace_floats_ = 0;
    std::vector<std::ptrdiff_t> out_columns_;
    int out_channels_, out_height_, out_width_, pool_ = 1;
    bool plain_shortcut_;
};

}  // namespace

void residual_block(const ResidualBlock& block) {
    const Runner run(block);
    std::vector<int> active, idle;
    std::vector<double> cost;
    for (int i = 0; i < block.samples; ++i) {
        const int n = block.order[i];
        (run.hidden(n) > 0 ? active : idle).push_back(n);
        if (run.hidden(n) > 0) cost.push_back(run.cost(n));
    }
    if (run.shortcut_is_output()) idle.clear();
    const int idles = int(idle.size());
    if (active.empty() && idle.empty()) return;

    const int threads = std::max(1, block.threads);
    const int whole = count_whole(cost, threads), shared = int(active.size()) - whole;
    const int parts = shared ? ceil_div(2 * threads, shared) : 1;  // of each shared sample
    const std::size_t floats = run.workspace_floats();
    float* memory = scratch((whole ? threads + shared : shared) * floats);
    float* shared_memory = memory + (whole ? threads : 0) * floats;
    std::vector<Cut> cuts;  // [conv][shared sample]
    for (int i = 0; i < run.convs(); ++i)
        for (int s = 0; s < shared; ++s) cuts.push_back(run.cut(i, active[whole + s], parts));

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        // Dearest first, each thread taking the next sample when it is free.
        float* workspace = memory + thread_index() * floats;
        bool bordered = false;
#pragma omp for schedule(dynamic, 1) nowait
        for (int i = 0; i < whole; ++i) {
            if (!bordered) run.zero_borders(workspace);  // once: samples only write inside
            bordered = true;
            run.whole_sample(workspace, active[i]);
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (int i = 0; i < idles; ++i) run.shortcut(idle[i], 0, run.out_height());
        if (shared) {
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < shared * parts; ++i)
                run.prepare_part(shared_memory + i / parts * floats, active[whole + i / parts], i % parts, parts);
            for (int c = 0; c < run.convs(); ++c) {
#pragma omp for schedule(dynamic, 1)
                for (int i = 0; i < shared * parts; ++i) {
                    const int s = i / parts;
                    const Cut& cut = cuts[c * shared + s];
                    for (int p = i % parts; p < cut.parts(); p += parts)
                        run.conv(shared_memory + s * floats, c, active[whole + s], cut.unit0(p), cut.unit1(p),
                                 cut.row0(p), cut.row1(p));
                }
            }
        }
    }
}

}  // namespace den
