/* The program in a real guest: one stream, in writes or reads of one size, or one each way, and nothing else.
 *
 * stream send HOST_PORT GUEST_PORT SIZE   connects to HOST_PORT of the host and writes for ever
 * stream take HOST_PORT GUEST_PORT SIZE   listens on GUEST_PORT, and reads what the host writes SIZE bytes at a time
 * stream echo HOST_PORT GUEST_PORT SIZE   listens on GUEST_PORT, and returns what comes, SIZE bytes at a time
 * stream both HOST_PORT GUEST_PORT SIZE   is two programs, one of which sends, while the other takes
 *
 * The marks are those of pattern.rs: every STEP bytes, or every SIZE bytes where that is less, the stream's offset. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

#define MAGIC 0x76736f636b21a55aULL
#define STEP 4096
#define READ_SIZE 65536

static char buffer[READ_SIZE];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void send_stream(int fd, size_t size, size_t step)
{
    uint64_t offset = 0;

    for (;;) {
        for (size_t at = 0; at < size; at += step, offset += step) {
            uint64_t mark = offset ^ MAGIC;
            memcpy(buffer + at, &mark, sizeof(mark));
        }
        for (size_t done = 0; done < size;) {
            ssize_t sent = send(fd, buffer + done, size - done, MSG_NOSIGNAL);
            if (sent <= 0)
                fail("send");
            done += sent;
        }
    }
}

static void take_stream(int fd, size_t step)
{
    uint64_t offset = 0, mark;

    for (;;) {
        ssize_t length = recv(fd, buffer, sizeof(buffer), 0);
        if (length <= 0)
            fail("recv");
        uint64_t at = (offset + step - 1) / step * step;
        for (; at + sizeof(mark) <= offset + length; at += step) {
            memcpy(&mark, buffer + (at - offset), sizeof(mark));
            if (mark != (at ^ MAGIC)) {
                fprintf(stderr, "wrong bytes at offset %llu\n", (unsigned long long)at);
                exit(1);
            }
        }
        offset += length;
    }
}

static void echo(int fd, size_t size)
{
    for (;;) {
        if (recv(fd, buffer, size, MSG_WAITALL) != (ssize_t)size)
            fail("recv");
        if (send(fd, buffer, size, MSG_NOSIGNAL) != (ssize_t)size)
            fail("send");
    }
}

static struct sockaddr_vm address(unsigned int cid, const char *port)
{
    struct sockaddr_vm address = {
        .svm_family = AF_VSOCK,
        .svm_cid = cid,
        .svm_port = strtoul(port, NULL, 10),
    };
    return address;
}

static int open_socket(void)
{
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (fd < 0)
        fail("socket");
    return fd;
}

static int connect_to_host(const char *port)
{
    struct sockaddr_vm host = address(VMADDR_CID_HOST, port);
    int fd = open_socket();
    if (connect(fd, (struct sockaddr *)&host, sizeof(host)) < 0)
        fail("connect");
    return fd;
}

static int accept_from_host(const char *port)
{
    struct sockaddr_vm own = address(VMADDR_CID_ANY, port);
    int fd = open_socket();
    if (bind(fd, (struct sockaddr *)&own, sizeof(own)) < 0 || listen(fd, 1) < 0)
        fail("listen");
    int stream = accept(fd, NULL, NULL);
    if (stream < 0)
        fail("accept");
    return stream;
}

int main(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    size_t size = strtoul(argv[4], NULL, 10);
    if (size == 0 || size > sizeof(buffer))
        return 2;
    if (strcmp(argv[1], "echo") == 0)
        echo(accept_from_host(argv[3]), size);
    size_t step = size < STEP ? size : STEP;
    int sends = strcmp(argv[1], "send") == 0;
    if (strcmp(argv[1], "both") == 0) {
        pid_t child = fork();
        if (child < 0)
            fail("fork");
        sends = child == 0;
    }
    if (sends)
        send_stream(connect_to_host(argv[2]), size, step);
    take_stream(accept_from_host(argv[3]), step);
}
