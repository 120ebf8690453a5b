/*-------------------------------------------------------------------------
 *
 * worker.h
 *		What every background worker of pg_fanout shares.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_WORKER_H
#define PGF_WORKER_H

#include "postgres.h"

#include "server/compat.h"
#include "server/shmem.h"

/* This worker's slot, once attached, and which of the kinds it is. */
extern WorkerSlot *worker_self;
extern DatabaseSlot *worker_slot;	/* of a publisher, else NULL */
extern SubscriptionSlot *worker_subscription;	/* of a consumer, else NULL */
extern DatabaseSlot *worker_history;	/* of a history worker, else NULL */

/*
 * First thing a worker does: signals, exit callback, attach to the
 * slot given by the launcher (slot index in main_arg, generation in bgw_extra),
 * connect to its database (a consumer: as the role that subscribed), name itself in pg_stat_activity ("pg_fanout " and
 * what), pin the settings that it depends on, and look for the extension.
 * Ends the process if it was told to stop meanwhile or if there is no
 * extension; waits while the extension's version is another than the
 * library's.
 */
extern void worker_attach(Datum main_arg, const char *what);

/*
 * Opens a short transaction with SPI connected and a snapshot active, after
 * taking a share lock on the extension, so that a concurrent DROP EXTENSION
 * either waits for this transaction or is seen here.  Ends the process with
 * code 0 if the extension is gone or has been replaced by another version.
 * search_path is pg_catalog, pg_temp in a publisher.
 *
 * Waits for the lock, interruptibly, as long as another transaction that drops
 * the extension is open; not to be called while something must be done in time.
 */
extern void worker_begin(void);
extern void worker_commit(void);

/* After an error was caught: ends the transaction, whatever its state. */
extern void worker_abort(void);

/* Ends the process with exit code 0; how says when it is to start again. */
pg_noreturn extern void worker_end(WorkerEnd how);

/*
 * Does SIGINT (pg_cancel_backend) cancel what runs?  Not before it is allowed;
 * one that came too late is forgotten when that ends.
 */
extern void worker_allow_cancel(bool allow);

/*
 * The single place where a worker waits.  Returns true if fd became readable
 * (writable).  fd may be -1.  timeout_ms < 0: until woken.  Handles
 * interrupts (SIGTERM ends the process here), postmaster death and
 * configuration reload, and resets the latch.
 */
extern bool worker_wait(int fd, bool for_write, long timeout_ms);

/* Same as BrokerOptions.fd_changed: lets SIGTERM shut the socket down. */
extern void worker_broker_fd(int fd);
extern void worker_set_socket_finder(int (*find) (void));
extern void worker_keep_socket(bool keep);

/* True once after each reload of the configuration. */
extern bool worker_reloaded(void);

/* Status block of the slot; each change of state is time-stamped. */
extern void worker_set_state(WorkerState state);
extern void worker_set_connected(const char *connected_to); /* NULL: not */
extern void worker_set_error(const char *text); /* remembers the last one */
extern void worker_copy_text(char *to, const char *text, size_t size);

/*
 * What a worker does: start() once, then rounds of work(), and wait() whenever a
 * round found nothing to do.  work() runs in a context that is reset after it.
 * Never returns: an error becomes last_error, and ends the process.
 */
pg_noreturn extern void worker_run(void (*start) (void), bool (*work) (void), void (*wait) (void));

#endif							/* PGF_WORKER_H */
