/*-------------------------------------------------------------------------
 *
 * topology.h
 *		Declares on the broker what the catalog says.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_TOPOLOGY_H
#define PGF_TOPOLOGY_H

#include "postgres.h"

#include "datatype/timestamp.h"

#include "broker/broker.h"
#include "broker/connection.h"
#include "server/monotime.h"

/* The longest pause between attempts, unless pg_fanout.retry_interval is longer. */
#define MAX_RETRY_MS 300000

/*
 * RabbitMQ 4 drops a message of a quorum queue after 20 deliveries unless
 * told otherwise; 3.x has no limit but takes no "-1" either.  A number that is
 * never reached means the same to both, so that the declaration stays
 * equivalent when the broker is upgraded.
 */
#define NO_DELIVERY_LIMIT PG_INT32_MAX

/* A binding, and what the broker said of it. */
typedef struct Binding
{
	char	   *consumer_group; /* server encoding */
	char	   *queue;			/* UTF-8; NULL if it cannot be converted */
	BrokerField *arguments;
	int			narguments;
	char	   *signature;		/* equal if the declaration is equal */
	bool		classic;
	bool		stream;
	bool		dropping;
	bool		if_unused;
	bool		if_empty;
	bool		confirmed;		/* by the broker, on this connection */
	bool		rechecked;		/* it was before, so that is no news */
	bool		answered;		/* there is an answer to record */
	bool		gone;			/* the answer: it was deleted */
	char	   *error;			/* the answer: refused */
} Binding;

/*
 * A topic as the publisher knows it.  The first half is the catalog's and
 * comes anew with each topology_load(); the second is the publisher's and is
 * carried over.
 */
typedef struct Topic
{
	int32		topic_id;		/* hash key */
	uint32		load;			/* of which topology_load() */
	MemoryContext context;		/* holds the texts and bindings */
	char	   *name;			/* server encoding */
	char	   *exchange;		/* UTF-8; NULL if it cannot be converted */
	const char *content_type;
	bool		dead_letters;	/* on_exhausted = 'dead_letter' */
	bool		paused;
	bool		dropping;
	Binding    *bindings;
	int			nbindings;

	bool		confirmed;		/* exchange, on this connection */
	bool		rechecked;		/* it was before, so that is no news */
	uint32		recheck;		/* of which topology_recheck() */
	bool		answered;
	bool		gone;
	char	   *error;			/* the exchange was refused */
	bool		held;			/* fanout.held has messages of it */
	int			holding;		/* held in memory, not recorded yet */
	bool		stalled;
	bool		stall_changed;	/* to be recorded */
	bool		nacked;			/* since it was last tried */
	bool		alert;			/* the retry limit was reached just now */
	int			attempts;
	TimestampTz stalled_at;
	MonoTime	retry_at;		/* no sooner */
	char	   *reason;			/* TopMemoryContext */
	int64		sent;			/* not counted in fanout.topic_stat yet */
	uint32		doubted_messages;	/* for connection_believes(); of its
									 * messages, and of its declarations */
	uint32		doubted_topology;
	bool		restless;		/* linked by next */
	struct Topic *next;
} Topic;

/*
 * Reads topics, bindings, stalls and which topics have held messages, in the
 * current transaction.  What the broker has confirmed stays confirmed if the
 * declaration is the same.
 */
extern void topology_load(void);

extern Topic *topology_find(int32 topic_id);

/*
 * Looks again which topics have held messages: a purge that was rolled back
 * leaves some that nobody told of.
 */
extern void topology_find_held(void);

/* All topics, in no particular order; begin with *i = 0; NULL at the end. */
extern Topic *topology_next(int *i);

/*
 * The topics that there is something to do for, or that nothing can be done
 * for at the moment: those stalled, refused, with held messages, or with
 * something to record.  Begin with NULL.  Looking for them costs nothing for all
 * the others; what makes a topic one of them has to call topology_touch().
 */
extern Topic *topology_restless(Topic *last);
extern void topology_touch(Topic *topic);

/* Everything has to be declared again: another connection, or verify(). */
extern void topology_forget_confirmed(void);
extern void topology_forget_topic(Topic *topic);

/*
 * Makes topology_declare() declare some of the topics again, those that were
 * longest not looked at: a queue or a binding that somebody deleted comes back
 * even if nothing tells of it, as when a topic's other queues still take its
 * messages.
 */
extern void topology_recheck(int count);

/*
 * Declares what is not confirmed, and with drops deletes what is to be
 * dropped.  Refusals are remembered as errors of the topic or binding;
 * BROKER_LOST ends it.  So does a 403 that is not to be believed yet, with
 * BROKER_REFUSED; it is no answer, and the caller is to log in anew.
 */
extern BrokerResult topology_declare(Connection *conn, bool drops, BrokerError *error);
extern BrokerResult topology_declare_topic(Connection *conn, Topic *topic, bool drops,
										   BrokerError *error);

/* Is the topic stalled because it is not allowed what it needs (403)? */
extern bool topology_access_refused(const Topic *topic);

/*
 * Is there an answer or a stall that topology_record() or
 * topology_record_stalls() should write into the catalog?
 */
extern bool topology_unrecorded(void);

/*
 * Records the answers, in the current transaction; those whose rows are
 * locked by others stay to be recorded.
 */
extern void topology_record(void);

/* The first refusal that keeps a topic from flowing, or NULL. */
extern const char *topology_error(const Topic *topic);

/* Writes stalls that changed: fanout.stall, WARNING and NOTIFY for alerts. */
extern void topology_record_stalls(void);

#endif							/* PGF_TOPOLOGY_H */
