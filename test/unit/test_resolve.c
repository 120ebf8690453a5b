/*-------------------------------------------------------------------------
 *
 * test_resolve.c
 *		Unit tests of resolve.c, against a name service that we are ourselves.
 *
 *-------------------------------------------------------------------------
 */
#include <dirent.h>
#include <dlfcn.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "broker/clock.h"
#include "broker/resolve.h"
#include "tap.h"

/* How long an attempt may last, and what the machine may need more, in ms. */
#define LIMIT		200
#define SLACK		500

#define ANSWER		"127.0.0.9"

static char text[256];
static bool waits_return = true;
static jmp_buf lost;

/* The name service: what it was asked, and whether it is silent. */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static bool silent = false;
static int	asked = 0;
static bool signals_blocked = true;

typedef int (*GetAddrInfo) (const char *, const char *, const struct addrinfo *, struct addrinfo **);

/*
 * In place of the system's: addresses are addresses, "none." does not resolve,
 * "fast." does at once, and all others do as soon as nobody is silent.
 */
int
getaddrinfo(const char *host, const char *service, const struct addrinfo *hints,
			struct addrinfo **result)
{
	GetAddrInfo system_s = (GetAddrInfo) dlsym(RTLD_NEXT, "getaddrinfo");
	sigset_t	blocked;

	if (hints->ai_flags & AI_NUMERICHOST)
		return system_s(host, service, hints, result);

	pthread_sigmask(SIG_SETMASK, NULL, &blocked);
	pthread_mutex_lock(&mutex);
	asked++;
	signals_blocked = signals_blocked && sigismember(&blocked, SIGTERM) == 1 && sigismember(&blocked, SIGUSR1) == 1;
	while (silent && strcmp(host, "fast.") != 0)
		pthread_cond_wait(&changed, &mutex);
	pthread_mutex_unlock(&mutex);
	if (strcmp(host, "none.") == 0)
		return EAI_NONAME;
	return system_s(ANSWER, service, hints, result);
}

static void
be_silent(bool value)
{
	pthread_mutex_lock(&mutex);
	silent = value;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&mutex);
}

static int
times_asked(void)
{
	int			n;

	pthread_mutex_lock(&mutex);
	n = asked;
	pthread_mutex_unlock(&mutex);
	return n;
}

static bool
wait_for(int fd, bool for_write, long timeout_ms)
{
	struct pollfd p = {.fd = fd,.events = for_write ? POLLOUT : POLLIN};

	if (!waits_return)
		longjmp(lost, 1);
	return poll(&p, 1, (int) timeout_ms) > 0;
}

static int
entries(const char *directory)
{
	DIR		   *dir = opendir(directory);
	int			n = 0;

	if (dir == NULL)
		return -1;
	while (readdir(dir) != NULL)
		n++;
	closedir(dir);
	return n;
}

static int
threads(void)
{
	return entries("/proc/self/task");
}

/* One attempt: the address found as a number, or NULL. */
static const char *
attempt(const char *host, int port)
{
	static char address[64];
	struct addrinfo *all = resolve(host, port, clock_ms() + LIMIT, wait_for, text, sizeof(text));
	struct sockaddr_in *first;

	if (all == NULL)
		return NULL;
	first = (struct sockaddr_in *) (void *) all->ai_addr;
	snprintf(address, sizeof(address), "%d.%d:%d", ntohl(first->sin_addr.s_addr) >> 24,
			 ntohl(first->sin_addr.s_addr) & 0xff, ntohs(first->sin_port));
	freeaddrinfo(all);
	return address;
}

static bool
gives(const char *host, int port, const char *expected)
{
	const char *address = attempt(host, port);

	if (address == NULL)
		diag("%s", text);
	return address != NULL && strcmp(address, expected) == 0;
}

/* Once nobody is silent, all threads end by and by. */
static void
recover(void)
{
	int64_t		deadline = clock_ms() + 10000;

	be_silent(false);
	while (threads() > 3 && clock_left(deadline) > 0)	/* ".", "..", our own */
		usleep(1000);
}

static void
test_answers(void)
{
	int			n = times_asked();

	ok(gives("127.0.0.7", 5672, "127.7:5672"), "an address is taken as it is");
	ok(times_asked() == n, "nobody is asked about an address");
	ok(gives("broker.", 5671, "127.9:5671"), "a name is looked up");
	ok(attempt("none.", 1) == NULL && strstr(text, "could not resolve host name \"none.\": ") == text,
	   "a name that there is not is an error: %s", text);
	ok(signals_blocked, "no signal handler runs in the thread that asks");
}

static void
test_silence(void)
{
	int64_t		begin = clock_ms();
	int			before = threads();
	int			files = entries("/proc/self/fd");
	int			n = times_asked();

	be_silent(true);
	ok(attempt("broker.", 1) == NULL && strstr(text, "did not answer in time") != NULL,
	   "silence is an error: %s", text);
	ok(clock_ms() - begin < LIMIT + SLACK, "an attempt ends at its deadline, after %d ms", (int) (clock_ms() - begin));
	for (int i = 0; i < 5; i++)
		(void) attempt("broker.", 1);
	ok(times_asked() == n + 1, "the same name is asked for once, however often it is needed");
	ok(threads() == before + 1 && entries("/proc/self/fd") <= files + 2,
	   "neither threads nor files pile up");
	ok(gives("fast.", 2, "127.9:2"), "another name is looked up meanwhile");
	ok(gives("127.0.0.7", 3, "127.7:3"), "an address needs no answer");
	recover();
	n = times_asked();
	ok(gives("broker.", 1, "127.9:1") && times_asked() == n,
	   "an answer that came too late is good for the next attempt");
	ok(gives("broker.", 1, "127.9:1") && times_asked() == n + 1, "but only for one");
}

static void
test_late_refusal(void)
{
	int			n;

	be_silent(true);
	(void) attempt("none.", 1);
	recover();
	n = times_asked();
	ok(attempt("none.", 1) == NULL && times_asked() == n + 1,
	   "a refusal that came too late is not believed");
}

static void
test_too_many(void)
{
	char		name[32];
	int			before = threads();
	int			n = 0;

	be_silent(true);
	for (int i = 0; i < 2 * RESOLVE_MAX; i++)
	{
		snprintf(name, sizeof(name), "broker%d.", i);
		(void) resolve(name, 1, clock_ms(), wait_for, text, sizeof(text));
		n = threads() - before;
	}
	ok(n == RESOLVE_MAX, "there are at most %d lookups at once: %d", RESOLVE_MAX, n);
	ok(strstr(text, "others are still being looked up") != NULL, "the next one says why not: %s", text);
	recover();
	ok(gives("broker0.", 1, "127.9:1") && gives("more.", 1, "127.9:1"), "there is room again once they have ended");
}

static void
test_lost(void)
{
	int			before = threads();

	be_silent(true);
	waits_return = false;
	for (volatile int i = 0; i < 5; i++)
	{
		if (setjmp(lost) == 0)
			(void) attempt("broker.", 7);
	}
	waits_return = true;
	ok(threads() == before + 1, "a wait that does not return leaves one lookup behind");
	recover();
	ok(gives("broker.", 7, "127.9:7"), "which the next attempt uses");
}

int
main(void)
{
	test_answers();
	test_silence();
	test_late_refusal();
	test_too_many();
	test_lost();
	return done();
}
