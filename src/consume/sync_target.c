/*-------------------------------------------------------------------------
 *
 * sync_target.c
 *		The table that a subscription of sync_table() writes: what it is, and what
 *		messages can set in it.
 *
 * All SQL on fanout.sync_target and fanout.sync_column.  What these say goes by
 * oids and attribute numbers, so a table, a column, a schema or a type may be
 * renamed or moved: fanout.sync_refresh_columns() has the rules.  What is made of
 * it here, names and plans among it, is thrown away at the first sign that the
 * table or anything that has a name in a statement was altered.
 *
 * That sign is looked at when a batch begins, with the table locked.  Only the
 * name of its schema can change after that; a batch ends with a look whether its
 * statements still mean this table (sync_target_check_name).
 *
 *		invalid --load--> valid --invalidation message--> invalid
 *
 * It must never write the table, or run statements made of a message's text:
 * names in statements are those of the catalogs.
 *
 * Locks: ROW EXCLUSIVE on the table until the transaction ends, so that its
 * columns, constraints and row security stay as they were found.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/nbtree.h"
#include "access/relation.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/inval.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/rls.h"
#include "utils/syscache.h"
#include "utils/typcache.h"

#include "capture/textform.h"
#include "consume/inbox.h"
#include "consume/sync_target.h"
#include "server/compat.h"
#include "server/query.h"

/* Names of unknown columns that are kept: more than a table has. */
#define MAX_NAMES 1600

/* A consumer has one subscription; a session that calls the handler, a few. */
static SyncTarget *current = NULL;
static bool valid = false;
static bool recorded = false;	/* something that an abort takes back */

/*
 * sync_refuse
 *		Raises the error of a message that cannot be applied to the table.
 */
void
sync_refuse(const char *what, const char *hint)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("message cannot be applied: %s", what),
			 errhint("%s", hint)));
}

/* ---- what makes it invalid ---- */

static void
relation_changed(Datum arg, Oid relid)
{
	if (current != NULL && (relid == current->relid || relid == InvalidOid))
		valid = false;
}

static void
name_changed(Datum arg, int cache, uint32 hash)
{
	valid = false;
}

/* What was recorded in a (sub)transaction that failed is to be recorded again. */
static void
forget_recorded(void)
{
	if (recorded)
		valid = recorded = false;
}

static void
xact_ended(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_ABORT)
		forget_recorded();
	recorded = false;
}

static void
subxact_ended(SubXactEvent event, SubTransactionId subid, SubTransactionId parent, void *arg)
{
	if (event == SUBXACT_EVENT_ABORT_SUB)
		forget_recorded();
}

static void
watch_catalogs(void)
{
	static const int caches[] = {NAMESPACEOID, TYPEOID, OPEROID};
	static bool watching = false;

	if (watching)
		return;
	watching = true;
	CacheRegisterRelcacheCallback(relation_changed, (Datum) 0);
	RegisterXactCallback(xact_ended, NULL);
	RegisterSubXactCallback(subxact_ended, NULL);
	for (int i = 0; i < lengthof(caches); i++)
		CacheRegisterSyscacheCallback(caches[i], name_changed, (Datum) 0);
}

static void
forget_target(void)
{
	if (current == NULL)
		return;
	sync_write_forget(current);
	MemoryContextDelete(current->context);
	current = NULL;
}

/* ---- making it ---- */

static char *
text_column(int row, int column)
{
	bool		isnull;
	Datum		value = query_value(row, column, &isnull);

	return isnull ? NULL : TextDatumGetCString(value);
}

/*
 * Tells whether equal values of a column may look different, as 1.0 and 1.00 do,
 * or "Ann" and "ANN" of citext.  A btree index asks the same question before it
 * merges equal values.
 */
static bool
is_inexact(Form_pg_attribute attr, Oid type)
{
	TypeCacheEntry *entry = lookup_type_cache(type, TYPECACHE_BTREE_OPFAMILY);
	Oid			function = InvalidOid;

	if (OidIsValid(entry->btree_opf))
		function = get_opfamily_proc(entry->btree_opf, entry->btree_opintype, entry->btree_opintype,
									 BTEQUALIMAGE_PROC);
	return !OidIsValid(function) ||
		!DatumGetBool(OidFunctionCall1Coll(function, attr->attcollation, ObjectIdGetDatum(entry->btree_opintype)));
}

/* Takes over a row of sync_refresh_columns(): what messages can set. */
static void
add_column(SyncTarget *target, Relation rel, int row)
{
	bool		isnull;
	AttrNumber	attnum = DatumGetInt16(query_value(row, 1, &isnull));
	Form_pg_attribute attr = TupleDescAttr(RelationGetDescr(rel), attnum - 1);
	SyncColumn *column = &target->columns[target->ncolumns];
	int32		typmod = attr->atttypmod;
	int			position;

	column->attnum = attnum;
	column->remote = text_column(row, 2);
	column->seen = DatumGetBool(query_value(row, 4, &isnull));
	column->name = pstrdup(NameStr(attr->attname));
	column->local = pstrdup(quote_identifier(column->name));
	column->identity = (attr->attidentity == ATTRIBUTE_IDENTITY_ALWAYS);
	column->type = getBaseTypeAndTypmod(attr->atttypid, &typmod);
	column->of_domain = (column->type != attr->atttypid);
	column->reader = readjson_plan(column->type, typmod, CurrentMemoryContext);
	target->text_settings |= textform_settings(column->type);
	position = DatumGetInt16(query_value(row, 3, &isnull));
	column->is_key = !isnull;
	if (column->is_key)
	{
		column->inexact = is_inexact(attr, column->type);
		target->keys[position - 1] = target->ncolumns;
	}
	target->ncolumns++;
}

static void
add_columns(SyncTarget *target, Relation rel)
{
	static CachedQuery query = {
		"select attnum, remote, key_position, seen from fanout.sync_refresh_columns($1)"
	};
	Oid			types[] = {INT4OID};
	Datum		values[] = {Int32GetDatum(target->subscription_id)};
	int			n;

	owner_execute(&query, 1, types, values, NULL);
	n = SPI_processed;
	target->columns = palloc0((n + 1) * sizeof(SyncColumn));
	target->keys = palloc0((n + 1) * sizeof(int));
	for (int i = 0; i < n; i++)
		add_column(target, rel, i);
	for (int i = 0; i < n; i++)
		target->nkeys += target->columns[i].is_key ? 1 : 0;
}

/* Texts are equal where the values are: of keys, and of rows that are compared. */
static void
plan_texts(SyncTarget *target)
{
	AttrNumber *attnums = palloc((target->ncolumns + 1) * sizeof(AttrNumber));

	for (int i = 0; i < target->nkeys; i++)
		attnums[i] = target->columns[target->keys[i]].attnum;
	target->key_text = rowjson_plan(target->desc, attnums, target->nkeys, target->context);
	for (int i = 0; i < target->ncolumns; i++)
		attnums[i] = target->columns[i].attnum;
	target->column_text = rowjson_plan(target->desc, attnums, target->ncolumns, target->context);
}

static SyncTarget *
make_target(Relation rel, int32 subscription_id, int32 version)
{
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "pg_fanout sync target",
												  ALLOCSET_DEFAULT_SIZES);
	MemoryContext oldcontext = MemoryContextSwitchTo(context);
	SyncTarget *target = palloc0(sizeof(SyncTarget));

	target->context = context;
	target->subscription_id = subscription_id;
	target->version = version;
	target->relid = RelationGetRelid(rel);
	target->owner = rel->rd_rel->relowner;
	target->partitioned = (rel->rd_rel->relkind == RELKIND_PARTITIONED_TABLE);
	target->skips_updates = (rel->trigdesc != NULL && rel->trigdesc->trig_update_before_row);
	target->skips_deletes = (rel->trigdesc != NULL && rel->trigdesc->trig_delete_before_row);
	target->untrusted = !pgf_may_become(target->owner, GetUserId());
	target->schema = get_namespace_name(RelationGetNamespace(rel));
	target->table = pstrdup(RelationGetRelationName(rel));
	target->qualified = quote_qualified_identifier(target->schema, target->table);
	target->desc = CreateTupleDescCopyConstr(RelationGetDescr(rel));
	add_columns(target, rel);
	plan_texts(target);
	target->shape.context = AllocSetContextCreate(context, "pg_fanout sync shape", ALLOCSET_SMALL_SIZES);
	MemoryContextSwitchTo(oldcontext);
	return target;
}

/* ---- checking it ---- */

/* Only whoever subscribed may write what is remembered of its rows. */
static void
check_role(Oid role)
{
	if (role != GetUserId())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for the subscription of another role")));
}

/*
 * Raises an error if the table cannot be kept equal any more.  A worker finds
 * that out before it takes a message; see subscription_problem() in the install
 * script.
 */
static void
check_obstacle(int32 subscription_id)
{
	static CachedQuery query = {"select fanout.sync_problem($1)"};
	Oid			types[] = {INT4OID};
	Datum		values[] = {Int32GetDatum(subscription_id)};
	char	   *problem;

	owner_execute(&query, 1, types, values, NULL);
	problem = text_column(0, 1);
	if (problem != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("%s", problem)));
}

/* With the table locked, which keeps row security as it is. */
static void
check_rights(Relation rel)
{
	Oid			owner = rel->rd_rel->relowner;

	if (!pgf_may_become(GetUserId(), owner))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied to act as the owner of table \"%s\"", RelationGetRelationName(rel))));
	if (check_enable_rls(RelationGetRelid(rel), owner, true) == RLS_ENABLED)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("row security applies to the owner of table \"%s\"", RelationGetRelationName(rel))));
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

/* ---- loading it ---- */

static void
remember_target(Relation rel, int32 subscription_id, int32 version)
{
	SyncTarget *target;

	/* set before it is read, so that what comes meanwhile is noticed */
	valid = true;
	check_obstacle(subscription_id);
	target = make_target(rel, subscription_id, version);
	forget_target();
	MemoryContextSetParent(target->context, TopMemoryContext);
	current = target;
}

/* Takes over what may be different in each batch. */
static void
read_state(SyncTarget *target, HeapTuple row, TupleDesc desc)
{
	bool		isnull;
	Datum		value;

	target->floor = DatumGetInt64(SPI_getbinval(row, desc, 5, &isnull));
	value = SPI_getbinval(row, desc, 6, &isnull);
	target->source_schema = isnull ? NULL : TextDatumGetCString(value);
	value = SPI_getbinval(row, desc, 7, &isnull);
	target->source_table = isnull ? NULL : TextDatumGetCString(value);
	target->refuses_unknown = DatumGetBool(SPI_getbinval(row, desc, 8, &isnull));
	value = SPI_getbinval(row, desc, 9, &isnull);
	target->sharers = PointerGetDatum(DatumGetArrayTypePCopy(value));
	target->floor_xid = DatumGetInt64(SPI_getbinval(row, desc, 10, &isnull));
	/* an error may have left it */
	target->queues_triggers = false;
	target->shared = ArrayGetNItems(1, ARR_DIMS(DatumGetArrayTypeP(target->sharers))) > 1;
}

/*
 * sync_target_load
 *		Returns what is known of the table of a subscription, and locks it.
 *
 * As the role that subscribed, with SPI connected.  What is known stays until the
 * next call; what may be different in each batch is in the current context.
 * Errors: 42704 the subscription is none of sync_table(), 42501 it is of another
 * role, or that may not act as the table's owner, or row security applies; 42P01
 * the table is gone, 55000 it cannot be kept equal any more.
 */
SyncTarget *
sync_target_load(Datum topic, Datum consumer_group)
{
	static CachedQuery query = {
		"select s.subscription_id, s.version, coalesce(b.role, fanout.subscriber(s)::oid, 0),"
		" coalesce(b.target, fanout.target_table(t)::oid, 0), t.floor, t.source_schema, t.source_table,"
		" t.unknown_columns = 'error',"
		" fanout.sync_sharers(t), coalesce(t.floor_xid, 0)"
		" from fanout.subscription s join fanout.sync_target t using (subscription_id)"
		" left join fanout.subscription_bound b using (subscription_id)"
		" where s.topic = $1 and s.consumer_group = $2"
	};
	Oid			types[] = {TEXTOID, TEXTOID};
	Datum		values[] = {topic, consumer_group};
	bool		isnull;
	SPITupleTable *result;
	int32		subscription_id;
	int32		version;
	Relation	rel;

	watch_catalogs();
	owner_execute(&query, 2, types, values, NULL);
	if (SPI_processed != 1)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("this subscription was not made by fanout.sync_table()")));
	result = SPI_tuptable;
	subscription_id = DatumGetInt32(query_value(0, 1, &isnull));
	version = DatumGetInt32(query_value(0, 2, &isnull));
	check_role(DatumGetObjectId(query_value(0, 3, &isnull)));
	rel = open_target(DatumGetObjectId(query_value(0, 4, &isnull)));
	check_rights(rel);
	if (!valid || current == NULL || current->subscription_id != subscription_id || current->version != version)
		remember_target(rel, subscription_id, version);
	read_state(current, result->vals[0], result->tupdesc);
	relation_close(rel, NoLock);
	return current;
}

/*
 * sync_target_check_name
 *		Raises an error if statements of this batch may have meant another table.
 *
 * A schema can be renamed although a table in it is locked, and another may have
 * got its name; then plans were made anew from their text.  The batch is undone.
 */
void
sync_target_check_name(const SyncTarget *target)
{
	AcceptInvalidationMessages();
	if (get_relname_relid(target->table, get_namespace_oid(target->schema, true)) != target->relid)
		ereport(ERROR,
				(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
				 errmsg("table %s was renamed while messages were applied to it", target->qualified)));
}

/* ---- what is recorded ---- */

/*
 * sync_target_set_source
 *		Records of which table it is a copy from now on.
 */
void
sync_target_set_source(SyncTarget *target, const char *schema, const char *table)
{
	static CachedQuery query = {
		"update fanout.sync_target set source_schema = $2, source_table = $3 where subscription_id = $1"
	};
	Oid			types[] = {INT4OID, TEXTOID, TEXTOID};
	Datum		values[] = {
		Int32GetDatum(target->subscription_id), CStringGetTextDatum(schema), CStringGetTextDatum(table)
	};

	owner_execute(&query, 3, types, values, NULL);
	target->source_schema = pstrdup(schema);
	target->source_table = pstrdup(table);
}

/*
 * sync_target_set_floor
 *		Records the sequence of a TRUNCATE: nothing older is applied any more.
 */
void
sync_target_set_floor(SyncTarget *target, int64 floor, uint64 xid)
{
	static CachedQuery query = {
		"update fanout.sync_target set floor = $2, floor_xid = nullif($3, 0) where subscription_id = $1"
	};
	Oid			types[] = {INT4OID, INT8OID, INT8OID};
	Datum		values[] = {
		Int32GetDatum(target->subscription_id), Int64GetDatum(floor), Int64GetDatum((int64) xid)
	};

	owner_execute(&query, 3, types, values, NULL);
	target->floor = floor;
	target->floor_xid = xid;
}

/* Records which columns messages set, and which of theirs the table lacks. */
static void
record_shape(const SyncTarget *target, Datum *ignored, int nignored)
{
	static CachedQuery query = {"select fanout.sync_set_columns($1, $2, $3, $4)"};
	Oid			types[] = {INT4OID, INT2ARRAYOID, TEXTARRAYOID, TEXTARRAYOID};
	Datum	   *attnums = palloc((target->ncolumns + 1) * sizeof(Datum));
	Datum	   *remotes = palloc((target->ncolumns + 1) * sizeof(Datum));
	Datum		values[4];
	int			n = 0;

	for (int i = -1; (i = bms_next_member(target->shape.set, i)) >= 0;)
	{
		attnums[n] = Int16GetDatum(target->columns[i].attnum);
		remotes[n++] = CStringGetTextDatum(target->columns[i].remote);
	}
	values[0] = Int32GetDatum(target->subscription_id);
	values[1] = PointerGetDatum(construct_array(attnums, n, INT2OID, 2, true, TYPALIGN_SHORT));
	values[2] = PointerGetDatum(construct_array(remotes, n, TEXTOID, -1, false, TYPALIGN_INT));
	values[3] = PointerGetDatum(construct_array(ignored, nignored, TEXTOID, -1, false, TYPALIGN_INT));
	recorded = true;
	owner_execute(&query, 4, types, values, NULL);
}

/* ---- members of rows ---- */

static bool
same_text(const JsonSlice *a, const JsonSlice *b)
{
	return a->len == b->len && memcmp(a->text, b->text, a->len) == 0;
}

/* Has the row the members of the latest one, in the same order? */
static bool
has_shape(const SyncShape *shape, const JsonSlice *row)
{
	JsonCursor	cursor;
	JsonSlice	name;
	JsonSlice	value;
	int			i;

	jsonscan_enter(row, &cursor);
	for (i = 0; jsonscan_member(&cursor, &name, &value) == JSON_FOUND; i++)
	{
		if (i >= shape->count || !same_text(&name, &shape->names[i]))
			return false;
	}
	return i == shape->count;
}

static void
copy_names(SyncShape *shape, const JsonSlice *row)
{
	JsonCursor	cursor;
	JsonSlice	name;
	JsonSlice	value;
	JsonStep	step;
	int			room = 16;

	shape->count = 0;
	shape->names = palloc(room * sizeof(JsonSlice));
	jsonscan_enter(row, &cursor);
	while ((step = jsonscan_member(&cursor, &name, &value)) == JSON_FOUND)
	{
		if (shape->count == room)
			shape->names = repalloc_huge(shape->names, (room *= 2) * sizeof(JsonSlice));
		name.text = pnstrdup(name.text, name.len);
		shape->names[shape->count++] = name;
	}
	if (step == JSON_MALFORMED)
		sync_refuse("its row is no JSON", "Only messages of pg_fanout can be applied to a table.");
}

static int
find_remote(const SyncTarget *target, const char *name)
{
	for (int i = 0; i < target->ncolumns; i++)
	{
		if (target->columns[i].remote != NULL && strcmp(target->columns[i].remote, name) == 0)
			return i;
	}
	return -1;
}

/*
 * Finds a column that was renamed here to what is a column's new name there: it
 * has that name, and the messages have the one no more by which it was known.
 */
static int
find_renamed(SyncTarget *target, const char *name)
{
	for (int i = 0; i < target->ncolumns; i++)
	{
		SyncColumn *column = &target->columns[i];

		if (column->remote == NULL || strcmp(column->name, name) != 0 || bms_is_member(i, target->shape.set))
			continue;
		column->remote = MemoryContextStrdup(target->context, name);
		return i;
	}
	return -1;
}

static void
set_member(SyncShape *shape, int member, int column)
{
	shape->columns[member] = column;
	if (column >= 0)
		shape->set = bms_add_member(shape->set, column);
}

/* Finds the columns that the members set: by their names there, then here. */
static void
map_members(SyncTarget *target, char **names)
{
	SyncShape  *shape = &target->shape;

	shape->set = NULL;
	shape->columns = palloc((shape->count + 1) * sizeof(int));
	for (int i = 0; i < shape->count; i++)
		set_member(shape, i, find_remote(target, names[i]));
	for (int i = 0; i < shape->count; i++)
	{
		if (shape->columns[i] < 0)
			set_member(shape, i, find_renamed(target, names[i]));
	}
}

static void
make_shape(SyncTarget *target, const JsonSlice *row)
{
	SyncShape  *shape = &target->shape;
	MemoryContext oldcontext;
	char	  **names;

	MemoryContextReset(shape->context);
	shape->count = -1;			/* not made, if an error comes */
	oldcontext = MemoryContextSwitchTo(shape->context);
	copy_names(shape, row);
	names = palloc((shape->count + 1) * sizeof(char *));
	for (int i = 0; i < shape->count; i++)
		names[i] = readjson_string(&shape->names[i]);
	map_members(target, names);
	MemoryContextSwitchTo(oldcontext);
}

/* Generated columns have their values from the table itself. */
static bool
is_generated(const SyncTarget *target, const char *name)
{
	for (int i = 0; i < target->desc->natts; i++)
	{
		Form_pg_attribute attr = TupleDescAttr(target->desc, i);

		if (!attr->attisdropped && attr->attgenerated != '\0' && strcmp(NameStr(attr->attname), name) == 0)
			return true;
	}
	return false;
}

/* The names of members that the table has no column for; *count: of these. */
static Datum *
unknown_names(const SyncTarget *target, int *count)
{
	const SyncShape *shape = &target->shape;
	Datum	   *names = palloc((shape->count + 1) * sizeof(Datum));

	*count = 0;
	for (int i = 0; i < shape->count && *count < MAX_NAMES; i++)
	{
		char	   *name = readjson_string(&shape->names[i]);

		if (shape->columns[i] < 0 && !is_generated(target, name))
			names[(*count)++] = CStringGetTextDatum(name);
	}
	return names;
}

/*
 * sync_target_set_shape
 *		Finds out which columns a row sets, and records it when that is new.
 *
 * As the role that subscribed.  Errors: 42703 if the row has a column that the
 * table lacks, and the subscription refuses that.
 */
void
sync_target_set_shape(SyncTarget *target, const JsonSlice *row)
{
	SyncShape  *shape = &target->shape;
	Datum	   *ignored;
	int			n;

	if (has_shape(shape, row))
		return;
	make_shape(target, row);
	ignored = unknown_names(target, &n);
	if (n > 0 && target->refuses_unknown)
	{
		recorded = true;		/* a column's new name may be, in this row */
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_COLUMN),
				 errmsg("message cannot be applied: table %s has no column for \"%s\"",
						target->qualified, TextDatumGetCString(ignored[0])),
				 errhint("Add the column, or name it among \"columns\" of fanout.sync_table().")));
	}
	record_shape(target, ignored, n);
}

/* ---- values ---- */

static void
begin_values(const SyncTarget *target, SyncValues *values)
{
	values->columns = NULL;
	values->values = palloc0((target->ncolumns + 1) * sizeof(Datum));
	values->nulls = palloc0((target->ncolumns + 1) * sizeof(bool));
}

/*
 * sync_target_hash_key
 *		Sets the hash by which a key is remembered; values by index of the column.
 */
void
sync_target_hash_key(const SyncTarget *target, const Datum *values, const bool *nulls, SyncHash *hash)
{
	StringInfoData text;

	initStringInfo(&text);
	for (int i = 0; i < target->nkeys; i++)
	{
		appendStringInfoChar(&text, i == 0 ? '[' : ',');
		rowjson_append_value(&text, target->key_text, i, values[target->keys[i]], nulls[target->keys[i]]);
	}
	sync_rows_hash(text.data, hash);
	pfree(text.data);
}

static void
check_key(const SyncTarget *target, const SyncValues *values)
{
	for (int i = 0; i < target->nkeys; i++)
	{
		const SyncColumn *key = &target->columns[target->keys[i]];

		if (!bms_is_member(target->keys[i], values->columns))
			sync_refuse(psprintf("its row has no column \"%s\"", key->remote ? key->remote : key->name),
						"The key of the table must be among the columns that are captured.");
		if (values->nulls[target->keys[i]])
			sync_refuse(psprintf("its row has no value in the column \"%s\" of the key", key->remote),
						"Use a key whose columns are not null at the source.");
	}
}

/*
 * sync_target_key_slices
 *		Finds the key's columns in a row, by name, in the key's order.
 */
void
sync_target_key_slices(const SyncTarget *target, const JsonSlice *row, JsonSlice *slices)
{
	JsonCursor	cursor;
	JsonSlice	name;
	JsonSlice	value;

	for (int i = 0; i < target->nkeys; i++)
		slices[i].text = NULL;
	jsonscan_enter(row, &cursor);
	while (jsonscan_member(&cursor, &name, &value) == JSON_FOUND)
	{
		char	   *text = readjson_string(&name);

		for (int i = 0; i < target->nkeys; i++)
		{
			const char *remote = target->columns[target->keys[i]].remote;

			if (remote != NULL && strcmp(remote, text) == 0)
				slices[i] = value;
		}
	}
	for (int i = 0; i < target->nkeys; i++)
	{
		const SyncColumn *key = &target->columns[target->keys[i]];

		if (slices[i].text == NULL)
			sync_refuse(psprintf("its row has no column \"%s\"", key->remote ? key->remote : key->name),
						"The key of the table must be among the columns that are captured.");
	}
}

/*
 * sync_target_read_row
 *		Reads the values of a row whose shape was set.
 *
 * As the table's owner, since the types' input functions run.  In the current
 * context.  Errors: those of the types, 22023 if a column of the key is missing
 * or null.
 */
void
sync_target_read_row(SyncTarget *target, const JsonSlice *row, SyncValues *values)
{
	SyncShape  *shape = &target->shape;
	int			settings = textform_begin_input(target->text_settings);
	JsonCursor	cursor;
	JsonSlice	name;
	JsonSlice	value;

	begin_values(target, values);
	values->columns = bms_copy(shape->set);
	jsonscan_enter(row, &cursor);
	for (int i = 0; jsonscan_member(&cursor, &name, &value) == JSON_FOUND; i++)
	{
		int			column = shape->columns[i];

		if (column >= 0)
			values->values[column] = readjson_value(target->columns[column].reader, &value, &values->nulls[column]);
	}
	textform_end_input(settings);
	check_key(target, values);
	sync_target_hash_key(target, values->values, values->nulls, &values->hash);
}

/*
 * sync_target_read_key
 *		Reads the values of a key alone, from slices in the key's order.  As
 *		sync_target_read_row().
 */
void
sync_target_read_key(const SyncTarget *target, const JsonSlice *slices, SyncValues *values)
{
	int			settings = textform_begin_input(target->text_settings);

	begin_values(target, values);
	values->columns = sync_target_key_set(target);
	for (int i = 0; i < target->nkeys; i++)
	{
		int			column = target->keys[i];

		values->values[column] = readjson_value(target->columns[column].reader, &slices[i], &values->nulls[column]);
	}
	textform_end_input(settings);
	check_key(target, values);
	sync_target_hash_key(target, values->values, values->nulls, &values->hash);
}

/*
 * sync_target_key_set
 *		Returns the columns of the key, in the current context.
 */
Bitmapset *
sync_target_key_set(const SyncTarget *target)
{
	Bitmapset  *keys = NULL;

	for (int i = 0; i < target->nkeys; i++)
		keys = bms_add_member(keys, target->keys[i]);
	return keys;
}
