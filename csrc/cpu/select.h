// The instruction set in use: the best one of the processor, unless another is asked for.
#pragma once

#include "kernels.h"

namespace fastpeft {

const Kernels& kernels();

// True if `name` is known and the processor has it; it is then in use. `reason` says why not.
bool select_isa(const char* name, const char** reason);

}  // namespace fastpeft
