/*-------------------------------------------------------------------------
 *
 * consumer.h
 *		The worker that consumes one subscription's queue.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_CONSUMER_H
#define PGF_CONSUMER_H

#include "postgres.h"

/* main_arg: the slot, as the launcher packed it for worker_attach(). */
extern PGDLLEXPORT void pg_fanout_consumer_main(Datum main_arg);

#endif							/* PGF_CONSUMER_H */
