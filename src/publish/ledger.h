/*-------------------------------------------------------------------------
 *
 * ledger.h
 *		The entries of what was sent; is the state of this database this server's
 *		own?
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_LEDGER_H
#define PGF_LEDGER_H

#include "postgres.h"

#include "publish/scan.h"

/*
 * Raises an error if the publisher cannot go on from what ledger, rotation and
 * outbox say.  Inside a transaction opened by worker_begin().
 */
extern void ledger_check(void);

/*
 * The same as a question, in a transaction of its own; for the publisher only.
 * Each new problem is logged once, and is the worker's last error.
 */
extern bool ledger_usable(void);

extern void ledger_record_sent(Datum base, Datum target, int64 last_id, int count, const Unread *unread);

#endif							/* PGF_LEDGER_H */
