/*-------------------------------------------------------------------------
 *
 * cache.h
 *		What a capture trigger needs to know of its table and topic, cached.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_CACHE_H
#define PGF_CACHE_H

#include "postgres.h"

#include "commands/trigger.h"
#include "utils/jsonb.h"
#include "utils/rel.h"

#include "capture/rowjson.h"

typedef enum TopicFormat
{
	FORMAT_DEBEZIUM,
	FORMAT_ROW,
	FORMAT_CLOUDEVENTS,
} TopicFormat;

typedef enum CaptureOp
{
	OP_INSERT,
	OP_UPDATE,
	OP_DELETE,
	OP_TRUNCATE,
	OP_READ,					/* no change: a row that was there, see
								 * history/ */
} CaptureOp;

#define CAPTURE_OPS (OP_READ + 1)

/* One topic as capture and publish() see it. */
typedef struct TopicInfo
{
	int32		topic_id;
	TopicFormat format;
} TopicInfo;

/*
 * One capture trigger on one table (or partition).  It and all that it points
 * to stay as they are while anybody uses it; see cache_of_trigger().
 */
typedef struct CaptureInfo
{
	MemoryContext context;		/* holds it all */
	bool		valid;			/* still what the catalogs say */
	bool		cached;			/* else its last user frees it */
	int			uses;			/* calls of triggers that have it */
	Oid			relid;			/* the table it fires on */
	Oid			entity;			/* the table captured: itself, or the
								 * partitioned table above it */
	TopicInfo	topic;
	bool		old_row;
	int			sent_as;		/* CaptureOp of the messages of updates,
								 * insert or delete; -1: the event's own */
	bool		counted;		/* its events are, when they are queued; see
								 * nesting.c */
	RowJson    *row;			/* the captured columns */
	int			nkeys;			/* 0: no key */
	AttrNumber *keys;
	RowJson    *key;			/* the key's columns */
	Oid			key_index;		/* by which the key is unique only in the end;
								 * InvalidOid: none, see taken.c */
	char	   *filter;			/* with key_index: which rows are sent, an
								 * expression; NULL: all */
	char	   *schema;			/* of the table captured */
	char	   *table;
	char	   *source;			/* constant part of Debezium's "source" */
	char	   *uri;			/* CloudEvents' source */
	char	   *key_columns;	/* names of the key's columns, a JSON array */
	char	   *type[CAPTURE_OPS];	/* AMQP type */
	Jsonb	   *headers[CAPTURE_OPS];
} CaptureInfo;

/*
 * Cached information on the trigger that fires.  It stays as it is until the
 * current memory context is reset, whatever runs meanwhile: a type's output
 * function may write to the same table, change schemas, fail and be caught.
 * Raises an error (42704) if the topic does not exist.
 */
extern CaptureInfo *cache_of_trigger(TriggerData *trigdata);

/* The topic of that name; raises an error (42704) if it does not exist. */
extern TopicInfo cache_topic(const char *topic);

/* The headers of a captured change; NULL: it does not have that one. */
typedef struct ChangeHeaders
{
	const char *op;
	const char *schema;
	const char *table;
	const char *format;
	const char *old_key;		/* only if the key changed */
	const char *key_columns;	/* the same: their names, a JSON array */
	const char *via;
	bool		taken;			/* a message follows of the row that has the
								 * key which this one's row has left */
} ChangeHeaders;

extern Jsonb *cache_headers(const ChangeHeaders *headers);

/*
 * Appends a slash and a name, in UTF-8, with all but RFC 3986's unreserved
 * characters escaped.
 */
extern void cache_append_segment(StringInfo out, const char *name);

extern const char *const capture_op_code[CAPTURE_OPS];	/* c u d t r */
extern const char *const topic_format_name[];	/* by TopicFormat */

/* The option's value among the arguments of a capture trigger; NULL: not given. */
extern const char *cache_option(char **args, int nargs, const char *name);

/*
 * Tells whether a part of a trigger's condition is the call of
 * fanout.count_change().
 */
extern bool cache_is_count(Node *condition);

/* Arguments of a trigger as C strings, in the current context. */
extern char **cache_trigger_arguments(Oid trigger, int *nargs, Oid *relid, Oid *parent, char **name);

extern void cache_invalidate_topics(void);

#endif							/* PGF_CACHE_H */
