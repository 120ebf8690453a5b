/*-------------------------------------------------------------------------
 *
 * capture.h
 *		Messages that no trigger writes: of rows that were there before.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_CAPTURE_H
#define PGF_CAPTURE_H

#include "postgres.h"

#include "access/htup.h"
#include "lib/stringinfo.h"
#include "utils/jsonb.h"
#include "utils/rel.h"
#include "utils/reltrigger.h"

/* The type of messages that have rows to be compared with those of a copy. */
#define COMPARISON_TYPE "pg_fanout.compare"

extern Size capture_read_row(Relation rel, Trigger *trigger, HeapTuple tuple, const char *queue,
							 Jsonb *headers);
extern void capture_append_row(StringInfo out, Relation rel, Trigger *trigger, HeapTuple tuple);
extern const char *capture_key_columns(Relation rel, Trigger *trigger);
extern void capture_payload(const char *topic, const char *type, const char *payload, Jsonb *headers,
							const char *queue);
extern void capture_notice(const char *topic, const char *type, Jsonb *payload, Jsonb *headers,
						   const char *queue);

#endif							/* PGF_CAPTURE_H */
