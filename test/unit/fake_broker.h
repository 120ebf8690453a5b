/*-------------------------------------------------------------------------
 *
 * fake_broker.h
 *		A RabbitMQ made of raw bytes, for tests of broker.c.
 *
 * A child process that plays the server's part of the login, up to the step
 * where a script does something else.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_FAKE_BROKER_H
#define PGF_FAKE_BROKER_H

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "broker/broker.h"
#include "client.h"
#include "tap.h"

/* each test uses some of these */
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wunused-variable"
#ifdef __clang__
#pragma clang diagnostic ignored "-Wunused-const-variable"
#else
#pragma GCC diagnostic ignored "-Wunused-const-variable"
#endif

#define CONNECT_TIMEOUT 1000
#define RPC_TIMEOUT		1000

/* Steps of the server at which a script is asked. */
enum
{
	AT_START,
	AT_TUNE,
	AT_OPEN_OK,
	AT_LOGGED_IN,				/* a script that does this never returns */
	AT_CHANNEL_OPEN_OK,
	AT_SELECT_OK,
	AT_CONNECTED,				/* channel 1 is open for publishing */
};

/* Returns true if it has done the step in its own way. */
typedef bool (*Script) (int fd, int step);

static BrokerOptions options = {
	.connection_name = "test_broker",
	.connect_timeout_ms = CONNECT_TIMEOUT,
	.rpc_timeout_ms = RPC_TIMEOUT,
	.heartbeat_s = 30,
	.min_channels = 1,
	.max_channels = 3,
	.wait = wait_socket,
	.fd_changed = fd_changed,
};


/*
 * The server's side.  It ends silently whenever the client is gone.
 */

static void
put(int fd, const void *bytes, size_t len)
{
	const char *p = bytes;

	while (len > 0)
	{
		ssize_t		n = send(fd, p, len, MSG_NOSIGNAL);

		if (n <= 0)
			_exit(0);
		p += n;
		len -= (size_t) n;
	}
}

static size_t
make_frame(unsigned char *to, int type, int channel, const void *payload, size_t len)
{
	to[0] = (unsigned char) type;
	to[1] = (unsigned char) (channel >> 8);
	to[2] = (unsigned char) channel;
	to[3] = (unsigned char) (len >> 24);
	to[4] = (unsigned char) (len >> 16);
	to[5] = (unsigned char) (len >> 8);
	to[6] = (unsigned char) len;
	memcpy(to + 7, payload, len);
	to[7 + len] = 0xCE;
	return len + 8;
}

static void
put_frame(int fd, int type, int channel, const void *payload, size_t len)
{
	static unsigned char frame[70000];

	put(fd, frame, make_frame(frame, type, channel, payload, len));
}

static void
get(int fd, void *bytes, size_t len)
{
	char	   *p = bytes;

	while (len > 0)
	{
		ssize_t		n = recv(fd, p, len, 0);

		if (n <= 0)
			_exit(0);
		p += n;
		len -= (size_t) n;
	}
}

static void
skip_frame(int fd)
{
	unsigned char head[7];
	char		payload[70000];
	size_t		len;

	get(fd, head, 7);
	len = ((size_t) head[3] << 24) + ((size_t) head[4] << 16) + ((size_t) head[5] << 8) + head[6];
	get(fd, payload, len + 1);
}

static void
skip_message(int fd)
{
	for (int i = 0; i < 3; i++)
		skip_frame(fd);
}

static const unsigned char start[] = {
	0, 10, 0, 10, 0, 9, 0, 0, 0, 0,
	0, 0, 0, 14, 'A', 'M', 'Q', 'P', 'L', 'A', 'I', 'N', ' ', 'P', 'L', 'A', 'I', 'N',
	0, 0, 0, 5, 'e', 'n', '_', 'U', 'S',
};
static const unsigned char tune[] = {0, 10, 0, 30, 7, 255, 0, 2, 0, 0, 0, 60};
static const unsigned char open_ok[] = {0, 10, 0, 41, 0};
static const unsigned char channel_open_ok[] = {0, 20, 0, 11, 0, 0, 0, 0};
static const unsigned char select_ok[] = {0, 85, 0, 11};
static const unsigned char close_ok[] = {0, 20, 0, 41};
static const unsigned char close_404[] = {0, 20, 0, 40, 1, 148, 4, 'g', 'o', 'n', 'e', 0, 60, 0, 40};
static const unsigned char close_540[] = {0, 10, 0, 50, 2, 28, 3, 'n', 'o', 't', 0, 50, 0, 40};
static const unsigned char exchange_ok[] = {0, 40, 0, 11};
static const unsigned char bind_ok[] = {0, 50, 0, 21};
static const unsigned char declare_ok[] = {0, 50, 0, 11, 1, 'q', 0, 0, 0, 7, 0, 0, 0, 3};
static const unsigned char other_ok[] = {0, 50, 0, 11, 1, 'r', 0, 0, 0, 7, 0, 0, 0, 3};
static const unsigned char deliver[] = {0, 60, 0, 60, 1, 'c', 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 'x', 0};
static const unsigned char ack[] = {0, 60, 0, 80, 0, 0, 0, 0, 0, 0, 0, 1, 0};
static const unsigned char ack_all[] = {0, 60, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 1};
static const unsigned char returned[] = {0, 60, 0, 50, 1, 56, 2, 'N', 'O', 1, 'x', 0};
static const unsigned char header_id[] = {
	0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0x80, 2, 'i', 'd',
};

/* One connection, then the process ends. */
static void
serve(int listener, Script script)
{
	int			fd = accept(listener, NULL, NULL);
	char		header[8];

	get(fd, header, 8);
	if (!script(fd, AT_START))
		put_frame(fd, 1, 0, start, sizeof(start));
	skip_frame(fd);
	if (!script(fd, AT_TUNE))
		put_frame(fd, 1, 0, tune, sizeof(tune));
	skip_frame(fd);
	skip_frame(fd);
	if (!script(fd, AT_OPEN_OK))
		put_frame(fd, 1, 0, open_ok, sizeof(open_ok));
	script(fd, AT_LOGGED_IN);
	skip_frame(fd);
	if (!script(fd, AT_CHANNEL_OPEN_OK))
		put_frame(fd, 1, 1, channel_open_ok, sizeof(channel_open_ok));
	skip_frame(fd);
	if (!script(fd, AT_SELECT_OK))
		put_frame(fd, 1, 1, select_ok, sizeof(select_ok));
	script(fd, AT_CONNECTED);
	for (;;)
		skip_frame(fd);
}


/*
 * The client's side
 */

/* Forks a server; returns its process and where it listens. */
static pid_t
start_server(Script script, BrokerAddress *address)
{
	struct sockaddr_in in = {.sin_family = AF_INET};
	socklen_t	len = sizeof(in);
	int			listener = socket(AF_INET, SOCK_STREAM, 0);
	pid_t		pid;

	in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (bind(listener, (struct sockaddr *) &in, sizeof(in)) < 0 || listen(listener, 5) < 0 ||
		getsockname(listener, (struct sockaddr *) &in, &len) < 0)
		abort();
	pid = fork();
	if (pid == 0)
		serve(listener, script);
	close(listener);

	address->host = "127.0.0.1";
	address->port = ntohs(in.sin_port);
	address->user = "guest";
	address->password = "s3cret";
	address->vhost = "/";
	address->tls = false;
	return pid;
}

static void
stop_server(pid_t pid)
{
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
}

static Broker *
log_in_to(Script script, pid_t *pid, BrokerError *error)
{
	BrokerAddress address;

	*pid = start_server(script, &address);
	error->text[0] = '\0';
	return broker_connect(&address, NULL, &options, error);
}

/* Waits for the next event, at most two seconds. */
static BrokerEvent
next_event(Broker *broker)
{
	int64_t		deadline = now_ms() + 2000;
	BrokerEvent event;

	for (;;)
	{
		broker_next_event(broker, &event);
		if ((event.type != BROKER_NOTHING && event.type != BROKER_MORE) || now_ms() >= deadline)
			return event;
		wait_socket(broker_fd(broker), false, 10);
	}
}

/* Logs in and opens channel 1 for publishing. */
static Broker *
connect_to(Script script, pid_t *pid, BrokerError *error)
{
	Broker	   *broker = log_in_to(script, pid, error);

	if (broker != NULL &&
		(broker_open_channel(broker, true, error) != 1 ||
		 next_event(broker).type != BROKER_CHANNEL_OPENED))
	{
		diag("channel 1 was not opened: %s", error->text);
		broker_close(broker, false);
		return NULL;
	}
	return broker;
}

#endif							/* PGF_FAKE_BROKER_H */
