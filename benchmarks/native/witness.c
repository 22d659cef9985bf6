/* The moment of the kernel's own verdict: watches duplicates of a process's sockets for errors, on another core.

   Takes lines "PID FD KEY" and then an empty one, upon which it answers with an empty line and spins (a sleeper would
   add the time that it takes to wake it). At the end of its input it prints "KEY NANOSECONDS" for each socket that the
   kernel has ended, on CLOCK_MONOTONIC. It never reads SO_ERROR, which would take the error from its owner. */
#include "common.h"
#include <sys/syscall.h>

struct sighting {
    int key;
    int64_t at;
};

static void adopt(int epoll, int pid, int fd, int key) {
    static int process = -1, of = -1;
    if (of != pid) process = syscall(SYS_pidfd_open, of = pid, 0);
    int copy = syscall(SYS_pidfd_getfd, process, fd, 0);
    if (copy < 0) die("pidfd_getfd");
    struct sighting *s = calloc(1, sizeof *s);
    if (!s) die("calloc");
    s->key = key;
    watch(epoll, EPOLL_CTL_ADD, copy, EPOLLONESHOT, s); /* errors are always told */
}

int main(void) {
    raise_limit();
    int epoll = epoll_create1(0), pid, fd, key;
    size_t seen = 0, room = 1 << 16;
    struct sighting **sightings = calloc(room, sizeof *sightings);
    char line[64];
    while (fgets(line, sizeof line, stdin) && line[0] != '\n') {
        if (sscanf(line, "%d %d %d", &pid, &fd, &key) != 3) die("expected PID FD KEY");
        adopt(epoll, pid, fd, key);
    }
    watch(epoll, EPOLL_CTL_ADD, 0, EPOLLIN, NULL);
    printf("\n");
    fflush(stdout);
    for (int ended = 0; !ended;) {
        struct epoll_event events[EVENTS];
        int count = epoll_wait(epoll, events, EVENTS, 0);
        int64_t at = count ? now() : 0;
        for (int i = 0; i < count; i++) {
            struct sighting *s = events[i].data.ptr;
            if (!s) {
                ended = 1;
            } else if (seen < room) {
                s->at = at;
                sightings[seen++] = s;
            }
        }
    }
    for (size_t i = 0; i < seen; i++) printf("%d %" PRId64 "\n", sightings[i]->key, sightings[i]->at);
    return 0;
}
