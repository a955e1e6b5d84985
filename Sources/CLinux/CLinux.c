#define _GNU_SOURCE
#include "CLinux.h"

#if defined(__linux__)
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>

const int linux_open_direct = O_DIRECT;
const int linux_write_durable = RWF_DSYNC;
const int linux_dont_wait = MSG_DONTWAIT;
const int linux_no_signal = MSG_NOSIGNAL;
const int linux_accept_flags = SOCK_NONBLOCK | SOCK_CLOEXEC;

ssize_t linux_read_cached(int fd, const struct iovec *vectors, int count, off_t offset) {
    return preadv2(fd, vectors, count, offset, RWF_NOWAIT);
}

ssize_t linux_write_durable_at(int fd, const struct iovec *vectors, int count, off_t offset) {
    return pwritev2(fd, vectors, count, offset, RWF_DSYNC);
}

int linux_fallocate(int fd, int mode, off_t offset, off_t count) {
    return fallocate(fd, mode, offset, count);
}

int linux_accept(int fd) {
    return accept4(fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
}

int linux_socket(int family) {
    return socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
}

int linux_eventfd(void) {
    return eventfd(0, EFD_CLOEXEC);
}

int linux_signal_descriptor(const int *signals, int count) {
    sigset_t set;
    sigemptyset(&set);
    for (int index = 0; index < count; index++) sigaddset(&set, signals[index]);
    return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

void linux_name_thread(const char *name) {
    char text[16];
    strncpy(text, name, sizeof text - 1);
    text[sizeof text - 1] = 0;
    pthread_setname_np(pthread_self(), text);
}
#endif
