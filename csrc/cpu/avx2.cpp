#define FASTPEFT_ISA avx2
#define FASTPEFT_AVX2
#include "table.h"
