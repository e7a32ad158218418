// The tile instructions of Intel's AMX: eight registers of up to 16 rows of 64 bytes, and the product of two of them.
//
// A row of the left factor holds 16 pairs of bf16 channels of one pixel, the 16 rows of the right factor those pairs of
// weights of 16 outputs, a row of the sums 16 floats of one pixel: a product is 8192 multiply-adds in 16 cycles.
#pragma once

#include <cstddef>
#include <cstdint>

// Tests have the same names in C++, for machines without AMX and for sanitizers, which do not see into assembly.
#if !defined(DEN_EMULATED_AMX)

namespace amx {

// How many rows, and bytes of each, the registers have.
struct alignas(64) Config {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};

    void set(int tile, int tile_rows, int bytes) {
        rows[tile] = std::uint8_t(tile_rows), row_bytes[tile] = std::uint16_t(bytes);
    }
};

inline void configure(const Config& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
// Without it, a switch to another thread saves 8 KB more.
inline void release() { __asm__ volatile("tilerelease"); }

template <int Tile>
inline __attribute__((always_inline)) void clear() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(Tile));
}

// `stride`: bytes from row to row.
template <int Tile>
inline __attribute__((always_inline)) void load(const void* from, std::ptrdiff_t stride) {
    // The last operand tells the compiler that memory is read.
    const auto& memory = *static_cast<const char(*)[]>(from);
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(Tile), "r"(from), "r"(stride), "m"(memory));
}

template <int Tile>
inline __attribute__((always_inline)) void store(void* to, std::ptrdiff_t stride) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(Tile), "r"(to), "r"(stride) : "memory");
}

// Sum += Left * Right.
template <int Sum, int Left, int Right>
inline __attribute__((always_inline)) void add_product() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Left), "i"(Right));
}

}  // namespace amx

#endif

namespace amx {

// A core that multiplies tiles and nothing else for some 2000 cycles puts its vector units to sleep; the next store of a
// tile then waits 1100 for them ("Tiles of AMX" in docs/cpu-kernels.md). Zeros are added: none is denormal, and no flag is
// raised.
inline __attribute__((always_inline)) void keep_vectors_awake() {
    __asm__ volatile("vxorps %%xmm0, %%xmm0, %%xmm0\n\tvaddps %%zmm0, %%zmm0, %%zmm0" ::: "xmm0");
}

}  // namespace amx
