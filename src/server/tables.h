/*-------------------------------------------------------------------------
 *
 * tables.h
 *		The extension's own tables: their oids, and what must be in them.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_TABLES_H
#define PGF_TABLES_H

#include "postgres.h"

#include "server/compat.h"

/* fanout.outbox_0 to fanout.outbox_2, and those of fanout.sent */
#define OUTBOX_SEGMENTS 3

extern Oid	tables_oid(const char *name);
extern Oid	tables_segment(int segment);
extern Oid	tables_outbox_sequence(void);
extern Oid	tables_topology_change(void);
extern Oid	tables_scattered(void);

pg_noreturn extern void tables_row_missing(const char *name);

#endif							/* PGF_TABLES_H */
