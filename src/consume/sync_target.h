/*-------------------------------------------------------------------------
 *
 * sync_target.h
 *		The table that a subscription of sync_table() writes: what it is, what
 *		messages can set in it, and the statements that write it.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_SYNC_TARGET_H
#define PGF_SYNC_TARGET_H

#include "postgres.h"

#include "executor/spi.h"
#include "nodes/bitmapset.h"

#include "capture/rowjson.h"
#include "consume/jsonscan.h"
#include "consume/readjson.h"
#include "consume/sync_rows.h"
#include "server/compat.h"

/* Statements are kept for as many sets of columns. */
#define MAX_STATEMENTS 16

typedef struct SyncColumn
{
	AttrNumber	attnum;
	char	   *remote;			/* its name in messages; NULL: it is in none */
	char	   *name;			/* in the table */
	char	   *local;			/* the same, quoted */
	Oid			type;			/* not a domain, but the base of one */
	bool		of_domain;		/* the table has it as a domain over type */
	JsonReader *reader;			/* of that type */
	bool		is_key;
	bool		inexact;		/* of the key: values that are equal may
								 * differ */
	bool		identity;		/* GENERATED ALWAYS: no UPDATE can set it */
	bool		seen;			/* a message has had it */
} SyncColumn;

/* The plans for rows that have one set of columns; NULL: not made yet. */
typedef struct SyncStatements
{
	Bitmapset  *columns;		/* indexes of SyncTarget.columns */
	SPIPlanPtr	update;
	SPIPlanPtr	insert;
	SPIPlanPtr	move;
} SyncStatements;

/* The members that the rows of the latest message had, in their order. */
typedef struct SyncShape
{
	MemoryContext context;
	int			count;
	JsonSlice  *names;			/* as they stand in the body */
	int		   *columns;		/* index of the column that each sets; -1:
								 * none */
	Bitmapset  *set;			/* all of these */
} SyncShape;

typedef struct SyncTarget
{
	MemoryContext context;
	int32		subscription_id;
	int32		version;
	Oid			relid;
	Oid			owner;
	bool		partitioned;
	bool		skips_updates;	/* a trigger may leave an UPDATE out */
	bool		skips_deletes;	/* or a DELETE */
	bool		untrusted;		/* its owner may not become the role of the
								 * session */
	char	   *schema;
	char	   *table;
	char	   *qualified;		/* both, quoted */
	SyncColumn *columns;		/* those that are not generated */
	int			ncolumns;
	int		   *keys;			/* indexes of columns, in the key's order */
	int			nkeys;
	int			text_settings;	/* on which the texts of columns depend */
	RowJson    *key_text;		/* of the key's columns */
	RowJson    *column_text;	/* of all columns */
	TupleDesc	desc;

	/* read anew for each batch */
	int64		floor;			/* sequence of the newest TRUNCATE */
	uint64		floor_xid;		/* its transaction at the source; 0: not known */
	char	   *source_schema;	/* of the one table that it is a copy of;
								 * NULL: */
	char	   *source_table;	/* not known yet */
	bool		refuses_unknown;
	Datum		sharers;		/* integer[]: subscriptions that write into it */
	bool		shared;			/* they are more than one */

	bool		queues_triggers;	/* what AFTER triggers have to do is left
									 * to the end of what runs */
	SyncShape	shape;
	SyncStatements statements[MAX_STATEMENTS];
	int			nstatements;
	SPIPlanPtr	delete_plan;
	SPIPlanPtr	exists_plan;
	SPIPlanPtr	occupied_plan;
	SPIPlanPtr	range_plan;
	char	   *range_sql;		/* of that */
} SyncTarget;

/* A row, or its key alone, in the target's types. */
typedef struct SyncValues
{
	Bitmapset  *columns;		/* those that are set */
	Datum	   *values;			/* by index of the column */
	bool	   *nulls;
	SyncHash	hash;			/* of the key */
} SyncValues;

/* sync_target.c */
extern SyncTarget *sync_target_load(Datum topic, Datum consumer_group);
extern void sync_target_check_name(const SyncTarget *target);
extern void sync_target_set_source(SyncTarget *target, const char *schema, const char *table);
extern void sync_target_set_floor(SyncTarget *target, int64 floor, uint64 xid);
extern void sync_target_set_shape(SyncTarget *target, const JsonSlice *row);
extern void sync_target_key_slices(const SyncTarget *target, const JsonSlice *row, JsonSlice *slices);
extern void sync_target_read_row(SyncTarget *target, const JsonSlice *row, SyncValues *values);
extern void sync_target_read_key(const SyncTarget *target, const JsonSlice *slices, SyncValues *values);
extern void sync_target_hash_key(const SyncTarget *target, const Datum *values, const bool *nulls, SyncHash *hash);
extern Bitmapset *sync_target_key_set(const SyncTarget *target);
pg_noreturn extern void sync_refuse(const char *what, const char *hint);

/* sync_write.c */
extern bool sync_write_exists(SyncTarget *target, const SyncValues *row);
extern bool sync_write_occupied(SyncTarget *target, const SyncValues *row, const SyncValues *old_key);
extern bool sync_write_update(SyncTarget *target, const SyncValues *row);
extern bool sync_write_put(SyncTarget *target, const SyncValues *row);
extern bool sync_write_insert(SyncTarget *target, const SyncValues *row);
extern bool sync_write_move(SyncTarget *target, const SyncValues *row, const SyncValues *old_key);
extern bool sync_write_delete(SyncTarget *target, const SyncValues *key);
extern Portal sync_write_open_range(SyncTarget *target, const int *keys, const SyncValues *after,
									const SyncValues *upto);
extern void sync_write_truncate(SyncTarget *target, int64 sequence, void (*between) (void));
extern void sync_write_check_constraints(const SyncTarget *target);
extern void sync_write_forget(SyncTarget *target);

#endif							/* PGF_SYNC_TARGET_H */
