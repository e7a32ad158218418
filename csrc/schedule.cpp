#include "schedule.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace den {

float* scratch(Scratch kind, std::size_t floats) {
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    struct Memory {
        std::unique_ptr<float, Free> floats;
        std::size_t capacity = 0;
    };
    thread_local Memory kinds[4];
    Memory& memory = kinds[int(kind)];
    if (floats > memory.capacity) {
        memory.floats.reset();  // before asking for more: the old contents are of no use
        memory.capacity = 0;
        // Large memory in large pages, where the system has them: fewer address translations to wait for.
        constexpr std::size_t kPage = 4096, kLargePage = 2 << 20;
        const std::size_t page = floats * sizeof(float) >= kLargePage ? kLargePage : kPage;
        const std::size_t bytes = (floats * sizeof(float) + page - 1) / page * page;
        void* p = std::aligned_alloc(page, bytes);
#if defined(__linux__)
        if (p && page == kLargePage) madvise(p, bytes, MADV_HUGEPAGE);
#endif
        if (!p) throw std::bad_alloc();
        memory.floats.reset(static_cast<float*>(p));
        memory.capacity = bytes / sizeof(float);
    }
    float* start = memory.floats.get();
#ifdef __SANITIZE_ADDRESS__
    // What is kept from an earlier call hides nothing: reading beyond the end fails, and reading the old contents gives NaN.
    ASAN_UNPOISON_MEMORY_REGION(start, memory.capacity * sizeof(float));
    std::fill_n(start, floats, std::numeric_limits<float>::quiet_NaN());
    ASAN_POISON_MEMORY_REGION(start + floats, (memory.capacity - floats) * sizeof(float));
#endif
    return start;
}

int count_whole(const std::vector<double>& cost, int threads, double sharing) {
    const int n = int(cost.size());
    if (threads == 1) return n;
    double rest = 0;
    for (double c : cost) rest += c;
    std::vector<double> load(threads, 0.0);
    const int fewest = std::max(0, n - 2 * threads);
    int best = n;
    double best_time = -1, longest = 0;
    for (int whole = 0; whole <= n; ++whole) {
        if (whole > 0) {
            auto idlest = std::min_element(load.begin(), load.end());
            *idlest += cost[whole - 1];
            longest = std::max(longest, *idlest);
            rest -= cost[whole - 1];
        }
        if (whole < fewest) continue;
        // All threads go on to the shared samples as soon as they are free.
        double busy = 0;
        for (double l : load) busy += l;
        const double time = std::max(longest, (busy + sharing * rest) / threads);
        if (best_time < 0 || time <= best_time) best_time = time, best = whole;
    }
    return best;
}

Pieces::Pieces(const std::vector<int>& thread_of, int threads) {
    if (thread_of.empty()) return;
    lists_.resize(threads);
    for (std::size_t i = 0; i < thread_of.size(); ++i) lists_[thread_of[i]].push_back(int(i));
    begun_.reset(new std::atomic<int>[threads]);
    for (int i = 0; i < threads; ++i) begun_[i] = 0;
}

std::vector<int> deal(const std::vector<double>& cost, const std::vector<int>& wanted, int threads) {
    // A map that comes from another core's cache can take as long as some of the work on it.
    constexpr double kMoving = 1.05;
    std::vector<int> dealt;
    if (cost.empty()) return dealt;
    double share = 0;
    for (double c : cost) share += c / threads;
    std::vector<double> load(threads, 0.0);
    for (std::size_t i = 0; i < cost.size(); ++i) {
        const int idlest = int(std::min_element(load.begin(), load.end()) - load.begin());
        const bool fits = wanted[i] >= 0 && load[wanted[i]] + cost[i] <= share * kMoving;
        dealt.push_back(fits ? wanted[i] : idlest);
        load[dealt.back()] += cost[i];
    }
    return dealt;
}

Cut::Cut(const ConvShape& conv, int active_out, int parts)
    : units(conv.units(active_out)), rows(conv.out_height()) {
    if (conv.out_width() * rows < active_out) {
        // Weights are the larger part of what is read: every thread reads some of them, and the whole map.
        by_units = std::min(parts, units);
        by_rows = std::min(ceil_div(parts, by_units), rows);
    } else {
        // By rows, if there are enough: each thread then goes on with the rows that it wrote.
        by_rows = std::min(parts, std::max(1, rows / 2));
        by_units = std::min(ceil_div(parts, by_rows), units);
    }
}

}  // namespace den
