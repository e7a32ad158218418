// Whether this process may use the tile registers of AMX.
#pragma once

#if defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace amx {

// Whether this machine multiplies bf16 tiles and the system, asked here, lets this process use their registers.
inline bool permitted() {
#if defined(__linux__)
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // CPUID 7.0, EDX
    constexpr long kAskFor = 0x1023, kTileData = 18;        // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned eax, ebx, ecx, edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kBf16) || !(edx & kTile)) return false;
    return syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
#else
    return false;
#endif
}

}  // namespace amx
