// What becomes of the sums of AMX tiles: relu(sum * mul + add + residual), a piece of a row at a time.
#pragma once

#include "amx_pixels.h"
#include "conv_tile.h"

namespace {

constexpr int kTileOutputs = Vec::lanes;  // outputs of a tile

class Epilogue {
public:
    explicit Epilogue(const ConvPass& pass) : pass_(pass) {}

    alignas(64) float sums[kMostSums * kTileRows * kTileOutputs];  // [pixel][vector][16]

    // Of these pieces, and `vectors` times 16 outputs from at.first_out on.
    void begin(const TileAt<bf16>& at, int vectors, const Piece* first, const Piece* last) {
        at_ = at, vectors_ = vectors, next_ = first, end_ = last;
        whole_ = at.lanes_out == vectors * kTileOutputs && in_one_piece<bf16, Vec>(pass_, at);
    }

    int pieces() const { return int(end_ - next_); }  // that are left

    void finish_piece() {
        if (next_ == end_) return;
        const Piece& piece = *next_++;
        at_.row = piece.row, at_.col = piece.col;
        const float* from = sums + piece.slot * vectors_ * kTileOutputs;
        if (vectors_ == 1)
            whole_ ? finish_pixels<1>(piece, from) : finish_ragged<bf16, Vec, 1>(pass_, at_, 1, piece.count, from);
        else
            whole_ ? finish_pixels<2>(piece, from) : finish_ragged<bf16, Vec, 2>(pass_, at_, 1, piece.count, from);
    }

    void finish() {
        while (next_ != end_) finish_piece();
    }

private:
    // Where every vector is written whole.
    template <int N>
    void finish_pixels(const Piece& piece, const float* from) const {
        using Reg = Vec::Reg;
        const Reg floor = floor_of<Vec>(pass_);
        Reg mul[N], add[N];
#pragma GCC unroll 2
        for (int v = 0; v < N; ++v) {
            mul[v] = Vec::load(pass_.mul + at_.first_out + v * kTileOutputs);
            add[v] = Vec::load(pass_.add + at_.first_out + v * kTileOutputs);
        }
        const Offsets<N> offset = offsets<bf16, Vec, N>(pass_, at_);
        const std::ptrdiff_t first = piece.row * pass_.out_row + channel_at(pass_, at_.first_out);
        const std::ptrdiff_t* column = pass_.out_col + piece.col;
        const auto pixel = [&](auto value_of) __attribute__((always_inline)) {
#pragma GCC unroll 2
            for (int v = 0; v < N; ++v) {
                const std::ptrdiff_t place = first + *column + offset.of[v];
                const Reg value = Vec::fma(Vec::load(from + v * kTileOutputs), mul[v], add[v]);
                Vec::store(pass_.out + place, Vec::at_least(floor, value_of(value, place)));
            }
            ++column, from += N * kTileOutputs;
        };
        // By eight, so that the processor foresees the end of the loop.
        const auto every_pixel = [&](auto value_of) __attribute__((always_inline)) {
            int left = piece.count;
            for (; left >= 8; left -= 8)
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i) pixel(value_of);
            for (; left > 0; --left) pixel(value_of);
        };
        if (pass_.residual)
            every_pixel([&](Reg value, std::ptrdiff_t place) { return Vec::add(value, Vec::load(pass_.residual + place)); });
        else
            every_pixel([](Reg value, std::ptrdiff_t) { return value; });
    }

    const ConvPass& pass_;
    TileAt<bf16> at_{};
    int vectors_ = 1;
    bool whole_ = true;
    const Piece *next_ = nullptr, *end_ = nullptr;
};

}  // namespace
