/*-------------------------------------------------------------------------
 *
 * ledger.h
 *		The entries of what was sent.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_LEDGER_H
#define PGF_LEDGER_H

#include "postgres.h"

#include "publish/scan.h"

/*
 * An entry: what is sent.  Of the main cursor, or of a topic that has left it, or
 * rides with it again (attached).
 */
typedef struct LedgerEntry
{
	int32		topic_id;		/* 0: the main cursor's */
	bool		attached;
	Datum		base;			/* pg_snapshots */
	Datum		target;
	int64		last_id;
	Unread		unread;			/* with respect to base */
} LedgerEntry;

extern void ledger_check(void);
extern void ledger_read(LedgerEntry *entry);
extern LedgerEntry *ledger_read_detached(int *n);
extern void ledger_record(const LedgerEntry *entry, int64 count);

#endif							/* PGF_LEDGER_H */
