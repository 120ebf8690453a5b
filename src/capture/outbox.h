/*-------------------------------------------------------------------------
 *
 * outbox.h
 *		Writing the outbox, in the application's transaction.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_OUTBOX_H
#define PGF_OUTBOX_H

#include "postgres.h"

#include "capture/outboxrow.h"

extern void outbox_insert(const OutboxRow *row, bool at_once);
extern void outbox_topology_changed(void);

#endif							/* PGF_OUTBOX_H */
