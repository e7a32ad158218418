// The kernels of one instruction set: compiled once for each, with DEN_ISA_* and the matching compiler flags.
//
// No standard library here: its inline functions would be merged across instruction sets by the linker.
#include "kernels.h"

#include "batch_norm_kernels.h"
#include "conv_tile.h"
#include "weight_grad_tile.h"
#include "weight_grad_transforms.h"

namespace {

// Register tiles by output vectors (NV). Enough independent accumulators to hide the latency of a multiply-add, as
// many pixels as the registers hold: each load of weights is used once a pixel.
#if defined(DEN_ISA_AVX512)
#define DEN_ISA_NAME avx512
using Vec = Vec16;
constexpr int kMaxVectors = 3;
template <int NV> struct Shape;
template <> struct Shape<1> { static constexpr int rows = 2, cols = 8; };
template <> struct Shape<2> { static constexpr int rows = 1, cols = 12; };
template <> struct Shape<3> { static constexpr int rows = 1, cols = 8; };
#elif defined(DEN_ISA_AVX2)
#define DEN_ISA_NAME avx2
using Vec = Vec8;
constexpr int kMaxVectors = 2;
template <int NV> struct Shape;
template <> struct Shape<1> { static constexpr int rows = 2, cols = 6; };
template <> struct Shape<2> { static constexpr int rows = 1, cols = 6; };
#else
#define DEN_ISA_NAME portable
using Vec = Vec4;
constexpr int kMaxVectors = 2;
template <int NV> struct Shape;
template <> struct Shape<1> { static constexpr int rows = 2, cols = 4; };
template <> struct Shape<2> { static constexpr int rows = 1, cols = 6; };
#endif

// Tiles of every width up to the largest, for the whole row height and for a single last row.
template <class V, int NV>
struct Tiles {
    static constexpr int rows = Shape<NV>::rows, cols = Shape<NV>::cols;
    TileFn whole[cols], single[cols];

    template <int Q>
    constexpr void fill() {
        whole[Q - 1] = tile<V, NV, rows, Q>;
        single[Q - 1] = tile<V, NV, 1, Q>;
        if constexpr (Q > 1) fill<Q - 1>();
    }
    constexpr Tiles() : whole{}, single{} { fill<cols>(); }
};

template <class V, int NV>
void tile_rows(const den::ConvPass& pass, TileAt at, int row0, int row1) {
    static constexpr Tiles<V, NV> tiles;
    constexpr int rows = Tiles<V, NV>::rows, cols = Tiles<V, NV>::cols;
    // An even split: 16 pixels by tiles of up to 6 go as 6, 5, 5, not 6, 6, 4.
    const int count = (pass.width + cols - 1) / cols;
    const int narrow = pass.width / count, wider = pass.width % count;
    for (int row = row0; row < row1;) {
        const int height = row + rows <= row1 ? rows : 1;
        const TileFn* set = height == rows ? tiles.whole : tiles.single;
        const float* in = pass.in + row * pass.in_row;
        at.row = row;
        at.col = 0;
        for (int i = 0; i < count; ++i) {
            const int q = narrow + (i < wider);
            at.in = in + at.col * den::kBlock;
            set[q - 1](pass, at);
            at.col += q;
        }
        row += height;
    }
}

inline int vectors_of(int channels) { return (channels + Vec::lanes - 1) / Vec::lanes; }

// How many of the vectors left the next tile takes. Four are better as two and two than as three and one.
inline int next_vectors(int left) {
    if (left <= kMaxVectors) return left;
    return left == kMaxVectors + 1 && kMaxVectors > 2 ? kMaxVectors - 1 : kMaxVectors;
}

void conv(const den::ConvPass& pass, int unit0, int unit1, int row0, int row1) {
    constexpr int per_block = den::kBlock / Vec::lanes;
    const int units = (pass.group_out + den::kBlock - 1) / den::kBlock;  // of one group
    const int active_units = (pass.active_out + den::kBlock - 1) / den::kBlock;
    const std::ptrdiff_t weight_block = (std::ptrdiff_t)pass.taps * pass.group_in * den::kBlock;
    for (int unit = unit0; unit < unit1;) {
        const int group = unit / active_units, first = unit % active_units;
        const int last = first + (unit1 - unit) < active_units ? first + (unit1 - unit) : active_units;
        const int end = last * per_block < vectors_of(pass.active_out) ? last * per_block : vectors_of(pass.active_out);
        for (int v = first * per_block; v < end;) {
            const int nv = next_vectors(end - v);
            const int out = v * Vec::lanes;  // within the group
            const int left = pass.active_out - out;
            TileAt at{};
            at.weight = pass.weight + ((std::ptrdiff_t)group * units + out / den::kBlock) * weight_block + out % den::kBlock;
            at.first_in = group * pass.group_in;
            at.first_out = group * pass.group_out + out;
            at.lanes_out = pass.whole_blocks || left > nv * Vec::lanes ? nv * Vec::lanes : left;
#if defined(DEN_ISA_AVX512)
            if (nv == 1 && left <= Vec8::lanes) {
                // Half a vector: 8 lanes do the same work at twice the rate where 512-bit units are paired.
                at.lanes_out = pass.whole_blocks ? Vec8::lanes : left;
                tile_rows<Vec8, 1>(pass, at, row0, row1);
            } else if (nv == 3)
                tile_rows<Vec, 3>(pass, at, row0, row1);
            else
#endif
            if (nv == 2)
                tile_rows<Vec, 2>(pass, at, row0, row1);
            else
                tile_rows<Vec, 1>(pass, at, row0, row1);
            v += nv;
        }
        unit += last - first;
    }
}

void load(const den::MapLoad& load, int row0, int row1) {
    constexpr int step = Vec::lanes;
    for (int row = row0; row < row1; ++row) {
        if (!load.row_read[row]) continue;
        const float* line = load.in + row * load.in_row;
        float* out_line = load.out + row * load.out_row;
        for (int col = 0; col < load.width; ++col) {
            if (load.out_col[col] < 0) continue;
            const float* x = line + col * load.in_pixel;
            float* out = out_line + load.out_col[col];
            int c = 0;
            for (; c + step <= load.channels; c += step) {
                Vec::Reg value = Vec::load(x + c);
                if (load.mul) value = Vec::at_least(Vec::zero(), Vec::fma(value, Vec::load(load.mul + c), Vec::load(load.add + c)));
                Vec::store(out + (c / den::kBlock) * load.out_block + c % den::kBlock, value);
            }
            for (; c < load.channels; ++c) {
                float value = x[c];
                if (load.mul) {
                    value = value * load.mul[c] + load.add[c];
                    if (value < 0) value = 0;
                }
                out[(c / den::kBlock) * load.out_block + c % den::kBlock] = value;
            }
        }
    }
}

void weight_grad(const den::WeightGradPass& pass) {
    const int vectors = vectors_of(pass.outputs);
#if defined(DEN_ISA_AVX512)
    int v = 0;
    for (; v + 2 <= vectors; v += 2) weight_grad_vectors<Vec, 2, 8>(pass, v);
    if (v == vectors) return;
    if (pass.outputs - v * Vec::lanes <= Vec8::lanes)
        weight_grad_vectors<Vec8, 1, 16>(pass, 2 * v);
    else
        weight_grad_vectors<Vec, 1, 16>(pass, v);
#else
    // A block of 16 has an even number of vectors.
    for (int v = 0; v < vectors; v += 2) weight_grad_vectors<Vec, 2, 6>(pass, v);
#endif
}

#define DEN_STRING2(x) #x
#define DEN_STRING(x) DEN_STRING2(x)
#define DEN_CONCAT2(a, b) a##b
#define DEN_CONCAT(a, b) DEN_CONCAT2(a, b)

}  // namespace

namespace den {

extern const Kernels DEN_CONCAT(kernels_, DEN_ISA_NAME);
const Kernels DEN_CONCAT(kernels_, DEN_ISA_NAME) = {
    DEN_STRING(DEN_ISA_NAME), conv, load, weight_grad,
    transform_tiles<Vec, InputPoints>, transform_tiles<Vec, GradPoints>, transform_weight<Vec>,
    norm_sums<Vec>, norm_apply<Vec>, norm_grad_sums<Vec>, norm_grad_apply<Vec>};

}  // namespace den
