#include "pack.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace den {

template <class T>
std::size_t packed_elements(int out_channels, int group_in, int taps, int groups) {
    return std::size_t(groups) * round_up(out_channels / groups, kBlock) * round_up(group_in, kWord<T>) * taps;
}

namespace {

using Word = std::uint32_t;

// The weights of one output for `run` input channels, [channel][tap], as words [word of channels][tap].
void to_words(const float* from, int run, int taps, Word* to) { std::memcpy(to, from, sizeof(float) * run * taps); }

void to_words(const bf16* from, int run, int taps, Word* words) {
    bf16* to = reinterpret_cast<bf16*>(words);
    if (taps == 1) {
        std::memcpy(to, from, sizeof(bf16) * run);
        if (run % 2) to[run] = bf16{};
        return;
    }
    for (int c = 0; c < run; c += 2, from += 2 * taps)
        for (int t = 0; t < taps; ++t, to += 2) {
            to[0] = from[t];
            to[1] = c + 1 < run ? from[taps + t] : bf16{};
        }
}

// Copies four neighbouring words of four rows to four columns, to[0..3].
inline void transpose(const Word* rows, std::ptrdiff_t pitch, Word* const (&to)[4]) {
#if defined(__SSE2__)
    __m128 a[4];
    for (int i = 0; i < 4; ++i) a[i] = _mm_loadu_ps(reinterpret_cast<const float*>(rows + i * pitch));
    _MM_TRANSPOSE4_PS(a[0], a[1], a[2], a[3]);
    for (int i = 0; i < 4; ++i) _mm_storeu_ps(reinterpret_cast<float*>(to[i]), a[i]);
#else
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) to[j][i] = rows[i * pitch + j];
#endif
}

// One block of 16 output channels, of which `outs` exist.
template <class T>
void pack_unit(const T* weight, int outs, int group_in, int taps, int first_in, T* packed) {
    constexpr int block = kMapBlock<T>;  // also the elements of a row of weights
    // The 16 rows of a run are first laid side by side: in the tensor they are often a power of two apart, and would
    // evict each other from the cache. Rows of outputs that do not exist stay zero.
    const int pitch = kBlock * taps + 4;
    std::vector<Word> rows(std::size_t(kBlock) * pitch, 0);
    for (int done = 0; done < group_in;) {
        const int run = std::min(block - (first_in + done) % block, group_in - done);
        const int words = ceil_div(run, kWord<T>);
        for (int o = 0; o < outs; ++o)
            to_words(weight + (std::ptrdiff_t(o) * group_in + done) * taps, run, taps, &rows[o * pitch]);
        // Word w of tap t, column w * taps + t of the rows, becomes row t * words + w.
        Word* out = reinterpret_cast<Word*>(packed);
        for (int column = 0, w = 0, t = 0; column < words * taps; column += 4) {
            Word* to[4];
            Word beyond[kBlock];
            for (Word*& row : to) {
                row = w < words ? out + (std::ptrdiff_t(t) * words + w) * kBlock : beyond;
                if (++t == taps) t = 0, ++w;
            }
            for (int o = 0; o < kBlock; o += 4) {
                transpose(&rows[o * pitch + column], pitch, to);
                for (Word*& row : to) row += 4;
            }
        }
        packed += std::ptrdiff_t(words) * taps * block;
        done += run;
    }
}

}  // namespace

template <class T>
void pack_weight(const T* weight, int out_channels, int group_in, int taps, int groups, int threads, T* packed) {
    const int group_out = out_channels / groups, units = ceil_div(group_out, kBlock);
    const std::ptrdiff_t out_elements = std::ptrdiff_t(group_in) * taps;
    const std::ptrdiff_t unit_elements = std::ptrdiff_t(round_up(group_in, kWord<T>)) * taps * kBlock;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int i = 0; i < groups * units; ++i) {
        const int group = i / units, first = i % units * kBlock;
        pack_unit(weight + (group * group_out + first) * out_elements, std::min(kBlock, group_out - first), group_in,
                  taps, group * group_in, packed + i * unit_elements);
    }
}

template std::size_t packed_elements<float>(int, int, int, int);
template std::size_t packed_elements<bf16>(int, int, int, int);
template void pack_weight(const float*, int, int, int, int, int, float*);
template void pack_weight(const bf16*, int, int, int, int, int, bf16*);

}  // namespace den
