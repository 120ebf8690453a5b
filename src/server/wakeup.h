/*-------------------------------------------------------------------------
 *
 * wakeup.h
 *		What is to happen when the current transaction ends.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_WAKEUP_H
#define PGF_WAKEUP_H

#include "postgres.h"

#include "server/shmem.h"

/*
 * Remembers that the current transaction wrote something for the publisher;
 * its latch is set when (and only when) the transaction commits.  Very cheap
 * when called again in the same transaction.
 */
extern void wakeup_publisher_at_commit(void);

/*
 * The same for a transaction that removed rows of the outbox, which the publisher may
 * have counted.
 */
extern void wakeup_removed_at_commit(void);

/*
 * The same for changed subscriptions, which the publisher reads again, and for
 * what the consumers of this database are to look at.
 */
extern void wakeup_subscriptions_at_commit(void);
extern void wakeup_consumers_at_commit(void);

/*
 * Remembers that the set of databases with the extension may change when the
 * current transaction ends (CREATE/DROP EXTENSION, database commands): the
 * launcher is woken at commit and at abort.
 */
extern void wakeup_launcher_at_end(void);

/*
 * Keeps new workers out of a database (shmem_hold()) until the current
 * subtransaction aborts or the transaction ends, however it ends; then the
 * launcher is woken.  Returns NULL if the database has no slot and none is
 * free: then it has no worker either, and the launcher is told to look for
 * the extension again at the end.
 */
extern DatabaseSlot *wakeup_hold_until_end(Oid database);

/*
 * Restarts the workers of a database (InvalidOid: all), if there are any, when
 * the current transaction commits.
 */
extern void wakeup_restart_at_commit(Oid database);

/* Registers the transaction callbacks, once per process; idempotent. */
extern void wakeup_init(void);

#endif							/* PGF_WAKEUP_H */
