/*-------------------------------------------------------------------------
 *
 * reader.h
 *		Reading the outbox in batches, and what becomes of its messages.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_READER_H
#define PGF_READER_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "storage/itemptr.h"
#include "utils/jsonb.h"
#include "utils/uuid.h"

#include "broker/broker.h"
#include "publish/flight.h"
#include "publish/scan.h"
#include "server/monotime.h"

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
	char	   *key;			/* NULL: none, as with all that follows; or
								 * left in the table, see reader_unsendable() */
	char	   *old_key;		/* NULL unless the change changed the key */
	Jsonb	   *headers;
	char	   *payload;		/* no zero byte ends it */
	size_t		payload_len;
	size_t		headers_len;	/* of headers and key, in the table */
	char	   *queue;			/* NULL: the topic's exchange */
	TimestampTz created_at;
	int			segment;		/* of the outbox; OUTBOX_SEGMENTS: fanout.held */
	ItemPointerData place;		/* in a segment of the outbox */
	bool		truncates;		/* TRUNCATE: orders with all keys */

	/* reader.c's own */
	size_t		bytes;			/* that it counts for in its chunk */

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
	size_t		bytes;			/* of payloads, headers and keys */
	int			unsettled;		/* messages that are waiting or in flight */
	bool		last;			/* of its batch, or of the topic's held ones */
	Datum		base;			/* pg_snapshot; 0 for held messages */
	Datum		target;
	Unread		unread;			/* with respect to base */
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
	bool		open;			/* the rows of that batch were found */
	BatchScan	scan;
} Cursor;

#define CHUNK_MESSAGES	5000
#define CHUNK_BYTES		(4 * 1024 * 1024)

/*
 * Headers and key must fit into a frame of 64 kB, as AMQP writes them.  As JSON
 * in the table they may be larger, but not by that much.
 */
#define READER_MAX_HEADERS	(1024 * 1024)

/*
 * All of these run inside a transaction opened by worker_begin().  Chunks are
 * made as children of parent.
 */

/* Where the ledger says the publisher is; an error if ledger_check() raises one. */
extern void reader_load_cursor(Cursor *cursor);

/*
 * Next chunk of the batch being walked, or else the first chunk of a new
 * batch.  Sets *topology if topics or bindings changed since the last call, in
 * the new batch's target at least (and forgets that they did).  Returns NULL if there is nothing new;
 * the base then moves up by itself.
 */
extern Chunk *reader_read(Cursor *cursor, MemoryContext parent, bool *topology);

/*
 * The broker can never take it: the body is over BROKER_MAX_BODY, or key and
 * headers are over READER_MAX_HEADERS.  Nothing of these was read then.
 */
extern bool reader_unsendable(const Message *message);

/*
 * Frees the body of a message that will not be sent any more, so that large ones
 * do not wait for the rest of their chunk.
 */
extern void reader_free_body(Message *message);

/*
 * Copies messages of a chunk of the outbox into fanout.held; an error unless it
 * finds each of them.
 */
extern void reader_hold(Message **messages, int n);

/*
 * Moves a message into fanout.dead_letter with its reason: out of fanout.held
 * if it is from there, and false then if somebody has purged it; else out of the
 * outbox, and an error if it is not there.  A held one must be locked with
 * reader_lock_held().
 */
extern bool reader_bury(const Message *message, const char *topic, int attempts);

/* First messages held for a topic, in order, at most limit; NULL if none. */
extern Chunk *reader_read_held(int32 topic_id, int limit, MemoryContext parent);

/*
 * Locks held messages that are to be released or buried, without waiting.  False
 * if somebody else has locked one.  One that was purged needs no lock.
 */
extern bool reader_lock_held(Message **messages, int n);

/* Held messages were sent: removes them, once they are locked. */
extern void reader_release(Message **messages, int n);

/* Topics that have held messages. */
extern int	reader_topics_held(int32 **topic_ids);

#endif							/* PGF_READER_H */
