// Which pixels the AMX tiles of a pass hold.
#pragma once

#include "kernels.h"

namespace {

using den::bf16;
using ConvPass = den::BasicConvPass<bf16>;

constexpr int kTileRows = 16;  // most pixels of a tile
constexpr int kMostSums = 5;   // most tiles of pixels that are summed together

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int smaller(int a, int b) { return a < b ? a : b; }

struct PixelTile {
    const bf16* in;
    int row, col;  // of its first pixel
    int skip;      // pixels that the tile before has
};

// Where the pixels of rows [row0, row1) lie, as lines of which tiles are pieces: the rows, or all of them joined. Between two
// joined rows lie columns of padding, from `width` to `pitch`: computed and dropped, which is cheaper than short tiles where
// rows are short.
class Lines {
public:
    int length, pitch;
    int rows;  // of a tile: pixels

    Lines(const ConvPass& pass, int row0, int row1) : Lines(row0, row1 - row0, pass.width, pass.width) {
        const std::ptrdiff_t pixels = pass.in_row / pass.in_pixel;
        if (pass.in_row % pass.in_pixel || pixels < pass.width) return;
        const Lines joined(row0, 1, (row1 - row0 - 1) * int(pixels) + pass.width, int(pixels));
        if (joined.cost() < cost()) *this = joined, joined_ = true;
    }

    int tiles() const { return count_ * of_line_; }

    // Calls take(tile) for tiles [first, last).
    template <class Take>
    void tiles(const ConvPass& pass, int first, int last, const Take& take) const {
        int line = first / of_line_, place = first % of_line_ * rows;
        for (int index = first; index < last; ++index) {
            const int start = smaller(place, length - rows);
            int row = row0_ + line, col = start;
            if (joined_) row += start / pitch, col = start % pitch;
            take(PixelTile{pass.in + row * pass.in_row + col * pass.in_pixel, row, col, place - start});
            place += rows;
            if (place >= length) ++line, place = 0;
        }
    }

    // The taps that a tile needs. Where rows share it those in the padding add zeros.
    den::TapRange taps(const ConvPass& pass, const PixelTile& tile) const {
        return joined_ || !pass.row_taps ? den::TapRange{0, pass.taps} : pass.row_taps[tile.row];
    }

private:
    Lines(int row0, int count, int length, int pitch)
        : length(length), pitch(pitch), row0_(row0), count_(count), of_line_(ceil_div(length, kTileRows)) {
        rows = ceil_div(length, of_line_);
    }
    // In cycles a product, as measured: a row takes one, and short tiles wait for their loads.
    double cost() const { return double(tiles()) * (rows + 1.5 > 14 ? rows + 1.5 : 14); }

    int row0_, count_, of_line_;
    bool joined_ = false;
};

// Pixels next to each other in a row, and the place of the first among those of its group.
struct Piece {
    int row, col, count, slot;
};

// Tiles that are summed together.
struct PixelGroup {
    int tiles;
    const bf16* in[kMostSums];
    den::TapRange taps;
    int first_piece, last_piece;
};

// Some of the tiles of a pass, in groups: worked out once for all output channels.
class PixelGroups {
public:
    static constexpr int kMostTiles = 64;

    int count;
    PixelGroup groups[kMostTiles];
    Piece pieces[kMostTiles * kTileRows];

    // Tiles [first, last), by up to `most`.
    void fill(const ConvPass& pass, const Lines& lines, int first, int last, int most) {
        const int total = last - first;
        int tiles = 0, piece = 0;
        count = 0;
        most = ceil_div(total, ceil_div(total, most));
        lines.tiles(pass, first, last, [&](const PixelTile& tile) {
            if (tiles % most == 0) groups[count++] = {0, {}, {pass.taps, 0}, piece, piece};
            PixelGroup& group = groups[count - 1];
            const den::TapRange taps = lines.taps(pass, tile);
            group.taps.begin = smaller(group.taps.begin, taps.begin);
            group.taps.end = taps.end > group.taps.end ? taps.end : group.taps.end;
            group.in[group.tiles] = tile.in;
            piece = cut(pass, lines, tile, group.tiles * kTileRows, piece);
            group.last_piece = piece;
            ++group.tiles, ++tiles;
        });
    }

private:
    // A tile's pixels without padding and without what the tile before has; returns the next piece.
    int cut(const ConvPass& pass, const Lines& lines, const PixelTile& tile, int slot, int piece) {
        int row = tile.row, col = tile.col + tile.skip;
        for (int q = tile.skip; q < lines.rows; ++row, col = 0) {
            for (; col >= lines.pitch; col -= lines.pitch) ++row;
            const int left = lines.rows - q, count = smaller(left, pass.width - col);
            if (count > 0) pieces[piece++] = {row, col, count, slot + q};
            q += smaller(left, lines.pitch - col);
        }
        return piece;
    }
};

}  // namespace
