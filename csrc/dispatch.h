// Which instruction set's kernels run: the best that the CPU and the operating system support, unless told otherwise.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"
#include "training_kernels.h"

namespace den {

template <class T = float>
const BasicKernels<T>& kernels();           // those in use
const TrainingKernels& training_kernels();
std::vector<std::string> supported_isas();  // best first
// Changes the kernels in use, for tests and measurements; returns the name of those used before.
// Throws std::invalid_argument when the machine cannot run them.
std::string set_isa(const std::string& name);

}  // namespace den
