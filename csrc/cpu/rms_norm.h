// RMSNorm: `norm.h` and `norm_shrink.h`, not centred.
#pragma once

#include "norm_shrink.h"

namespace fastpeft {
namespace FASTPEFT_ISA {

constexpr NormKernels rms_norm_kernels = {
    norm_forward<false>, norm_backward<false>, norm_shrink<false>, norm_shrink_backward<false>
};

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
