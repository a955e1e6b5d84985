// Linux calls that glibc declares for _GNU_SOURCE only, which Swift's own C module is built without.
#pragma once
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/socket.h>

#if defined(__linux__)
extern const int linux_open_direct;       // O_DIRECT
extern const int linux_write_durable;     // RWF_DSYNC

// Each returns what the call of the same name returns, and sets errno.
ssize_t linux_read_cached(int fd, const struct iovec *vectors, int count, off_t offset);  // preadv2, RWF_NOWAIT
ssize_t linux_write_cached(int fd, const struct iovec *vectors, int count, off_t offset); // pwritev2, RWF_NOWAIT
int linux_is_local(int fd);               // fstatfs: whether it is a file system on this machine's own storage
ssize_t linux_write_durable_at(int fd, const struct iovec *vectors, int count, off_t offset);  // pwritev2, RWF_DSYNC
int linux_fallocate(int fd, int mode, off_t offset, off_t count);
ssize_t linux_copy_range(int from, off_t offset, int to, off_t target, size_t count); // copy_file_range
int linux_clone_range(int to, off_t target, int from, off_t offset, off_t count); // ioctl FICLONERANGE
// sync_file_range, until it is done: 0, or the error number of data that did not get to the storage. The
// kernel tells each such error once for a descriptor: a later fsync of it succeeds.
int linux_write_back(int fd, off_t offset, off_t count);
int linux_accept(int fd);                 // accept4, non-blocking and close-on-exec
int linux_socket(int family);             // stream, non-blocking and close-on-exec
int linux_eventfd(void);                  // close-on-exec
int linux_signal_descriptor(const int *signals, int count); // signalfd, non-blocking, close-on-exec
int linux_fork(void);                     // fork, which Swift hides: only before any thread is started
// Linux's nbd module (linux/nbd.h): hands a socket to a device; serves it until it is detached, which
// takes as long; ends that.
int linux_nbd_attach(int device, int socket, uint64_t size, uint32_t block, uint32_t flags);
int linux_nbd_run(int device);
int linux_nbd_detach(int device);
// recvmsg without waiting. `count`: of descriptors, those that fit and then those that came along.
ssize_t linux_receive_with_descriptors(
    int fd, void *memory, size_t size, int *descriptors, int *count);
// Reads a key of the kernel's keyring: its length, whether or not it fits. keyctl(2), KEYCTL_READ.
ssize_t linux_read_key(int serial, void *memory, size_t size);
void linux_name_thread(const char *name); // of the caller, 15 bytes at most
uintptr_t linux_current_thread(void);     // pthread_self, which the caller must not take for a constant
int linux_thread_identifier(void);        // of the caller, as the system's tools show it

// Drops the calling program's resident pages of code and constants; see CodePages.swift.
void linux_release_code_pages(void);

// Flags for send and recv.
extern const int linux_dont_wait;         // MSG_DONTWAIT
extern const int linux_no_signal;         // MSG_NOSIGNAL
extern const int linux_accept_flags;      // SOCK_NONBLOCK | SOCK_CLOEXEC
/* Tells the processor that this is a loop that waits: what shares its core goes faster meanwhile. */
static inline void linux_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif
