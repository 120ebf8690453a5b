/*-------------------------------------------------------------------------
 *
 * compare.c
 *		Compares rows of a copy with those that its source has sent for that.
 *
 * A message of a comparison has all rows of one range of keys, and the snapshot
 * under which, or after which, the source read them.  Ranges follow each other
 * without gaps, so rows of the copy that are in the range, but not in the message,
 * are too many.
 *
 * The message stands in the queue behind all changes that its snapshot saw: these
 * were committed, with lower ids, before the message was.  It may stand behind
 * others, too.  So all that was applied before is known, but for rows whose last
 * change the snapshot did not see; these are left out:
 *
 *		last applied change of the key		snapshot saw it		compared
 *											did not				left out
 *											none is known		compared
 *		newest TRUNCATE						did not				all is left out
 *		a TRUNCATE waits											all is left out, unless
 *															it is a repair
 *		messages of the key wait								left out
 *		the row is another subscription's						left out
 *		the copy alone has it, no message was about
 *		it, and the copy is captured itself						left out
 *
 * The last are rows that were made here, and are on their way to others: a repair
 * that deletes them would delete them everywhere.
 *
 * Reads from fanout.waiting which messages wait.  A batch writes there only when it ends,
 * so a message of a comparison is the first of its batch (at_hand_take()): then all that
 * stood before it is applied, or in that table.
 *
 * Values are compared as the copy has them: those of the message are read as any
 * change's would be, and then both must have the same text.  So columns that are
 * mapped, ignored, or of another type need nothing of their own.
 *
 * A repair writes what it finds.  The source has locked the rows, so the message's
 * sequence stands among those of their changes where the lock does, and is
 * remembered with the row.  A row too many is deleted, and its sequence stays:
 * a change that the snapshot did not see may be on its way with a lower one than
 * the message has.
 *
 * A row that the table refuses keeps back no other row, because it may need one that comes
 * later in the message, or one that another message has, of this table or another; and
 * that one may need a row of this message:
 *
 *		at once		no savepoints; a row is refused ---> all is undone: row by row
 *		row by row	a savepoint for each, again for those that were refused as long as
 *					others were mended; what is left then is tried again with the
 *					message, and what was mended is committed
 *
 * A row that this very message has mended is known by its sequence.
 *
 * It must never write the table unless it is to repair, and never list a row that
 * was only changed meanwhile.
 *
 * Memory: the rows of a message, and PIECE rows of the copy.  Differences: the
 * first MAX_LISTED of a run are listed, all are counted.
 *
 * Locks: see sync_target.c; those of the statements that repair.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/hsearch.h"
#include "utils/json.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/xid8.h"

#include "consume/compare.h"
#include "consume/delivery.h"
#include "consume/failure.h"
#include "consume/inbox.h"
#include "server/query.h"

/* Rows of the copy that are fetched at once. */
#define PIECE 1000

/* Differences of a run that are listed. */
#define MAX_LISTED 10000

/* How often rows that were refused are tried with one message. */
#define MAX_PASSES 10

/* A row that the source has. */
typedef struct SourceRow
{
	SyncHash	hash;			/* first, as of every hash table */
	SyncValues	values;
	bool		left_out;
	bool		found;			/* the copy has it */
	Bitmapset  *differs;		/* columns that have another value there */
} SourceRow;

/* Rows, by what was found. */
typedef struct Found
{
	int64		compared;
	int64		left_out;
	int64		missing;
	int64		different;
	int64		extra;
	int64		mended;
} Found;

typedef struct Comparison
{
	SyncTarget *target;
	const CompareMessage *message;
	void		(*between) (void);
	MemoryContext caller;		/* what outlives the comparison is there */
	MemoryContext context;

	/* of the message */
	bool		repair;
	Datum		snapshot;		/* pg_snapshot */
	int		   *keys;			/* indexes of columns, in the order of the
								 * source's index */
	int		   *header_keys;	/* the same, in that of messages' headers */
	bool		has_after;
	bool		has_upto;
	SyncValues	after;
	SyncValues	upto;
	HTAB	   *rows;			/* of SourceRow */
	SourceRow **ordered;		/* the same, in the order of the message */
	int			nrows;
	int			room;
	bool		waiting;		/* messages of the subscription wait */
	bool		truncate_waits; /* a TRUNCATE is one of them */
	bool		captured;		/* the copy is; rows that are made here are
								 * its own */

	/* what was found */
	int64		listed;			/* of the run; -1: not counted yet */
	Found		mended;			/* rows that were mended, in all passes */
	Found		others;			/* the others, in this pass */
	int64		ranges;
	int64		ranges_sent;	/* -1: this is not the last message */
	char	   *error;			/* NULL: none */
	char	   *failure;		/* why the source has ended it, or NULL */

	/* of a repair */
	bool		row_by_row;
	int64		refused;		/* rows, in this pass */
	ErrorData  *refusal;		/* of the latest of them, or NULL */
} Comparison;

/* ---- the message ---- */

pg_noreturn static void
malformed(void)
{
	sync_refuse("it is no part of a comparison", "Only messages of pg_fanout can be applied to a table.");
}

/* Finds a member of an object; a null if there is none. */
static JsonSlice
member(const JsonSlice *object, const char *quoted_name)
{
	JsonSlice	found = {.kind = JSON_IS_NULL,.text = "null",.len = 4};
	JsonSlice	name;
	JsonSlice	value;
	JsonCursor	cursor;
	JsonStep	step;

	jsonscan_enter(object, &cursor);
	while ((step = jsonscan_member(&cursor, &name, &value)) == JSON_FOUND)
	{
		if (name.len == strlen(quoted_name) && memcmp(name.text, quoted_name, name.len) == 0)
			found = value;
	}
	if (step == JSON_MALFORMED)
		malformed();
	return found;
}

/* Takes an array of as many elements as the key has columns apart. */
static JsonSlice *
key_elements(const SyncTarget *target, const JsonSlice *array)
{
	JsonSlice  *elements = palloc((target->nkeys + 1) * sizeof(JsonSlice));
	JsonSlice	element;
	JsonCursor	cursor;
	int			n = 0;

	if (array->kind != JSON_IS_ARRAY)
		malformed();
	jsonscan_enter(array, &cursor);
	for (; jsonscan_element(&cursor, &element) == JSON_FOUND; n++)
	{
		if (n < target->nkeys)
			elements[n] = element;
	}
	return n == target->nkeys ? elements : NULL;
}

/* The place of a column in the copy's key; -1: it is none of it. */
static int
place_in_key(const SyncTarget *target, const char *remote)
{
	for (int i = 0; i < target->nkeys; i++)
	{
		const SyncColumn *column = &target->columns[target->keys[i]];

		if (column->remote != NULL && strcmp(column->remote, remote) == 0)
			return i;
	}
	return -1;
}

/* Reads a key that bounds the range; names: in the same order.  False: none does. */
static bool
read_bound(const SyncTarget *target, const JsonSlice *names, JsonSlice array, SyncValues *key)
{
	JsonSlice  *slices;
	JsonSlice  *ordered = palloc((target->nkeys + 1) * sizeof(JsonSlice));

	if (array.kind == JSON_IS_NULL)
		return false;
	slices = key_elements(target, &array);
	if (slices == NULL)
		malformed();
	for (int i = 0; i < target->nkeys; i++)
		ordered[place_in_key(target, readjson_string(&names[i]))] = slices[i];
	sync_target_read_key(target, ordered, key);
	return true;
}

/* Returns texts that tell how the copy's key sorts, one for each column, in the source's order. */
static Datum *
key_order(const Comparison *c)
{
	static CachedQuery query = {"select fanout.key_order($1, $2)"};
	Oid			types[] = {OIDOID, INT2ARRAYOID};
	Datum	   *attnums = palloc((c->target->nkeys + 1) * sizeof(Datum));
	Datum		values[2];
	Datum	   *order;
	int			n;
	bool		isnull;

	for (int i = 0; i < c->target->nkeys; i++)
		attnums[i] = Int16GetDatum(c->target->columns[c->keys[i]].attnum);
	values[0] = ObjectIdGetDatum(c->target->relid);
	values[1] = PointerGetDatum(construct_array(attnums, c->target->nkeys, INT2OID, 2, true, TYPALIGN_SHORT));
	owner_execute(&query, 2, types, values, NULL);
	deconstruct_array(DatumGetArrayTypePCopy(query_value(0, 1, &isnull)), TEXTOID, -1, false, TYPALIGN_INT,
					  &order, NULL, &n);
	if (n != c->target->nkeys)
		elog(ERROR, "the key of table %s has %d columns, not %d", c->target->qualified, n, c->target->nkeys);
	return order;
}

/* Finds the columns that names are of, as indexes; NULL: they are not those of the key. */
static int *
find_columns(const SyncTarget *target, const JsonSlice *names)
{
	int		   *found = palloc((target->nkeys + 1) * sizeof(int));

	if (names == NULL)
		return NULL;
	for (int i = 0; i < target->nkeys; i++)
	{
		int			place = place_in_key(target, readjson_string(&names[i]));

		if (place < 0)
			return NULL;
		found[i] = target->keys[place];
	}
	return found;
}

/* Do both ends sort the key alike?  If not, says why in the comparison. */
static bool
sorts_alike(Comparison *c, const JsonSlice *order)
{
	Datum	   *own_order = key_order(c);

	for (int i = 0; i < c->target->nkeys; i++)
	{
		char	   *own = TextDatumGetCString(own_order[i]);
		char	   *remote = readjson_string(&order[i]);

		if (strcmp(own, remote) == 0)
			continue;
		c->error = psprintf("column \"%s\" of the key sorts in another way than at the source: as %s, and there as %s",
							c->target->columns[c->keys[i]].name, own, remote);
		return false;
	}
	return true;
}

/*
 * Finds the columns of the source's key, and whether both ends sort it alike.
 * Returns their names; or NULL, and says why in the comparison.
 */
static JsonSlice *
read_key(Comparison *c, const JsonSlice *body)
{
	JsonSlice	array = member(body, "\"key\"");
	JsonSlice	order_array = member(body, "\"order\"");
	JsonSlice	header_array = member(body, "\"key_columns\"");
	JsonSlice  *names = key_elements(c->target, &array);
	JsonSlice  *order = key_elements(c->target, &order_array);

	if (names != NULL && order == NULL)
		malformed();
	c->keys = find_columns(c->target, names);
	c->header_keys = find_columns(c->target, key_elements(c->target, &header_array));
	if (c->keys == NULL || c->header_keys == NULL)
	{
		c->error = "the key of the copy has other columns than that of the source's capture";
		return NULL;
	}
	return sorts_alike(c, order) ? names : NULL;
}

static void
add_in_order(Comparison *c, SourceRow *row)
{
	if (c->nrows == c->room)
	{
		c->room = Max(256, 2 * c->room);
		c->ordered = c->ordered ? repalloc(c->ordered, c->room * sizeof(SourceRow *)) :
			palloc(c->room * sizeof(SourceRow *));
	}
	c->ordered[c->nrows++] = row;
}

/* Reads the rows, as any message's would be. */
static void
read_rows(Comparison *c, const JsonSlice *rows)
{
	HASHCTL		control = {.keysize = sizeof(SyncHash),.entrysize = sizeof(SourceRow),.hcxt = c->context};
	JsonCursor	cursor;
	JsonSlice	row;
	JsonStep	step;

	if (rows->kind != JSON_IS_ARRAY)
		malformed();
	c->rows = hash_create("pg_fanout compared rows", 256, &control, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	jsonscan_enter(rows, &cursor);
	while ((step = jsonscan_element(&cursor, &row)) == JSON_FOUND)
	{
		SyncValues	values;
		SourceRow  *entry;
		bool		found;

		if (row.kind != JSON_IS_OBJECT)
			malformed();
		sync_target_set_shape(c->target, &row);
		sync_target_read_row(c->target, &row, &values);
		entry = hash_search(c->rows, &values.hash, HASH_ENTER, &found);
		entry->values = values;
		if (!found)
			add_in_order(c, entry);
	}
	if (step == JSON_MALFORMED)
		malformed();
}

/* Reads the whole message.  False: its range cannot be compared, c->error says why. */
static bool
read_range(Comparison *c, const JsonSlice *body)
{
	JsonSlice	rows = member(body, "\"rows\"");
	JsonSlice	snapshot = member(body, "\"snapshot\"");
	JsonSlice  *names = read_key(c, body);

	if (names == NULL)
		return false;
	if (snapshot.kind != JSON_IS_STRING)
		malformed();
	c->snapshot = DirectFunctionCall1(pg_snapshot_in, CStringGetDatum(readjson_string(&snapshot)));
	c->has_after = read_bound(c->target, names, member(body, "\"after\""), &c->after);
	c->has_upto = read_bound(c->target, names, member(body, "\"upto\""), &c->upto);
	read_rows(c, &rows);
	return true;
}

/* ---- what is left out ---- */

static bool
is_seen(const Comparison *c, uint64 xid)
{
	FullTransactionId fxid = FullTransactionIdFromU64(xid);

	return xid == 0 ||
		DatumGetBool(DirectFunctionCall2(pg_visible_in_snapshot, FullTransactionIdGetDatum(fxid), c->snapshot));
}

/* Has this very message written the row? */
static bool
is_mended(const Comparison *c, const SyncRow *known)
{
	return known->sequence == c->message->sequence;
}

/* Does a key's newest change say that the row cannot be compared? */
static bool
is_changed(const Comparison *c, const SyncRow *known)
{
	return known->foreign || known->sequence >= c->message->sequence || !is_seen(c, known->xid);
}

static void
look_for_waiting(Comparison *c)
{
	static CachedQuery query = {
		"select exists (select from fanout.waiting where subscription_id = $1),"
		" exists (select from fanout.waiting where subscription_id = $1 and barrier)"
	};
	Oid			types[] = {INT4OID};
	Datum		values[] = {Int32GetDatum(c->target->subscription_id)};
	bool		isnull;

	owner_execute(&query, 1, types, values, NULL);
	c->waiting = DatumGetBool(query_value(0, 1, &isnull));
	c->truncate_waits = DatumGetBool(query_value(0, 2, &isnull));
}

/* The place of a column in the copy's key. */
static int
key_place(const SyncTarget *target, int column)
{
	for (int i = 0; i < target->nkeys; i++)
	{
		if (target->keys[i] == column)
			return i;
	}
	elog(ERROR, "column %d is not one of the key's", column);
}

/* Looks whether a capture sends the copy's own changes, or those of a part of it. */
static void
look_for_capture(Comparison *c)
{
	static CachedQuery query = {
		"select exists (select from pg_catalog.pg_trigger"
		" where tgfoid = 'fanout.capture_trigger()'::pg_catalog.regprocedure"
		" and (tgrelid = $1 or tgrelid in (select relid from pg_catalog.pg_partition_tree($1))))"
	};
	Oid			types[] = {OIDOID};
	Datum		values[] = {ObjectIdGetDatum(c->target->relid)};
	bool		isnull;

	owner_execute(&query, 1, types, values, NULL);
	c->captured = DatumGetBool(query_value(0, 1, &isnull));
}

/* The key as messages have it in their header. */
static char *
header_key(const Comparison *c, const SyncValues *row)
{
	const SyncTarget *target = c->target;
	StringInfoData text;

	if (target->nkeys == 1)
		return rowjson_text(target->key_text, 0, row->values[target->keys[0]], row->nulls[target->keys[0]]);
	initStringInfo(&text);
	for (int i = 0; i < target->nkeys; i++)
	{
		int			column = c->header_keys[i];

		appendStringInfoChar(&text, i == 0 ? '[' : ',');
		rowjson_append_value(&text, target->key_text, key_place(target, column), row->values[column], row->nulls[column]);
	}
	appendStringInfoChar(&text, ']');
	return text.data;
}

/*
 * Do messages of the row wait to be tried again?  By the numbers of their keys, which
 * have an index.
 */
static bool
has_waiting(const Comparison *c, const SyncValues *row)
{
	static CachedQuery query = {
		"select exists (select from fanout.waiting where subscription_id = $1 and key1 = $2)"
		" or exists (select from fanout.waiting where subscription_id = $1 and key2 = $2)"
	};
	Oid			types[] = {INT4OID, INT8OID};
	Datum		values[] = {Int32GetDatum(c->target->subscription_id), (Datum) 0};
	char	   *key;
	bool		isnull;

	if (!c->waiting)
		return false;
	key = header_key(c, row);
	if (key == NULL)
		return false;
	values[1] = Int64GetDatum((int64) delivery_key_hash(key));
	owner_execute(&query, 2, types, values, NULL);
	return DatumGetBool(query_value(0, 1, &isnull));
}

/* Loads what is known of the rows of the message. */
static void
load_known(Comparison *c)
{
	SyncHash   *hashes = palloc((c->nrows + 1) * sizeof(SyncHash));

	for (int i = 0; i < c->nrows; i++)
		hashes[i] = c->ordered[i]->hash;
	sync_rows_load(c->target->subscription_id, c->target->sharers, hashes, c->nrows);
}

static void
leave_out_changed(Comparison *c)
{
	load_known(c);
	for (int i = 0; i < c->nrows; i++)
	{
		SourceRow  *row = c->ordered[i];

		row->left_out = is_changed(c, sync_rows_find(&row->hash));
		row->found = false;
		row->differs = NULL;
	}
}

/* ---- what is found ---- */

/* {"id":7}, by the copy's names. */
static char *
key_object(const SyncTarget *target, const SyncValues *row)
{
	StringInfoData text;

	initStringInfo(&text);
	for (int i = 0; i < target->nkeys; i++)
	{
		int			column = target->keys[i];

		appendStringInfoChar(&text, i == 0 ? '{' : ',');
		escape_json(&text, target->columns[column].name);
		appendStringInfoChar(&text, ':');
		rowjson_append_value(&text, target->key_text, i, row->values[column], row->nulls[column]);
	}
	appendStringInfoChar(&text, '}');
	return text.data;
}

static int64
count_listed(const Comparison *c)
{
	static CachedQuery query = {
		"select count(*) from fanout.sync_difference where subscription_id = $1 and run = $2"
	};
	Oid			types[] = {INT4OID, INT8OID};
	Datum		values[] = {Int32GetDatum(c->target->subscription_id), Int64GetDatum(c->message->run)};
	bool		isnull;

	owner_execute(&query, 2, types, values, NULL);
	return DatumGetInt64(query_value(0, 1, &isnull));
}

/*
 * Lists a difference; columns: NULL, or those that have another value.  One that was
 * found in an earlier pass, or with the message before, is not listed again.
 */
static void
record_difference(Comparison *c, const char *kind, const SyncValues *row, Bitmapset *columns, bool mended)
{
	static CachedQuery query = {
		"insert into fanout.sync_difference (subscription_id, run, kind, key, columns, mended)"
		" select $1, $2, $3, $4::text::jsonb, $5, $6"
		" where not ($7 and exists (select from fanout.sync_difference"
		" where subscription_id = $1 and run = $2 and kind = $3 and key = $4::text::jsonb and mended = $6))"
	};
	Oid			types[] = {INT4OID, INT8OID, TEXTOID, TEXTOID, TEXTARRAYOID, BOOLOID, BOOLOID};
	Datum	   *names = palloc((c->target->ncolumns + 1) * sizeof(Datum));
	Datum		values[7];
	int			n = 0;

	if (c->listed < 0)
		c->listed = count_listed(c);
	if (c->listed++ >= MAX_LISTED)
		return;
	for (int i = -1; (i = bms_next_member(columns, i)) >= 0;)
		names[n++] = CStringGetTextDatum(c->target->columns[i].name);
	values[0] = Int32GetDatum(c->target->subscription_id);
	values[1] = Int64GetDatum(c->message->run);
	values[2] = CStringGetTextDatum(kind);
	values[3] = CStringGetTextDatum(key_object(c->target, row));
	values[4] = PointerGetDatum(construct_array(names, n, TEXTOID, -1, false, TYPALIGN_INT));
	values[5] = BoolGetDatum(mended);
	values[6] = BoolGetDatum(c->row_by_row && !mended);
	owner_execute(&query, 7, types, values, NULL);
}

/* Adds what was found to what is known of the run. */
static void
record(const Comparison *c)
{
	static CachedQuery query = {
		"select fanout.record_comparison($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)"
	};
	Oid			types[] = {
		INT4OID, INT8OID, BOOLOID, INT8OID, INT8OID, INT8OID, INT8OID, INT8OID, INT8OID, INT8OID, INT8OID, TEXTOID,
		TEXTOID
	};
	char		nulls[14] = "             ";
	Datum		values[] = {
		Int32GetDatum(c->target->subscription_id), Int64GetDatum(c->message->run), BoolGetDatum(c->repair),
		Int64GetDatum(c->ranges), Int64GetDatum(c->ranges_sent),
		Int64GetDatum(c->mended.compared + c->others.compared), Int64GetDatum(c->others.left_out),
		Int64GetDatum(c->mended.missing + c->others.missing),
		Int64GetDatum(c->mended.different + c->others.different),
		Int64GetDatum(c->mended.extra + c->others.extra), Int64GetDatum(c->mended.mended), (Datum) 0, (Datum) 0
	};

	values[11] = query_text_param(c->error, &nulls[11]);
	values[12] = query_text_param(c->failure, &nulls[12]);
	if (c->ranges_sent < 0)
		nulls[4] = 'n';
	owner_execute(&query, 13, types, values, nulls);
}

/* ---- writing ---- */

/* Keeps the error that was caught, or raises it again if no row is the reason. */
static void
take_refusal(Comparison *c, ErrorData *error)
{
	if (!failure_is_own(error->sqlerrcode))
		ReThrowError(error);
	if (c->refusal != NULL)
		FreeErrorData(c->refusal);
	c->refusal = error;
	c->refused++;
}

/*
 * Does a part of the repair with a savepoint.  False: the table refused something.  The
 * savepoint is gone before an error is raised again: whoever catches that rolls back what
 * it has begun itself, and nothing else.
 */
static bool
in_savepoint(Comparison *c, bool (*part) (Comparison *c, const SyncValues *row), const SyncValues *row, bool *result)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	ResourceOwner oldowner = CurrentResourceOwner;
	ErrorData  *volatile error = NULL;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(oldcontext);
	PG_TRY();
	{
		*result = part(c, row);
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(c->caller);
		error = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
	}
	PG_END_TRY();
	MemoryContextSwitchTo(oldcontext);
	CurrentResourceOwner = oldowner;
	if (error != NULL)
		take_refusal(c, error);
	return error == NULL;
}

/* Checks deferred constraints before the row's savepoint ends, so that they refuse the row. */
static bool
put_row(Comparison *c, const SyncValues *row)
{
	bool		written = sync_write_put(c->target, row);

	if (c->row_by_row)
		sync_write_check_constraints(c->target);
	return written;
}

static bool
delete_row(Comparison *c, const SyncValues *row)
{
	bool		written = sync_write_delete(c->target, row);

	if (c->row_by_row)
		sync_write_check_constraints(c->target);
	return written;
}

/*
 * Writes a row that differs, if that is wanted.  Returns false if it was refused.
 * mended: false if a trigger left it out, or it is not wanted.
 */
static bool
mend(Comparison *c, bool (*write) (Comparison *c, const SyncValues *row), const SyncValues *row, bool *mended)
{
	*mended = false;
	if (!c->repair)
		return true;
	if (c->row_by_row)
		return in_savepoint(c, write, row, mended);
	*mended = write(c, row);
	return true;
}

/* Counts a row that differs; returns where its kind is to be counted. */
static Found *
count_difference(Comparison *c, bool mended)
{
	Found	   *found = mended ? &c->mended : &c->others;

	found->compared++;
	found->mended += mended ? 1 : 0;
	return found;
}

/* ---- rows of the copy ---- */

/* Tells whether a column has another value than the source says. */
static bool
value_differs(const SyncTarget *target, int column, const SyncValues *a, const SyncValues *b)
{
	Form_pg_attribute attr = TupleDescAttr(target->desc, target->columns[column].attnum - 1);
	StringInfoData texts[2];

	if (a->nulls[column] || b->nulls[column])
		return a->nulls[column] != b->nulls[column];
	if (datum_image_eq(a->values[column], b->values[column], attr->attbyval, attr->attlen))
		return false;
	for (int i = 0; i < 2; i++)
	{
		const SyncValues *values = (i == 0) ? a : b;

		initStringInfo(&texts[i]);
		rowjson_append_value(&texts[i], target->column_text, column, values->values[column], false);
	}
	return strcmp(texts[0].data, texts[1].data) != 0;
}

static void
compare_row(Comparison *c, SourceRow *row, const SyncValues *own)
{
	MemoryContext oldcontext;

	row->found = true;
	if (row->left_out)
		return;
	for (int i = -1; (i = bms_next_member(row->values.columns, i)) >= 0;)
	{
		if (!value_differs(c->target, i, &row->values, own))
			continue;
		oldcontext = MemoryContextSwitchTo(c->context);
		row->differs = bms_add_member(row->differs, i);
		MemoryContextSwitchTo(oldcontext);
	}
}

/* Was the row made here, in a table whose changes go to others? */
static bool
is_own(const Comparison *c, const SyncRow *known)
{
	return c->captured && known->sequence == 0;
}

/* The row's last sequence stays: see the head of this file. */
static void
settle_extra(Comparison *c, SyncRow *known, const SyncValues *row)
{
	bool		mended;

	if (!mend(c, delete_row, row, &mended))
		return;
	if (mended && known->sequence > 0)
		sync_rows_set(known, known->sequence, known->xid, false);
	count_difference(c, mended)->extra++;
	record_difference(c, "extra", row, NULL, mended);
}

/* Looks at rows that the source does not have. */
static void
check_extra(Comparison *c, const SyncValues *rows, const SyncHash *hashes, int n)
{
	sync_rows_load(c->target->subscription_id, c->target->sharers, hashes, n);
	for (int i = 0; i < n; i++)
	{
		SyncRow    *known = sync_rows_find(&hashes[i]);

		if (is_changed(c, known) || is_own(c, known) || has_waiting(c, &rows[i]))
			c->others.left_out++;
		else
			settle_extra(c, known, &rows[i]);
	}
	sync_rows_store(c->target->subscription_id);
}

/* The values of a row that was fetched; they are of the result. */
static void
take_row(const SyncTarget *target, HeapTuple tuple, TupleDesc desc, SyncValues *row)
{
	row->columns = NULL;
	row->values = palloc((target->ncolumns + 1) * sizeof(Datum));
	row->nulls = palloc((target->ncolumns + 1) * sizeof(bool));
	heap_deform_tuple(tuple, desc, row->values, row->nulls);
	sync_target_hash_key(target, row->values, row->nulls, &row->hash);
}

static void
compare_piece(Comparison *c, SPITupleTable * table, uint64 count)
{
	SyncValues *extra = palloc((count + 1) * sizeof(SyncValues));
	SyncHash   *hashes = palloc((count + 1) * sizeof(SyncHash));
	int			n = 0;

	for (uint64 i = 0; i < count; i++)
	{
		SourceRow  *row;

		take_row(c->target, table->vals[i], table->tupdesc, &extra[n]);
		row = hash_search(c->rows, &extra[n].hash, HASH_FIND, NULL);
		if (row != NULL)
			compare_row(c, row, &extra[n]);
		else
		{
			hashes[n] = extra[n].hash;
			n++;
		}
	}
	if (n > 0)
		check_extra(c, extra, hashes, n);
}

/* Compares all rows that the copy has in the range. */
static void
compare_copy(Comparison *c)
{
	MemoryContext piece = AllocSetContextCreate(c->context, "pg_fanout compared piece", ALLOCSET_DEFAULT_SIZES);
	Portal		cursor = sync_write_open_range(c->target, c->keys, c->has_after ? &c->after : NULL,
											   c->has_upto ? &c->upto : NULL);

	for (;;)
	{
		SPITupleTable *table;

		SPI_cursor_fetch(cursor, true, PIECE);
		table = SPI_tuptable;
		if (SPI_processed == 0)
			break;
		MemoryContextSwitchTo(piece);
		compare_piece(c, table, SPI_processed);
		MemoryContextSwitchTo(c->context);
		SPI_freetuptable(table);
		MemoryContextReset(piece);
		c->between();
	}
	SPI_cursor_close(cursor);
	MemoryContextSwitchTo(c->context);
}

/* ---- rows of the source ---- */

static void
settle_different(Comparison *c, SyncRow *known, const SourceRow *row)
{
	bool		mended;
	Found	   *found;

	if (!mend(c, put_row, &row->values, &mended))
		return;
	if (mended)
		sync_rows_set(known, c->message->sequence, c->message->xid, true);
	found = count_difference(c, mended);
	if (row->found)
		found->different++;
	else
		found->missing++;
	record_difference(c, row->found ? "different" : "missing", &row->values, row->differs, mended);
}

static void
settle_row(Comparison *c, const SourceRow *row)
{
	bool		equal = row->found && row->differs == NULL;
	SyncRow    *known = sync_rows_find(&row->hash);

	if (is_mended(c, known))
		return;
	if (row->left_out || (!equal && has_waiting(c, &row->values)))
		c->others.left_out++;
	else if (equal)
	{
		/* which deletes what is older than it, once it is applied */
		if (c->repair && c->truncate_waits)
			sync_rows_set(known, c->message->sequence, c->message->xid, true);
		c->others.compared++;
	}
	else
		settle_different(c, known, row);
}

/* Says of each row of the message what became of it. */
static void
settle_rows(Comparison *c)
{
	load_known(c);
	for (int i = 0; i < c->nrows; i++)
		settle_row(c, c->ordered[i]);
	sync_rows_store(c->target->subscription_id);
}

/* ---- a message ---- */

/* All of the range, once. */
static bool
compare_all(Comparison *c, const SyncValues *none)
{
	memset(&c->others, 0, sizeof(c->others));
	c->refused = 0;
	leave_out_changed(c);
	compare_copy(c);
	settle_rows(c);
	if (c->mended.mended > 0 && !c->row_by_row)
		sync_write_check_constraints(c->target);
	return true;
}

/* See the head of this file. */
static void
mend_row_by_row(Comparison *c)
{
	int64		before;

	memset(&c->mended, 0, sizeof(c->mended));
	c->listed = -1;
	c->row_by_row = true;
	for (int i = 0; i < MAX_PASSES; i++)
	{
		before = c->mended.mended;
		(void) compare_all(c, NULL);
		if (c->refused == 0 || c->mended.mended == before)
			break;
		c->between();
	}
}

static void
compare_range(Comparison *c)
{
	bool		result;

	look_for_waiting(c);
	if (c->message->sequence <= c->target->floor || !is_seen(c, c->target->floor_xid) ||
		(c->truncate_waits && !c->repair))
	{
		c->others.left_out = c->nrows;
		return;
	}
	look_for_capture(c);
	if (!c->repair)
		(void) compare_all(c, NULL);
	else if (!in_savepoint(c, compare_all, NULL, &result))
		mend_row_by_row(c);
	if (c->refused == 0)
		return;
	c->ranges = 0;
	memset(&c->others, 0, sizeof(c->others));
}

/* Reads a number of the message that has to be there. */
static int64
read_number(const JsonSlice *body, const char *quoted_name)
{
	JsonSlice	number = member(body, quoted_name);

	if (number.kind != JSON_IS_NUMBER)
		malformed();
	return DatumGetInt64(DirectFunctionCall1(int8in, CStringGetDatum(readjson_string(&number))));
}

/*
 * compare_apply
 *		Compares the rows of the message's range, and records what it finds.
 *
 * To be called as the table's owner, with SPI connected, and after sync_rows_store():
 * it loads what is known of rows anew, so what was not stored would be lost, and the
 * caller must load its own again.  Calls between() after each PIECE rows.  Frees all
 * memory but that of the message, and of the result.
 *
 * Returns NULL; or, of a repair, why the table has refused a row: then the message has
 * to be applied again, for that row and the count of the range.
 * Errors: 22023 the message is no part of a comparison; of types' input functions;
 * of a repair, those of writing that say nothing about a row.
 */
ErrorData *
compare_apply(SyncTarget *target, const CompareMessage *message, void (*between) (void))
{
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "pg_fanout comparison", ALLOCSET_DEFAULT_SIZES);
	MemoryContext oldcontext = MemoryContextSwitchTo(context);
	Comparison	c = {
		.target = target,.message = message,.between = between,.caller = oldcontext,.context = context,
		.listed = -1,.ranges_sent = -1
	};
	JsonSlice	body;
	JsonSlice	failure;

	if (message->body == NULL || !jsonscan_text(message->body, strlen(message->body), &body) ||
		body.kind != JSON_IS_OBJECT)
		malformed();
	c.repair = (member(&body, "\"repair\"").kind == JSON_IS_BOOLEAN && member(&body, "\"repair\"").text[0] == 't');
	failure = member(&body, "\"failure\"");
	if (failure.kind == JSON_IS_STRING)
		c.failure = readjson_string(&failure);
	else if (member(&body, "\"ranges\"").kind != JSON_IS_NULL)
		c.ranges_sent = read_number(&body, "\"ranges\"");
	else
	{
		c.ranges = 1;
		if (read_range(&c, &body))
			compare_range(&c);
	}
	record(&c);
	MemoryContextSwitchTo(oldcontext);
	MemoryContextDelete(context);
	return c.refused > 0 ? c.refusal : NULL;
}
