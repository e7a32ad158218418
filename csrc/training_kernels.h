// The kernels that only training needs, of one instruction set; float.
#pragma once

#include "batch_norm_pass.h"
#include "weight_grad_pass.h"

namespace den {

struct TrainingKernels {
    void (*weight_grad)(const WeightGradPass& pass);
    // Winograd's weight gradient: inputs and gradients to places, sums of places to taps.
    void (*transform_input)(const TileTransform& pass);
    void (*transform_grad)(const TileTransform& pass);
    void (*transform_weight)(float* block);
    // Batch norm: sums, then results; forward and backward.
    void (*norm_sums)(const NormPass& pass);
    void (*norm_apply)(const NormPass& pass);
    void (*norm_grad_sums)(const NormPass& pass);
    void (*norm_grad_apply)(const NormPass& pass);
};

}  // namespace den
