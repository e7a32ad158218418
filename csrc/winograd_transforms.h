// The transforms of Winograd's F(2x2, 3x3) and F(4x4, 3x3) in one dimension, a vector of channels at a time; `s` is the
// distance between neighbours.
#pragma once

#include "vec.h"

namespace {

// factor * a + b
template <class V>
inline typename V::Reg scaled(float factor, typename V::Reg a, typename V::Reg b) {
    return V::fma(V::broadcast(&factor), a, b);
}

template <class V, int M>
struct Transform;

template <class V>
struct Transform<V, 2> {
    using Reg = typename V::Reg;
    static constexpr int side = 4;
    // B^T d
    static inline void input(const Reg* d, int s, Reg* v, int sv) {
        const Reg d0 = d[0], d1 = d[s], d2 = d[2 * s], d3 = d[3 * s];
        v[0] = V::sub(d0, d2);
        v[sv] = V::add(d1, d2);
        v[2 * sv] = V::sub(d2, d1);
        v[3 * sv] = V::sub(d3, d1);
    }
    // A^T m
    static inline void output(const Reg* m, int s, Reg* y, int sy) {
        const Reg sum = V::add(m[s], m[2 * s]), difference = V::sub(m[s], m[2 * s]);
        y[0] = V::add(m[0], sum);
        y[sy] = V::add(difference, m[3 * s]);
    }
    // G g
    static inline void weight(const Reg* g, int s, Reg* u, int su) {
        const Reg even = scaled<V>(0.5f, V::add(g[0], g[2 * s]), V::zero()), odd = scaled<V>(0.5f, g[s], V::zero());
        u[0] = g[0];
        u[su] = V::add(even, odd);
        u[2 * su] = V::sub(even, odd);
        u[3 * su] = g[2 * s];
    }
};

template <class V>
struct Transform<V, 4> {
    using Reg = typename V::Reg;
    static constexpr int side = 6;
    static inline void input(const Reg* d, int s, Reg* v, int sv) {
        const Reg d0 = d[0], d1 = d[s], d2 = d[2 * s], d3 = d[3 * s], d4 = d[4 * s], d5 = d[5 * s];
        const Reg even = scaled<V>(-4.0f, d2, d4), odd = scaled<V>(-4.0f, d1, d3);
        const Reg even2 = V::sub(d4, d2), odd2 = V::sub(d3, d1);
        v[0] = scaled<V>(4.0f, d0, scaled<V>(-5.0f, d2, d4));
        v[sv] = V::add(even, odd);
        v[2 * sv] = V::sub(even, odd);
        v[3 * sv] = scaled<V>(2.0f, odd2, even2);
        v[4 * sv] = scaled<V>(-2.0f, odd2, even2);
        v[5 * sv] = scaled<V>(4.0f, d1, scaled<V>(-5.0f, d3, d5));
    }
    static inline void output(const Reg* m, int s, Reg* y, int sy) {
        const Reg s1 = V::add(m[s], m[2 * s]), d1 = V::sub(m[s], m[2 * s]);
        const Reg s2 = V::add(m[3 * s], m[4 * s]), d2 = V::sub(m[3 * s], m[4 * s]);
        y[0] = V::add(m[0], V::add(s1, s2));
        y[sy] = scaled<V>(2.0f, d2, d1);
        y[2 * sy] = scaled<V>(4.0f, s2, s1);
        y[3 * sy] = V::add(scaled<V>(8.0f, d2, d1), m[5 * s]);
    }
    static inline void weight(const Reg* g, int s, Reg* u, int su) {
        const Reg even = scaled<V>(-1.0f / 6, V::add(g[0], g[2 * s]), V::zero());
        const Reg odd = scaled<V>(-1.0f / 6, g[s], V::zero());
        const Reg even2 = scaled<V>(1.0f / 24, g[0], scaled<V>(1.0f / 6, g[2 * s], V::zero()));
        const Reg odd2 = scaled<V>(1.0f / 12, g[s], V::zero());
        u[0] = scaled<V>(0.25f, g[0], V::zero());
        u[su] = V::add(even, odd);
        u[2 * su] = V::sub(even, odd);
        u[3 * su] = V::add(even2, odd2);
        u[4 * su] = V::sub(even2, odd2);
        u[5 * su] = g[2 * s];
    }
};

}  // namespace
