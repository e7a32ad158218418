// The vector types of the instruction set that this translation unit is compiled for, behind a few operations: lanes of
// floats, which also load and store bf16, and how a word of x (kernels.h) is multiplied into them.
//
// Everything is in an anonymous namespace: the same header is compiled with several flags into one library, and an
// inline function shared between them could be linked in its AVX-512 form into the portable path.
#pragma once

#include "kernels.h"

#if defined(DEN_ISA_AVX512) || defined(DEN_ISA_AVX512_BF16)
#define DEN_512
#endif
#if defined(DEN_512) || defined(DEN_ISA_AVX2)
// GCC's own header leaves registers undefined on purpose, and GCC 12 warns of that.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

namespace {

using den::bf16;

// p, of which the compiler does not know where it comes from: it then adds to this pointer in place of working out, and
// keeping in memory, an address for each use.
template <class T>
inline __attribute__((always_inline)) T* opaque(T* p) {
    __asm__("" : "+r"(p));
    return p;
}

constexpr std::uint32_t kUpper = 0xffff0000u;  // the half of a float that bf16 keeps

#if defined(DEN_512)

struct Vec16 {
    using Reg = __m512;
    using Words = __m512i;
    static constexpr int lanes = 16;
    static Reg zero() { return _mm512_setzero_ps(); }
    static Reg load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, Reg a) { _mm512_storeu_ps(p, a); }
    static Reg broadcast(const float* p) { return _mm512_set1_ps(*p); }
    static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
    static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
    static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
    static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
    // max(low, a). maxps returns its second operand when one is NaN, so a NaN survives as it does in torch.relu.
    static Reg at_least(Reg low, Reg a) { return _mm512_max_ps(low, a); }
    // The larger, or a NaN if either is one.
    static Reg larger(Reg a, Reg b) {
        return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
    }

    static Words words(const void* p) { return _mm512_loadu_si512(p); }
    static Words broadcast_word(const void* p) {
        std::int32_t word;
        __builtin_memcpy(&word, p, sizeof word);
        return _mm512_set1_epi32(word);
    }
    static Reg lower(Words a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
    static Reg upper(Words a) { return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32(int(kUpper)))); }
    static Reg load(const bf16* p) {
        return lower(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
    }
    // Rounds to nearest even; a NaN stays one.
    static void store(bf16* p, Reg a) {
#if defined(DEN_ISA_AVX512_BF16)
        const __m256i half = (__m256i)_mm512_cvtneps_pbh(a);
#else
        const __m512i bits = _mm512_castps_si512(a);
        const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
        const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
        const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
        const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
    }

    // a where y is above 0 or not a number, else 0.
    static Reg where_positive(Reg y, Reg a) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_NLE_UQ), a);
    }
};

#endif
#if defined(DEN_512) || defined(DEN_ISA_AVX2)

struct Vec8 {
    using Reg = __m256;
    using Words = __m256i;
    static constexpr int lanes = 8;
    static Reg zero() { return _mm256_setzero_ps(); }
    static Reg load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, Reg a) { _mm256_storeu_ps(p, a); }
    static Reg broadcast(const float* p) { return _mm256_broadcast_ss(p); }
    static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
    static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
    static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
    static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
    static Reg at_least(Reg low, Reg a) { return _mm256_max_ps(low, a); }
    static Reg larger(Reg a, Reg b) { return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }

    static Words words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static Words broadcast_word(const void* p) {
        std::int32_t word;
        __builtin_memcpy(&word, p, sizeof word);
        return _mm256_set1_epi32(word);
    }
    static Reg lower(Words a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); }
    static Reg upper(Words a) { return _mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32(int(kUpper)))); }
    static Reg load(const bf16* p) {
        return lower(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    static void store(bf16* p, Reg a) {
#if defined(DEN_ISA_AVX512_BF16)
        const __m128i half = (__m128i)_mm256_cvtneps_pbh(a);
#else
        const __m256i bits = _mm256_castps_si256(a);
        const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
        const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
        const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
#endif
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
    }

    static Reg where_positive(Reg y, Reg a) {
        return _mm256_and_ps(_mm256_cmp_ps(y, _mm256_setzero_ps(), _CMP_NLE_UQ), a);
    }
};

#else

// GCC and Clang vector extensions: SSE2 on x86-64, NEON on aarch64, scalar code elsewhere.
struct Vec4 {
    typedef float Reg __attribute__((vector_size(16)));
    typedef std::uint32_t Words __attribute__((vector_size(16)));
    static constexpr int lanes = 4;
    static Reg zero() { return Reg{0, 0, 0, 0}; }
    static Reg load(const float* p) {
        Reg a;
        __builtin_memcpy(&a, p, sizeof a);  // p may be unaligned
        return a;
    }
    static void store(float* p, Reg a) { __builtin_memcpy(p, &a, sizeof a); }
    static Reg broadcast(const float* p) { return Reg{*p, *p, *p, *p}; }
    static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
    static Reg add(Reg a, Reg b) { return a + b; }
    static Reg sub(Reg a, Reg b) { return a - b; }
    static Reg div(Reg a, Reg b) { return a / b; }
    static Reg at_least(Reg low, Reg a) {
        const Words below = (Words)(a < low);  // false for NaN, which is kept
        return (Reg)(((Words)a & ~below) | ((Words)low & below));
    }
    static Reg larger(Reg a, Reg b) {
        const Words kept = (Words)(a > b) | (Words)(a != a);
        return (Reg)(((Words)a & kept) | ((Words)b & ~kept));
    }

    static Words words(const void* p) {
        Words a;
        __builtin_memcpy(&a, p, sizeof a);
        return a;
    }
    static Words broadcast_word(const void* p) {
        std::uint32_t word;
        __builtin_memcpy(&word, p, sizeof word);
        return Words{word, word, word, word};
    }
    // The first of a pair lies in the lower half of a little-endian word.
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    static Reg lower(Words a) { return (Reg)(a << 16); }
    static Reg upper(Words a) { return (Reg)(a & kUpper); }
#else
    static Reg lower(Words a) { return (Reg)(a & kUpper); }
    static Reg upper(Words a) { return (Reg)(a << 16); }
#endif
    static Reg load(const bf16* p) { return (Reg)(Words{p[0].bits, p[1].bits, p[2].bits, p[3].bits} << 16); }
    static void store(bf16* p, Reg a) {
        const Words bits = (Words)a, nan = (Words)(a != a);
        const Words rounded = bits + ((bits >> 16) & 1) + 0x7fff;
        const Words kept = ((rounded & ~nan) | ((bits | 0x400000) & nan)) >> 16;
        for (int i = 0; i < lanes; ++i) p[i].bits = std::uint16_t(kept[i]);
    }
    static Reg where_positive(Reg y, Reg a) {
        typedef int Mask __attribute__((vector_size(16)));
        return (Reg)((Mask)a & ~(Mask)(y <= zero()));
    }
};

#endif

// The widest of them.
#if defined(DEN_512)
using Vec = Vec16;
#elif defined(DEN_ISA_AVX2)
using Vec = Vec8;
#else
using Vec = Vec4;
#endif

// How a tile multiplies a word of x by a vector of weight words, in `steps` multiply-adds.
template <class V, class T>
struct Product;

template <class V>
struct Product<V, float> {
    using Reg = typename V::Reg;
    static constexpr int steps = 1;
    static constexpr bool reads_memory = false;  // whether fma takes x in memory, too
    static Reg weights(const float* p, int) { return V::load(p); }
    static Reg broadcast(const float* p, int) { return V::broadcast(p); }
    static Reg fma(Reg x, Reg k, Reg sum) { return V::fma(x, k, sum); }
};

#if defined(DEN_512) && !defined(__SANITIZE_ADDRESS__)

// In assembly, so that the multiply-adds are these: left to itself GCC copies accumulators between registers, and broadcasts
// a word once for all.
template <>
struct Product<Vec16, float> {
    using Reg = __m512;
    static constexpr int steps = 1;
    static constexpr bool reads_memory = true;
    static Reg weights(const float* p, int) { return Vec16::load(p); }
    static Reg broadcast(const float* p, int) { return Vec16::broadcast(p); }
    static Reg fma(Reg x, Reg k, Reg sum) {
        __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(k));
        return sum;
    }
    static Reg fma(const float* x, Reg k, Reg sum) {
        __asm__("vfmadd231ps %1%{1to16%}, %2, %0" : "+v"(sum) : "m"(*x), "v"(k));
        return sum;
    }
};

#endif

#if defined(DEN_ISA_AVX512_BF16)

template <>
struct Product<Vec16, bf16> {
    using Reg = Vec16::Words;
    static constexpr int steps = 1;
    static constexpr bool reads_memory = false;
    static Reg weights(const bf16* p, int) { return Vec16::words(p); }
    static Reg broadcast(const bf16* p, int) { return Vec16::broadcast_word(p); }
    static __m512 fma(Reg x, Reg k, __m512 sum) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)k); }
};

template <>
struct Product<Vec8, bf16> {
    using Reg = Vec8::Words;
    static constexpr int steps = 1;
    static constexpr bool reads_memory = false;
    static Reg weights(const bf16* p, int) { return Vec8::words(p); }
    static Reg broadcast(const bf16* p, int) { return Vec8::broadcast_word(p); }
    static __m256 fma(Reg x, Reg k, __m256 sum) { return _mm256_dpbf16_ps(sum, (__m256bh)x, (__m256bh)k); }
};

#else

// Without pair instructions: the first elements of the pairs, then the second ones, widened to floats.
template <class V>
struct Product<V, bf16> {
    using Reg = typename V::Reg;
    static constexpr int steps = 2;
    static constexpr bool reads_memory = false;
    static Reg weights(const bf16* p, int step) { return widen(V::words(p), step); }
    static Reg broadcast(const bf16* p, int step) { return widen(V::broadcast_word(p), step); }
    static Reg fma(Reg x, Reg k, Reg sum) { return V::fma(x, k, sum); }

private:
    static Reg widen(typename V::Words a, int step) { return step == 0 ? V::lower(a) : V::upper(a); }
};

#endif

// A number known when compiled, as an argument.
template <int N>
struct Int {
    static constexpr int value = N;
};

// sums[n] += x[0] * k[n] for NV vectors of weights, of the r-th of the words that these are multiplied with.
//
// A word is broadcast into a register, or, where the instruction set can, by each multiply-add from memory. The first takes
// one instruction more, the second NV - 1 reads more: a core that its hardware threads share runs out of the first, a core
// alone of the second. One word in NV + 1 goes the second way, and all where NV is 1.
template <class V, class T, int NV>
inline __attribute__((always_inline)) void add_products(const T* x, const typename Product<V, T>::Reg (&k)[NV], int step, int r,
                                                        typename V::Reg (&sums)[NV]) {
    using P = Product<V, T>;
    if constexpr (P::reads_memory)
        if (NV == 1 || r % (NV + 1) == 1) {
#pragma GCC unroll 4
            for (int n = 0; n < NV; ++n) sums[n] = P::fma(x, k[n], sums[n]);
            return;
        }
    const typename P::Reg b = P::broadcast(x, step);
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) sums[n] = P::fma(b, k[n], sums[n]);
}

}  // namespace
