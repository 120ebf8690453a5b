/*-------------------------------------------------------------------------
 *
 * resolve.c
 *		Looks up the addresses of a host, within a limit and interruptibly.
 *
 * getaddrinfo() is the only way to what the system's administrator has set up
 * for names (/etc/hosts, nsswitch.conf and its modules, search domains), but
 * it blocks for as long as a silent nameserver makes it wait, ten seconds and
 * more, and cannot be cancelled.  So a thread calls it, and the main thread
 * waits, in the caller's wait function, for the pipe that the thread closes
 * when it has ended.  If the time is over first, the lookup goes on without
 * anybody waiting for it.
 *
 * A lookup's life:
 *
 *		begin_lookup() --> RUNNING --thread ends--> ENDED --reap()--> (freed)
 *
 *		RUNNING: the second half of the struct is the thread's.
 *		ENDED:	 all of it is the main thread's, which learns of the end by the
 *				 pipe; pthread_join() makes what was written visible to it.
 *
 * Bounds: one lookup per host and port, however often that is asked for: a
 * later call waits for the lookup that is under way.  RESOLVE_MAX lookups at
 * once.  getaddrinfo() itself ends some time (resolv.conf: timeout, attempts).
 * Addresses that came too late for one attempt are kept for the next one, since
 * a nameserver may well need longer than the caller's limit each time; failures
 * are not kept.
 *
 * Must never: block; let the thread touch anything but its Lookup, receive a
 * signal, or call into PostgreSQL.  The process may end at any time while
 * threads are waiting for the network: they hold nothing that outlives it.
 *
 * Scenarios, each of them a test in test/unit/test_resolve.c: an address in
 * place of a name; a name that resolves, and one that does not; a silent
 * nameserver, asked again and again; another host meanwhile; an answer that
 * comes too late for the first attempt; too many silent names; a wait function
 * that does not return.
 *
 *-------------------------------------------------------------------------
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "broker/clock.h"
#include "broker/resolve.h"

/* How long addresses that nobody waited for are kept. */
#define KEEP_MS				120000

typedef struct Lookup
{
	struct Lookup *next;
	char	   *host;
	char		service[16];	/* the port */
	pthread_t	thread;
	int			ended_fd;		/* readable once the thread has ended */
	bool		joined;

	/* the thread's until it has ended */
	int			thread_fd;		/* the other end of the pipe */
	int			problem;		/* of getaddrinfo() */
	int			system_problem; /* errno, if that says EAI_SYSTEM */
	struct addrinfo *addresses;
	int64_t		ended_at;
} Lookup;

/* All that are under way, or ended and not looked at yet. */
static Lookup *lookups = NULL;

static const struct addrinfo any_tcp = {.ai_family = AF_UNSPEC,.ai_socktype = SOCK_STREAM};

static struct addrinfo *parse_address(const char *host, const char *service);
static Lookup *find_lookup(const char *host, const char *service);
static void reap_ended(void);
static bool usable(const Lookup *lookup);
static Lookup *begin_lookup(const char *host, const char *service, char *text, size_t text_size);
static Lookup *new_lookup(const char *host, const char *service);
static int	start_thread(Lookup *lookup);
static void *run(void *arg);
static bool has_ended(Lookup *lookup);
static struct addrinfo *take_addresses(Lookup *lookup, char *text, size_t text_size);
static void forget(Lookup *lookup);
static void free_lookup(Lookup *lookup);

struct addrinfo *
resolve(const char *host, int port, int64_t deadline,
		bool (*wait) (int fd, bool for_write, long timeout_ms),
		char *text, size_t text_size)
{
	char		service[16];
	struct addrinfo *addresses;
	Lookup	   *lookup;

	snprintf(service, sizeof(service), "%d", port);
	addresses = parse_address(host, service);
	if (addresses != NULL)
		return addresses;

	reap_ended();
	lookup = find_lookup(host, service);
	if (lookup == NULL)
		lookup = begin_lookup(host, service, text, text_size);
	if (lookup == NULL)
		return NULL;

	while (!has_ended(lookup))
	{
		if (clock_left(deadline) == 0)
		{
			snprintf(text, text_size, "could not resolve host name \"%s\": the name service did not answer in time", host);
			return NULL;
		}
		(void) wait(lookup->ended_fd, false, clock_left(deadline));
	}
	return take_addresses(lookup, text, text_size);
}

/* Returns the address that host itself is, or NULL if it is a name.  Asks nobody. */
static struct addrinfo *
parse_address(const char *host, const char *service)
{
	struct addrinfo hints = any_tcp;
	struct addrinfo *address = NULL;

	hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
	return getaddrinfo(host, service, &hints, &address) == 0 ? address : NULL;
}

static Lookup *
find_lookup(const char *host, const char *service)
{
	for (Lookup *lookup = lookups; lookup != NULL; lookup = lookup->next)
	{
		if (strcmp(lookup->host, host) == 0 && strcmp(lookup->service, service) == 0)
			return lookup;
	}
	return NULL;
}

/* Frees the lookups that ended while nobody waited for them, but for addresses worth keeping. */
static void
reap_ended(void)
{
	Lookup	   *next;

	for (Lookup *lookup = lookups; lookup != NULL; lookup = next)
	{
		next = lookup->next;
		if (has_ended(lookup) && !usable(lookup))
			forget(lookup);
	}
}

/* Only of a lookup that has ended. */
static bool
usable(const Lookup *lookup)
{
	return lookup->problem == 0 && clock_left(lookup->ended_at + KEEP_MS) > 0;
}

/* Begins to look a name up.  Returns NULL with a reason if that cannot be. */
static Lookup *
begin_lookup(const char *host, const char *service, char *text, size_t text_size)
{
	Lookup	   *lookup;
	int			count = 0;
	int			problem;

	for (lookup = lookups; lookup != NULL; lookup = lookup->next)
		count++;
	if (count >= RESOLVE_MAX)
	{
		snprintf(text, text_size, "could not resolve host name \"%s\": %d others are still being looked up",
				 host, count);
		return NULL;
	}
	lookup = new_lookup(host, service);
	problem = (lookup == NULL) ? ENOMEM : start_thread(lookup);
	if (problem != 0)
	{
		snprintf(text, text_size, "could not resolve host name \"%s\": %s", host, strerror(problem));
		free_lookup(lookup);
		return NULL;
	}
	lookup->next = lookups;
	lookups = lookup;
	return lookup;
}

static Lookup *
new_lookup(const char *host, const char *service)
{
	Lookup	   *lookup = calloc(1, sizeof(Lookup));

	if (lookup == NULL)
		return NULL;
	lookup->ended_fd = -1;
	lookup->host = strdup(host);
	snprintf(lookup->service, sizeof(lookup->service), "%s", service);
	if (lookup->host != NULL)
		return lookup;
	free(lookup);
	return NULL;
}

/*
 * Starts a lookup's thread, with all signals blocked, so that the kernel gives
 * them to the main thread, whose handlers expect to run there.  Returns an
 * errno, 0 if all is well.
 */
static int
start_thread(Lookup *lookup)
{
	sigset_t	all;
	sigset_t	before;
	int			ends[2];
	int			problem;

	if (pipe2(ends, O_CLOEXEC) != 0)
		return errno;
	lookup->ended_fd = ends[0];
	lookup->thread_fd = ends[1];

	sigfillset(&all);
	problem = pthread_sigmask(SIG_SETMASK, &all, &before);
	if (problem == 0)
	{
		problem = pthread_create(&lookup->thread, NULL, run, lookup);
		pthread_sigmask(SIG_SETMASK, &before, NULL);
	}
	if (problem != 0)
		close(ends[1]);
	return problem;
}

/* The thread.  Closing its end of the pipe is the last thing that it does. */
static void *
run(void *arg)
{
	Lookup	   *lookup = arg;

	lookup->problem = getaddrinfo(lookup->host, lookup->service, &any_tcp, &lookup->addresses);
	lookup->system_problem = errno;
	lookup->ended_at = clock_ms();
	close(lookup->thread_fd);
	return NULL;
}

/*
 * Has the thread ended?  If so, what it has found may be read.  Joining a
 * thread that has closed its pipe takes no longer than the thread's return.
 */
static bool
has_ended(Lookup *lookup)
{
	struct pollfd p = {.fd = lookup->ended_fd,.events = POLLIN};

	if (!lookup->joined && poll(&p, 1, 0) > 0)
	{
		pthread_join(lookup->thread, NULL);
		lookup->joined = true;
	}
	return lookup->joined;
}

/* Returns what a lookup that has ended found, or NULL with a reason, and frees the rest. */
static struct addrinfo *
take_addresses(Lookup *lookup, char *text, size_t text_size)
{
	struct addrinfo *addresses = lookup->problem == 0 ? lookup->addresses : NULL;

	if (addresses == NULL)
		snprintf(text, text_size, "could not resolve host name \"%s\": %s", lookup->host,
				 lookup->problem == EAI_SYSTEM ? strerror(lookup->system_problem) :
				 gai_strerror(lookup->problem));
	lookup->addresses = NULL;
	forget(lookup);
	return addresses;
}

/* Takes a lookup that has ended out of the list, and frees it. */
static void
forget(Lookup *lookup)
{
	Lookup	  **link = &lookups;

	while (*link != lookup)
		link = &(*link)->next;
	*link = lookup->next;
	free_lookup(lookup);
}

/* Only without a thread. */
static void
free_lookup(Lookup *lookup)
{
	if (lookup == NULL)
		return;
	if (lookup->addresses != NULL)
		freeaddrinfo(lookup->addresses);
	if (lookup->ended_fd >= 0)
		close(lookup->ended_fd);
	free(lookup->host);
	free(lookup);
}
