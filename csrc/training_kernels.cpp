// The training kernels of one instruction set: compiled once for each, as kernels.cpp is.
//
// No standard library here: its inline functions would be merged across instruction sets by the linker.
#include "training_kernels.h"

#include "batch_norm_kernels.h"
#include "vec.h"
#include "weight_grad_tile.h"
#include "weight_grad_transforms.h"

namespace {

void weight_grad(const den::WeightGradPass& pass) {
    const int vectors = (pass.outputs + Vec::lanes - 1) / Vec::lanes;
#if defined(DEN_512)
    int v = 0;
    for (; v + 2 <= vectors; v += 2) weight_grad_vectors<Vec, 2, 8>(pass, v);
    if (v == vectors) return;
    if (pass.outputs - v * Vec::lanes <= Vec8::lanes)
        weight_grad_vectors<Vec8, 1, 16>(pass, 2 * v);
    else
        weight_grad_vectors<Vec, 1, 16>(pass, v);
#else
    // A block of 16 has an even number of vectors.
    for (int v = 0; v < vectors; v += 2) weight_grad_vectors<Vec, 2, 6>(pass, v);
#endif
}

#define DEN_CONCAT(isa) training_##isa
#define DEN_NAME(isa) DEN_CONCAT(isa)
#define DEN_TABLE DEN_NAME(DEN_ISA)

}  // namespace

namespace den {

extern const TrainingKernels DEN_TABLE;
const TrainingKernels DEN_TABLE = {
    weight_grad, transform_tiles<Vec, InputPoints>, transform_tiles<Vec, GradPoints>, transform_weight<Vec>,
    norm_sums<Vec>, norm_apply<Vec>, norm_grad_sums<Vec>, norm_grad_apply<Vec>};

}  // namespace den
