#include "CTrace.h"

uint64_t merino_trace_mask = 0;
