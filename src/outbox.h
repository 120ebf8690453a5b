/*-------------------------------------------------------------------------
 *
 * outbox.h
 *		The outbox tables: writing rows, reading batches, keeping the ledger.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_OUTBOX_H
#define PGF_OUTBOX_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "storage/itemptr.h"
#include "utils/jsonb.h"
#include "utils/uuid.h"

#include "broker.h"
#include "flight.h"
#include "monotime.h"

/* ---- writing, in the application's transaction ---- */

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
	TimestampTz created_at;
} OutboxRow;

/* The next number of the sequence. */
extern int64 outbox_next_id(void);

/*
 * Writes one message into the current segment, at once or at the latest when
 * the statement ends, and arranges for the publisher to be woken at commit.
 * Checks no rights: the caller has decided.
 */
extern void outbox_insert(const OutboxRow *row, bool at_once);

/* Records that the current transaction changed topics or bindings. */
extern void outbox_topology_changed(void);

/* ---- reading, in the publisher ---- */

typedef enum MessageState
{
	MESSAGE_WAITING,			/* not published, or not known to have arrived */
	MESSAGE_IN_FLIGHT,
	MESSAGE_RETURNED,			/* in flight, and returned as unroutable: its
								 * ack will follow */
	MESSAGE_SENT,				/* acknowledged */
	MESSAGE_HELD,				/* its topic does not flow */
	MESSAGE_DEAD,				/* the broker will never take it */
} MessageState;

/* One message read from the outbox or from fanout.held. */
typedef struct Message
{
	int64		id;
	uint64		xid;
	int32		topic_id;
	char		message_id[37];
	char	   *type;			/* NULL: none; server encoding, as all texts */
	char	   *key;			/* NULL: none */
	char	   *old_key;		/* NULL unless the change changed the key */
	Jsonb	   *headers;		/* NULL: none */
	char	   *payload;		/* NULL: over BROKER_MAX_BODY, left in the
								 * table */
	size_t		payload_len;
	char	   *queue;			/* NULL: the topic's exchange */
	TimestampTz created_at;
	int			segment;		/* of the outbox; -1: from fanout.held */
	ItemPointerData place;		/* in that */
	bool		truncates;		/* TRUNCATE: orders with all keys */

	/* publisher's own, see wire.h and publisher.c */
	FlightItem	flight;
	MessageState state;
	BrokerMessage wire;			/* as it goes out; exchange and routing key
								 * are set when it does */
	char	   *reason;			/* why it cannot be sent, NULL otherwise */
	struct Chunk *chunk;
	MonoTime	published_at;
} Message;

/*
 * A chunk of messages in order of id.  Everything lives in context, which the
 * caller deletes.
 */
typedef struct Chunk
{
	MemoryContext context;
	Message   **messages;
	int			count;
	int			before;			/* messages of chunks that are recorded with
								 * it */
	size_t		bytes;			/* of payloads */
	int			unsettled;		/* messages that are waiting or in flight */
	bool		last;			/* of its batch, or of the topic's held ones */
	Datum		base;			/* pg_snapshot; 0 for held messages */
	Datum		target;
	uint64		flush_ticket;	/* flush() served when this is recorded */
	bool		drops_behind;	/* what is to be dropped may go then */
	struct Chunk *next;
} Chunk;

/*
 * Where the publisher stands in its reading; the ledger follows behind.
 * Snapshots are in TopMemoryContext.
 */
typedef struct Cursor
{
	Datum		base;			/* pg_snapshot: all that is visible here was
								 * read */
	Datum		target;			/* batch being walked; 0: none */
	int64		last_id;		/* read in target up to here */
	bool		portal_open;	/* the rest waits in a WITH HOLD cursor */
} Cursor;

#define CHUNK_MESSAGES	5000
#define CHUNK_BYTES		(4 * 1024 * 1024)

/*
 * All of these run inside a transaction opened by worker_begin().  Chunks are
 * made as children of parent.
 */

/* Where the ledger says the publisher is; an error if ledger_check() raises one. */
extern void outbox_load_cursor(Cursor *cursor);

/*
 * Next chunk of the batch being walked, or else the first chunk of a new
 * batch.  Sets *topology if topics or bindings changed since the last call, in
 * the new batch's target at least (and forgets that they did).  Returns NULL if there is nothing new;
 * the base then moves up by itself.
 */
extern Chunk *outbox_read(Cursor *cursor, MemoryContext parent, bool *topology);

/* The chunk and those before it are settled: one entry in the ledger. */
extern void outbox_record_sent(const Chunk *chunk);

/* Moves messages into fanout.held. */
extern void outbox_hold(Message **messages, int count);

/*
 * Moves messages into fanout.dead_letter with their reasons, out of
 * fanout.held if they are there.
 */
extern void outbox_bury(Message **messages, int count, const char *topic, int attempts);

/* First messages held for a topic, in order, at most limit; NULL if none. */
extern Chunk *outbox_read_held(int32 topic_id, int limit, MemoryContext parent);

/*
 * Held messages were sent: removes them.  False if some are there still,
 * locked by others.
 */
extern bool outbox_release(Message **messages, int count);

/* Topics that have held messages. */
extern int	outbox_topics_held(int32 **topic_ids);

/* ---- the ring of segments ---- */

/* Segment that new rows go to; from fanout.rotation. */
extern int	outbox_current_segment(void);

/*
 * One step of rotation: empties segments whose rows have all been sent for
 * longer than the retention, those of the ledger with them, and makes the next one current if it is empty
 * and the current one is old enough.  Never waits for a lock.  Returns the
 * current segment.
 */
extern int	outbox_rotate(int retention_s);

/* Adds to the counters of sent messages: parallel arrays. */
extern void outbox_count_sent(const int32 *topic_ids, const int64 *counts, int n, double seconds);

#endif							/* PGF_OUTBOX_H */
