// The direct convolution by AMX tiles, for machines that have them.
#pragma once

#include "kernels.h"

namespace den {

// BasicKernels<bf16>::conv. What does not fit tiles (an odd width inside a pair of packed channels, groups across blocks of
// a map), the kernels of AVX512-BF16 compute: decided by shape and width, never by how the work is cut.
void amx_conv(const BasicConvPass<bf16>& pass, int unit0, int unit1, int row0, int row1);

}  // namespace den
