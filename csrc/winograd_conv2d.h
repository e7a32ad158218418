// The elastic convolution by Winograd's algorithm.
#pragma once

#include "conv2d.h"

namespace den {

// Whether `conv2d` is computed so: a 3x3 of stride 1, with enough tiles in the batch that transforming the weights, which
// every call does, is a small part. Decided by shape and batch size alone.
template <class T>
bool winograd_suits(const Conv2d<T>& args);

template <class T>
void winograd_conv2d(const Conv2d<T>& args);

}  // namespace den
