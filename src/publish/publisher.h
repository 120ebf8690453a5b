/*-------------------------------------------------------------------------
 *
 * publisher.h
 *		The worker that publishes one database's outbox.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_PUBLISHER_H
#define PGF_PUBLISHER_H

#include "postgres.h"

/* main_arg: the slot, as the launcher packed it for worker_attach(). */
extern PGDLLEXPORT void pg_fanout_publisher_main(Datum main_arg);

#endif							/* PGF_PUBLISHER_H */
