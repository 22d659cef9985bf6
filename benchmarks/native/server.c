/* The physical limit: what an epoll server in C, which does nothing but the system calls, needs on this machine.

   server echo    sends back what comes
   server greet   sends one byte to whoever connects, and closes when the peer does
   server bulk    receives or sends a large amount, for one peer after the other

   Prints its port; ends with its standard input. */
#include "common.h"
#include <poll.h>

static char buffer[256 * 1024];

struct connection {
    int fd;
    size_t start, end; /* what is in `held` and not yet sent */
    char *held;        /* only while the peer does not take it */
};

static void finish(struct connection *c) {
    close(c->fd);
    free(c->held);
    free(c);
}

static int flush(struct connection *c) {
    while (c->start < c->end) {
        ssize_t n = send(c->fd, c->held + c->start, c->end - c->start, MSG_NOSIGNAL);
        if (n < 0) return errno == EAGAIN ? 0 : -1;
        c->start += n;
    }
    free(c->held);
    c->held = NULL;
    return 1;
}

/* Sends it, and keeps what the socket does not take: then nothing more is read until it has. */
static int echo(int epoll, struct connection *c, size_t size) {
    ssize_t n = send(c->fd, buffer, size, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN) return -1;
    if (n < 0) n = 0;
    if ((size_t)n < size) {
        c->start = 0;
        c->end = size - n;
        if (!(c->held = malloc(c->end))) die("malloc");
        memcpy(c->held, buffer + n, c->end);
        watch(epoll, EPOLL_CTL_MOD, c->fd, EPOLLOUT, c);
    }
    return 0;
}

static int ready(int epoll, struct connection *c) {
    if (c->held) {
        int done = flush(c);
        if (done > 0) watch(epoll, EPOLL_CTL_MOD, c->fd, EPOLLIN, c);
        return done < 0 ? -1 : 0;
    }
    ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
    if (n < 0 && errno == EAGAIN) return 0;
    return n <= 0 ? -1 : echo(epoll, c, n);
}

static void admit(int epoll, int listener, int greeting) {
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct connection *c = calloc(1, sizeof *c);
        if (!c) die("calloc");
        c->fd = fd;
        no_delay(fd);
        if (greeting && send(fd, "x", 1, MSG_NOSIGNAL) != 1) die("greet");
        watch(epoll, EPOLL_CTL_ADD, fd, EPOLLIN, c);
    }
}

static void bulk(int fd) {
    struct __attribute__((packed)) { char mode; uint64_t bytes; } header;
    struct __attribute__((packed)) { uint64_t bytes; uint32_t checksum; } answer = {0, 0};
    if (recv(fd, &header, sizeof header, MSG_WAITALL) != sizeof header) die("header");
    while (answer.bytes < header.bytes) {
        uint64_t left = header.bytes - answer.bytes;
        size_t most = left < sizeof buffer ? left : sizeof buffer;
        ssize_t n = header.mode == 'u' ? recv(fd, buffer, most, 0) : send(fd, buffer, most, MSG_NOSIGNAL);
        if (n <= 0) die("bulk");
        answer.bytes += n;
    }
    if (header.mode == 'u' && send(fd, &answer, sizeof answer, MSG_NOSIGNAL) != sizeof answer) die("answer");
    recv(fd, buffer, 1, 0); /* until the peer closes */
    close(fd);
}

static void bulk_forever(int listener) {
    struct pollfd waiting[] = {{0, POLLIN, 0}, {listener, POLLIN, 0}};
    while (poll(waiting, 2, -1) > 0 && !waiting[0].revents) {
        int fd = accept(listener, NULL, NULL);
        if (fd >= 0) bulk(fd);
    }
}

int main(int argc, char **argv) {
    if (argc != 2) die("usage: server echo|greet|bulk");
    raise_limit();
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), epoll = epoll_create1(0);
    struct sockaddr_in address = loopback(0);
    socklen_t size = sizeof address;
    if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 4096)) die("listen");
    if (getsockname(listener, (struct sockaddr *)&address, &size)) die("getsockname");
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    if (argv[1][0] == 'b') {
        bulk_forever(listener);
        return 0;
    }
    watch(epoll, EPOLL_CTL_ADD, listener, EPOLLIN, &listener);
    watch(epoll, EPOLL_CTL_ADD, 0, EPOLLIN, NULL);
    for (;;) {
        struct epoll_event events[EVENTS];
        int count = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            void *data = events[i].data.ptr;
            if (!data) return 0; /* nothing is ever written to it: it has ended */
            if (data == &listener) admit(epoll, listener, argv[1][0] == 'g');
            else if (ready(epoll, data)) finish(data);
        }
    }
}
