/*-------------------------------------------------------------------------
 *
 * run.h
 *		Messages in memory: as they are read, and until they are recorded.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_RUN_H
#define PGF_RUN_H

#include "postgres.h"

#include "access/xlogdefs.h"
#include "datatype/timestamp.h"
#include "lib/ilist.h"
#include "storage/itemptr.h"
#include "utils/jsonb.h"

#include "broker/types.h"
#include "publish/scan.h"
#include "publish/window.h"
#include "server/monotime.h"

struct Chunk;
struct Flow;
struct Run;

/* One message read from the outbox or from fanout.held. */
typedef struct Message
{
	WindowItem	item;			/* the window's */
	struct Run *run;
	int64		id;
	uint64		xid;
	int32		topic_id;
	char		message_id[37];
	char	   *type;			/* NULL: none; server encoding, as all texts */
	char	   *key;			/* NULL: none, as with all that follows; or
								 * left in the table, see message_unsendable() */
	char	   *old_key;		/* NULL unless the change changed the key */
	Jsonb	   *headers;
	char	   *payload;		/* no zero byte ends it */
	size_t		payload_len;
	size_t		headers_len;	/* of headers and key, in the table */
	char	   *queue;			/* UTF-8; NULL: the topic's exchange */
	TimestampTz created_at;
	int			segment;		/* of the outbox; OUTBOX_SEGMENTS: fanout.held */
	ItemPointerData place;		/* in a segment of the outbox */
	bool		barrier;		/* orders with all keys: a TRUNCATE, or part
								 * of a comparison */
	size_t		bytes;			/* that it counts for in its run */
	const char *content_type;	/* NULL: the topic's */
	BrokerMessage wire;			/* as it goes out; exchange, routing key and
								 * content type are set when it does */
	char	   *reason;			/* why it cannot be sent, NULL otherwise */
	int			attempts;		/* with a reason: made before it was given up */
} Message;

/* What became visible between two snapshots.  Shared by all that is read of it. */
typedef struct Batch
{
	int			references;
	uint64		number;			/* that the main cursor's base has when it has
								 * read up to target */
	uint64		base_number;	/* likewise, of base; 0: not known */
	Datum		base;			/* pg_snapshot */
	Datum		target;
	Unread		unread;			/* with respect to base */
	Unread		end_unread;		/* to target; the same as long as that is not
								 * known */
} Batch;

/*
 * Messages of one topic that were read together, in order of id.  All of it lives
 * in context.
 */
typedef struct Run
{
	dlist_node	node;			/* in its flow */
	struct Run *next_of_chunk;
	struct Flow *flow;
	struct Chunk *chunk;		/* NULL: its topic has left the main cursor */
	MemoryContext context;
	Batch	   *batch;			/* NULL: of fanout.held */
	bool		ends_batch;		/* nothing of the topic follows in the batch */
	uint64		reading;		/* the flow's number of the reading; 0: the
								 * main cursor's */
	Message   **messages;
	int			count;
	int			room;
	int			done;			/* from the first one on */
	int			recorded;		/* of these */
	size_t		bytes;			/* of payloads, headers and keys */
	XLogRecPtr	commit_lsn;		/* WAL must be on disk up to here before they
								 * go out */
} Run;

/*
 * Bounds a run or chunk.  Its first message may be larger, because it could never be read
 * otherwise.
 */
typedef struct RunLimit
{
	int			messages;
	size_t		bytes;
} RunLimit;

/* flush() is served when all topics have sent what was written before it. */
typedef struct FlushTicket
{
	uint64		ticket;			/* 0: none */
	uint64		number;			/* of the main cursor's base that shows that */
} FlushTicket;

/* What the main cursor has read at once: the runs of several topics. */
typedef struct Chunk
{
	struct Chunk *next;
	uint64		number;			/* how many were read before it, and itself */
	Run		   *runs;
	int			open_runs;		/* that have messages which are not done */
	int			count;			/* messages */
	size_t		bytes;
	Batch	   *batch;
	int64		last_id;
	bool		ends_batch;
	MonoTime	read_at;
	FlushTicket flush;			/* due when this is recorded */
	uint32		load;			/* of the catalog, before the batch that it
								 * ends; 0: it ends none */
} Chunk;

/*
 * Headers and key must fit into a frame of 64 kB, as AMQP writes them.  As JSON
 * in the table they may be larger, but not by that much.
 */
#define MESSAGE_MAX_HEADERS	(1024 * 1024)

/*
 * The broker can never take it: the body is over BROKER_MAX_BODY, or key and
 * headers are over MESSAGE_MAX_HEADERS.  Nothing of these was read then.
 */
static inline bool
message_unsendable(const Message *message)
{
	return message->payload_len > BROKER_MAX_BODY || message->headers_len > MESSAGE_MAX_HEADERS;
}

#define message_of(windowitem) ((Message *) ((char *) (windowitem) - offsetof(Message, item)))

#endif							/* PGF_RUN_H */
