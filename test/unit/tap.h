/*-------------------------------------------------------------------------
 *
 * tap.h
 *		What a unit test needs to speak TAP.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_TAP_H
#define PGF_TAP_H

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>

static int	tap_count = 0;
static int	tap_failures = 0;

/* One check.  The name says what is promised.  Returns the condition. */
static bool
__attribute__((format(printf, 2, 3), unused))
ok(bool condition, const char *name,...)
{
	va_list		args;

	printf("%sok %d - ", condition ? "" : "not ", ++tap_count);
	va_start(args, name);
	vprintf(name, args);
	va_end(args);
	putchar('\n');
	fflush(stdout);
	if (!condition)
		tap_failures++;
	return condition;
}

/* A line that explains. */
static void
__attribute__((format(printf, 1, 2), unused))
diag(const char *format,...)
{
	va_list		args;

	printf("# ");
	va_start(args, format);
	vprintf(format, args);
	va_end(args);
	putchar('\n');
	fflush(stdout);
}

/* The plan; returns the exit code. */
static int
__attribute__((unused))
done(void)
{
	printf("1..%d\n", tap_count);
	return tap_failures == 0 ? 0 : 1;
}

#endif							/* PGF_TAP_H */
