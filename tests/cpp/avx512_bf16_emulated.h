// The instructions of AVX512-BF16 that csrc/vec.h uses, out of AVX-512: the avx512_bf16 kernels then run, with their
// packing and their tiles, on machines that have no such instructions. For tests (DEN_EMULATE_AVX512_BF16 of
// CMakeLists.txt). Unlike the instructions it keeps denormal numbers.
#pragma once

#include <immintrin.h>

namespace emulated {

// The second of a pair first, as the instruction does.
inline __m512 dot_of_pairs(__m512 sum, __m512i x, __m512i k) {
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
    sum = _mm512_fmadd_ps((__m512)_mm512_and_si512(x, upper), (__m512)_mm512_and_si512(k, upper), sum);
    return _mm512_fmadd_ps((__m512)_mm512_slli_epi32(x, 16), (__m512)_mm512_slli_epi32(k, 16), sum);
}

inline __m256 dot_of_pairs(__m256 sum, __m256i x, __m256i k) {
    return _mm512_castps512_ps256(
        dot_of_pairs(_mm512_zextps256_ps512(sum), _mm512_zextsi256_si512(x), _mm512_zextsi256_si512(k)));
}

// To nearest even; a NaN stays one, quiet.
inline __m256i rounded(__m512 a) {
    const __m512i bits = (__m512i)a;
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(nearest, nan, quiet), 16));
}

inline __m128i rounded(__m256 a) { return _mm256_castsi256_si128(rounded(_mm512_zextps256_ps512(a))); }

}  // namespace emulated

#define _mm512_dpbf16_ps(sum, x, k) emulated::dot_of_pairs(sum, (__m512i)(x), (__m512i)(k))
#define _mm256_dpbf16_ps(sum, x, k) emulated::dot_of_pairs(sum, (__m256i)(x), (__m256i)(k))
#define _mm512_cvtneps_pbh(a) emulated::rounded(a)
#define _mm256_cvtneps_pbh(a) emulated::rounded(a)
