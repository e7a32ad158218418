// What one core of this machine can do at most: multiply-adds a second from registers, and bytes read a second from each
// level of memory. Prints one JSON object. Compiled and run by machine.py.
#include <time.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <immintrin.h>

#include "../csrc/amx_permission.h"
#include "../csrc/amx_tiles.h"
#endif

namespace {

// CPU time of this thread: what other processes take is not counted.
double seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

template <class Run>
double fastest(int repeats, Run run) {
    double best = 1e30;
    for (int i = 0; i < repeats; ++i) {
        const double start = seconds();
        run();
        const double took = seconds() - start;
        if (took < best) best = took;
    }
    return best;
}

volatile float sink;
// All loops over the sums are unrolled: they stay in registers.
constexpr int kSteps = 200000, kChains = 12;  // independent sums: more than the latency of a multiply-add

#if defined(__x86_64__)

__attribute__((target("avx512f"))) void fma_512() {
    __m512 sum[kChains], x = _mm512_set1_ps(0.5f), y = _mm512_set1_ps(0.25f);
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sum[c] = _mm512_setzero_ps();
    for (int i = 0; i < kSteps; ++i)
#pragma GCC unroll 12
        for (int c = 0; c < kChains; ++c) {
            sum[c] = _mm512_fmadd_ps(x, y, sum[c]);
            __asm__("" : "+v"(sum[c]));
        }
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sink = _mm512_cvtss_f32(sum[c]);
}

__attribute__((target("avx512f,avx512bf16"))) void fma_bf16() {
    __m512 sum[kChains];
    const __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f003f00), y = (__m512bh)_mm512_set1_epi32(0x3e803e80);
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sum[c] = _mm512_setzero_ps();
    for (int i = 0; i < kSteps; ++i)
#pragma GCC unroll 12
        for (int c = 0; c < kChains; ++c) {
            sum[c] = _mm512_dpbf16_ps(sum[c], x, y);
            __asm__("" : "+v"(sum[c]));
        }
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sink = _mm512_cvtss_f32(sum[c]);
}

__attribute__((target("avx2,fma"))) void fma_256() {
    __m256 sum[kChains], x = _mm256_set1_ps(0.5f), y = _mm256_set1_ps(0.25f);
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sum[c] = _mm256_setzero_ps();
    for (int i = 0; i < kSteps; ++i)
#pragma GCC unroll 12
        for (int c = 0; c < kChains; ++c) {
            sum[c] = _mm256_fmadd_ps(x, y, sum[c]);
            __asm__("" : "+x"(sum[c]));
        }
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sink = _mm256_cvtss_f32(sum[c]);
}

constexpr int kTileSteps = 50000;

// Of values that differ: a core multiplies zeros faster than these.
void products_of_tiles() {
    amx::Config config;
    for (int tile = 0; tile < 8; ++tile) config.set(tile, 16, 64);
    alignas(64) static unsigned short values[2][512];
    for (int i = 0; i < 512; ++i) values[0][i] = 0x3c00 + i * 37 % 256, values[1][i] = 0xbc00 + i * 53 % 256;
    amx::configure(config);
    amx::clear<0>(), amx::clear<1>(), amx::clear<2>(), amx::clear<3>();
    amx::load<4>(values[0], 64), amx::load<5>(values[1], 64), amx::load<6>(values[1], 64), amx::load<7>(values[0], 64);
    for (int i = 0; i < kTileSteps; ++i) {
        amx::add_product<0, 4, 6>(), amx::add_product<1, 4, 7>();
        amx::add_product<2, 5, 6>(), amx::add_product<3, 5, 7>();
    }
    amx::release();
}

#endif

// Reads all of it, eight lines at a time.
void read(const char* memory, std::size_t bytes) {
    typedef long long Line __attribute__((vector_size(32)));
    Line sum[8] = {};
    for (std::size_t i = 0; i + 512 <= bytes; i += 512)
#pragma GCC unroll 16
        for (int k = 0; k < 16; ++k) {
            Line line;
            std::memcpy(&line, memory + i + 32 * k, sizeof line);
            sum[k % 8] ^= line;
        }
    for (const Line& s : sum) sink = float(s[0]);
}

void print_rate(const char* name, double rate, bool first = false) {
    std::printf("%s\"%s\": %.1f", first ? "" : ", ", name, rate);
}

}  // namespace

int main() {
    std::printf("{");
    bool first = true;
    [[maybe_unused]] const double steps = double(kSteps) * kChains * 1e-9;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        print_rate("fp32 avx2 GFLOP/s", 16 * steps / fastest(50, fma_256), first), first = false;
    if (__builtin_cpu_supports("avx512f"))
        print_rate("fp32 avx512 GFLOP/s", 32 * steps / fastest(50, fma_512), first), first = false;
    if (__builtin_cpu_supports("avx512bf16"))
        print_rate("bf16 avx512_bf16 GFLOP/s", 64 * steps / fastest(50, fma_bf16), first), first = false;
    const double products = 4e-9 * kTileSteps;  // of 16 x 16 x 32 multiply-adds
    if (amx::permitted())
        print_rate("bf16 amx GFLOP/s", 2 * 8192 * products / fastest(50, products_of_tiles), first), first = false;
#endif
    struct Level {
        const char* name;
        std::size_t kib;
    };
    constexpr std::size_t kLargest = std::size_t(256) << 20;
    char* memory = static_cast<char*>(std::aligned_alloc(4096, kLargest));
    if (!memory) return 1;
    std::memset(memory, 1, kLargest);
    for (const Level level : {Level{"read 16 KiB GB/s", 16}, Level{"read 512 KiB GB/s", 512},
                              Level{"read 8 MiB GB/s", 8 << 10}, Level{"read 256 MiB GB/s", 256 << 10}}) {
        const std::size_t bytes = level.kib << 10, passes = bytes < (4 << 20) ? (8 << 20) / bytes : 1;
        const double best = fastest(bytes == kLargest ? 8 : 40, [&] {
            for (std::size_t i = 0; i < passes; ++i) read(memory, bytes);
        });
        print_rate(level.name, double(bytes * passes) / best * 1e-9, first), first = false;
    }
    const double written = fastest(8, [&] { std::memset(memory, 2, kLargest); });
    print_rate("write 256 MiB GB/s", double(kLargest) / written * 1e-9);
    std::printf("}\n");
    std::free(memory);
}
