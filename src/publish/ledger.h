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

extern void ledger_check(void);
extern void ledger_record_sent(Datum base, Datum target, int64 last_id, int count, const Unread *unread);

#endif							/* PGF_LEDGER_H */
