/*-------------------------------------------------------------------------
 *
 * names.c
 *		A name service for tests, put before the system's by LD_PRELOAD.
 *
 * Every name that ends in ".test" is 127.0.0.1.  While there is a file "silent"
 * in the directory that $NAMES_DIR names, those that have "silent" in them get no
 * answer, as from a nameserver that is gone.  The file "asked" in it has a line
 * for each name looked up.
 *
 *-------------------------------------------------------------------------
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int (*GetAddrInfo) (const char *, const char *, const struct addrinfo *, struct addrinfo **);

static void
note(const char *directory, const char *name)
{
	char		line[512];
	int			len = snprintf(line, sizeof(line), "%s/asked", directory);
	int			fd = len < (int) sizeof(line) ? open(line, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;

	if (fd < 0)
		return;
	len = snprintf(line, sizeof(line), "%s\n", name);
	if (write(fd, line, (size_t) len) != len)
		abort();
	close(fd);
}

int
getaddrinfo(const char *name, const char *service, const struct addrinfo *hints,
			struct addrinfo **result)
{
	GetAddrInfo next = (GetAddrInfo) dlsym(RTLD_NEXT, "getaddrinfo");
	const char *directory = getenv("NAMES_DIR");
	size_t		len = name ? strlen(name) : 0;
	char		silent[512];

	if (directory == NULL || len < 5 || strcmp(name + len - 5, ".test") != 0 ||
		(hints != NULL && (hints->ai_flags & AI_NUMERICHOST) != 0))
		return next(name, service, hints, result);

	note(directory, name);
	snprintf(silent, sizeof(silent), "%s/silent", directory);
	while (strstr(name, "silent") != NULL && access(silent, F_OK) == 0)
		usleep(20000);
	return next("127.0.0.1", service, hints, result);
}
