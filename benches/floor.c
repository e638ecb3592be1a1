/* The kernel's floor: a bare epoll loop that does smolrx's work and nothing else: accept, read,
 * log, echo, close. It logs the same three lines, has no options but `--keep-open`, one thread,
 * no timeouts, no shutdown, and takes any client for a well-behaved one. benches/cost.rs compiles
 * and runs it: cc -O2 -o floor floor.c && ./floor [--keep-open] */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CHUNK = 65536, CONNECTIONS = 32768, EVENTS = 256 };

/* An idle connection owns these bytes and no buffer. */
struct connection {
	char *part; /* a line whose end has not come yet */
	unsigned len;
	char peer[24]; /* as the log shows it: 127.0.0.1:53412 */
};

static struct connection connections[CONNECTIONS]; /* by descriptor */
static char input[CHUNK], text[4 * CHUNK];
static size_t logged;
static int keep_open;

static void check(int ok, const char *what) {
	if (!ok) {
		perror(what);
		exit(1);
	}
}

/* The sockets block, and the client always reads: a short write needs no queue. */
static void write_all(int fd, const char *from, size_t len) {
	for (ssize_t n; len > 0; from += n, len -= n)
		if ((n = write(fd, from, len)) <= 0)
			return;
}

static void put(const char *from, size_t len) {
	memcpy(text + logged, from, len);
	logged += len;
}

#define PUT(literal) put(literal, sizeof literal - 1)

static void log_line(const struct connection *c, const char *line, size_t len) {
	if (sizeof text - logged < 2 * len + 64) {
		write_all(1, text, logged);
		logged = 0;
	}
	PUT("Received "), put(line, len), PUT(" from "), put(c->peer, strlen(c->peer));
	PUT("\nSend: "), put(line, len), PUT("\n");
}

/* Reads what is there, logs and echoes each whole line, and closes after the last one: one read,
 * one write of the log and one of the echo, however many lines came. Returns whether the
 * connection stays open. */
static int serve(int fd) {
	struct connection *c = &connections[fd];
	if (c->len > 0)
		memcpy(input, c->part, c->len);
	ssize_t got = recv(fd, input + c->len, CHUNK - c->len, MSG_DONTWAIT);
	if (got < 0 && errno == EAGAIN)
		return 1;
	char *line = input, *end = input + c->len + (got > 0 ? got : 0), *newline;
	int last = 0;
	while (!last && (newline = memchr(line, '\n', end - line))) {
		log_line(c, line, newline - line);
		line = newline + 1;
		last = !keep_open;
	}
	if (got <= 0 && line < end) { /* a last line without a newline counts */
		log_line(c, line, end - line);
		line = end;
	}
	last |= got <= 0;
	if (last && (line > input || keep_open))
		PUT("Close the client socket\n");
	write_all(1, text, logged);
	logged = 0;
	write_all(fd, input, line - input);
	free(c->part);
	c->part = NULL;
	c->len = last ? 0 : end - line;
	if (c->len > 0)
		c->part = memcpy(malloc(c->len), line, c->len);
	if (last)
		close(fd);
	return !last;
}

/* Most clients speak at once: only one that has not is worth an epoll_ctl. */
static void welcome(int listener, int epoll) {
	struct sockaddr_in from;
	socklen_t size = sizeof from;
	int fd = accept4(listener, (struct sockaddr *)&from, &size, SOCK_CLOEXEC);
	check(fd >= 0 && fd < CONNECTIONS, "accept4");
	char *peer = connections[fd].peer;
	inet_ntop(AF_INET, &from.sin_addr, peer, 16);
	sprintf(peer + strlen(peer), ":%u", ntohs(from.sin_port));
	struct epoll_event readable = {.events = EPOLLIN, .data.fd = fd};
	if (serve(fd))
		check(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &readable) == 0, "epoll_ctl");
}

int main(int argc, char **argv) {
	keep_open = argc > 1 && strcmp(argv[1], "--keep-open") == 0;
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), epoll = epoll_create1(EPOLL_CLOEXEC);
	struct sockaddr_in at = {.sin_family = AF_INET}; /* any address, any free port */
	socklen_t size = sizeof at;
	check(bind(listener, (struct sockaddr *)&at, size) == 0, "bind");
	check(listen(listener, 1024) == 0, "listen");
	getsockname(listener, (struct sockaddr *)&at, &size);
	printf("Serving on 0.0.0.0:%u\n", ntohs(at.sin_port));
	fflush(stdout);
	struct epoll_event events[EVENTS] = {{.events = EPOLLIN, .data.fd = listener}};
	check(epoll_ctl(epoll, EPOLL_CTL_ADD, listener, events) == 0, "epoll_ctl");
	for (;;) {
		int n = epoll_wait(epoll, events, EVENTS, -1);
		for (int i = 0; i < n; i++)
			if (events[i].data.fd == listener)
				welcome(listener, epoll);
			else
				serve(events[i].data.fd);
	}
}
