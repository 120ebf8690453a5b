/*-------------------------------------------------------------------------
 *
 * sync.c
 *		The built-in handler of sync_table(): keeps a table equal to the remote
 *		entity.
 *
 * All SQL on the target tables, and on fanout.sync_target and fanout.sync_row.
 *
 * A batch is written in three statements: fanout.sync_row takes the sequences
 * and answers which keys were behind, their rows that are gone are deleted,
 * the others inserted or updated.  To get there, of several messages of one key
 * only the newest is kept, and a batch is cut at TRUNCATEs and where rows begin
 * to have other columns (the remote table was altered): a column that a message
 * lacks is not touched.
 *
 * Writing less than every message may meet a constraint that applying them one
 * by one would not: one row gives up a unique value that another takes, and
 * then changes again.  The consumer runs a batch that failed again message by
 * message, and that is as good as the source.
 *
 * sync_row is what makes repeats harmless, those too that the inbox does not
 * remember: redrives, replays.  A deleted row leaves its sequence there, with
 * the time; the publisher removes it when the inbox's retention has passed.
 *
 * A message's values become those of the columns by the types' input functions,
 * before and apart from the statements, under the settings that texts were
 * written with.  The statements, and what they fire, run under the session's.
 *
 * Rights: the target is written with those of the session, which is the role
 * that subscribed.  Our own tables are accessed as their owner, as foreign keys
 * do it.  Statements on the target name everything with its schema, and
 * are made of identifiers that were looked up, never of a message's text.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/relation.h"
#include "access/table.h"
#include "catalog/namespace.h"
#include "catalog/pg_operator.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "nodes/bitmapset.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/fmgroids.h"
#include "utils/json.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/syscache.h"
#include "utils/typcache.h"

#include "capture/headers.h"
#include "capture/textform.h"
#include "consume/delivery.h"
#include "consume/inbox.h"
#include "server/compat.h"
#include "server/query.h"
#include "server/shmem.h"
#include "server/worker.h"

PG_FUNCTION_INFO_V1(pgf_sync_messages);

/* What is needed of a message; NULL: it has none. */
typedef struct SyncMessage
{
	const char *key;			/* headers */
	const char *old_key;
	const char *op;
	int64		sequence;
	bool		has_sequence;
	Jsonb	   *body;
} SyncMessage;

/* Statements kept for as many sets of columns. */
#define MAX_UPSERTS 16

typedef struct SyncColumn
{
	char	   *remote;			/* its name in messages */
	char	   *local;			/* quoted */
	char	   *type;			/* with its schema; not a domain */
	Oid			type_oid;
	int32		typmod;
	int			text_settings;	/* of the type: textform.h */
	bool		is_key;
} SyncColumn;

typedef struct Upsert
{
	Bitmapset  *columns;		/* indexes of SyncTarget.columns */
	SPIPlanPtr	plan;
} Upsert;

typedef struct SyncTarget
{
	MemoryContext context;
	int32		subscription_id;
	char	   *definition;		/* what it was made from */
	Oid			relid;
	TupleDesc	desc;			/* copy, to notice ALTER TABLE */
	int64		floor;			/* sequence of the newest TRUNCATE */
	SyncColumn *columns;		/* those that messages can set */
	int			ncolumns;
	int		   *keys;			/* indexes of columns, in the key's order */
	int			nkeys;
	SPIPlanPtr	delete_plan;
	Upsert		upserts[MAX_UPSERTS];
	int			nupserts;
} SyncTarget;

/* A message, looked into. */
typedef struct Entry
{
	const SyncMessage *message;
	Jsonb	   *row;			/* NULL for TRUNCATE */
	Jsonb	   *old_row;		/* NULL: not known */
	bool		truncates;
	bool		deletes;
	Bitmapset  *columns;		/* those that the row has and the target knows */
} Entry;

/* What shall become of the row of one key. */
typedef struct Change
{
	const char *key;
	int64		sequence;
	Jsonb	   *row;			/* of a deleted row: its key columns at least */
	bool		deleted;
	bool		wanted;			/* newest of its key, and newer than what is
								 * there */
} Change;

/* A consumer has one subscription. */
static SyncTarget *current = NULL;

/* ---- our own tables ---- */

static void
execute_own(CachedQuery *query, int nargs, Oid *types, Datum *values)
{
	Caller		caller = become_owner();

	query_execute(query, nargs, types, values, NULL);
	become_caller(&caller);
}

/* ---- the target ---- */

/*
 * The mapping of columns: those that a message can set, with their remote
 * names.  Generated columns are left to the server.  Of a domain it is the type
 * beneath that is read from messages; the statement makes it one of the domain,
 * checks its constraints and thereby runs their functions.
 */
static void
add_column(SyncTarget *target, Form_pg_attribute attr, Jsonb *renames)
{
	SyncColumn *column;
	char	   *remote = NameStr(attr->attname);
	JsonbIterator *it;
	JsonbIteratorToken token;
	JsonbValue	name;
	JsonbValue	value;

	if (attr->attisdropped || attr->attgenerated != '\0')
		return;
	it = renames ? JsonbIteratorInit(&renames->root) : NULL;
	while (it != NULL && (token = JsonbIteratorNext(&it, &name, false)) != WJB_DONE)
	{
		if (token != WJB_KEY)
			continue;
		(void) JsonbIteratorNext(&it, &value, false);
		if (value.type == jbvString &&
			value.val.string.len == strlen(NameStr(attr->attname)) &&
			memcmp(value.val.string.val, NameStr(attr->attname), value.val.string.len) == 0)
			remote = pnstrdup(name.val.string.val, name.val.string.len);
	}
	column = &target->columns[target->ncolumns++];
	column->remote = pstrdup(remote);
	column->local = pstrdup(quote_identifier(NameStr(attr->attname)));
	column->typmod = attr->atttypmod;
	column->type_oid = getBaseTypeAndTypmod(attr->atttypid, &column->typmod);
	column->type = format_type_extended(column->type_oid, column->typmod,
										FORMAT_TYPE_TYPEMOD_GIVEN | FORMAT_TYPE_FORCE_QUALIFY);
	column->text_settings = textform_settings(column->type_oid);
	column->is_key = false;
}

static int
find_local(const SyncTarget *target, const char *name)
{
	for (int i = 0; i < target->ncolumns; i++)
	{
		if (strcmp(target->columns[i].local, quote_identifier(name)) == 0)
			return i;
	}
	ereport(ERROR,
			(errcode(ERRCODE_UNDEFINED_COLUMN),
			 errmsg("key column \"%s\" of \"%s\" is not there or cannot be written",
					name, get_rel_name(target->relid)),
			 errhint("Call fanout.unsubscribe() and fanout.sync_table() again.")));
	return -1;
}

static void
add_keys(SyncTarget *target, ArrayType *names)
{
	Datum	   *values;
	int			n;

	deconstruct_array(names, TEXTOID, -1, false, TYPALIGN_INT, &values, NULL, &n);
	target->keys = palloc(n * sizeof(int));
	target->nkeys = n;
	for (int i = 0; i < n; i++)
	{
		target->keys[i] = find_local(target, TextDatumGetCString(values[i]));
		target->columns[target->keys[i]].is_key = true;
	}
}

static void
forget_target(void)
{
	if (current == NULL)
		return;
	if (current->delete_plan != NULL)
		SPI_freeplan(current->delete_plan);
	for (int i = 0; i < current->nupserts; i++)
		SPI_freeplan(current->upserts[i].plan);
	MemoryContextDelete(current->context);
	current = NULL;
}

static SyncTarget *
make_target(Relation rel, ArrayType *key, Jsonb *renames)
{
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "pg_fanout sync target",
												  ALLOCSET_DEFAULT_SIZES);
	MemoryContext oldcontext = MemoryContextSwitchTo(context);
	SyncTarget *target = palloc0(sizeof(SyncTarget));

	target->context = context;
	target->relid = RelationGetRelid(rel);
	target->desc = CreateTupleDescCopyConstr(RelationGetDescr(rel));
	target->columns = palloc(target->desc->natts * sizeof(SyncColumn));
	for (int i = 0; i < target->desc->natts; i++)
		add_column(target, TupleDescAttr(target->desc, i), renames);
	add_keys(target, key);
	MemoryContextSwitchTo(oldcontext);
	return target;
}

/* Is what we remember still what the catalog says? */
static bool
target_is_current(const char *definition, Relation rel)
{
	return current != NULL &&
		strcmp(current->definition, definition) == 0 &&
		equalTupleDescs(current->desc, RelationGetDescr(rel));
}

/* Only whoever subscribed may write what is remembered of its rows. */
static void
check_role(Oid role)
{
	if (role != GetUserId())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for the subscription of another role")));
}

static Relation
open_target(Oid relid)
{
	Relation	rel = try_relation_open(relid, RowExclusiveLock);

	if (rel == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("the table of this subscription does not exist any more"),
				 errhint("Call fanout.unsubscribe(), and fanout.sync_table() with another table.")));
	return rel;
}

static void
remember_target(Relation rel, int32 subscription_id, ArrayType *key, Jsonb *columns, const char *definition)
{
	SyncTarget *target = make_target(rel, key, columns);

	forget_target();
	target->subscription_id = subscription_id;
	target->definition = MemoryContextStrdup(target->context, definition);
	MemoryContextSetParent(target->context, TopMemoryContext);
	current = target;
}

/*
 * What is known of the target of a subscription, which is locked against
 * ALTER TABLE until the transaction ends.
 */
static SyncTarget *
load_target(Datum topic, Datum consumer_group)
{
	static CachedQuery query = {
		"select s.subscription_id, s.role::oid, t.target::oid, t.key, t.columns, t.floor,"
		" row(s.subscription_id, t.target::oid, t.key, t.columns)::text"
		" from fanout.subscription s join fanout.sync_target t using (subscription_id)"
		" where s.topic = $1 and s.consumer_group = $2"
	};
	Oid			types[] = {TEXTOID, TEXTOID};
	Datum		values[] = {topic, consumer_group};
	bool		isnull;
	bool		no_columns;
	Datum		columns;
	char	   *definition;
	Relation	rel;

	execute_own(&query, 2, types, values);
	if (SPI_processed != 1)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("this subscription was not made by fanout.sync_table()")));
	check_role(DatumGetObjectId(query_value(0, 2, &isnull)));
	columns = query_value(0, 5, &no_columns);
	definition = TextDatumGetCString(query_value(0, 7, &isnull));
	rel = open_target(DatumGetObjectId(query_value(0, 3, &isnull)));
	if (!target_is_current(definition, rel))
		remember_target(rel, DatumGetInt32(query_value(0, 1, &isnull)),
						DatumGetArrayTypeP(query_value(0, 4, &isnull)),
						no_columns ? NULL : DatumGetJsonbP(columns), definition);
	current->floor = DatumGetInt64(query_value(0, 6, &isnull));
	relation_close(rel, NoLock);
	return current;
}

/* ---- from messages to changes ---- */

pg_noreturn static void refuse(const char *what, const char *hint);

static void
refuse(const char *what, const char *hint)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("message cannot be applied: %s", what),
			 errhint("%s", hint)));
}

/* A member of an object that is itself an object; NULL: there is none. */
static Jsonb *
object_member(Jsonb *object, const char *name)
{
	JsonbValue	buffer;
	JsonbValue *value;

	if (object == NULL || !JB_ROOT_IS_OBJECT(object))
		return NULL;
	value = getKeyJsonValueFromContainer(&object->root, name, strlen(name), &buffer);
	if (value == NULL || value->type != jbvBinary ||
		!JsonContainerIsObject(value->val.binary.data))
		return NULL;
	return JsonbValueToJsonb(value);
}

static bool
has_member(Jsonb *object, const char *name)
{
	JsonbValue	buffer;

	return getKeyJsonValueFromContainer(&object->root, name, strlen(name), &buffer) != NULL;
}

/* The formats tell themselves apart: see "Bodies" in the README. */
static bool
is_debezium(Jsonb *body)
{
	return has_member(body, "source") && has_member(body, "op") &&
		has_member(body, "before") && has_member(body, "after");
}

static bool
is_cloudevent(Jsonb *body)
{
	return has_member(body, "specversion") && has_member(body, "data");
}

/* The row that a message is about, and the one before, if it says so. */
static void
find_rows(const SyncMessage *message, Jsonb **row, Jsonb **old_row)
{
	Jsonb	   *body = message->body;

	*row = *old_row = NULL;
	if (body == NULL || !JB_ROOT_IS_OBJECT(body))
		return;
	if (is_debezium(body))
	{
		*row = object_member(body, "after");
		*old_row = object_member(body, "before");
	}
	else if (is_cloudevent(body))
		*row = object_member(body, "data");
	else
		*row = body;
	/* of a deleted row there is only what it was */
	if (*row == NULL)
		*row = *old_row;
}

/*
 * Tells whether a key of a single column of that type is JSON, not a text: see
 * rowjson_text().  An array may be either; its text begins with a brace, or with
 * bounds as in [0:1]={7,8}.
 */
static bool
key_is_json(Oid type, const char *key)
{
	Oid			base = getBaseType(type);

	if (type_is_array(base))
		return key[0] == '[' && key[1 + strspn(key + 1, "+-0123456789")] != ':';
	return base == JSONOID || base == JSONBOID || type_is_rowtype(base);
}

/*
 * The key columns of a row of which only the key's text is known: the old key
 * of an update, where the body has no "before".
 */
static Jsonb *
row_of_key(const SyncTarget *target, const char *key)
{
	StringInfoData json;
	Jsonb	   *values = NULL;

	if (target->nkeys > 1)
		values = DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(key)));
	if (values != NULL &&
		(!JB_ROOT_IS_ARRAY(values) || JB_ROOT_COUNT(values) != target->nkeys))
		refuse("the old key does not have the columns of the table's key",
			   "Capture with format 'debezium', or with the same key.");
	initStringInfo(&json);
	for (int i = 0; i < target->nkeys; i++)
	{
		appendStringInfoChar(&json, i == 0 ? '{' : ',');
		escape_json(&json, target->columns[target->keys[i]].remote);
		appendStringInfoChar(&json, ':');
		if (values == NULL && key_is_json(target->columns[target->keys[i]].type_oid, key))
			appendStringInfoString(&json, key);
		else if (values == NULL)
			escape_json(&json, key);
		else
		{
			JsonbValue *value = getIthJsonbValueFromContainer(&values->root, i);
			Jsonb	   *element = JsonbValueToJsonb(value);

			(void) JsonbToCString(&json, &element->root, VARSIZE(element));
		}
	}
	appendStringInfoChar(&json, '}');
	return DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(json.data)));
}

static void
check_key_columns(const SyncTarget *target, Jsonb *row)
{
	for (int i = 0; i < target->nkeys; i++)
	{
		if (!has_member(row, target->columns[target->keys[i]].remote))
			refuse(psprintf("its row has no column \"%s\"", target->columns[target->keys[i]].remote),
				   "The key of the table must be among the columns that are captured.");
	}
}

static bool
has_op(const SyncMessage *message, const char *op)
{
	return message->op != NULL && strcmp(message->op, op) == 0;
}

static Bitmapset *
columns_of(const SyncTarget *target, Jsonb *row)
{
	Bitmapset  *columns = NULL;

	for (int i = 0; i < target->ncolumns; i++)
	{
		if (has_member(row, target->columns[i].remote))
			columns = bms_add_member(columns, i);
	}
	return columns;
}

static void
look_into(const SyncTarget *target, const SyncMessage *message, Entry *entry)
{
	entry->message = message;
	entry->truncates = has_op(message, "t");
	entry->deletes = has_op(message, "d");
	entry->columns = NULL;
	if (!message->has_sequence)
		refuse("it has no header \"sequence\"", "Only messages of pg_fanout can be applied to a table.");
	if (entry->truncates)
		return;
	if (message->key == NULL)
		refuse("it has no header \"key\"", "Capture the remote table with a key.");
	find_rows(message, &entry->row, &entry->old_row);
	if (entry->row == NULL)
		refuse("its body has no row", "The body must be of format \"debezium\", \"row\" or \"cloudevents\".");
	if (!entry->deletes)
		entry->columns = columns_of(target, entry->row);
}

static void
add_change(const SyncTarget *target, Change *change, const char *key, Jsonb *row,
		   int64 sequence, bool deleted)
{
	check_key_columns(target, row);
	change->key = key;
	change->sequence = sequence;
	change->row = row;
	change->deleted = deleted;
	change->wanted = true;
}

/* A message is one change, or two if it changed the key. */
static int
add_changes(const SyncTarget *target, Change *changes, const Entry *entry)
{
	const SyncMessage *message = entry->message;
	int			n = 0;

	if (message->old_key != NULL)
	{
		Jsonb	   *old_row = entry->old_row ? entry->old_row : row_of_key(target, message->old_key);

		add_change(target, &changes[n++], message->old_key, old_row, message->sequence, true);
	}
	add_change(target, &changes[n++], message->key, entry->row, message->sequence, entry->deletes);
	return n;
}

/* ---- the newest of each key ---- */

static int
by_key_and_age(const void *a, const void *b)
{
	const Change *x = *(Change *const *) a;
	const Change *y = *(Change *const *) b;
	int			keys = strcmp(x->key, y->key);

	if (keys != 0)
		return keys;
	if (x->sequence != y->sequence)
		return x->sequence < y->sequence ? -1 : 1;
	return x - y;
}

static int
by_key(const void *a, const void *b)
{
	return strcmp(a, (*(Change *const *) b)->key);
}

/* Sorts pointers to the changes by key; only the newest of each stays wanted. */
static int
keep_newest(Change *changes, int count, Change **newest)
{
	Change	  **sorted = palloc(count * sizeof(Change *));
	int			n = 0;

	for (int i = 0; i < count; i++)
		sorted[i] = &changes[i];
	qsort(sorted, count, sizeof(Change *), by_key_and_age);
	for (int i = 0; i < count; i++)
	{
		if (i + 1 < count && strcmp(sorted[i]->key, sorted[i + 1]->key) == 0)
			sorted[i]->wanted = false;
		else
			newest[n++] = sorted[i];
	}
	pfree(sorted);
	return n;
}

/*
 * Counts changes that were older than what had been applied.  Repeats are; but
 * if the source's sequence went back, so is everything, and the copy stays as
 * it is.
 */
static void
count_stale(int count)
{
	if (worker_subscription != NULL && count > 0)
		pg_atomic_fetch_add_u64(&worker_subscription->stale, count);
}

/*
 * Records the sequences; what is not newer than what was recorded before is
 * not wanted.
 */
static void
take_sequences(const SyncTarget *target, Change **newest, int count)
{
	static CachedQuery query = {
		"insert into fanout.sync_row as s (subscription_id, key, sequence, deleted_at)"
		" select $1, key, sequence, case when deleted then now() end"
		" from unnest($2, $3, $4) as given (key, sequence, deleted) where sequence > $5"
		" on conflict (subscription_id, key) do update"
		" set sequence = excluded.sequence, deleted_at = excluded.deleted_at"
		" where s.sequence < excluded.sequence"
		" returning key"
	};
	Oid			types[] = {INT4OID, TEXTARRAYOID, INT8ARRAYOID, BOOLARRAYOID, INT8OID};
	Datum		values[5];
	Datum	   *keys = palloc(count * sizeof(Datum));
	Datum	   *sequences = palloc(count * sizeof(Datum));
	Datum	   *deleted = palloc(count * sizeof(Datum));

	for (int i = 0; i < count; i++)
	{
		keys[i] = CStringGetTextDatum(newest[i]->key);
		sequences[i] = Int64GetDatum(newest[i]->sequence);
		deleted[i] = BoolGetDatum(newest[i]->deleted);
		newest[i]->wanted = false;
	}
	values[0] = Int32GetDatum(target->subscription_id);
	values[1] = PointerGetDatum(construct_array(keys, count, TEXTOID, -1, false, TYPALIGN_INT));
	values[2] = PointerGetDatum(construct_array(sequences, count, INT8OID, 8, FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
	values[3] = PointerGetDatum(construct_array(deleted, count, BOOLOID, 1, true, TYPALIGN_CHAR));
	values[4] = Int64GetDatum(target->floor);
	execute_own(&query, 5, types, values);
	count_stale(count - (int) SPI_processed);
	for (int i = 0; i < SPI_processed; i++)
	{
		char	   *key = SPI_getvalue(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, 1);
		Change	  **found = bsearch(key, newest, count, sizeof(Change *), by_key);

		(*found)->wanted = true;
	}
}

/* ---- writing ---- */

/* Records of those columns, with their remote names. */
static void
append_record(StringInfo sql, const SyncTarget *target, Bitmapset *columns)
{
	const char *separator = "";

	appendStringInfoString(sql, " from pg_catalog.unnest($1) as r (");
	for (int i = -1; (i = bms_next_member(columns, i)) >= 0;)
	{
		appendStringInfo(sql, "%s%s %s", separator,
						 quote_identifier(target->columns[i].remote), target->columns[i].type);
		separator = ", ";
	}
	appendStringInfoChar(sql, ')');
}

static char *
target_name(const SyncTarget *target)
{
	return quote_qualified_identifier(get_namespace_name(get_rel_namespace(target->relid)),
									  get_rel_name(target->relid));
}

static SPIPlanPtr
prepare(const char *sql)
{
	Oid			type = RECORDARRAYOID;
	SPIPlanPtr	plan = SPI_prepare(sql, 1, &type);

	if (plan == NULL || SPI_keepplan(plan) != 0)
		elog(ERROR, "could not prepare \"%s\": %s", sql, SPI_result_code_string(SPI_result));
	return plan;
}

static Bitmapset *
key_columns(const SyncTarget *target)
{
	Bitmapset  *keys = NULL;

	for (int i = 0; i < target->nkeys; i++)
		keys = bms_add_member(keys, target->keys[i]);
	return keys;
}

/* The operator that a unique index uses, wherever its type was made. */
static char *
equality(Oid type)
{
	Oid			operator = lookup_type_cache(type, TYPECACHE_EQ_OPR)->eq_opr;
	HeapTuple	tuple = SearchSysCache1(OPEROID, ObjectIdGetDatum(operator));
	Form_pg_operator form;
	char	   *name;

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "no equality operator for type %u", type);
	form = (Form_pg_operator) GETSTRUCT(tuple);
	name = psprintf("operator(%s.%s)", quote_identifier(get_namespace_name(form->oprnamespace)),
					NameStr(form->oprname));
	ReleaseSysCache(tuple);
	return name;
}

static void
append_key_match(StringInfo sql, const SyncTarget *target)
{
	for (int i = 0; i < target->nkeys; i++)
	{
		SyncColumn *key = &target->columns[target->keys[i]];

		appendStringInfo(sql, "%s t.%s %s r.%s", i == 0 ? " where" : " and", key->local,
						 equality(key->type_oid), quote_identifier(key->remote));
	}
}

static SPIPlanPtr
prepare_delete(SyncTarget *target)
{
	StringInfoData sql;

	initStringInfo(&sql);
	appendStringInfo(&sql, "delete from %s as t using (select r.*", target_name(target));
	append_record(&sql, target, key_columns(target));
	appendStringInfoString(&sql, ") as r");
	append_key_match(&sql, target);
	return prepare(sql.data);
}

/* Columns of the target, or the same of the record. */
static void
append_list(StringInfo sql, const SyncTarget *target, Bitmapset *columns, bool remote)
{
	const char *separator = "";

	for (int i = -1; (i = bms_next_member(columns, i)) >= 0;)
	{
		SyncColumn *column = &target->columns[i];

		if (remote)
			appendStringInfo(sql, "%sr.%s", separator, quote_identifier(column->remote));
		else
			appendStringInfo(sql, "%s%s", separator, column->local);
		separator = ", ";
	}
}

static void
append_on_conflict(StringInfo sql, const SyncTarget *target, Bitmapset *columns)
{
	const char *separator = ") do update set ";

	appendStringInfoString(sql, " on conflict (");
	for (int i = 0; i < target->nkeys; i++)
		appendStringInfo(sql, "%s%s", i == 0 ? "" : ", ", target->columns[target->keys[i]].local);
	for (int i = -1; (i = bms_next_member(columns, i)) >= 0;)
	{
		SyncColumn *column = &target->columns[i];

		if (column->is_key)
			continue;
		appendStringInfo(sql, "%s%s = excluded.%s", separator, column->local, column->local);
		separator = ", ";
	}
	if (separator[0] == ')')
		appendStringInfoString(sql, ") do nothing");
}

static SPIPlanPtr
prepare_upsert(SyncTarget *target, Bitmapset *columns)
{
	StringInfoData sql;

	initStringInfo(&sql);
	appendStringInfo(&sql, "insert into %s as t (", target_name(target));
	append_list(&sql, target, columns, false);
	/* what the source generated as an identity is the row's identity here */
	appendStringInfoString(&sql, ") overriding system value select ");
	append_list(&sql, target, columns, true);
	append_record(&sql, target, columns);
	append_on_conflict(&sql, target, columns);
	return prepare(sql.data);
}

static SPIPlanPtr
find_upsert(SyncTarget *target, Bitmapset *columns)
{
	Upsert	   *upsert;

	for (int i = 0; i < target->nupserts; i++)
	{
		if (bms_equal(target->upserts[i].columns, columns))
			return target->upserts[i].plan;
	}
	/* more sets than that is a table that is altered all the time */
	if (target->nupserts == MAX_UPSERTS)
		SPI_freeplan(target->upserts[--target->nupserts].plan);
	upsert = &target->upserts[target->nupserts];
	upsert->plan = prepare_upsert(target, columns);
	upsert->columns = NULL;
	{
		MemoryContext oldcontext = MemoryContextSwitchTo(target->context);

		upsert->columns = bms_copy(columns);
		MemoryContextSwitchTo(oldcontext);
	}
	target->nupserts++;
	return upsert->plan;
}

/* What the records are made of; *settings: those that texts of them depend on. */
static TupleDesc
record_desc(const SyncTarget *target, Bitmapset *columns, int *settings)
{
	TupleDesc	desc = CreateTemplateTupleDesc(bms_num_members(columns));
	AttrNumber	n = 0;

	*settings = 0;
	for (int i = -1; (i = bms_next_member(columns, i)) >= 0;)
	{
		SyncColumn *column = &target->columns[i];

		TupleDescInitEntry(desc, ++n, column->remote, column->type_oid, column->typmod, 0);
		*settings |= column->text_settings;
	}
	return BlessTupleDesc(desc);
}

/*
 * Turns rows, JSON objects, into records of the columns, in place.  It calls
 * jsonb_to_record() as FROM jsonb_to_record(row) AS r (column type, ...) would.
 */
static void
read_records(const SyncTarget *target, Bitmapset *columns, Datum *rows, int count)
{
	MemoryContext scratch = AllocSetContextCreate(CurrentMemoryContext, "pg_fanout sync row",
												  ALLOCSET_DEFAULT_SIZES);
	int			settings;
	ReturnSetInfo expected = {
		.type = T_ReturnSetInfo,
		.expectedDesc = record_desc(target, columns, &settings)
	};
	int			level = textform_begin_input(settings);
	FmgrInfo	to_record;

	LOCAL_FCINFO(fcinfo, 1);

	fmgr_info(F_JSONB_TO_RECORD, &to_record);
	InitFunctionCallInfoData(*fcinfo, &to_record, 1, InvalidOid, NULL, (Node *) &expected);
	for (int i = 0; i < count; i++)
	{
		MemoryContext oldcontext = MemoryContextSwitchTo(scratch);
		Datum		record;

		fcinfo->args[0].value = rows[i];
		fcinfo->args[0].isnull = false;
		record = FunctionCallInvoke(fcinfo);
		MemoryContextSwitchTo(oldcontext);
		rows[i] = datumCopy(record, false, -1);
		MemoryContextReset(scratch);
	}
	textform_end_input(level);
	MemoryContextDelete(scratch);
}

/* rows: of jsonb, which become records here */
static void
execute_rows(SPIPlanPtr plan, const SyncTarget *target, Bitmapset *columns, Datum *rows, int count)
{
	Datum		value;
	int			result;

	read_records(target, columns, rows, count);
	value = PointerGetDatum(construct_array(rows, count, RECORDOID, -1, false, TYPALIGN_DOUBLE));
	result = SPI_execute_plan(plan, &value, NULL, false, 0);
	if (result < 0)
		elog(ERROR, "could not write the table: %s", SPI_result_code_string(result));
}

static void
write_deletes(SyncTarget *target, Change *changes, int count)
{
	Datum	   *rows = palloc(count * sizeof(Datum));
	int			n = 0;

	for (int i = 0; i < count; i++)
	{
		if (changes[i].wanted && changes[i].deleted)
			rows[n++] = JsonbPGetDatum(changes[i].row);
	}
	if (n == 0)
		return;
	if (target->delete_plan == NULL)
		target->delete_plan = prepare_delete(target);
	execute_rows(target->delete_plan, target, key_columns(target), rows, n);
}

static void
write_upserts(SyncTarget *target, Change *changes, int count, Bitmapset *columns)
{
	Datum	   *rows = palloc(count * sizeof(Datum));
	int			n = 0;

	for (int i = 0; i < count; i++)
	{
		if (changes[i].wanted && !changes[i].deleted)
			rows[n++] = JsonbPGetDatum(changes[i].row);
	}
	if (n > 0)
		execute_rows(find_upsert(target, columns), target, columns, rows, n);
}

/* Entries whose rows have the same columns. */
static void
apply_rows(SyncTarget *target, const Entry *entries, int count, Bitmapset *columns)
{
	Change	   *changes = palloc(2 * count * sizeof(Change));
	Change	  **newest;
	int			n = 0;

	for (int i = 0; i < count; i++)
		n += add_changes(target, changes + n, &entries[i]);
	newest = palloc(n * sizeof(Change *));
	take_sequences(target, newest, keep_newest(changes, n, newest));
	write_deletes(target, changes, n);
	write_upserts(target, changes, n, columns);
}

/* ---- TRUNCATE ---- */

/* Rows of which something newer than the TRUNCATE was applied already. */
static Datum *
younger_rows(SyncTarget *target, int64 sequence, int *count)
{
	static CachedQuery query = {
		"select key from fanout.sync_row"
		" where subscription_id = $1 and sequence > $2 and deleted_at is null"
	};
	Oid			types[] = {INT4OID, INT8OID};
	Datum		values[2];
	Datum	   *rows;

	values[0] = Int32GetDatum(target->subscription_id);
	values[1] = Int64GetDatum(sequence);
	execute_own(&query, 2, types, values);
	*count = SPI_processed;
	rows = palloc((*count + 1) * sizeof(Datum));
	for (int i = 0; i < *count; i++)
	{
		char	   *key = SPI_getvalue(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, 1);

		rows[i] = JsonbPGetDatum(row_of_key(target, key));
	}
	return rows;
}

/* All that the TRUNCATE is newer than is forgotten; the floor stands for it. */
static void
raise_floor(SyncTarget *target, int64 sequence)
{
	static CachedQuery raise = {
		"update fanout.sync_target set floor = $2 where subscription_id = $1"
	};
	static CachedQuery forget = {
		"delete from fanout.sync_row where subscription_id = $1 and sequence < $2"
	};
	Oid			types[] = {INT4OID, INT8OID};
	Datum		values[2];

	values[0] = Int32GetDatum(target->subscription_id);
	values[1] = Int64GetDatum(sequence);
	execute_own(&raise, 2, types, values);
	execute_own(&forget, 2, types, values);
	target->floor = sequence;
}

/* DELETE, as not everybody who may delete all rows may TRUNCATE. */
static void
apply_truncate(SyncTarget *target, const SyncMessage *message)
{
	StringInfoData sql;
	Datum	   *younger;
	int			count;
	SPIPlanPtr	plan;

	if (message->sequence <= target->floor)
		return;
	raise_floor(target, message->sequence);
	younger = younger_rows(target, message->sequence, &count);
	initStringInfo(&sql);
	appendStringInfo(&sql, "delete from %s as t where not exists (select", target_name(target));
	append_record(&sql, target, key_columns(target));
	append_key_match(&sql, target);
	appendStringInfoChar(&sql, ')');
	plan = prepare(sql.data);
	execute_rows(plan, target, key_columns(target), younger, count);
	SPI_freeplan(plan);
}

/* ---- the whole ---- */

/*
 * How many entries, from the first on, can be applied as one.  *columns: those
 * of their rows; NULL if all are deletes.
 */
static int
uniform_entries(const Entry *entries, int count, Bitmapset **columns)
{
	int			n;

	*columns = NULL;
	for (n = 0; n < count && !entries[n].truncates; n++)
	{
		if (entries[n].deletes)
			continue;
		if (*columns != NULL && !bms_equal(*columns, entries[n].columns))
			break;
		*columns = entries[n].columns;
	}
	return n;
}

static void
apply(SyncTarget *target, const SyncMessage *messages, int count)
{
	Entry	   *entries = palloc0(count * sizeof(Entry));

	for (int i = 0; i < count; i++)
		look_into(target, &messages[i], &entries[i]);
	for (int i = 0; i < count;)
	{
		Bitmapset  *columns;
		int			n = uniform_entries(entries + i, count - i, &columns);

		if (n == 0)
			apply_truncate(target, entries[i++].message);
		else
			apply_rows(target, entries + i, n, columns);
		i += n;
	}
}

/* ---- the handler ---- */

static const char *
text_value(Datum value, bool isnull)
{
	return isnull ? NULL : TextDatumGetCString(value);
}

static void
read_message(SyncMessage *message, const Datum *values, const bool *nulls)
{
	Jsonb	   *headers = nulls[MESSAGE_HEADERS] ? NULL : DatumGetJsonbP(values[MESSAGE_HEADERS]);

	message->key = text_value(values[MESSAGE_KEY], nulls[MESSAGE_KEY]);
	message->old_key = headers_string(headers, "old_key");
	message->op = headers_string(headers, "op");
	message->has_sequence = !nulls[MESSAGE_SEQUENCE];
	if (message->has_sequence)
		message->sequence = DatumGetInt64(values[MESSAGE_SEQUENCE]);
	message->body = nulls[MESSAGE_BODY] ? NULL : DatumGetJsonbP(values[MESSAGE_BODY]);
}

static void
take_apart(Datum composite, TupleDesc desc, Datum *values, bool *nulls)
{
	HeapTupleHeader header = DatumGetHeapTupleHeader(composite);
	HeapTupleData tuple;

	tuple.t_len = HeapTupleHeaderGetDatumLength(header);
	ItemPointerSetInvalid(&tuple.t_self);
	tuple.t_tableOid = InvalidOid;
	tuple.t_data = header;
	heap_deform_tuple(&tuple, desc, values, nulls);
}

/*
 * fanout.sync_messages(messages fanout.message[]): applies messages of one
 * subscription to its table, in the order given.  The result is that of
 * applying one after the other; what is older than what was applied before is
 * left out.
 *
 * Errors: what the table's constraints, types and triggers raise; 22023 (a
 * message cannot be applied: no sequence, no key, no row in the body, a key
 * column missing), 42704 (not a subscription of sync_table()), 42501 (somebody
 * else's), 42P01 (the table is gone), 42703 (a key column is).
 */
Datum
pgf_sync_messages(PG_FUNCTION_ARGS)
{
	ArrayType  *array = PG_GETARG_ARRAYTYPE_P(0);
	Oid			type = ARR_ELEMTYPE(array);
	TupleDesc	desc = lookup_rowtype_tupdesc(type, -1);
	SyncMessage *messages;
	Datum	   *elements;
	int			count;
	Datum		values[MESSAGE_ATTRIBUTES];
	bool		nulls[MESSAGE_ATTRIBUTES];
	SyncTarget *target = NULL;

	if (desc->natts != MESSAGE_ATTRIBUTES)
		elog(ERROR, "fanout.message has %d attributes", desc->natts);
	deconstruct_array(array, type, -1, false, TYPALIGN_DOUBLE, &elements, NULL, &count);
	messages = palloc(count * sizeof(SyncMessage));
	SPI_connect();
	for (int i = 0; i < count; i++)
	{
		take_apart(elements[i], desc, values, nulls);
		if (target == NULL)
			target = load_target(values[MESSAGE_TOPIC], values[MESSAGE_CONSUMER_GROUP]);
		read_message(&messages[i], values, nulls);
	}
	if (count > 0)
		apply(target, messages, count);
	SPI_finish();
	ReleaseTupleDesc(desc);
	PG_RETURN_VOID();
}
