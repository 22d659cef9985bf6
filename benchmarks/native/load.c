/* The peers of the servers that are measured: quick enough never to be what is waited for.

   load echo PORT PID CONNECTIONS SIZE WARM_MS RUN_MS     one message under way on each connection, for a while
   load check PORT CONNECTIONS SIZE MESSAGES              the same for so many messages each; what comes back is compared
   load accept PORT PID PARALLEL WARM_MS RUN_MS           connect, get a byte, end, see the other end; again
   load upload PORT PID BYTES u|U                         send so many; U: the server answers with a checksum, too
   load download PORT PID BYTES d|D                       receive so many; D: each byte is compared
   load hold PORT CONNECTIONS SPREAD_MS                   open connections over a while; send back what comes after the
                                                          greeting, until standard input ends

   Prints one line of JSON (hold: an empty line once all stand). The CPU time of the server, whose process id is PID, is
   the scheduler's own account in nanoseconds (clock_getcpuclockid(3)). For a process that runs that account is as old
   as its last tick, 4 ms or more; so it is read while the server sleeps, before the first message and after the last. */
#include "common.h"

#define PERIOD 65521 /* of the bytes that are sent; prime, so that a lost or swapped block shows */

static char buffer[256 * 1024];
static char pattern[PERIOD + sizeof buffer];
static int epoll;

/* -- what is measured */

static int64_t wall, server_cpu, own_cpu, operations;
static int server_pid;
static clockid_t server_clock;
static int64_t histogram[64 * 64]; /* of latency: 64 classes for each power of two */

/* Until the server sleeps: then it has done all that it was asked for, and its account is exact. */
static void settle(void) {
    char path[64], line[512], *state = NULL;
    snprintf(path, sizeof path, "/proc/%d/stat", server_pid);
    do {
        struct timespec little = {0, 1000000};
        nanosleep(&little, NULL);
        FILE *file = fopen(path, "r");
        if (!file || !fgets(line, sizeof line, file) || !(state = strrchr(line, ')'))) die(path);
        fclose(file);
    } while (state[2] != 'S');
}

static void begin(void) {
    memset(histogram, 0, sizeof histogram);
    operations = 0;
    settle();
    server_cpu = -clock_ns(server_clock);
    own_cpu = -clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    wall = -now();
}

static void end(void) {
    wall += now();
    own_cpu += clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    settle();
    server_cpu += clock_ns(server_clock);
}

static void count(int64_t nanoseconds) {
    uint64_t v = nanoseconds > 0 ? nanoseconds : 0;
    int power = 63 - __builtin_clzll(v | 1);
    operations++;
    histogram[power < 6 ? v : (power - 5) * 64 + ((v >> (power - 6)) & 63)]++;
}

static double percentile(double share) { /* in microseconds */
    int64_t before = 0;
    for (int i = 0; i < 64 * 64; i++) {
        before += histogram[i];
        if (before >= share * operations) return (i < 64 ? i : (64.5 + i % 64) * (1ULL << (i / 64 - 1))) / 1e3;
    }
    return 0;
}

static void report(int64_t answer) {
    printf("{\"operations\": %" PRId64 ", \"seconds\": %.9f, \"server_cpu\": %.9f, \"load_cpu\": %.9f, "
           "\"p50\": %.3f, \"p99\": %.3f, \"answer\": %" PRId64 "}\n",
           operations, wall / 1e9, server_cpu / 1e9, own_cpu / 1e9, percentile(0.5), percentile(0.99), answer);
}

static void measure(const char *pid) {
    server_pid = atoi(pid);
    if (clock_getcpuclockid(server_pid, &server_clock)) die("clock_getcpuclockid");
}

static void make_pattern(void) {
    uint32_t x = 1;
    for (size_t i = 0; i < sizeof pattern; i++) {
        x = x * 1103515245 + 12345;
        pattern[i] = i < PERIOD ? (char)(x >> 16) : pattern[i - PERIOD];
    }
}

static int64_t ms(const char *text) { return atoll(text) * 1000000; }

/* -- connections */

struct connection {
    int fd, messages;
    size_t sent, received; /* of the message that is under way */
    const char *message;
    int64_t began;
};

static int connected(int port, int flags) {
    struct sockaddr_in address = loopback(port);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address)) die("connect");
    no_delay(fd);
    if (flags & O_NONBLOCK) not_blocking(fd);
    return fd;
}

/* -- echo */

static size_t size;
static int checked; /* messages of each connection; 0: for a time */

static void push(struct connection *c, int armed) {
    while (c->sent < size) {
        ssize_t n = send(c->fd, c->message + c->sent, size - c->sent, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN) die("send");
        if (n < 0) break;
        c->sent += n;
    }
    int waits = c->sent < size;
    if (waits != armed) watch(epoll, EPOLL_CTL_MOD, c->fd, waits ? EPOLLIN | EPOLLOUT : EPOLLIN, c);
}

static void begin_message(struct connection *c, int64_t at) {
    c->sent = c->received = 0;
    c->began = at;
    c->message = checked ? pattern + (c->fd * 31 + c->messages * 17) % PERIOD : pattern;
    push(c, 0);
}

/* Whether its message has come back whole. */
static int pull(struct connection *c) {
    ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
    if (n < 0 && errno == EAGAIN) return 0;
    if (n <= 0) die("recv");
    if (c->received + n > size || (checked && memcmp(buffer, c->message + c->received, n))) die("not what was sent");
    c->received += n;
    return c->received == size;
}

/* All connections at once, until the time is over or each has sent what is to be checked. */
static void exchange(struct connection *all, int connections, int64_t until) {
    int64_t at = now();
    for (int i = 0; i < connections; i++) begin_message(&all[i], at);
    for (int active = connections; active;) {
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
            if (events[i].events & EPOLLOUT) push(c, 1);
            if (!(events[i].events & ~EPOLLOUT) || !pull(c)) continue;
            at = now();
            count(at - c->began);
            c->messages++;
            if (checked ? c->messages < checked : at < until) begin_message(c, at);
            else active--;
        }
    }
}

static struct connection *connect_all(int port, int connections) {
    struct connection *all = calloc(connections, sizeof *all);
    if (!all) die("calloc");
    for (int i = 0; i < connections; i++) {
        all[i].fd = connected(port, O_NONBLOCK);
        watch(epoll, EPOLL_CTL_ADD, all[i].fd, EPOLLIN, &all[i]);
    }
    return all;
}

static void echo(int port, int connections, int64_t warm, int64_t run) {
    struct connection *all = connect_all(port, connections);
    exchange(all, connections, now() + warm);
    begin();
    exchange(all, connections, now() + run);
    end();
}

/* -- accept */

static void open_one(struct connection *c, int port) {
    static uint32_t opened;
    struct sockaddr_in address = loopback(port), own = loopback(0);
    int on = 1;
    own.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 1 + opened++ % 250); /* so that ports never run out */
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0 || setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on)) die("socket");
    if (bind(c->fd, (struct sockaddr *)&own, sizeof own)) die("bind");
    c->received = 0;
    c->began = now();
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) die("connect");
    watch(epoll, EPOLL_CTL_ADD, c->fd, EPOLLIN, c);
}

/* So many at a time, each followed by another, until the time is over. */
static void accept_many(int port, int parallel, int64_t until) {
    struct connection *all = calloc(parallel, sizeof *all);
    if (!all) die("calloc");
    for (int i = 0; i < parallel; i++) open_one(&all[i], port);
    for (int active = parallel; active;) {
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
            ssize_t n = recv(c->fd, buffer, 2, 0);
            if (n < 0 && errno == EAGAIN) continue;
            if (n == 1 && buffer[0] == 'x' && !c->received++) {
                if (shutdown(c->fd, SHUT_WR)) die("shutdown");
                continue;
            }
            if (n != 0 || !c->received) die("not greeted");
            close(c->fd); /* the other end is closed, too */
            int64_t at = now();
            count(at - c->began);
            if (at < until) open_one(c, port);
            else active--;
        }
    }
}

/* -- bulk */

struct __attribute__((packed)) header { char mode; uint64_t bytes; };
struct __attribute__((packed)) answer { uint64_t bytes; uint32_t checksum; };

static void ask(int fd, char mode, uint64_t bytes) {
    struct header header = {mode, bytes};
    if (send(fd, &header, sizeof header, MSG_NOSIGNAL) != sizeof header) die("send");
}

static int64_t upload(int fd, char mode, uint64_t bytes) {
    struct answer answer;
    ask(fd, mode, bytes);
    for (uint64_t sent = 0; sent < bytes;) {
        size_t most = bytes - sent < sizeof buffer ? bytes - sent : sizeof buffer;
        ssize_t n = send(fd, pattern + sent % PERIOD, most, MSG_NOSIGNAL);
        if (n < 0) die("send");
        sent += n;
    }
    if (recv(fd, &answer, sizeof answer, MSG_WAITALL) != sizeof answer || answer.bytes != bytes) die("not all arrived");
    return answer.checksum;
}

static void download(int fd, char mode, uint64_t bytes) {
    ask(fd, mode, bytes);
    for (uint64_t received = 0; received < bytes;) {
        ssize_t n = recv(fd, buffer, sizeof buffer, 0);
        if (n <= 0) die("recv");
        if (mode == 'D' && memcmp(buffer, pattern + received % PERIOD, n)) die("not what the server was to send");
        received += n;
    }
}

/* -- hold */

static void hold(int port, int connections, int64_t spread) {
    struct connection *all = calloc(connections, sizeof *all);
    int opened = 0, greeted = 0;
    int64_t start = now();
    watch(epoll, EPOLL_CTL_ADD, 0, EPOLLIN, NULL);
    for (;;) {
        while (opened < connections && opened - greeted < 200 && now() >= start + spread / connections * opened) {
            all[opened].fd = connected(port, O_NONBLOCK);
            watch(epoll, EPOLL_CTL_ADD, all[opened].fd, EPOLLIN, &all[opened]);
            opened++;
        }
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(epoll, events, EVENTS, opened < connections ? 1 : -1);
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c) return; /* standard input has ended */
            ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
            if (n <= 0) die("a connection that was to be held has ended");
            if (c->received && send(c->fd, buffer, n, MSG_NOSIGNAL) != n) die("send");
            if (!c->received && ++greeted == connections) {
                printf("\n");
                fflush(stdout);
            }
            c->received = 1;
        }
    }
}

int main(int argc, char **argv) {
    if (argc < 5) die("usage: load echo|check|accept|upload|download|hold PORT ...: see load.c");
    const char *what = argv[1];
    int port = atoi(argv[2]);
    raise_limit();
    make_pattern();
    epoll = epoll_create1(0);
    if (!strcmp(what, "echo") && argc == 8) {
        measure(argv[3]);
        size = atol(argv[5]);
        echo(port, atoi(argv[4]), ms(argv[6]), ms(argv[7]));
        report(0);
    } else if (!strcmp(what, "check") && argc == 6) {
        size = atol(argv[4]);
        checked = atoi(argv[5]);
        exchange(connect_all(port, atoi(argv[3])), atoi(argv[3]), 0);
        printf("{\"operations\": %" PRId64 "}\n", operations);
    } else if (!strcmp(what, "accept") && argc == 7) {
        measure(argv[3]);
        accept_many(port, atoi(argv[4]), now() + ms(argv[5]));
        begin();
        accept_many(port, atoi(argv[4]), now() + ms(argv[6]));
        end();
        report(0);
    } else if ((!strcmp(what, "upload") || !strcmp(what, "download")) && argc == 6) {
        measure(argv[3]);
        int fd = connected(port, 0);
        int64_t answer = 0;
        begin();
        if (what[0] == 'u') answer = upload(fd, argv[5][0], atoll(argv[4]));
        else download(fd, argv[5][0], atoll(argv[4]));
        end();
        report(answer);
    } else if (!strcmp(what, "hold") && argc == 5) {
        hold(port, atoi(argv[3]), ms(argv[4]));
    } else {
        die("see load.c for what it takes");
    }
    return 0;
}
