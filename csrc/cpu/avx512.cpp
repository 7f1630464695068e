#define FASTPEFT_ISA avx512
#define FASTPEFT_AVX512
#include "table.h"
