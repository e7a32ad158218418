// How samples are spread over threads, and the scratch memory they work in.
#pragma once

#include <cstddef>
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
// one operation, the maps between several, pooled features, or transposed weights handed to one. Contents are undefined. Throws
// std::bad_alloc.
enum class Scratch { kWork, kMaps, kFeatures, kTransposed };
float* scratch(Scratch kind, std::size_t floats);

// Scratch memory is counted in floats, whatever lies in it.
template <class T>
T* elements(float* memory) {
    return reinterpret_cast<T*>(memory);
}

// Given the cost of each sample, dearest first: how many of them run whole, one thread each. The others, too few to
// keep all threads busy, are then run by all threads together. Only time depends on the answer, no result.
int count_whole(const std::vector<double>& cost, int threads);

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
