// The tile instructions of csrc/amx_tiles.h in C++: its kernels then run, with their packing and their epilogues, on machines
// that have no AMX, and under sanitizers, which see the memory that C++ reads. For tests (DEN_EMULATE_AMX of CMakeLists.txt).
// Unlike the instructions it keeps denormal numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define DEN_EMULATED_AMX

namespace amx {

struct Config {
    int rows[8] = {}, row_bytes[8] = {};

    void set(int tile, int tile_rows, int bytes) { rows[tile] = tile_rows, row_bytes[tile] = bytes; }
};

struct Registers {
    Config config;
    alignas(64) unsigned char bytes[8][16][64];
};

inline Registers& registers() {
    static thread_local Registers all;
    return all;
}

inline void require(bool holds) {
    if (!holds) std::abort();
}

inline void configure(const Config& config) {
    for (int tile = 0; tile < 8; ++tile)
        require(config.rows[tile] > 0 && config.rows[tile] <= 16 && config.row_bytes[tile] > 0 && config.row_bytes[tile] <= 64 &&
                config.row_bytes[tile] % 4 == 0);
    registers().config = config;
    std::memset(registers().bytes, 0, sizeof(registers().bytes));
}

inline void release() { registers().config = Config{}; }

template <int Tile>
void clear() {
    require(registers().config.rows[Tile] > 0);
    std::memset(registers().bytes[Tile], 0, sizeof(registers().bytes[Tile]));
}

// Whole rows of 64 bytes: what a shorter row leaves is zero.
template <int Tile>
void load(const void* from, std::ptrdiff_t stride) {
    Registers& all = registers();
    clear<Tile>();
    for (int row = 0; row < all.config.rows[Tile]; ++row)
        std::memcpy(all.bytes[Tile][row], static_cast<const char*>(from) + row * stride, all.config.row_bytes[Tile]);
}

template <int Tile>
void store(void* to, std::ptrdiff_t stride) {
    const Registers& all = registers();
    require(all.config.rows[Tile] > 0);
    for (int row = 0; row < all.config.rows[Tile]; ++row)
        std::memcpy(static_cast<char*>(to) + row * stride, all.bytes[Tile][row], all.config.row_bytes[Tile]);
}

inline float upper_half(std::uint32_t word) {
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

// The second of a pair first, as `emulated::dot_of_pairs` of avx512_bf16_emulated.h.
template <int Sum, int Left, int Right>
void add_product() {
    Registers& all = registers();
    const Config& config = all.config;
    const int pairs = config.row_bytes[Left] / 4, columns = config.row_bytes[Sum] / 4;
    require(pairs == config.rows[Right] && config.rows[Sum] == config.rows[Left] && config.row_bytes[Right] == columns * 4);
    for (int row = 0; row < config.rows[Sum]; ++row) {
        std::uint32_t left[16];
        float sums[16];
        std::memcpy(left, all.bytes[Left][row], sizeof left);
        std::memcpy(sums, all.bytes[Sum][row], sizeof sums);
        for (int pair = 0; pair < pairs; ++pair) {
            std::uint32_t right[16];
            std::memcpy(right, all.bytes[Right][pair], sizeof right);
            const float first = upper_half(left[pair] << 16), second = upper_half(left[pair] & 0xffff0000u);
            for (int column = 0; column < columns; ++column)
                sums[column] += second * upper_half(right[column] & 0xffff0000u);
            for (int column = 0; column < columns; ++column) sums[column] += first * upper_half(right[column] << 16);
        }
        std::memcpy(all.bytes[Sum][row], sums, sizeof sums);
    }
}

}  // namespace amx
