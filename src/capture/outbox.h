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

#include "access/tupdesc.h"
#include "datatype/timestamp.h"
#include "utils/jsonb.h"
#include "utils/uuid.h"

/* Bytes of a message's type in UTF-8: those of a short string of AMQP. */
#define OUTBOX_MAX_TYPE 255

typedef struct OutboxRow
{
	int64		id;				/* from outbox_next_id() */
	int32		topic_id;
	pg_uuid_t	message_id;
	const char *type;			/* NULL: none */
	const char *key;			/* NULL: none */
	Jsonb	   *headers;		/* NULL: none */
	const char *payload;
	size_t		payload_len;
	const char *queue;			/* NULL: the topic's exchange */
	TimestampTz created_at;
} OutboxRow;

extern TupleDesc outbox_descriptor(void);
extern int64 outbox_next_id(void);
extern void outbox_insert(const OutboxRow *row, bool at_once);
extern void outbox_topology_changed(void);

#endif							/* PGF_OUTBOX_H */
