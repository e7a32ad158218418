#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#include "amx_conv.h"
#if defined(DEN_AMX)
#include "amx_permission.h"
#endif

namespace den {

extern const BasicKernels<float> kernels_float_portable;
extern const BasicKernels<bf16> kernels_bf16_portable;
extern const TrainingKernels training_portable;
#if defined(DEN_X86)
extern const BasicKernels<float> kernels_float_avx512, kernels_float_avx2;
extern const BasicKernels<bf16> kernels_bf16_avx512_bf16, kernels_bf16_avx512, kernels_bf16_avx2;
extern const TrainingKernels training_avx512, training_avx2;
#endif

namespace {

struct Isa {
    const char* name;
    const BasicKernels<float>& of_float;
    const BasicKernels<bf16>& of_bf16;
    const TrainingKernels& training;
};

#if defined(DEN_AMX)

#if defined(DEN_EMULATE_AMX)
bool amx_permitted() { return true; }
#else
bool amx_permitted() { return amx::permitted(); }
#endif

// The kernels of AVX512-BF16, but for convolutions.
const BasicKernels<bf16>& amx_kernels() {
    static const BasicKernels<bf16> kernels = [] {
        BasicKernels<bf16> amx = kernels_bf16_avx512_bf16;
        amx.conv = amx_conv;
        amx.tiles = true;
        return amx;
    }();
    return kernels;
}

#endif

// Best first. __builtin_cpu_supports also asks the operating system whether it saves the wider registers.
std::vector<Isa> detect() {
    std::vector<Isa> found;
#if defined(DEN_X86)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
#if defined(DEN_EMULATE_AVX512_BF16)
    const bool avx512_bf16 = avx512;
#else
    const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#if defined(DEN_AMX)
    if (avx512_bf16 && amx_permitted()) found.push_back({"amx_bf16", kernels_float_avx512, amx_kernels(), training_avx512});
#endif
    if (avx512_bf16)
        found.push_back({"avx512_bf16", kernels_float_avx512, kernels_bf16_avx512_bf16, training_avx512});
    if (avx512) found.push_back({"avx512", kernels_float_avx512, kernels_bf16_avx512, training_avx512});
    if (avx2) found.push_back({"avx2", kernels_float_avx2, kernels_bf16_avx2, training_avx2});
#endif
    found.push_back({"portable", kernels_float_portable, kernels_bf16_portable, training_portable});
    return found;
}

const std::vector<Isa>& supported() {
    static const std::vector<Isa> found = detect();
    return found;
}

std::atomic<const Isa*>& current() {
    static std::atomic<const Isa*> isa{&supported().front()};
    return isa;
}

}  // namespace

template <>
const BasicKernels<float>& kernels() {
    return current().load(std::memory_order_relaxed)->of_float;
}

template <>
const BasicKernels<bf16>& kernels() {
    return current().load(std::memory_order_relaxed)->of_bf16;
}

const TrainingKernels& training_kernels() { return current().load(std::memory_order_relaxed)->training; }

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : supported()) names.push_back(isa.name);
    return names;
}

std::string set_isa(const std::string& name) {
    std::string names;
    for (const Isa& isa : supported()) {
        if (name == isa.name) return current().exchange(&isa)->name;
        names += (names.empty() ? "" : ", ") + std::string(isa.name);
    }
    throw std::invalid_argument("isa must be one that this machine runs (" + names + "), got '" + name + "'");
}

}  // namespace den
