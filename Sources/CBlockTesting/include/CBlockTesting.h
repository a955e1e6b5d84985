// What tests need of the system and Swift cannot call: filters of system calls, starting programs, walks over folders.
#pragma once
#include <sys/types.h>

// Starts `arguments[0]`, which is looked up in PATH, in `folder` (null: here) with `environment` (null: this program's),
// the three standard descriptors, no other one, and no signal blocked or ignored.
// `arguments` and `environment` end with null. Returns 0 and the child, or the errno value.
int testing_spawn(
    pid_t *child, char *const arguments[], char *const environment[], const char *folder,
    const int descriptors[3]);

// How a child ended, waiting for it: its exit status, 128 and the signal's number, or -1.
int testing_wait(pid_t child);

// Whether a child that nobody has waited for yet has ended.
int testing_has_ended(pid_t child);

// Removes a folder with all that is in it, as far as that is allowed. Links are removed, not followed.
void testing_remove_folder(const char *path);

#if defined(__linux__)
// From now on the calling thread, and the threads it starts, get EPERM from io_uring_setup, as in a
// sandbox. Returns 0, or the errno value where the system does not allow filters.
int testing_refuse_io_uring(void);
#endif
