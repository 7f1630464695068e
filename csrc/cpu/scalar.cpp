#define FASTPEFT_ISA scalar
#include "table.h"
