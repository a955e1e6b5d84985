// What tests need of Linux and Swift cannot call: filters of system calls.
#pragma once

#if defined(__linux__)
// From now on the calling thread, and the threads it starts, get EPERM from io_uring_setup, as in a
// sandbox. Returns 0, or the errno value where the system does not allow filters.
int testing_refuse_io_uring(void);
#endif
