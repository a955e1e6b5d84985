#pragma once
#include <stdbool.h>
#include <stdint.h>

// One bit for each trace point that is switched on. In C, so that looking costs one load and nothing is
// initialised on the way.
extern uint64_t merino_trace_mask;

static inline bool merino_trace_is_on(uint32_t point) {
    return __atomic_load_n(&merino_trace_mask, __ATOMIC_RELAXED) >> point & 1;
}

static inline void merino_trace_switch(uint32_t point, bool on) {
    if (on) {
        __atomic_fetch_or(&merino_trace_mask, (uint64_t)1 << point, __ATOMIC_RELAXED);
    } else {
        __atomic_fetch_and(&merino_trace_mask, ~((uint64_t)1 << point), __ATOMIC_RELAXED);
    }
}
