// How the output of a Winograd convolution (winograd.h) is cut into tiles, and what one thread computes of them at a time.
#pragma once

#include <cstddef>
#include <vector>

#include "geometry.h"
#include "winograd.h"

namespace den {

// Of a 3x3 convolution of stride 1 into tiles of `tile` outputs a side. Its groups are convolutions of their own: channels
// are those of one group.
template <class T>
class WinogradTiling {
public:
    WinogradTiling(int tile, const ConvShape& conv) : tile_(tile), conv_(conv) {}

    int tiles() const;  // of one sample
    int words() const;  // of the input channels, in V and U
    // Rows and columns of zeros that the tiles at the lower and right border read beyond the padding.
    Pair slack() const;
    // Tiles that a thread computes at a time: V of them fills a third of an L2 cache, or more where weights are large. And
    // samples that it computes together, for with fewer tiles the weights would be the larger traffic.
    int chunk() const;
    int team() const;
    // V and products of a chunk of this many samples' tiles.
    std::size_t chunk_floats(int samples) const;

    // Tiles [first, last) of some samples, one sample's behind the other's. A sample's are like the one given of it, but for
    // their places.
    std::vector<WinogradTile<T>> tiles_of(const std::vector<WinogradTile<T>>& samples, int first, int last) const;
    // The pass over `tiles` tiles of such maps; where their output lies and its ReLU are still to be set.
    WinogradPass<T> pass(const BasicBlockedMap<T>& map, const float* weight, float* v, int tiles) const;
    // Has it read NHWC images in place of maps. Their channels must fill whole vectors: kBlock of them or a multiple.
    void read_images(WinogradPass<T>& pass) const;
    // Groups [group0, group1) of output channels of the tiles of a pass, at most a chunk; behind its V there is room for the
    // products.
    void convolve(const WinogradPass<T>& pass, const WinogradTile<T>* tiles, int count, int group0, int group1) const;
    int groups() const { return winograd_groups(conv_.group_out()); }

private:
    int tile_;
    ConvShape conv_;
};

}  // namespace den
