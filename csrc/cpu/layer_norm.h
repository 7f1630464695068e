// LayerNorm: `norm.h` and `norm_shrink.h`, centred.
#pragma once

#include "norm_shrink.h"

namespace fastpeft {
namespace FASTPEFT_ISA {

constexpr NormKernels layer_norm_kernels = {
    norm_forward<true>, norm_backward<true>, norm_shrink<true>, norm_shrink_backward<true>
};

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
