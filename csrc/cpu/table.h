// The kernels of one instruction set: included last by the translation unit that was compiled for it.
#pragma once

#include "attention.h"
#include "cross_entropy.h"
#include "dora_linear.h"
#include "gemm.h"
#include "glu.h"
#include "layer_norm.h"
#include "linear_rows.h"
#include "lora_embedding.h"
#include "lora_linear_small.h"
#include "nf4.h"
#include "rms_norm.h"
#include "rope.h"

#define FASTPEFT_JOIN_(a, b) a##b
#define FASTPEFT_JOIN(a, b) FASTPEFT_JOIN_(a, b)
#define FASTPEFT_TEXT_(a) #a
#define FASTPEFT_TEXT(a) FASTPEFT_TEXT_(a)

namespace fastpeft {

const Kernels FASTPEFT_JOIN(kernels_, FASTPEFT_ISA) = {
    FASTPEFT_TEXT(FASTPEFT_ISA),
    FASTPEFT_ISA::gemm_kernels,
    FASTPEFT_ISA::linear_rows_kernels,
    FASTPEFT_ISA::lora_linear_kernels,
    FASTPEFT_ISA::lora_linear_small_kernels,
    FASTPEFT_ISA::lora_embedding_kernels,
    FASTPEFT_ISA::weight_norm_kernels,
    FASTPEFT_ISA::dora_linear_kernels,
    FASTPEFT_ISA::rms_norm_kernels,
    FASTPEFT_ISA::layer_norm_kernels,
    FASTPEFT_ISA::glu_kernels,
    FASTPEFT_ISA::rope_kernels,
    FASTPEFT_ISA::attention_kernels,
    FASTPEFT_ISA::cross_entropy_kernels,
    FASTPEFT_ISA::nf4_kernels,
};

}  // namespace fastpeft
