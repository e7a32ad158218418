// How samples are spread over threads, and the scratch memory they work in.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "geometry.h"

namespace den {

inline int thread_index() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// At least `floats` floats, 64-byte aligned, owned by the calling thread until it asks for the same kind again: the work of
// one operation, the maps between several, pooled features, or transposed weights handed to one. Contents are undefined.
// Throws std::bad_alloc.
enum class Scratch { kWork, kMaps, kFeatures, kTransposed };
float* scratch(Scratch kind, std::size_t floats);

// Scratch memory is counted in floats, whatever lies in it.
template <class T>
T* elements(float* memory) {
    return reinterpret_cast<T*>(memory);
}

// How much dearer work is that threads share inside a sample: they wait at a barrier after each convolution, which weighs
// more where tiles of AMX make that short.
constexpr double kSharing = 1.05, kSharingOfTiles = 1.2;

// Given the cost of each sample, dearest first: how many of them run whole, one thread each. The others, too few to
// keep all threads busy, are then run by all threads together. Only time depends on the answer, no result.
int count_whole(const std::vector<double>& cost, int threads, double sharing = kSharing);

// Pieces of work by the thread that they are meant for. A thread that has done its own takes those that others have not
// begun: only time depends on who does what.
class Pieces {
public:
    Pieces() = default;
    // thread_of: that of each piece.
    Pieces(const std::vector<int>& thread_of, int threads);

    // work(piece) for what the calling thread, `own`, gets. Each thread calls it, once.
    template <class Work>
    void run(int own, const Work& work) const {
        const int threads = int(lists_.size());
        for (int i = 0; i < threads; ++i) {
            const int of = (own + i) % threads;
            for (int at; (at = begun_[of].fetch_add(1, std::memory_order_relaxed)) < int(lists_[of].size());)
                work(lists_[of][at]);
        }
    }

private:
    std::vector<std::vector<int>> lists_;
    std::unique_ptr<std::atomic<int>[]> begun_;  // of each list
};

// The thread that each piece is meant for, given their costs, dearest first: `wanted` (-1: any) where that leaves it with
// little more than its share of all, else the least busy.
std::vector<int> deal(const std::vector<double>& cost, const std::vector<int>& wanted, int threads);

// A convolution of one sample cut for several threads: by rows, and where those are few by output channels too.
struct Cut {
    int by_units, by_rows;
    int units, rows;

    Cut(const ConvShape& conv, int active_out, int parts);
    int parts() const { return by_units * by_rows; }
    int unit0(int part) const { return int((long long)units * (part / by_rows) / by_units); }
    int unit1(int part) const { return int((long long)units * (part / by_rows + 1) / by_units); }
    int row0(int part) const { return int((long long)rows * (part % by_rows) / by_rows); }
    int row1(int part) const { return int((long long)rows * (part % by_rows + 1) / by_rows); }
};

}  // namespace den
