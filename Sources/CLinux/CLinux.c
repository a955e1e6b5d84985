#define _GNU_SOURCE
#include "CLinux.h"

#if defined(__linux__)
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <link.h>
#include <pthread.h>
#include <string.h>
#include <signal.h>
#include <linux/nbd.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

const int linux_open_direct = O_DIRECT;
const int linux_write_durable = RWF_DSYNC;
const int linux_dont_wait = MSG_DONTWAIT;
const int linux_no_signal = MSG_NOSIGNAL;
const int linux_accept_flags = SOCK_NONBLOCK | SOCK_CLOEXEC;

ssize_t linux_read_cached(int fd, const struct iovec *vectors, int count, off_t offset) {
    return preadv2(fd, vectors, count, offset, RWF_NOWAIT);
}

ssize_t linux_write_cached(int fd, const struct iovec *vectors, int count, off_t offset) {
    return pwritev2(fd, vectors, count, offset, RWF_NOWAIT);
}

int linux_is_local(int fd) {
    struct statfs information;
    if (fstatfs(fd, &information) != 0) return 0;
    switch ((unsigned long)information.f_type & 0xffffffff) {
    case EXT4_SUPER_MAGIC: // ext2 and ext3 too
    case XFS_SUPER_MAGIC:
    case BTRFS_SUPER_MAGIC:
    case F2FS_SUPER_MAGIC:
    case TMPFS_MAGIC: // block devices too: /dev is one
    case RAMFS_MAGIC:
    case OVERLAYFS_SUPER_MAGIC:
    case 0x2fc12fc1: // ZFS
    case 0xca451a4e: // bcachefs
        return 1;
    default:
        return 0;
    }
}

ssize_t linux_write_durable_at(int fd, const struct iovec *vectors, int count, off_t offset) {
    return pwritev2(fd, vectors, count, offset, RWF_DSYNC);
}

int linux_fallocate(int fd, int mode, off_t offset, off_t count) {
    return fallocate(fd, mode, offset, count);
}

ssize_t linux_copy_range(int from, off_t offset, int to, off_t target, size_t count) {
    return copy_file_range(from, &offset, to, &target, count, 0);
}

int linux_clone_range(int to, off_t target, int from, off_t offset, off_t count) {
    struct file_clone_range range = {
        .src_fd = from, .src_offset = (uint64_t)offset, .src_length = (uint64_t)count,
        .dest_offset = (uint64_t)target,
    };
    return ioctl(to, FICLONERANGE, &range);
}

int linux_write_back(int fd, off_t offset, off_t count) {
    int result = sync_file_range(
        fd, offset, count,
        SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
    if (result == 0) return 0;
    int error = errno;
    // With nothing to do it fails only where the call itself is refused (a sandbox, a file of another
    // kind). Then it has told nothing of the data, and fsync still does.
    return sync_file_range(fd, offset, count, 0) == 0 ? error : 0;
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

int linux_fork(void) {
    return fork();
}

int linux_nbd_attach(int device, int socket, uint64_t size, uint32_t block, uint32_t flags) {
    // The kernel sends and receives without regard to the flag, but for errors that it makes of it.
    int mode = fcntl(socket, F_GETFL);
    if (mode < 0 || fcntl(socket, F_SETFL, mode & ~O_NONBLOCK) < 0) return -1;
    ioctl(device, NBD_CLEAR_SOCK);
    if (ioctl(device, NBD_SET_BLKSIZE, (unsigned long)block) < 0) return -1;
    if (ioctl(device, NBD_SET_SIZE_BLOCKS, (unsigned long)(size / block)) < 0) return -1;
    if (ioctl(device, NBD_SET_FLAGS, (unsigned long)flags) < 0) return -1;
    return ioctl(device, NBD_SET_SOCK, (unsigned long)socket);
}

int linux_nbd_run(int device) {
    int result = ioctl(device, NBD_DO_IT);
    ioctl(device, NBD_CLEAR_QUE);
    ioctl(device, NBD_CLEAR_SOCK);
    return result;
}

int linux_nbd_detach(int device) {
    int result = ioctl(device, NBD_DISCONNECT);
    ioctl(device, NBD_CLEAR_SOCK);
    return result;
}

ssize_t linux_receive_with_descriptors(
    int fd, void *memory, size_t size, int *descriptors, int *count) {
    enum { capacity = 32 };
    union {
        char bytes[CMSG_SPACE(capacity * sizeof(int))];
        struct cmsghdr alignment;
    } control;
    int limit = *count < capacity ? *count : capacity;
    struct iovec vector = {.iov_base = memory, .iov_len = size};
    struct msghdr message = {
        .msg_iov = &vector,
        .msg_iovlen = 1,
        .msg_control = control.bytes,
        .msg_controllen = CMSG_SPACE(limit * sizeof(int)),
    };
    *count = 0;
    ssize_t result = recvmsg(fd, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (result < 0) return result;
    for (struct cmsghdr *part = CMSG_FIRSTHDR(&message); part != NULL;
         part = CMSG_NXTHDR(&message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
        int found = (int)((part->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        for (int index = 0; index < found; index++) {
            int descriptor;
            memcpy(&descriptor, CMSG_DATA(part) + index * sizeof(int), sizeof descriptor);
            if (*count < limit) {
                descriptors[(*count)++] = descriptor;
            } else {
                close(descriptor);
            }
        }
    }
    return result;
}

ssize_t linux_read_key(int serial, void *memory, size_t size) {
    const int keyctl_read = 11;  // KEYCTL_READ of linux/keyctl.h
    return syscall(SYS_keyctl, keyctl_read, serial, memory, size, 0);
}

int linux_thread_identifier(void) {
    return (int)syscall(SYS_gettid);
}

void linux_name_thread(const char *name) {
    char text[16];
    strncpy(text, name, sizeof text - 1);
    text[sizeof text - 1] = 0;
    pthread_setname_np(pthread_self(), text);
}

// Never inlined, and a write as far as the compiler can see: no two calls are one.
__attribute__((noinline)) uintptr_t linux_current_thread(void) {
    __asm__ volatile("" ::: "memory");
    return (uintptr_t)pthread_self();
}

// Segments of the program file that nobody may write hold nothing but what the file holds: a page that
// is dropped comes back from the page cache when it is needed.
static int release_segments(struct dl_phdr_info *object, size_t size, void *context) {
    (void)size;
    (void)context;
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    for (int index = 0; index < object->dlpi_phnum; index++) {
        const ElfW(Phdr) *segment = &object->dlpi_phdr[index];
        if (segment->p_type != PT_LOAD || (segment->p_flags & PF_W) != 0) continue;
        uintptr_t begin = object->dlpi_addr + segment->p_vaddr;
        uintptr_t end = begin + segment->p_memsz;
        begin = (begin + page - 1) & ~(page - 1);
        end &= ~(page - 1);
        if (begin < end) madvise((void *)begin, end - begin, MADV_DONTNEED);
    }
    return 1; // The first object is the program itself.
}

void linux_release_code_pages(void) {
    dl_iterate_phdr(release_segments, NULL);
}
#endif
