/* Open-loop load over HTTP/1.1: requests are sent when they are due, whether or not earlier ones have been answered.

       open_loop HOST PORT CONNECTIONS DRAIN_S REQUEST_FILE DUE_FILE > LATENCIES

   DUE_FILE holds the seconds from the start at which requests are due, ascending, as doubles; LATENCIES are doubles too, in
   milliseconds, and negative for requests that failed. A latency counts from when the request was due, so one that had to wait for
   a free connection is not counted as a fast one ("coordinated omission"). Responses need a Content-Length. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { MAX_HEAD = 16384, MAX_EVENTS = 64 };

struct connection {
    int socket;
    int is_busy;
    double due;
    size_t n_head;     /* bytes of the head received so far */
    long body_left;    /* bytes of the body that are still to come; -1: the head is not complete */
    int status;
    char head[MAX_HEAD + 1];
};

static char *request;
static size_t request_size;
static struct addrinfo *address;
static struct connection *connections, **idle;
static int n_idle, poller;
static double started;

static void fail(const char *what) {
    fprintf(stderr, "open_loop: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9 - started;
}

static char *contents(const char *path, size_t *size) {
    struct stat facts;
    FILE *file = fopen(path, "rb");
    if (file == NULL || fstat(fileno(file), &facts) != 0) fail(path);
    char *bytes = malloc(facts.st_size + 1);
    *size = fread(bytes, 1, facts.st_size, file);
    fclose(file);
    return bytes;
}

static void answered(double milliseconds) {
    fwrite(&milliseconds, sizeof milliseconds, 1, stdout);
}

static void open_connection(struct connection *connection) {
    int on = 1;
    connection->socket = socket(address->ai_family, SOCK_STREAM, 0);
    if (connection->socket < 0 || connect(connection->socket, address->ai_addr, address->ai_addrlen) != 0) fail("connect");
    setsockopt(connection->socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = connection};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, connection->socket, &event) != 0) fail("epoll_ctl");
    connection->is_busy = 0;
    idle[n_idle++] = connection;
}

static void lost(struct connection *connection) {
    if (!connection->is_busy) { /* closed by the server while idle */
        for (int index = 0; index < n_idle; index++)
            if (idle[index] == connection) idle[index] = idle[--n_idle];
    } else {
        answered(-1);
    }
    close(connection->socket);
    open_connection(connection);
}

static void send_request(struct connection *connection, double due) {
    connection->due = due;
    connection->is_busy = 1;
    connection->n_head = 0;
    connection->body_left = -1;
    for (size_t sent = 0; sent < request_size;) {
        ssize_t size = send(connection->socket, request + sent, request_size - sent, MSG_NOSIGNAL);
        if (size < 0) {
            lost(connection);
            return;
        }
        sent += size;
    }
}

/* 0: the head is not complete; -1: it cannot be read. */
static int read_head(struct connection *connection) {
    connection->head[connection->n_head] = 0;
    char *end = strstr(connection->head, "\r\n\r\n");
    if (end == NULL) return connection->n_head < MAX_HEAD ? 0 : -1;
    char *length = strcasestr(connection->head, "\r\ncontent-length:");
    if (sscanf(connection->head, "HTTP/1.1 %d", &connection->status) != 1 || length == NULL || length > end) return -1;
    connection->body_left = atol(length + strlen("\r\ncontent-length:")) - (long)(connection->n_head - (end + 4 - connection->head));
    return 1;
}

static void receive(struct connection *connection) {
    static char body[1 << 18];
    int is_head = connection->is_busy && connection->body_left < 0;
    char *into = is_head ? connection->head + connection->n_head : body;
    ssize_t size = recv(connection->socket, into, is_head ? MAX_HEAD - connection->n_head : sizeof body, MSG_DONTWAIT);
    if (size < 0 && errno == EAGAIN) return;
    if (size <= 0 || !connection->is_busy) {
        lost(connection);
        return;
    }
    if (is_head) {
        connection->n_head += size;
        int outcome = read_head(connection);
        if (outcome < 0) lost(connection);
        if (outcome <= 0) return;
    } else {
        connection->body_left -= size;
    }
    if (connection->body_left > 0) return;
    connection->is_busy = 0;
    idle[n_idle++] = connection;
    answered(connection->status / 100 == 2 ? (now() - connection->due) * 1e3 : -1); /* a job that is accepted has 202 */
}

int main(int n_arguments, char **arguments) {
    if (n_arguments != 7) {
        fprintf(stderr, "usage: open_loop HOST PORT CONNECTIONS DRAIN_S REQUEST_FILE DUE_FILE\n");
        return 2;
    }
    int n_connections = atoi(arguments[3]);
    size_t due_size, next = 0;
    request = contents(arguments[5], &request_size);
    double *due = (double *)contents(arguments[6], &due_size);
    size_t n_due = due_size / sizeof *due;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
    if (getaddrinfo(arguments[1], arguments[2], &hints, &address) != 0) fail("address");
    if ((poller = epoll_create1(0)) < 0) fail("epoll_create1");
    connections = calloc(n_connections, sizeof *connections);
    idle = calloc(n_connections, sizeof *idle);
    for (int index = 0; index < n_connections; index++) open_connection(&connections[index]);
    started = now();
    double end = (n_due ? due[n_due - 1] : 0) + atof(arguments[4]);
    while ((next < n_due || n_idle < n_connections) && now() < end) {
        while (next < n_due && n_idle && due[next] <= now()) send_request(idle[--n_idle], due[next++]);
        double wait_s = next < n_due && n_idle ? due[next] - now() : 0.1;
        if (wait_s < 0) wait_s = 0;
        struct timespec wait = {.tv_sec = (time_t)wait_s, .tv_nsec = (long)((wait_s - (time_t)wait_s) * 1e9)};
        struct epoll_event events[MAX_EVENTS];
        int n_events = epoll_pwait2(poller, events, MAX_EVENTS, &wait, NULL); /* epoll_wait rounds to milliseconds */
        if (n_events < 0 && errno != EINTR) fail("epoll_pwait2");
        for (int index = 0; index < n_events; index++) receive(events[index].data.ptr);
    }
    for (int n_open = n_connections - n_idle; n_open > 0; n_open--) answered(-1);
    for (; next < n_due; next++) answered(-1);
    return 0;
}
