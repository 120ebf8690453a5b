/*-------------------------------------------------------------------------
 *
 * state.h
 *		What a publisher knows of each topic.  Every part has one owner, who alone
 *		writes it.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_STATE_H
#define PGF_STATE_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "lib/ilist.h"

#include "broker/types.h"
#include "publish/run.h"
#include "publish/scan.h"
#include "publish/window.h"
#include "server/monotime.h"

/*
 * RabbitMQ 4 drops a message of a quorum queue after 20 deliveries unless
 * told otherwise; 3.x has no limit but takes no "-1" either.  A number that is
 * never reached means the same to both, so that the declaration stays
 * equivalent when the broker is upgraded.
 */
#define NO_DELIVERY_LIMIT PG_INT32_MAX

/*
 * Where somebody stands in reading: the main cursor, or a topic that has left it.
 * Snapshots are in TopMemoryContext.
 */
typedef struct Cursor
{
	int32		topic_id;		/* 0: the main cursor */
	uint64		number;			/* of base: how many batches the main cursor
								 * had read by then; 0: not known */
	Datum		base;			/* pg_snapshot: all that is visible here was
								 * read */
	Unread		unread;			/* with respect to base; not the main cursor's */
	Batch	   *batch;			/* being walked; NULL: none */
	int64		last_id;		/* read in it up to here */
	bool		open;			/* its rows are being looked for, or found */
	bool		left_known;		/* a topic's: where the rest of the batch is */
	Unread		left;
	Datum		purged;			/* a topic's: pg_snapshot of what was given up
								 * before it was read; 0: nothing */
	BatchScan	scan;
} Cursor;

/* What the broker said of a binding and its queue. */
typedef struct BindingAnswer
{
	bool		declared;		/* the queue, but not the binding yet */
	bool		inspected;		/* the queue may be deleted */
	int			doubts;			/* answers in a row that did not tell */
	bool		deleted;		/* the queue, but not that of dead letters */
	bool		dead_declared;	/* the queue of dead letters */
	bool		dead_inspected; /* it may be deleted, or is gone */
	bool		depth_known;	/* of the queue of dead letters */
	bool		depth_changed;	/* to be recorded */
	uint32		depth;
	bool		bound;			/* of what is to be dropped: it was declared
								 * first, or refused */
	bool		confirmed;		/* on this connection */
	bool		rechecked;		/* it was before, so that is no news */
	bool		answered;		/* there is an answer to record */
	bool		gone;			/* the answer: it was deleted */
	bool		lasting;		/* the error is of the catalog's making */
	char	   *error;			/* the answer: refused; in the topic's context */
} BindingAnswer;

/* What the broker said of a topic. */
typedef struct Declaration
{
	bool		confirmed;		/* exchange, on this connection */
	bool		rechecked;		/* it was before, so that is no news */
	uint32		recheck;		/* of which topology_recheck() */
	bool		answered;
	bool		gone;
	char	   *error;			/* the exchange was refused; TopMemoryContext */
	int			code;			/* of the last refusal */
	bool		queued;			/* something has to be asked of the broker */
	bool		asking;			/* it is */
	bool		hangs;			/* something was not answered in time, the
								 * last time */
	bool		unrecorded;		/* there are answers to record */
	dlist_node	queue_node;
	dlist_node	unrecorded_node;
	uint32		doubted;		/* for connection_believes() */
	int			losses;			/* of the connection in a row, during the same
								 * request: */
	BrokerRequestKind lost_kind;
	char	   *lost_group;		/* TopMemoryContext; NULL: of the exchange */
	bool		lost_dead;		/* of the group's queue of dead letters */
	bool		lost_for_it;	/* it was refused for that, and is not to be
								 * asked again for a new connection's sake */
} Declaration;

/*
 * A message behind a topic's place that was accepted already, and is passed over when
 * it is read again.
 */
typedef struct AcceptedMessage
{
	int64		id;				/* hash key */
	uint64		passed;			/* in which reading; 0: not yet */
} AcceptedMessage;

/* recount.c's: from where on the rows of a topic are counted, and how far. */
typedef struct Recount
{
	Datum		base;			/* pg_snapshots; as in the topic's cursor: */
	Datum		target;			/* of its batch; 0: none */
	int64		last_id;
	Datum		upto;			/* all that is visible here; what is not is
								 * counted as it is found */
} Recount;

typedef enum FlowState
{
	FLOW_ATTACHED,
	FLOW_LEAVING,
	FLOW_DETACHED,
	FLOW_PROBING,
	FLOW_CATCHING_UP,
	FLOW_JOINING,
} FlowState;

/* Is the topic read by the main cursor? */
#define flow_rides(flow) ((flow)->state == FLOW_ATTACHED || (flow)->state == FLOW_JOINING)

/* sender.c's lists of topics that may publish */
typedef enum FlowList
{
	IN_NONE,
	IN_RING,					/* it has a turn next */
	IN_LINE,					/* waits for a channel */
	IN_ILL_LINE,				/* the same, and its last turn was in vain, or
								 * it is stalled */
} FlowList;

#define flow_in_line(list) ((list) == IN_LINE || (list) == IN_ILL_LINE)

typedef struct Flow
{
	FlowState	state;

	/* its messages in memory */
	Window		window;
	dlist_head	runs;			/* not recorded, in order */
	Run		   *filling;		/* of the chunk that is being read */
	uint64		batch_number;	/* the main cursor's batch that has, so far, */
	int64		batch_rows;		/* so many rows of it */
	size_t		bytes;			/* of messages in them that are not done */

	/* without the main cursor */
	dlist_node	node;			/* in the list of those not ATTACHED */
	Cursor		cursor;
	MonoTime	turn_since;		/* its cursor is open since then */
	bool		held;			/* fanout.held may have messages of it */
	int64		held_after;		/* they were read up to here */
	bool		moving;			/* what it has not sent goes to fanout.held */
	bool		held_read;		/* all of them were, and are not recorded yet */
	struct HTAB *accepted;		/* AcceptedMessages behind its place */
	uint64		readings;		/* how often it has read by itself */
	int			npurges;		/* calls of fanout.purge() that it knows of */
	char	  **purged;			/* message ids that were given up by them */
	int			npurged;
	bool		unrecorded;		/* where it is, or how far it came */
	MonoTime	record_at;		/* no sooner: held rows were locked */
	uint64		join_number;	/* of the main cursor when it joined, or let
								 * others pass */
	uint64		join_chunk;		/* the last one that was read then */
	uint64		drop_number;	/* what is to be dropped waits until it has
								 * sent as much; 0: nothing does */
	uint32		drop_load;		/* which topic_load() had found that */

	/* what waits of it in the outbox, for sessions to see */
	int64		backlog;		/* messages */
	bool		uncounted;		/* that is not known, until it is counted anew */
	Recount    *recount;		/* which is being done; NULL: it is not */
	TimestampTz oldest;			/* about when the oldest one was written; 0:
								 * not known */
	struct BacklogEntry *entry; /* where sessions see it; NULL: nowhere */
	bool		waits;			/* DETACHED, and counted: there is any */

	/* refusals */
	bool		stalled;
	bool		stall_changed;	/* to be recorded */
	bool		alert;			/* the retry limit was reached just now */
	bool		redeclared;		/* for the attempt that is under way */
	bool		give_up;		/* the next message, at its limit of attempts */
	int			attempts;
	int			idle_attempts;	/* of these, while no message waited */
	int			code;			/* the broker's, 0: none */
	TimestampTz stalled_at;
	MonoTime	retry_at;		/* no sooner */
	TimestampTz retry_stored;	/* the same in fanout.stall, as it was written
								 * or read last */
	char	   *reason;			/* TopMemoryContext */
	char	   *returned;		/* what the last return said; TopMemoryContext */
	bool		serial;			/* it was refused since it joined */
	uint32		doubted;		/* for connection_believes() */

	/* sender.c's */
	int			channel;		/* 0: none */
	bool		channel_open;
	int			channel_topics; /* that have had it, with this one */
	MonoTime	channel_since;	/* asked for, or used last */
	MonoTime	channel_at;		/* has it since then */
	MonoTime	confirmed_at;	/* the last confirm came */
	MonoTime	unconfirmed_since;	/* the oldest message was published first,
									 * if a turn ended without a confirm
									 * since; 0: none did */
	bool		in_vain;		/* it was ill when it lost its channel, and
								 * nothing was confirmed since */
	bool		yields;			/* others wait for it: publishes nothing more */
	bool		ready;			/* it may publish */
	FlowList	list;
	dlist_node	ready_node;		/* in that */
	int			isolate;		/* messages to be sent one at a time */
	int			losses;			/* of the connection in a row, weighed, while
								 * any of these was in flight: */
	int			doubtful;		/* so many messages, in flight at the first
								 * loss and not settled since */
	bool		progressed;		/* some of them were settled since the last
								 * one */
	MonoTime	lost_at;		/* the first of these losses */
	int			trials;			/* so many of them while it was on trial */
	int			blamed;			/* so many of these while nothing else may
								 * have been the reason */
	MonoTime	refill_at;		/* at the latest; 0: the window was not full */
} Flow;

/*
 * Was the topic's last turn in vain, or its last attempt?  Such topics have few channels, of
 * sender.c's and of topology.c's.
 */
#define flow_is_ill(flow) ((flow)->unconfirmed_since != 0 || (flow)->in_vain || (flow)->stalled)

/* A binding: what the catalog says, and what the broker said of it. */
typedef struct Binding
{
	char	   *consumer_group; /* server encoding */
	char	   *queue;			/* UTF-8; NULL if it cannot be converted */
	char	   *dead_queue;		/* UTF-8; NULL: no queue of dead letters */
	BrokerField *arguments;		/* NULL if they cannot be converted */
	int			narguments;
	char	   *signature;		/* equal if the declaration is equal */
	bool		classic;
	bool		stream;
	bool		refuses;		/* its queue may refuse by design */
	bool		undeclared;		/* the broker has not confirmed it yet */
	bool		dropping;
	uint32		drop_load;		/* which topic_load() found it so */
	bool		if_unused;
	bool		if_empty;
	BindingAnswer answer;		/* topology.c's */
} Binding;

/*
 * A topic.  What the catalog says comes anew with each topic_load(); the rest is
 * carried over.
 */
typedef struct Topic
{
	int32		topic_id;		/* hash key */
	uint32		load;			/* of which topic_load() */
	bool		known;			/* it is in the catalog; false: messages of it
								 * are left of one that was dropped */
	MemoryContext context;		/* holds the texts and bindings */
	char	   *name;			/* server encoding */
	char	   *exchange;		/* UTF-8; NULL if it cannot be converted */
	const char *content_type;
	bool		dead_letters;	/* on_exhausted = 'dead_letter' */
	bool		paused;
	bool		dropping;
	uint32		drop_load;		/* which topic_load() found it so, or not */
	Binding    *bindings;
	int			nbindings;

	Declaration declaration;	/* topology.c's */
	Flow		flow;			/* flow.c's */
	int64		sent;			/* not counted in fanout.topic_stat yet */
} Topic;

#define topic_of(flow_) ((Topic *) ((char *) (flow_) - offsetof(Topic, flow)))

#endif							/* PGF_STATE_H */
