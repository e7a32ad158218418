// The steps of a residual block: what each thread does with the samples that it is given.
//
// A sample works in a *workspace*: the blocked map that each convolution reads (the intermediate maps never leave it), and
// the scale and shift of the sample's level, padded for whole-vector loads. A thread has a *bench* for the transformed
// tiles of a Winograd convolution.
#pragma once

#include <cstddef>
#include <vector>

#include "dispatch.h"
#include "geometry.h"
#include "residual_block.h"
#include "schedule.h"
#include "winograd_tiling.h"

namespace den {

template <class T>
class BlockRunner {
public:
    // What depends on shapes alone is worked out here; the block's batch (its samples with their levels and order, x and
    // out) may be another one whenever nothing runs, as long as x is out or not as before. The block outlives the runner.
    explicit BlockRunner(const ResidualBlock& block);

    const ResidualBlock& block() const { return block_; }

    std::size_t workspace_floats() const { return workspace_floats_; }
    std::size_t bench_floats() const;  // for the block's present batch
    int convs() const { return int(maps_.size()); }
    int hidden(int n) const { return block_.widths[block_.level[n]]; }
    // Whether sample n runs any convolution.
    bool is_active(int n) const { return !block_.shortcut || hidden(n) > 0; }
    bool shortcut_is_output() const { return plain_shortcut_ && block_.out == block_.x; }
    // Samples that one thread computes together, so that the weights in its cache serve enough tiles.
    int team() const { return team_; }
    double cost(int n) const;
    double sharing() const { return kernels_.tiles ? kSharingOfTiles : kSharing; }  // of `count_whole`
    std::size_t weight_bytes() const;  // of all convolutions, at full width
    // Whether the maps of both lie alike in a workspace: the zeros around those of one are then the other's.
    bool lays_out_as(const BlockRunner& other) const;

    // Zeros around the maps, written once: samples only write inside.
    void zero_borders(float* workspace) const;
    // Part `part` of `parts` of out = shortcut(x), worked out in a thread's bench.
    void shortcut(int n, int part, int parts, float* bench) const;
    // Everything, for `count` samples in workspaces that follow each other.
    void run_team(float* workspaces, const int* samples, int count, float* bench) const;

    // A shared sample: part `part` of `parts` of what comes before the convolutions.
    void prepare_part(float* workspace, int n, int part, int parts, float* bench) const;
    // Direct convolution i of a shared sample, cut for several threads.
    bool is_winograd(int i) const { return block_.convs[i].winograd != 0; }
    Cut cut(int i, int n, int parts) const { return Cut(maps_[i].conv(), active_out(i, n), parts); }
    void conv(float* workspace, int i, int n, int unit0, int unit1, int row0, int row1) const;
    // Winograd convolution i of shared samples in workspaces that follow each other, called by every thread of a team.
    void shared_winograd(int i, float* workspaces, const std::vector<int>& samples, float* bench, int threads) const;

private:
    // Where the map that convolution i reads lies in a workspace.
    T* map(float* workspace, int i) const { return elements<T>(workspace + map_at_[i]); }
    // Sample n of the input, and of the output.
    const T* x(int n) const {
        return static_cast<const T*>(block_.x) + std::ptrdiff_t(n) * block_.height * block_.width * block_.channels;
    }
    T* out(int n) const {
        return static_cast<T*>(block_.out) + std::ptrdiff_t(n) * out_height_ * out_width_ * out_channels_;
    }
    static std::size_t scale_floats(const BlockConv& conv) { return round_up(conv.out_channels, kBlock) + kBlock; }
    // Whether the first convolution reads the input itself, not a padded copy: one by Winograd, whose tiles pass through the
    // norm, or a 1x1 that nothing stands before. Of an input that is not overwritten meanwhile.
    bool reads_x() const { return reads_x_; }
    bool can_read_x(const ConvShape& first) const;
    int active_in(int i, int n) const { return i ? hidden(n) : width_at(block_.in_widths, n, block_.channels); }
    int active_out(int i, int n) const {
        return i + 1 < convs() ? hidden(n) : width_at(block_.out_widths, n, out_channels_);
    }
    // Sample n's width of those of each level; null: all channels.
    int width_at(const int* widths, int n, int channels) const { return widths ? widths[block_.level[n]] : channels; }
    // What sample n's last convolution adds to: x, or the shortcut that was put into the output before.
    const T* residual(int n) const { return !block_.shortcut ? nullptr : plain_shortcut_ ? x(n) : out(n); }
    WinogradTiling<T> tiling(int i) const { return {block_.convs[i].winograd, maps_[i].conv()}; }

    // A part of the output as the last convolution is to find it.
    void prepare_output(int n, int part, int parts, float* bench) const;
    // Zeros around part `part` of `parts` of the channels that sample n fills.
    void zero_part(float* workspace, int n, int part, int parts) const;
    void load_scales(float* workspace, int n) const;
    // Rows of sample n into the first map, through the norm in front if there is one.
    void load_rows(float* workspace, int n, int row0, int row1) const;
    void project(int n, int unit0, int unit1, int row0, int row1, float* bench) const;
    // A tile of each of the samples that run group `group` of convolution i: a convolution of its own.
    std::vector<WinogradTile<T>> sample_tiles(int i, int group, float* workspaces, const int* samples, int count) const;
    WinogradPass<T> winograd_pass(int i, int group, float* v, int tiles) const;
    // Groups [group0, group1) of output channels of these tiles, some at a time.
    void winograd_tiles(int i, int group, const WinogradTile<T>* tiles, int count, int group0, int group1, float* bench) const;
    // One of `pieces` that the outputs of these samples are cut into, each of tiles of its own or of output channels of its
    // own.
    void tiles_piece(int i, int group, const std::vector<WinogradTile<T>>& samples, int piece, int pieces, float* bench) const;
    void channels_piece(int i, int group, const std::vector<WinogradTile<T>>& samples, int widest, int piece, int pieces,
                        float* bench) const;

    const ResidualBlock& block_;
    const BasicKernels<T>& kernels_;
    std::vector<BasicBlockedMap<T>> maps_;  // read by convolution i
    std::vector<BasicBlockedMap<T>> projection_;  // what the projection reads, if there is one
    std::vector<std::size_t> map_at_, scale_at_;
    std::size_t workspace_floats_ = 0;
    std::vector<std::ptrdiff_t> out_columns_;
    int out_channels_, out_height_, out_width_, pool_ = 1, team_ = 1;
    bool plain_shortcut_, reads_x_ = false;
};

}  // namespace den
