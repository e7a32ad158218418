// The vector type of the instruction set that this translation unit is compiled for, behind a few operations.
//
// Everything is in an anonymous namespace: the same header is compiled with several flags into one library, and an
// inline function shared between them could be linked in its AVX-512 form into the portable path.
#pragma once

#if defined(DEN_ISA_AVX512) || defined(DEN_ISA_AVX2)
#include <immintrin.h>
#endif

namespace {

#if defined(DEN_ISA_AVX512)

struct Vec16 {
    using Reg = __m512;
    static constexpr int lanes = 16;
    static Reg zero() { return _mm512_setzero_ps(); }
    static Reg load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, Reg a) { _mm512_storeu_ps(p, a); }
    static Reg broadcast(const float* p) { return _mm512_set1_ps(*p); }
    static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
    static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
    static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
    // max(low, a). maxps returns its second operand when one is NaN, so a NaN survives as it does in torch.relu.
    static Reg at_least(Reg low, Reg a) { return _mm512_max_ps(low, a); }
    // a where y is above 0 or not a number, else 0.
    static Reg where_positive(Reg y, Reg a) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_NLE_UQ), a);
    }
};

#endif
#if defined(DEN_ISA_AVX512) || defined(DEN_ISA_AVX2)

struct Vec8 {
    using Reg = __m256;
    static constexpr int lanes = 8;
    static Reg zero() { return _mm256_setzero_ps(); }
    static Reg load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, Reg a) { _mm256_storeu_ps(p, a); }
    static Reg broadcast(const float* p) { return _mm256_broadcast_ss(p); }
    static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
    static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
    static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
    static Reg at_least(Reg low, Reg a) { return _mm256_max_ps(low, a); }
    static Reg where_positive(Reg y, Reg a) {
        return _mm256_and_ps(_mm256_cmp_ps(y, _mm256_setzero_ps(), _CMP_NLE_UQ), a);
    }
};

#else

// GCC and Clang vector extensions: SSE2 on x86-64, NEON on aarch64, scalar code elsewhere.
struct Vec4 {
    typedef float Reg __attribute__((vector_size(16)));
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
    static Reg at_least(Reg low, Reg a) {
        typedef int Mask __attribute__((vector_size(16)));
        const Mask below = (Mask)(a < low);  // false for NaN, which is kept
        return (Reg)(((Mask)a & ~below) | ((Mask)low & below));
    }
    static Reg where_positive(Reg y, Reg a) {
        typedef int Mask __attribute__((vector_size(16)));
        return (Reg)((Mask)a & ~(Mask)(y <= zero()));
    }
};

#endif

}  // namespace
