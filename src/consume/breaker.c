/*-------------------------------------------------------------------------
 *
 * breaker.c
 *		Finds out that it is not the messages that fail.
 *
 *		         BREAKER_FAILURES of different keys fail in a row,
 *		         all with the same SQLSTATE
 *		CLOSED --------------------------------------------------> OPEN
 *		   ^                                                      |  |  ^
 *		   '------------------- a probe succeeds -----------------'  '--'
 *		                                                       a probe fails
 *
 * While it is open the subscription consumes nothing but one message now and then,
 * a probe, and no attempt counts: see consumer.c.
 *
 * Must never: open because of one key, or of one message again and again.
 *
 * Scenarios, each a test in test/unit/test_breaker.c: failures of different keys;
 * of one key; a success among them; another SQLSTATE among them; a probe.
 *
 *-------------------------------------------------------------------------
 */
#include <string.h>

#include "consume/breaker.h"

/* A message was applied: whatever failed before is the fault of others. */
void
breaker_success(Breaker *breaker)
{
	memset(breaker, 0, sizeof(*breaker));
}

static bool
seen_before(const Breaker *breaker, uint64_t key)
{
	for (int i = 0; i < breaker->count; i++)
	{
		if (breaker->keys[i] == key)
			return true;
	}
	return false;
}

/*
 * A message of that key, or with that id if it has no key, has failed.  Returns
 * true if the breaker opens, or if it is open and this was a probe.
 */
bool
breaker_failure(Breaker *breaker, const char *sqlstate, uint64_t key)
{
	if (breaker->open)
	{
		breaker->probes++;
		return true;
	}
	if (strcmp(breaker->sqlstate, sqlstate) != 0)
	{
		breaker_success(breaker);
		strncpy(breaker->sqlstate, sqlstate, sizeof(breaker->sqlstate) - 1);
	}
	if (seen_before(breaker, key))
		return false;
	breaker->keys[breaker->count++] = key;
	breaker->open = (breaker->count == BREAKER_FAILURES);
	return breaker->open;
}
