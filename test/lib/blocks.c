/*-------------------------------------------------------------------------
 *
 * blocks.c
 *		Stops a process that has looked how long a file is, for tests; put before the C
 *		library by LD_PRELOAD.
 *
 * The file "stop" in the directory that $BLOCKS_DIR names says which: a process id, how
 * the file's name ends, and how often the process may look before.  Then there is a file
 * "stopped", and the process waits until "stop" is gone.
 *
 *-------------------------------------------------------------------------
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef off_t (*Seek) (int, off_t, int);

/* Does an open file's name end so? */
static int
is_file(int fd, const char *end)
{
	char		link[64];
	char		name[1024];
	ssize_t		len;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	len = readlink(link, name, sizeof(name) - 1);
	if (len < (ssize_t) strlen(end))
		return 0;
	name[len] = '\0';
	return strcmp(name + len - strlen(end), end) == 0;
}

static void
wait_while(const char *stop, const char *stopped)
{
	int			fd = open(stopped, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);

	if (fd >= 0)
		close(fd);
	while (access(stop, F_OK) == 0)
		usleep(10000);
}

/* Waits if this process has looked often enough. */
static void
looked(int fd)
{
	static int	looks = 0;
	const char *directory = getenv("BLOCKS_DIR");
	char		stop[512];
	char		stopped[512];
	char		end[512];
	int			pid = 0;
	int			before = 0;
	FILE	   *file;

	snprintf(stop, sizeof(stop), "%s/stop", directory ? directory : "");
	snprintf(stopped, sizeof(stopped), "%s/stopped", directory ? directory : "");
	file = fopen(stop, "re");
	if (file == NULL)
		return;
	if (fscanf(file, "%d %511s %d", &pid, end, &before) != 3)
		pid = 0;
	fclose(file);
	if (pid == getpid() && is_file(fd, end) && looks++ == before)
		wait_while(stop, stopped);
}

off_t
lseek(int fd, off_t offset, int whence)
{
	Seek		next = (Seek) dlsym(RTLD_NEXT, "lseek");
	off_t		length = next(fd, offset, whence);

	if (whence == SEEK_END)
		looked(fd);
	return length;
}
