/* The load generator of net.py, http.py and websocket.py: one thread, one epoll, as many connections as asked for.

   load echo     port=N connections=N size=BYTES seconds=S     each connection sends a request, awaits the answer, sends the next
   load paced    port=N connections=N size=BYTES seconds=S     each connection sends one request a second, whatever the answers
                                                               do; with rate=N, all of them together N a second
   load connect  port=N connections=N size=BYTES seconds=S     connect, one request, one answer, close, and again
   load broadcast port=N connections=N size=BYTES seconds=S websocket=PATH    the first connection sends a message, which the
                                                               server sends to all; when all have it, it sends the next
   load push     port=N bytes=N repeat=N                       send so many bytes; the answer is how many have come
   load pull     port=N bytes=N repeat=N                       ask for so many bytes and receive them

   further: pattern=FILE     a MiB that what is sent is cut from, and what is pulled consists of
            pid=N            the server's process: its processor time and its memory are reported too
            tls=1            by TLS, without looking at the certificate; only when compiled with -DTLS -lssl -lcrypto
            http=FILE        echo, paced: FILE is the request, of HTTP/1.1; each answer has to be a response with status 200 and
                             `size` bytes of content, which are the pattern's first, again and again
            websocket=PATH   echo, paced, broadcast: the peer speaks WebSocket at this path. What is sent are binary messages, in
                             one masked frame each; no extension is offered. The first answer is that to the handshake
            text=1           the messages are text: the pattern has to be
            burst=N          broadcast: the first connection sends so many messages at once
            warm=S           seconds that are not counted, at the start
            think=US         echo: microseconds between an answer and the next request, for a single connection; else the next
                             one is there before a slow server has gone to sleep, and the fast one pays for waking up
            spin=1           never sleep: a server that wakes this process up pays for that, some microseconds of processor
                             time on top of each answer, which with clients elsewhere it would not

   It prints one line of JSON and returns 0. It compares every byte of every answer; a wrong one, and whatever else
   should not happen, ends it with a message and 1. It sets up at most 64 connections at a time, each proved by a
   first answer, so that no backlog overflows. In `paced` a connection that breaks is counted and not replaced; an answer's time
   counts from the moment at which its request was due, so a generator or a server that lags does not look fast.

   SPDX-License-Identifier: MIT */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#ifdef TLS
#include <openssl/err.h>
#include <openssl/ssl.h>
#endif

enum { PATTERN = 1 << 20, LARGEST = 1 << 20, AT_A_TIME = 64, EVENTS = 512, PIECE = 256 << 10, HEAD = 2048 };

/* WebSocket: of opcodes, and the longest head of a frame with its key. RFC 6455, section 5.2. */
enum { CONTINUATION, TEXT, BINARY, CLOSE = 8, PING, PONG, FRAME_HEAD = 14 };

/* Seconds: until all connections have to be set up, and until one answer has to be there. A bulk transfer gets PATIENCE
   after its last byte of progress. */
enum { SETTING_UP = 60, PATIENCE = 20 };

typedef struct {
    int fd;                     /* -1: broken, or not yet there */
    uint32_t id, turn;          /* which connection, and its how many-th request: these choose the bytes */
    uint32_t sent, received;    /* of the request, of the answer; of HTTP's answers: of the content */
    char *head;                 /* HTTP: what has come of an answer's head, and what came with it; WebSocket: of a frame's */
    uint32_t head_size;
    int in_content;             /* HTTP: the head is complete; WebSocket: that of a frame */
    int upgraded;               /* WebSocket: the handshake is over */
    uint32_t frame_left;        /* WebSocket: bytes of the frame's payload that are still to come */
    int busy, watches_out;      /* a request is under way; epoll reports room to write */
    int64_t due;                /* when the request was due, or sent; nanoseconds */
#ifdef TLS
    SSL *ssl;
#endif
} Connection;

static int port, number = 1, repeat = 1, use_tls, spin, think;
static uint32_t size = 1024, http_size;
static char *http;              /* the request; NULL where the peer echoes */
static char *websocket;         /* the path; NULL where it is not spoken */
static char handshake[HEAD];    /* the request for it */
static int message_type = BINARY;
static uint32_t burst = 1, said;    /* broadcast: messages at once; how many have been sent, */
static int waiting;                 /* and how many connections have not got the last of them */
static int64_t bytes = 1 << 30;
static double seconds = 1, warm = 0.2, rate;
static long pid;
static unsigned char pattern[PATTERN + LARGEST], scratch[LARGEST > PIECE ? LARGEST : PIECE];
static unsigned char masked[PATTERN + LARGEST], frame[FRAME_HEAD + LARGEST];
static Connection *all;
static int epoll, is_paced, is_connect, is_broadcast;
static int setting_up, ready_count, broken, unanswered, skipped, counting;
static int64_t answers, stop_at;
static int64_t idle;            /* nanoseconds in which there was nothing to do */

static uint32_t *times;         /* of the answers, in nanoseconds, 4.2 s at most */
static size_t times_count, times_room;

static void fail(const char *format, ...) {
    va_list rest;
    va_start(rest, format);
    vfprintf(stderr, format, rest);
    va_end(rest);
    fputc('\n', stderr);
    exit(1);
}

static int64_t nanoseconds(clockid_t clock) {
    struct timespec now;
    if (clock_gettime(clock, &now)) fail("the clock of process %ld cannot be read: %s", pid, strerror(errno));
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static int64_t now(void) { return nanoseconds(CLOCK_MONOTONIC); }

/* ---- what is measured ------------------------------------------------------------------------------------------- */

typedef struct { int64_t at, idle, server; } Moment;

/* The time, how much of it was idle, and the processor time that the server has used so far. */
static Moment moment(void) {
    Moment found = {now(), idle, 0};
    clockid_t clock;
    if (pid) {
        if (clock_getcpuclockid(pid, &clock)) fail("process %ld has no clock: has the server ended?", pid);
        found.server = nanoseconds(clock);
    }
    return found;
}

/* Bytes of memory that the server occupies. */
static int64_t resident(void) {
    char name[64];
    long pages = 0;
    if (!pid) return 0;
    snprintf(name, sizeof name, "/proc/%ld/statm", pid);
    FILE *file = fopen(name, "r");
    if (!file || fscanf(file, "%*d %ld", &pages) != 1) fail("%s cannot be read: has the server ended?", name);
    fclose(file);
    return pages * (int64_t)sysconf(_SC_PAGESIZE);
}

static void count_answer(int64_t took) {
    if (times_count == times_room) {
        times_room = times_room ? 2 * times_room : 1 << 16;
        if (!(times = realloc(times, times_room * sizeof *times))) fail("no memory for the times of the answers");
    }
    times[times_count++] = took > UINT32_MAX ? UINT32_MAX : (uint32_t)took;
    answers++;
}

static int by_value(const void *one, const void *other) {
    uint32_t a = *(const uint32_t *)one, b = *(const uint32_t *)other;
    return (a > b) - (a < b);
}

static double quantile(double part) {
    return times_count ? times[(size_t)(part * (times_count - 1))] / 1e9 : 0;
}

static void report(Moment from, Moment to, int64_t operations, double memory) {
    double took = (to.at - from.at) / 1e9;
    qsort(times, times_count, sizeof *times, by_value);
    printf("{\"operations\": %lld, \"seconds\": %.6f, \"server_cpu\": %.6f, \"busy\": %.3f, \"p50\": %.9f, "
           "\"p99\": %.9f, \"max\": %.9f, \"broken\": %d, \"unanswered\": %d, \"skipped\": %d, \"memory\": %.0f}\n",
           (long long)operations, took, (to.server - from.server) / 1e9, 1 - (to.idle - from.idle) / 1e9 / took, quantile(0.5),
           quantile(0.99), quantile(1), broken, unanswered, skipped, memory);
}

/* ---- one connection --------------------------------------------------------------------------------------------- */

static void watch(Connection *c, int out) {
    struct epoll_event event = {.events = EPOLLIN | (out ? EPOLLOUT : 0), .data.ptr = c};
    if (epoll_ctl(epoll, c->watches_out < 0 ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, c->fd, &event))
        fail("epoll_ctl: %s", strerror(errno));
    c->watches_out = out;
}

static void disconnect(Connection *c) {
#ifdef TLS
    if (c->ssl) {
        SSL_shutdown(c->ssl);           /* says goodbye and does not wait for an answer */
        ERR_clear_error();
        SSL_free(c->ssl);
        c->ssl = NULL;
    }
#endif
    close(c->fd);
    c->fd = -1;
    free(c->head);
    c->head = NULL;
}

/* The peer has gone, or the network. */
static void lost(Connection *c, const char *doing, const char *why) {
    if (!is_paced || !c->turn) fail("the connection was lost while %s: %s", doing, why);
    broken++;
    unanswered += c->busy;
    disconnect(c);
}

#ifdef TLS
static SSL_CTX *tls;

static const char *tls_error(int error) {
    static char text[256];
    if (error == SSL_ERROR_ZERO_RETURN) return "the peer said goodbye";
    if (!ERR_peek_error()) return "the peer hung up";
    ERR_error_string_n(ERR_get_error(), text, sizeof text);
    return text;
}

/* What SSL_read() or SSL_write() returned, as recv() and send() would have: -1 with EAGAIN for "not now". */
static ssize_t tls_result(Connection *c, int result) {
    if (result > 0) return result;
    int error = SSL_get_error(c->ssl, result);
    if (error != SSL_ERROR_WANT_READ && error != SSL_ERROR_WANT_WRITE) fail("TLS: %s", tls_error(error));
    errno = EAGAIN;
    return -1;
}
#endif

static ssize_t take(Connection *c, void *buffer, size_t room) {
#ifdef TLS
    if (c->ssl) return tls_result(c, SSL_read(c->ssl, buffer, room));
#endif
    return recv(c->fd, buffer, room, 0);
}

static ssize_t give(Connection *c, const void *data, size_t count) {
#ifdef TLS
    if (c->ssl) return tls_result(c, SSL_write(c->ssl, data, count));
#endif
    return send(c->fd, data, count, MSG_NOSIGNAL);
}

/* What give() waits for when it says EAGAIN: for room; the handshake of TLS, for the peer's word. */
static int wants_out(Connection *c) {
#ifdef TLS
    if (c->ssl) return SSL_want_write(c->ssl);
#endif
    return c->fd >= 0;
}

/* A frame of a client, whose payload is already masked. `masked` is masked with this key from its first byte on, so a part that
   begins elsewhere is masked with the key turned round: no payload has to be masked for each request. */
static const unsigned char KEY[4] = {0x37, 0xfa, 0x21, 0x3d};

static uint32_t size_of_head(uint32_t count) { return count < 126 ? 6 : count < 65536 ? 8 : FRAME_HEAD; }

static unsigned char *write_frame(unsigned char *end, int first, const unsigned char *payload, uint32_t count, size_t from) {
    int digits = count < 126 ? 0 : count < 65536 ? 2 : 8;
    *end++ = first;
    *end++ = 0x80 | (digits == 0 ? count : digits == 2 ? 126 : 127);
    while (digits--) *end++ = (uint64_t)count >> 8 * digits & 255;
    for (int i = 0; i < 4; i++) *end++ = KEY[(from + i) % 4];
    memcpy(end, payload, count);
    return end + count;
}

/* The bytes of the request that is under way: others for each connection and each turn, so that an answer which belongs to
   another connection, or to an earlier request, is not taken for the right one. */
static size_t place(Connection *c) {
    return (is_broadcast ? (said + c->turn) * 104729ULL : c->id * 7919ULL + c->turn * 104729ULL) % PATTERN;
}

/* Broadcast: the messages of the burst that is under way, in a frame each. */
static const unsigned char *write_burst(void) {
    unsigned char *end = frame;
    for (uint32_t i = 0; i < burst; i++) {
        size_t from = (said + i) * 104729ULL % PATTERN;
        end = write_frame(end, 0x80 | message_type, masked + from, size, from);
    }
    return frame;
}

static const unsigned char *request(Connection *c) {
    if (http) return (const unsigned char *)http;
    if (!websocket) return pattern + place(c);
    if (!c->upgraded) return (const unsigned char *)handshake;
    if (is_broadcast) return write_burst();
    write_frame(frame, 0x80 | message_type, masked + place(c), size, place(c));
    return frame;
}

static uint32_t size_of_request(Connection *c) {
    if (http) return http_size;
    return !websocket ? size : c->upgraded ? burst * (size_of_head(size) + size) : strlen(handshake);
}

static void go_on_sending(Connection *c) {
    for (uint32_t request_size = size_of_request(c); c->sent < request_size;) {
        ssize_t count = give(c, request(c) + c->sent, request_size - c->sent);
        if (count < 0 && errno == EAGAIN) {
            if (c->watches_out != wants_out(c)) watch(c, !c->watches_out);
            return;
        }
        if (count < 0) {
            lost(c, "sending", strerror(errno));
            return;
        }
        c->sent += count;
    }
    if (c->watches_out) watch(c, 0);
}

static void begin_request(Connection *c, int64_t due) {
    c->turn++;
    c->sent = c->received = 0;
    if (http) c->head_size = c->in_content = 0;
    c->due = due;
    c->busy = 1;
    go_on_sending(c);
}

static void open_connection(Connection *c) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int on = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) fail("no socket for connection %u: %s; raise `ulimit -n`", c->id, strerror(errno));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS)
        fail("cannot connect to 127.0.0.1:%d: %s", port, strerror(errno));
#ifdef TLS
    if (tls) {
        if (!(c->ssl = SSL_new(tls)) || !SSL_set_fd(c->ssl, c->fd)) fail("OpenSSL has no connection for us");
        SSL_set_connect_state(c->ssl);
    }
#endif
    if ((http || websocket) && !(c->head = malloc(HEAD + 1))) fail("no memory for connection %u", c->id);
    c->turn = 0;
    c->busy = 1;
    c->sent = c->received = 0;
    c->watches_out = -1;
    c->upgraded = 0;
    watch(c, 1);                /* the request is sent once there is room, which is when it is connected */
}

static void open_more(void) {
    while (setting_up < AT_A_TIME && ready_count + setting_up < number) {
        Connection *c = all + ready_count + setting_up;
        c->id = ready_count + setting_up++;
        open_connection(c);
    }
}

/* Broadcast: the next messages, which all are to get. */
static void say(int64_t due) {
    said += burst;
    waiting = number;
    for (int i = 0; i < number; i++) all[i].received = all[i].turn = 0, all[i].busy = 1;
    all->sent = 0;
    all->due = due;
    go_on_sending(all);
}

static int64_t after_thinking(int64_t at) {
    int64_t until = at + think * 1000LL, reached = at;
    while (reached < until) reached = now();
    idle += reached - at;
    return reached;
}

/* A whole and right answer has come. */
static void answered(Connection *c, int64_t at) {
    c->busy = 0;
    if (is_connect) {
        if (counting) count_answer(at - c->due);
        disconnect(c);
        if (at < stop_at) {
            c->due = at;
            open_connection(c);
        }
        return;
    }
    if (is_broadcast && waiting) {
        if (counting) count_answer(at - all->due);
        c->received = 0;
        c->busy = ++c->turn < burst;
        if (!c->busy && !--waiting && at < stop_at) say(at);
        return;
    }
    if (counting && c->turn) count_answer(at - c->due);
    if (!is_paced && at < stop_at) begin_request(c, think ? after_thinking(at) : at);
}

/* take(), or 0 when nothing has come or the connection is lost. */
static size_t take_some(Connection *c, void *buffer, size_t room) {
    ssize_t count = take(c, buffer, room);
    if (count > 0) return count;
    if (!count || (errno != EAGAIN && errno != EINTR))
        lost(c, "waiting for an answer", count ? strerror(errno) : "the server closed it");
    return 0;
}

/* Some content has come, of the answer of HTTP that is under way. */
static void receive_content(Connection *c, const void *content, size_t count) {
    if (c->received + count > size) fail("more came than the answer");
    if (memcmp(content, pattern + c->received % PATTERN, count)) fail("wrong content after %u bytes", c->received);
    c->received += count;
    if (c->received == size) answered(c, now());
}

/* What came after the head of an answer of HTTP, once that is there; NULL before. */
static char *take_head(Connection *c) {
    size_t count = take_some(c, c->head + c->head_size, HEAD - c->head_size);
    if (!count) return NULL;
    c->head_size += count;
    c->head[c->head_size] = 0;
    char *end = memmem(c->head, c->head_size, "\r\n\r\n", 4);
    if (!end && c->head_size == HEAD) fail("the head of an answer has more than %d bytes", HEAD);
    if (!end) return NULL;
    *end = 0;
    return end + 4;
}

/* The head of an answer of HTTP, or a part of it, and what came with it. */
static void receive_head(Connection *c) {
    char *rest = take_head(c);
    if (!rest) return;
    if (strncmp(c->head, "HTTP/1.1 200 ", 13)) fail("the answer was %.*s", (int)strcspn(c->head, "\r"), c->head);
    char *length = strcasestr(c->head, "\r\nContent-Length:");
    if (!length || strtoul(length + 17, NULL, 10) != size) fail("an answer has no `Content-Length: %u`", size);
    c->in_content = 1;
    receive_content(c, rest, c->head + c->head_size - rest);
}

/* A ping is answered; a half-sent message may be in the way, and then it is not: the server sends another. */
static void on_control(Connection *c, int opcode, const unsigned char *payload, uint32_t count) {
    unsigned char answer[125];
    if (opcode == CLOSE) return lost(c, "waiting for an answer", "the server closed it");
    if (opcode != PING && opcode != PONG) fail("a frame with the opcode %d has come", opcode);
    if (opcode == PONG || c->sent < size_of_request(c)) return;
    for (uint32_t i = 0; i < count; i++) answer[i] = payload[i] ^ KEY[i % 4];
    uint32_t whole = size_of_head(count) + count;
    write_frame(frame, 0x80 | PONG, answer, count, 0);
    if (give(c, frame, whole) != whole) fail("no room for a pong");
}

/* Another byte of a frame's head, and with control frames of the payload. Whether more of them are wanted. */
static int wants_more_head(Connection *c, unsigned char byte) {
    const unsigned char *head = (const unsigned char *)c->head;
    c->head[c->head_size++] = byte;
    if (c->head_size < 2) return 1;
    if (head[0] & 0x70 || head[1] & 0x80) fail("a frame begins with %02x %02x", head[0], head[1]);
    uint32_t digits = head[1] < 126 ? 0 : head[1] == 126 ? 2 : 8, opcode = head[0] & 15;
    if (opcode >= CLOSE && digits) fail("a control frame with more than 125 bytes has come");
    if (c->head_size < 2 + digits + (opcode >= CLOSE ? head[1] : 0)) return 1;
    c->head_size = 0;
    if (opcode >= CLOSE) {
        on_control(c, opcode, head + 2, head[1]);
        return 1;
    }
    uint64_t length = digits ? 0 : head[1];
    for (uint32_t i = 0; i < digits; i++) length = length << 8 | head[2 + i];
    if (opcode != CONTINUATION && (int)opcode != message_type) fail("a message of another type came than was sent");
    if (!c->busy || length > size - c->received) fail("more came than was sent");
    c->frame_left = length;
    return 0;
}

/* Some bytes after the handshake. Messages may come in any number of frames. */
static void receive_frames(Connection *c, const unsigned char *data, size_t count) {
    for (size_t some; count && c->fd >= 0; data += some, count -= some) {
        some = 1;
        if (!c->in_content) {
            if (wants_more_head(c, *data)) continue;
            c->in_content = 1;
        } else {
            some = count < c->frame_left ? count : c->frame_left;
            if (memcmp(data, pattern + place(c) + c->received, some)) fail("an answer differs from its request");
            c->received += some;
            c->frame_left -= some;
        }
        if (c->frame_left) continue;
        c->in_content = 0;
        if (!(c->head[0] & 0x80)) continue;
        if (c->received != size) fail("a message of %u bytes came back with %u", size, c->received);
        answered(c, now());
    }
}

static void receive_handshake(Connection *c) {
    char *rest = take_head(c);
    if (!rest) return;
    if (strncmp(c->head, "HTTP/1.1 101 ", 13)) fail("the handshake was answered with %.*s", (int)strcspn(c->head, "\r"), c->head);
    if (!strcasestr(c->head, "\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")) fail("the handshake has no right key");
    size_t count = c->head + c->head_size - rest;
    memcpy(scratch, rest, count);
    c->upgraded = 1;
    c->sent = size_of_request(c);       /* nothing is being sent */
    c->head_size = 0;
    answered(c, now());
    receive_frames(c, scratch, count);
}

static void receive_answer(Connection *c) {
    if (http && !c->in_content) return receive_head(c);
    if (websocket && !c->upgraded) return receive_handshake(c);
    if (websocket) return receive_frames(c, scratch, take_some(c, scratch, PIECE));
    uint32_t left = size - c->received, most = http ? PIECE : LARGEST - 1;
    size_t count = take_some(c, scratch, (left < most ? left : most) + 1);      /* 1 more: nothing may come after it */
    if (!count) return;
    if (http) return receive_content(c, scratch, count);
    if (!c->busy || c->received + count > size) fail("more came than was sent");
    if (memcmp(scratch, request(c) + c->received, count)) fail("an answer differs from its request");
    c->received += count;
    if (c->received == size) answered(c, now());
}

static void on_event(Connection *c, uint32_t events) {
    if (c->fd < 0) return;
    if (events & EPOLLOUT) {
        int failed = 0;
        socklen_t length = sizeof failed;
        if (!c->turn && !getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &failed, &length) && failed)
            fail("cannot connect to 127.0.0.1:%d: %s", port, strerror(failed));
        go_on_sending(c);
    } else if (c->sent < size_of_request(c) && c->busy) {
        go_on_sending(c);       /* TLS: the handshake goes on when something has come */
    }
    if (c->fd >= 0 && events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive_answer(c);
}

/* Handle what happens until `until` (nanoseconds), or once. */
static void turn(int64_t until) {
    struct epoll_event events[EVENTS];
    int64_t began = now(), left = until - began;
    if (left < 0 || spin) left = 0;
    struct timespec timeout = {left / 1000000000LL, left % 1000000000LL};
    int count = syscall(SYS_epoll_pwait2, epoll, events, EVENTS, &timeout, NULL, 0);
    if (count < 0 && errno == ENOSYS)   /* before Linux 5.11: whole milliseconds, and the last of them in a loop */
        count = epoll_wait(epoll, events, EVENTS, left / 1000000);
    if (count < 0 && errno != EINTR) fail("epoll_wait: %s", strerror(errno));
    if (count <= 0) idle += now() - began;
    for (int i = 0; i < count; i++) on_event(events[i].data.ptr, events[i].events);
}

/* ---- the modes -------------------------------------------------------------------------------------------------- */

/* Bring all connections up, each proved by an answer. The server's memory once 1 % of them are there. */
static int64_t set_up(void) {
    int64_t limit = now() + SETTING_UP * 1000000000LL, before = 0;
    int first = number / 100;
    while (ready_count < number) {
        if (now() > limit) fail("only %d of %d connections were served within %d s", ready_count, number, SETTING_UP);
        open_more();
        turn(now() + 100000000LL);
        while (setting_up && !all[ready_count].busy) {          /* in order, which is enough */
            if (ready_count++ == first) before = resident();
            setting_up--;
        }
    }
    return before;
}

static void finish_answers(void) {
    int64_t limit = now() + PATIENCE * 1000000000LL;
    for (int i = 0; i < number; i++)
        while (all[i].fd >= 0 && all[i].busy) {
            if (now() > limit) {
                if (!is_paced) fail("an answer did not come within %d s", PATIENCE);
                unanswered++;
                break;
            }
            turn(now() + 10000000LL);
        }
}

static void echo(void) {
    int64_t began = now(), ends = began + (int64_t)(warm * 1e9);
    stop_at = INT64_MAX;
    if (is_broadcast) {
        turn(began + 200000000LL);      /* the last handshake is answered before its connection hears what is said */
        say(now());
    } else for (int i = 0; i < number; i++)
        is_connect ? (all[i].id = i, all[i].due = began, open_connection(all + i)) : begin_request(all + i, now());
    while (now() < ends) turn(ends);
    counting = 1;
    Moment from = moment();
    int64_t last = from.at;
    ends = from.at + (int64_t)(seconds * 1e9);
    for (int64_t done = 0; now() < ends;) {
        turn(ends);
        if (answers != done) done = answers, last = now();
        if (now() - last > PATIENCE * 1000000000LL) fail("no answer within %d s", PATIENCE);
    }
    counting = 0;
    Moment to = moment();
    stop_at = 0;
    finish_answers();
    report(from, to, answers, 0);
}

static void paced(void) {
    int64_t before = set_up(), interval = 1e9 * number / (rate ? rate : number), began = now() + 10000000LL;
    int64_t ends = began + (int64_t)((warm + seconds) * 1e9), counts_from = began + (int64_t)(warm * 1e9), due = began;
    Moment from = moment();
    for (int64_t step = 0; (due = began + step / number * interval + step % number * interval / number) < ends; step++) {
        do turn(due); while (now() < due);
        if (!counting && due >= counts_from) counting = 1, from = moment();
        Connection *c = all + step % number;
        if (c->fd < 0) continue;
        if (c->busy) skipped++;             /* its last answer has not come by its next turn */
        else begin_request(c, due);
    }
    while (now() < ends) turn(ends);
    finish_answers();
    Moment to = moment();
    report(from, to, answers, number > 1 ? (double)(resident() - before) / (number - number / 100 - 1) : 0);
}

/* Wait until the only connection can be written or read; fail when nothing happens for PATIENCE. */
static void wait_for(int fd, short events) {
    struct pollfd one = {.fd = fd, .events = events};
    int64_t began = now();
    int count;
    do count = poll(&one, 1, spin ? 0 : PATIENCE * 1000);
    while (!count && spin && now() - began < PATIENCE * 1000000000LL);
    if (count <= 0) fail("the server did not go on within %d s", PATIENCE);
    idle += now() - began;
}

static void push(int fd) {
    int64_t rest = bytes;
    unsigned char answer[8] = {0};
    while (rest) {
        int64_t done = bytes - rest, at = done % PATTERN;
        int64_t room = PATTERN - at < PIECE ? PATTERN - at : PIECE;
        ssize_t count = send(fd, pattern + at, rest < room ? rest : room, MSG_NOSIGNAL);
        if (count < 0 && errno == EAGAIN) wait_for(fd, POLLOUT);
        else if (count < 0) fail("the connection was lost after %lld bytes: %s", (long long)done, strerror(errno));
        else rest -= count;
    }
    shutdown(fd, SHUT_WR);
    for (size_t got = 0; got < sizeof answer;) {
        ssize_t count = recv(fd, answer + got, sizeof answer - got, 0);
        if (count < 0 && errno == EAGAIN) wait_for(fd, POLLIN);
        else if (count <= 0) fail("the server did not say how many bytes have come");
        else got += count;
    }
    int64_t said = 0;
    for (int i = 7; i >= 0; i--) said = said << 8 | answer[i];
    if (said != bytes) fail("%lld bytes were sent, and %lld have come", (long long)bytes, (long long)said);
}

static void pull(int fd) {
    unsigned char question[8];
    int64_t done = 0;
    for (int i = 0; i < 8; i++) question[i] = bytes >> 8 * i & 255;
    if (send(fd, question, sizeof question, MSG_NOSIGNAL) != sizeof question) fail("cannot ask: %s", strerror(errno));
    while (done < bytes) {
        int64_t at = done % PATTERN;
        ssize_t count = recv(fd, scratch, bytes - done < PIECE ? bytes - done : PIECE, 0);
        if (count < 0 && errno == EAGAIN) wait_for(fd, POLLIN);
        else if (count <= 0) fail("the server ended after %lld of %lld bytes", (long long)done, (long long)bytes);
        else {                  /* the pattern begins again after its end, see main() */
            if (memcmp(scratch, pattern + at, count)) fail("wrong bytes after %lld", (long long)done);
            done += count;
        }
    }
}

/* `repeat` transfers, each by a connection of its own. */
static void bulk(void (*transfer)(int fd)) {
    Moment from = moment();
    for (int i = 0; i < repeat; i++) {
        open_connection(all);
        wait_for(all->fd, POLLOUT);
        transfer(all->fd);
        close(all->fd);
    }
    report(from, moment(), bytes * repeat, 0);
}

/* ---- the command line ------------------------------------------------------------------------------------------- */

static void read_pattern(const char *name) {
    FILE *file = fopen(name, "r");
    if (!file || fread(pattern, 1, PATTERN, file) != PATTERN) fail("%s: a MiB of bytes is wanted", name);
    fclose(file);
    memcpy(pattern + PATTERN, pattern, LARGEST);
}

static void read_request(const char *name) {
    FILE *file = fopen(name, "r");
    if (!file || !(http = malloc(LARGEST)) || !(http_size = fread(http, 1, LARGEST, file))) fail("%s: a request is wanted", name);
    fclose(file);
}

static void prepare_websocket(void) {
    snprintf(handshake, sizeof handshake, "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
             "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n", websocket, port);
    for (size_t i = 0; i < sizeof masked; i++) masked[i] = pattern[i] ^ KEY[i % 4];
}

static void read_option(char *option) {
    char *value = strchr(option, '=');
    if (!value) fail("%s: options are name=value", option);
    *value++ = 0;
    if (!strcmp(option, "port")) port = atoi(value);
    else if (!strcmp(option, "connections")) number = atoi(value);
    else if (!strcmp(option, "size")) size = atoi(value);
    else if (!strcmp(option, "bytes")) bytes = atoll(value);
    else if (!strcmp(option, "repeat")) repeat = atoi(value);
    else if (!strcmp(option, "seconds")) seconds = atof(value);
    else if (!strcmp(option, "rate")) rate = atof(value);
    else if (!strcmp(option, "http")) read_request(value);
    else if (!strcmp(option, "websocket")) websocket = value;
    else if (!strcmp(option, "text")) message_type = atoi(value) ? TEXT : BINARY;
    else if (!strcmp(option, "burst")) burst = atoi(value);
    else if (!strcmp(option, "warm")) warm = atof(value);
    else if (!strcmp(option, "pid")) pid = atol(value);
    else if (!strcmp(option, "spin")) spin = atoi(value);
    else if (!strcmp(option, "think")) think = atoi(value);
    else if (!strcmp(option, "tls")) use_tls = atoi(value);
    else if (!strcmp(option, "pattern")) read_pattern(value);
    else fail("%s: no such option", option);
}

int main(int count, char **words) {
    if (count < 2) fail("usage: load echo|paced|connect|broadcast|push|pull name=value…; see the head of load.c");
    for (int i = 2; i < count; i++) read_option(words[i]);
    const char *mode = words[1];
    if (port < 1 || port > 65535) fail("port=%d: a number from 1 to 65535 is wanted", port);
    if (size < 1 || (size > LARGEST - 1 && !http)) fail("size=%u: bytes from 1 to %d are wanted", size, LARGEST - 1);
    if (number < 1) fail("connections=%d: at least 1 is wanted", number);
    if (rate < 0) fail("rate=%g: requests a second are wanted", rate);
    if (http && strcmp(mode, "echo") && strcmp(mode, "paced")) fail("http=FILE: only for echo and paced");
    is_broadcast = !strcmp(mode, "broadcast");
    if (websocket && !is_broadcast && strcmp(mode, "echo") && strcmp(mode, "paced"))
        fail("websocket=PATH: only for echo, paced and broadcast");
    if (is_broadcast && !websocket) fail("broadcast needs websocket=PATH");
    if (burst != 1 && (!is_broadcast || burst < 1 || burst > LARGEST / (size + FRAME_HEAD)))
        fail("burst=%u: at least 1 is wanted, for broadcast alone, and a MiB in all at most", burst);
    if (websocket) prepare_websocket();
    if (use_tls) {
#ifdef TLS
        if (!(tls = SSL_CTX_new(TLS_client_method()))) fail("OpenSSL has no context for us");
        SSL_CTX_set_verify(tls, SSL_VERIFY_NONE, NULL);
        SSL_CTX_set_mode(tls, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
        SSL_CTX_set_session_cache_mode(tls, SSL_SESS_CACHE_OFF);
#else
        fail("compiled without TLS");
#endif
    }
    prctl(PR_SET_TIMERSLACK, 1000);     /* a microsecond instead of 50 */
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (!(all = calloc(number, sizeof *all))) fail("no memory for %d connections", number);
    is_paced = !strcmp(mode, "paced");
    is_connect = !strcmp(mode, "connect");
    if (!strcmp(mode, "echo") || is_broadcast) set_up(), echo();
    else if (is_paced) paced();
    else if (is_connect) echo();
    else if (!strcmp(mode, "push")) bulk(push);
    else if (!strcmp(mode, "pull")) bulk(pull);
    else fail("%s: no such mode", mode);
    return 0;
}
