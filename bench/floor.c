/* The floor: the least that a server of one thread can do for a file over NBD.
 *
 *     floor FILE SOCKET
 *
 * No graph, no formats, no checks of what a client asks for, one client at a time: receive, read or write the
 * file, send the replies 32 KiB or eight at a time. What it costs is the kernel's share, which every server of
 * ordinary system calls pays. For measurements beside the servers that are compared; see README.md.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#define PIECE_BYTES (32 << 10)
#define PIECE_REPLIES 8
#define INPUT_BYTES (1 << 20)
#define DATA_BYTES (34 << 20)

struct greeting { uint64_t magic, options; uint16_t flags; } __attribute__((packed));
struct option { uint64_t magic; uint32_t type, count; } __attribute__((packed));
struct answer { uint64_t magic; uint32_t option, type, count; } __attribute__((packed));
struct information { uint16_t type; uint64_t size; uint16_t flags; } __attribute__((packed));
struct request {
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie, offset;
    uint32_t count;
} __attribute__((packed));
/* A chunk of a structured reply; a simple reply is as long as its first two members. */
struct reply {
    uint32_t magic;
    union { uint32_t error; struct { uint16_t flags, type; }; };
    uint64_t cookie;
    uint32_t count;
    uint64_t offset;
} __attribute__((packed));

static int file, client;
static uint64_t file_bytes;
static int structured;
static jmp_buf gone;

static struct iovec vectors[4 * PIECE_REPLIES];
static struct reply headers[PIECE_REPLIES];
static int vector_count, reply_count;
static size_t gathered_bytes, data_used;
static char *data, *input;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static _Noreturn void leave(void) { longjmp(gone, 1); }

static void receive_all(void *memory, size_t count) {
    for (char *at = memory; count > 0;) {
        ssize_t part = recv(client, at, count, 0);
        if (part <= 0) leave();
        at += part;
        count -= part;
    }
}

static void send_all(const void *memory, size_t count) {
    for (const char *at = memory; count > 0;) {
        ssize_t part = send(client, at, count, MSG_NOSIGNAL);
        if (part <= 0) leave();
        at += part;
        count -= part;
    }
}

static void push(void) {
    struct msghdr message = {.msg_iov = vectors, .msg_iovlen = vector_count};
    while (gathered_bytes > 0) {
        ssize_t part = sendmsg(client, &message, MSG_NOSIGNAL);
        if (part <= 0) leave();
        gathered_bytes -= part;
        while (part > 0) {
            struct iovec *first = message.msg_iov;
            size_t here = (size_t)part < first->iov_len ? (size_t)part : first->iov_len;
            first->iov_base = (char *)first->iov_base + here;
            first->iov_len -= here;
            part -= here;
            if (first->iov_len == 0) message.msg_iov++, message.msg_iovlen--;
        }
    }
    vector_count = reply_count = 0;
    data_used = 0;
}

static void gather(void *memory, size_t count) {
    vectors[vector_count++] = (struct iovec){memory, count};
    gathered_bytes += count;
}

static void handshake(void) {
    struct greeting greeting = {
        htobe64(0x4e42444d41474943), htobe64(0x49484156454f5054), htobe16(3)};
    uint32_t flags;
    send_all(&greeting, sizeof greeting);
    receive_all(&flags, sizeof flags);
    structured = 0;
    for (;;) {
        struct option option;
        char rest[4096];
        receive_all(&option, sizeof option);
        if (be32toh(option.count) > sizeof rest) leave();
        receive_all(rest, be32toh(option.count));
        struct answer answer = {htobe64(0x3e889045565a9), option.type, htobe32(1), 0};
        switch (be32toh(option.type)) {
        case 8: /* structured replies */
            structured = 1;
            break;
        case 7: { /* go: flags tell of flush, FUA and several connections */
            struct information information = {0, htobe64(file_bytes), htobe16(1 | 4 | 8 | 256)};
            struct answer first = {answer.magic, option.type, htobe32(3), htobe32(sizeof information)};
            send_all(&first, sizeof first);
            send_all(&information, sizeof information);
            send_all(&answer, sizeof answer);
            return;
        }
        default:
            answer.type = htobe32(0x80000001);
        }
        send_all(&answer, sizeof answer);
    }
}

static void reply(const struct request *request, uint32_t error, uint32_t count) {
    struct reply *header = &headers[reply_count++];
    if (structured) {
        header->magic = htobe32(0x668e33ef);
        header->flags = htobe16(1);
        header->type = htobe16(error ? 32769 : count > 0 ? 1 : 0);
        header->count = count > 0 ? htobe32(8 + count) : 0;
        header->offset = request->offset;
        if (error) { /* its number, and a message of no length */
            header->count = htobe32(6);
            header->offset = htobe64((uint64_t)error << 32);
        }
    } else {
        header->magic = htobe32(0x67446698);
        header->error = htobe32(error);
    }
    header->cookie = request->cookie;
    gather(header, !structured ? 16 : error ? 26 : count > 0 ? 28 : 20);
}

static void serve_read(const struct request *request) {
    uint32_t count = be32toh(request->count);
    if (data_used + count > DATA_BYTES) push();
    if (count > DATA_BYTES) leave();
    char *memory = data + data_used;
    if (pread(file, memory, count, be64toh(request->offset)) != (ssize_t)count) {
        reply(request, 5, 0);
        return;
    }
    data_used += count;
    reply(request, 0, count);
    gather(memory, count);
}

static void serve(void) {
    size_t available = 0;
    handshake();
    for (;;) {
        ssize_t part = recv(client, input + available, INPUT_BYTES - available, 0);
        if (part <= 0) leave();
        available += part;
        size_t used = 0;
        while (available - used >= sizeof(struct request)) {
            struct request *request = (struct request *)(input + used);
            uint16_t type = be16toh(request->type);
            uint32_t payload = type == 1 ? be32toh(request->count) : 0;
            if (payload > INPUT_BYTES - sizeof *request) leave();
            if (available - used < sizeof *request + payload) break;
            used += sizeof *request + payload;
            uint64_t offset = be64toh(request->offset);
            switch (type) {
            case 0:
                serve_read(request);
                break;
            case 1:
                reply(request, pwrite(file, request + 1, payload, offset) == payload ? 0 : 5, 0);
                break;
            case 2:
                leave();
            case 3:
                reply(request, fdatasync(file) == 0 ? 0 : 5, 0);
                break;
            default:
                reply(request, 22, 0);
            }
            if (gathered_bytes >= PIECE_BYTES || reply_count == PIECE_REPLIES) push();
        }
        push();
        available -= used;
        memmove(input, input + used, available);
    }
}

int main(int count, char **arguments) {
    if (count != 3) {
        fprintf(stderr, "usage: floor FILE SOCKET\n");
        return 1;
    }
    struct stat status;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(arguments[2]) >= sizeof address.sun_path) {
        fprintf(stderr, "floor: the socket's path is too long\n");
        return 1;
    }
    strcpy(address.sun_path, arguments[2]);
    file = open(arguments[1], O_RDWR | O_CLOEXEC);
    if (file < 0 || fstat(file, &status) < 0) fail(arguments[1]);
    file_bytes = status.st_size;
    data = aligned_alloc(4096, DATA_BYTES);
    input = aligned_alloc(4096, INPUT_BYTES);
    if (!data || !input) fail("memory");
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) < 0
        || listen(listener, 16) < 0)
        fail(arguments[2]);
    for (;;) {
        client = accept(listener, NULL, NULL);
        if (client < 0) fail("accept");
        if (setjmp(gone) == 0) serve();
        vector_count = reply_count = 0;
        gathered_bytes = data_used = 0;
        close(client);
    }
}
