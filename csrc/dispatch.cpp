#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace den {

extern const Kernels kernels_portable;
#if defined(DEN_X86)
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx2;
#endif

namespace {

// Best first. __builtin_cpu_supports also asks the operating system whether it saves the wider registers.
std::vector<const Kernels*> detect() {
    std::vector<const Kernels*> found;
#if defined(DEN_X86)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") &&
        __builtin_cpu_supports("fma"))
        found.push_back(&kernels_avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kernels_avx2);
#endif
    found.push_back(&kernels_portable);
    return found;
}

const std::vector<const Kernels*>& supported() {
    static const std::vector<const Kernels*> found = detect();
    return found;
}

std::atomic<const Kernels*>& current() {
    static std::atomic<const Kernels*> kernels{supported().front()};
    return kernels;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Kernels* k : supported()) names.push_back(k->name);
    return names;
}

std::string set_isa(const std::string& name) {
    std::string names;
    for (const Kernels* k : supported()) {
        if (name == k->name) return current().exchange(k)->name;
        names += (names.empty() ? "" : ", ") + std::string(k->name);
    }
    throw std::invalid_argument("isa must be one that this machine runs (" + names + "), got '" + name + "'");
}

}  // namespace den
