/*-------------------------------------------------------------------------
 *
 * outboxrow.h
 *		From a message to a row of the outbox.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_OUTBOXROW_H
#define PGF_OUTBOXROW_H

#include "postgres.h"

#include "access/htup.h"
#include "access/tupdesc.h"
#include "datatype/timestamp.h"
#include "utils/jsonb.h"
#include "utils/uuid.h"

/* Bytes of a message's type in UTF-8: those of a short string of AMQP. */
#define OUTBOX_MAX_TYPE 255

/* Columns of fanout.outbox. */
#define OUTBOX_SEGMENT		1
#define OUTBOX_DATABASE		2
#define OUTBOX_ID			3
#define OUTBOX_XID			4
#define OUTBOX_TOPIC_ID		5
#define OUTBOX_MESSAGE_ID	6
#define OUTBOX_TYPE			7
#define OUTBOX_KEY			8
#define OUTBOX_HEADERS		9
#define OUTBOX_PAYLOAD		10
#define OUTBOX_QUEUE		11
#define OUTBOX_CREATED_AT	12
#define OUTBOX_NATTS		OUTBOX_CREATED_AT

/* The first columns of a row, which are never NULL, as they lie in it. */
typedef struct OutboxHead
{
	int16		segment;
	Oid			database;
	int64		id;
	uint64		xid;
	int32		topic_id;
	pg_uuid_t	message_id;
} OutboxHead;

typedef struct OutboxRow
{
	int64		id;				/* from ids_draw() */
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

extern TupleDesc outboxrow_descriptor(void);
extern HeapTuple outboxrow_form(const OutboxRow *row, int segment);

#endif							/* PGF_OUTBOXROW_H */
