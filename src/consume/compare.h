/*-------------------------------------------------------------------------
 *
 * compare.h
 *		The copy's part of fanout.compare().
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_COMPARE_H
#define PGF_COMPARE_H

#include "postgres.h"

#include "consume/sync_target.h"

/* A message of a comparison. */
typedef struct CompareMessage
{
	int64		run;
	int64		sequence;
	uint64		xid;			/* 0: none */
	const char *body;			/* in the server encoding; NULL: it cannot be */
} CompareMessage;

extern ErrorData *compare_apply(SyncTarget *target, const CompareMessage *message, void (*between) (void));

#endif							/* PGF_COMPARE_H */
