/*-------------------------------------------------------------------------
 *
 * breaker.h
 *		Finds out that it is not the messages that fail.
 *
 * Pure: no PostgreSQL, no broker.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_BREAKER_H
#define PGF_BREAKER_H

#include <stdbool.h>
#include <stdint.h>

/* So many messages of different keys must fail in a row. */
#define BREAKER_FAILURES 10

typedef struct Breaker
{
	bool		open;
	int			probes;			/* that failed since */
	char		sqlstate[6];	/* of the failures */
	uint64_t	keys[BREAKER_FAILURES]; /* of those that failed in a row */
	int			count;
} Breaker;

extern void breaker_success(Breaker *breaker);
extern bool breaker_failure(Breaker *breaker, const char *sqlstate, uint64_t key);

#endif							/* PGF_BREAKER_H */
