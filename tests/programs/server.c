/* A server that knows nothing of keepalive: prints its port, then each connection that an error ends, by the peer's
   port. What it is sent is thrown away; a connection that sent something is sent a byte now and then. */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST 1000

static struct pollfd polled[MOST];
static int ports[MOST], fed[MOST], count;

static void check(int failed, const char *what)
{
    if (failed) {
        perror(what);
        exit(1);
    }
}

static int begin(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0);

    check(bind(listener, (struct sockaddr *)&address, sizeof address), "bind");
    check(listen(listener, 200), "listen");
    check(getsockname(listener, (struct sockaddr *)&address, &length), "getsockname");
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return listener;
}

static void take(int listener)
{
    struct sockaddr_in peer;
    socklen_t length = sizeof peer;
    int connection = accept(listener, (struct sockaddr *)&peer, &length);

    check(connection < 0 || count == MOST, "accept");
    polled[count] = (struct pollfd){.fd = connection, .events = POLLIN};
    fed[count] = 0;
    ports[count++] = ntohs(peer.sin_port);
}

/* Whether the connection goes on. */
static int serve(int n)
{
    char buffer[4096];
    ssize_t got = read(polled[n].fd, buffer, sizeof buffer);

    if (got > 0)
        return fed[n] = 1;
    if (got < 0) {
        printf("%d %s\n", ports[n], strerrorname_np(errno));
        fflush(stdout);
    }
    close(polled[n].fd);
    return 0;
}

int main(void)
{
    polled[count++] = (struct pollfd){.fd = begin(), .events = POLLIN};
    for (;;) {
        int ready = poll(polled, count, 200);

        check(ready < 0, "poll");
        for (int n = count - 1; n > 0; n--) {
            if (polled[n].revents && !serve(n)) {
                count--;
                polled[n] = polled[count];
                ports[n] = ports[count];
                fed[n] = fed[count];
            } else if (fed[n] && ready == 0) {
                send(polled[n].fd, ".", 1, MSG_NOSIGNAL | MSG_DONTWAIT);
            }
        }
        if (polled[0].revents)
            take(polled[0].fd);
    }
}
