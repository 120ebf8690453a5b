/*-------------------------------------------------------------------------
 *
 * cache.c
 *		What a capture trigger needs to know of its table and topic, cached.
 *
 * A capture is described by nothing but its trigger: arguments (topic, then
 * pairs of option and value) and the table it stands on.  Here that is
 * resolved once per session into attribute numbers, rendering plans and
 * constant texts, and forgotten whenever the table, the table above it, a
 * schema's name or the set of topics changes.
 *
 * Entries are only marked invalid by the callbacks, since those can come at
 * any catalog access.  At the next use another entry takes the place of an
 * invalid one, which is freed when its last user has gone: rendering a row can
 * run anything that a type's output function does, and that may come back
 * here, or make a table, a schema or a topic another one.
 *
 * Columns named in the options are numbers in fanout.captured_column, so that
 * they are the same columns whatever they are called by now.  Where the numbers
 * are missing (a trigger made while event triggers were off), names count, and
 * an excluded name that no column has leaves nothing of the row in the message.
 * An excluded column never gets into a message, and so into no key either.
 *
 * Nothing here checks rights: whoever may write the table makes messages, and
 * needs no right on the tables of pg_fanout for it.  So no SQL is run, only
 * scans by hand, with the newest snapshot: a REPEATABLE READ transaction must
 * find the topic of a trigger that was created after its own snapshot.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <ctype.h>

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/relation.h"
#include "access/table.h"
#include "catalog/index.h"
#include "catalog/indexing.h"
#include "catalog/namespace.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_trigger.h"
#include "catalog/pg_type.h"
#include "commands/dbcommands.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/hsearch.h"
#include "utils/inval.h"
#include "utils/json.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

#include "capture/cache.h"
#include "server/compat.h"
#include "server/tables.h"

/* Columns of fanout.topic. */
#define TOPIC_ID		1
#define TOPIC_NAME		2
#define TOPIC_FORMAT	3
#define TOPIC_DROPPING	6

typedef struct TopicEntry
{
	char		name[256];		/* hash key */
	TopicInfo	info;
} TopicEntry;

const char *const capture_op_code[CAPTURE_OPS] = {"c", "u", "d", "t", "r"};
const char *const topic_format_name[] = {"debezium", "row", "cloudevents"};

static const char *const operation_name[CAPTURE_OPS] = {"insert", "update", "delete", "truncate", "read"};

/* Columns of fanout.captured_column. */
#define COLUMN_ENTITY	1
#define COLUMN_TRIGGER	2
#define COLUMN_OPTION	3
#define COLUMN_ATTNUM	5
#define COLUMN_NAME		6

/* An option that lists columns, as numbers of the captured table. */
typedef struct ColumnList
{
	bool		given;
	bool		unknown;		/* it names one that is not there */
	int			count;
	AttrNumber	attnums[MaxHeapAttributeNumber];
} ColumnList;

/* One entry of the cache; info is replaced, never changed. */
typedef struct CaptureEntry
{
	Oid			trigger;		/* hash key */
	CaptureInfo *info;
} CaptureEntry;

static HTAB *captures = NULL;
static HTAB *topics = NULL;
static uint64 invalidations = 0;	/* calls of the callbacks */

/* fanout.topic, when a topic was looked up; 0: none was */
static Oid	topic_relid;

/* ---- invalidation ---- */

static void
forget_topics(void)
{
	if (topics != NULL)
		hash_destroy(topics);
	topics = NULL;
}

static void
invalidate_captures(Oid relid)
{
	HASH_SEQ_STATUS scan;
	CaptureEntry *entry;

	invalidations++;
	if (captures == NULL)
		return;
	hash_seq_init(&scan, captures);
	while ((entry = hash_seq_search(&scan)) != NULL)
	{
		CaptureInfo *info = entry->info;

		if (!OidIsValid(relid) || info->relid == relid || info->entity == relid)
			info->valid = false;
	}
}

/*
 * All at once: without topic_relid nothing would tell that the topics, those in
 * the captures among them, have changed.
 */
static void
forget_everything(void)
{
	forget_topics();
	topic_relid = InvalidOid;
	invalidate_captures(InvalidOid);
}

static void
relation_changed(Datum arg, Oid relid)
{
	if (!OidIsValid(relid) || relid == topic_relid)
		forget_everything();
	else
		invalidate_captures(relid);
}

static void
schema_changed(Datum arg, int cacheid, uint32 hashvalue)
{
	forget_everything();
}

static void
init_caches(void)
{
	HASHCTL		ctl;
	static bool registered = false;

	if (!registered)
	{
		CacheRegisterRelcacheCallback(relation_changed, (Datum) 0);
		CacheRegisterSyscacheCallback(NAMESPACEOID, schema_changed, (Datum) 0);
		registered = true;
	}
	if (captures == NULL)
	{
		memset(&ctl, 0, sizeof(ctl));
		ctl.keysize = sizeof(Oid);
		ctl.entrysize = sizeof(CaptureEntry);
		captures = hash_create("pg_fanout captures", 32, &ctl, HASH_ELEM | HASH_BLOBS);
	}
	if (topics == NULL)
	{
		memset(&ctl, 0, sizeof(ctl));
		ctl.keysize = sizeof(((TopicEntry *) 0)->name);
		ctl.entrysize = sizeof(TopicEntry);
		topics = hash_create("pg_fanout topics", 32, &ctl, HASH_ELEM | HASH_STRINGS);
	}
}

/* ---- topics ---- */

/* Makes every session look topics up again once this transaction commits. */
void
cache_invalidate_topics(void)
{
	CacheInvalidateRelcacheByRelid(tables_oid("topic"));
}

static TopicFormat
parse_format(const char *format)
{
	if (strcmp(format, "row") == 0)
		return FORMAT_ROW;
	if (strcmp(format, "cloudevents") == 0)
		return FORMAT_CLOUDEVENTS;
	return FORMAT_DEBEZIUM;
}

static bool
read_topic(Relation rel, const char *topic, TopicInfo *info)
{
	ScanKeyData key;
	Snapshot	snapshot = RegisterSnapshot(GetLatestSnapshot());
	SysScanDesc scan;
	HeapTuple	tuple;
	bool		found = false;

	ScanKeyInit(&key, TOPIC_NAME, BTEqualStrategyNumber, F_TEXTEQ,
				CStringGetTextDatum(topic));
	scan = systable_beginscan(rel, InvalidOid, false, snapshot, 1, &key);
	if (HeapTupleIsValid(tuple = systable_getnext(scan)))
	{
		TupleDesc	desc = RelationGetDescr(rel);
		bool		isnull;

		found = !DatumGetBool(heap_getattr(tuple, TOPIC_DROPPING, desc, &isnull));
		info->topic_id = DatumGetInt32(heap_getattr(tuple, TOPIC_ID, desc, &isnull));
		info->format = parse_format(TextDatumGetCString(heap_getattr(tuple, TOPIC_FORMAT, desc, &isnull)));
	}
	systable_endscan(scan);
	UnregisterSnapshot(snapshot);
	return found;
}

/* Finds a topic, in the cache or in its table.  Returns false if there is none. */
static bool
find_topic(const char *topic, TopicInfo *info)
{
	TopicEntry *entry;
	Relation	rel;
	bool		found;

	init_caches();
	if (strlen(topic) < sizeof(entry->name))
	{
		entry = hash_search(topics, topic, HASH_FIND, NULL);
		if (entry != NULL)
		{
			*info = entry->info;
			return true;
		}
	}

	/*
	 * The lock is kept: fanout.topic_changed() of a topic being dropped needs
	 * no conflict with it, but DROP EXTENSION does.
	 */
	topic_relid = tables_oid("topic");
	rel = table_open(topic_relid, AccessShareLock);
	found = read_topic(rel, topic, info);
	table_close(rel, NoLock);
	if (!found)
		return false;

	/* opening the table may have run the callbacks */
	init_caches();
	if (strlen(topic) < sizeof(entry->name))
	{
		entry = hash_search(topics, topic, HASH_ENTER, NULL);
		entry->info = *info;
	}
	return true;
}

/* Returns what is known of a topic.  Raises an error (42704) if there is none. */
TopicInfo
cache_topic(const char *topic)
{
	TopicInfo	info;

	if (!find_topic(topic, &info))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("topic \"%s\" does not exist", topic),
				 errhint("Declare it first, with fanout.declare_topic() or fanout.declare_binding().")));
	return info;
}

/* ---- triggers ---- */

char	  **
cache_trigger_arguments(Oid trigger, int *nargs, Oid *relid, Oid *parent, char **name)
{
	Relation	rel = table_open(TriggerRelationId, AccessShareLock);
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;
	char	  **args = NULL;

	ScanKeyInit(&key, Anum_pg_trigger_oid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(trigger));
	scan = systable_beginscan(rel, TriggerOidIndexId, true, NULL, 1, &key);
	if (HeapTupleIsValid(tuple = systable_getnext(scan)))
	{
		Form_pg_trigger form = (Form_pg_trigger) GETSTRUCT(tuple);
		bool		isnull;
		bytea	   *packed = DatumGetByteaPP(heap_getattr(tuple, Anum_pg_trigger_tgargs,
														  RelationGetDescr(rel), &isnull));
		char	   *next = VARDATA_ANY(packed);

		*nargs = form->tgnargs;
		*relid = form->tgrelid;
		*parent = form->tgparentid;
		*name = pstrdup(NameStr(form->tgname));
		args = palloc((form->tgnargs + 1) * sizeof(char *));
		for (int i = 0; i < form->tgnargs; i++)
		{
			args[i] = pstrdup(next);
			next += strlen(next) + 1;
		}
	}
	systable_endscan(scan);
	table_close(rel, AccessShareLock);
	return args;
}

/* The table on which the trigger was created that this one is a clone of; its name there. */
static Oid
captured_entity(Oid trigger, char **name)
{
	Oid			relid = InvalidOid;
	Oid			parent = trigger;

	while (OidIsValid(parent))
	{
		int			nargs;
		Oid			next = InvalidOid;

		if (cache_trigger_arguments(parent, &nargs, &relid, &next, name) == NULL)
			break;
		parent = next;
	}
	return relid;
}

/* ---- columns ---- */

static bool
can_render(Form_pg_attribute attr)
{
	return !attr->attisdropped && !PGF_IS_VIRTUAL_GENERATED(attr);
}

static bool
has_attnum(const AttrNumber *attnums, int n, AttrNumber attnum)
{
	for (int i = 0; i < n; i++)
	{
		if (attnums[i] == attnum)
			return true;
	}
	return false;
}

/* Each column counts once: a trigger made by hand may repeat it. */
static void
add_column(ColumnList *list, TupleDesc desc, AttrNumber attnum)
{
	if (attnum > 0 && attnum <= desc->natts && !TupleDescAttr(desc, attnum - 1)->attisdropped &&
		!has_attnum(list->attnums, list->count, attnum))
		list->attnums[list->count++] = attnum;
}

/* Adds the columns that a text array names, in its external form. */
static void
add_named(ColumnList *list, Relation entity, const char *array)
{
	ArrayType  *parsed = DatumGetArrayTypeP(OidFunctionCall3(F_ARRAY_IN, CStringGetDatum(array),
															 ObjectIdGetDatum(TEXTOID), Int32GetDatum(-1)));
	Datum	   *elements;
	bool	   *nulls;
	int			n;

	deconstruct_array(parsed, TEXTOID, -1, false, TYPALIGN_INT, &elements, &nulls, &n);
	for (int i = 0; i < n; i++)
	{
		AttrNumber	attnum = nulls[i] ? InvalidAttrNumber :
			get_attnum(RelationGetRelid(entity), TextDatumGetCString(elements[i]));

		if (attnum <= 0)
			list->unknown = true;
		else
			add_column(list, RelationGetDescr(entity), attnum);
	}
}

/*
 * The number of a recorded column.  If it is gone, another one of its name is
 * meant, so that what was excluded stays so.
 */
static AttrNumber
recorded_attnum(HeapTuple tuple, TupleDesc desc, Relation entity)
{
	bool		isnull;
	AttrNumber	attnum = DatumGetInt16(heap_getattr(tuple, COLUMN_ATTNUM, desc, &isnull));
	TupleDesc	columns = RelationGetDescr(entity);

	if (attnum > 0 && attnum <= columns->natts && !TupleDescAttr(columns, attnum - 1)->attisdropped)
		return attnum;
	return get_attnum(RelationGetRelid(entity),
					  TextDatumGetCString(heap_getattr(tuple, COLUMN_NAME, desc, &isnull)));
}

/*
 * Adds the columns whose numbers were recorded when the capture was declared.
 * Returns whether there are any.
 */
static bool
add_recorded(ColumnList *list, Relation entity, const char *trigger, const char *option)
{
	Relation	rel = table_open(tables_oid("captured_column"), AccessShareLock);
	Snapshot	snapshot = RegisterSnapshot(GetLatestSnapshot());
	ScanKeyData keys[3];
	SysScanDesc scan;
	HeapTuple	tuple;
	bool		any = false;

	ScanKeyInit(&keys[0], COLUMN_ENTITY, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(RelationGetRelid(entity)));
	ScanKeyInit(&keys[1], COLUMN_TRIGGER, BTEqualStrategyNumber, F_TEXTEQ, CStringGetTextDatum(trigger));
	ScanKeyInit(&keys[2], COLUMN_OPTION, BTEqualStrategyNumber, F_TEXTEQ, CStringGetTextDatum(option));
	/* by its primary key, which gives the columns in their order */
	(void) RelationGetIndexList(rel);
	scan = systable_beginscan(rel, rel->rd_pkindex, OidIsValid(rel->rd_pkindex), snapshot, 3, keys);
	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
	{
		add_column(list, RelationGetDescr(entity),
				   recorded_attnum(tuple, RelationGetDescr(rel), entity));
		any = true;
	}
	systable_endscan(scan);
	UnregisterSnapshot(snapshot);
	table_close(rel, NoLock);
	return any;
}

/*
 * An option of the capture that lists columns.  They are recorded under the name
 * of the captured table's own trigger.
 */
static ColumnList *
column_option(Trigger *trigger, const char *trigger_name, Relation entity, const char *name)
{
	const char *array = cache_option(trigger->tgargs, trigger->tgnargs, name);
	ColumnList *list = palloc0(sizeof(ColumnList));

	list->given = (array != NULL);
	if (list->given && !add_recorded(list, entity, trigger_name, name))
		add_named(list, entity, array);
	return list;
}

/* Makes numbers of the captured table's columns those of a partition of it. */
static void
map_columns(ColumnList *list, Relation entity, Relation rel)
{
	for (int i = 0; i < list->count && entity != rel; i++)
		list->attnums[i] = get_attnum(RelationGetRelid(rel),
									  NameStr(TupleDescAttr(RelationGetDescr(entity), list->attnums[i] - 1)->attname));
}

static bool
excludes(const ColumnList *exclude, AttrNumber attnum)
{
	return exclude->unknown || has_attnum(exclude->attnums, exclude->count, attnum);
}

/* The columns of the message, as numbers of rel. */
static ColumnList *
message_columns(const ColumnList *columns, const ColumnList *exclude, TupleDesc desc)
{
	ColumnList *list = palloc0(sizeof(ColumnList));

	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute attr = TupleDescAttr(desc, i);

		if (can_render(attr) && !excludes(exclude, attr->attnum) &&
			(!columns->given || has_attnum(columns->attnums, columns->count, attr->attnum)))
			list->attnums[list->count++] = attr->attnum;
	}
	return list;
}

/* The columns of an index; none if one of them is excluded. */
static ColumnList *
index_columns(Relation entity, Oid indexoid, const ColumnList *exclude)
{
	ColumnList *list = palloc0(sizeof(ColumnList));
	Relation	index = index_open(indexoid, AccessShareLock);
	int			n = IndexRelationGetNumberOfKeyAttributes(index);

	for (int i = 0; i < n; i++)
	{
		AttrNumber	attnum = index->rd_index->indkey.values[i];

		if (excludes(exclude, attnum))
		{
			list->count = 0;
			break;
		}
		add_column(list, RelationGetDescr(entity), attnum);
	}
	index_close(index, AccessShareLock);
	return list;
}

/*
 * The primary key's index.  Before PostgreSQL 17 rd_pkindex leaves out a
 * deferrable one, which is good enough here: nothing depends on its being
 * unique at every moment.
 */
static Oid
primary_index(Relation rel, List *indexes)
{
	ListCell   *lc;

	foreach(lc, indexes)
	{
		Relation	index = index_open(lfirst_oid(lc), AccessShareLock);
		bool		primary = index->rd_index->indisprimary;

		index_close(index, AccessShareLock);
		if (primary)
			return lfirst_oid(lc);
	}
	return InvalidOid;
}

/* The columns of the primary key, else those of the replica identity, else none. */
static ColumnList *
default_key(Relation entity, const ColumnList *exclude)
{
	List	   *indexes = RelationGetIndexList(entity); /* sets rd_replidindex */
	Oid			primary = primary_index(entity, indexes);
	ColumnList *list = palloc0(sizeof(ColumnList));

	if (OidIsValid(primary))
		list = index_columns(entity, primary, exclude);
	if (list->count == 0 && OidIsValid(entity->rd_replidindex))
		list = index_columns(entity, entity->rd_replidindex, exclude);
	return list;
}

/* The columns of an explicit key that can be rendered, and may be. */
static ColumnList *
explicit_key(const ColumnList *key, const ColumnList *exclude, TupleDesc desc)
{
	ColumnList *list = palloc0(sizeof(ColumnList));

	for (int i = 0; i < key->count; i++)
	{
		if (can_render(TupleDescAttr(desc, key->attnums[i] - 1)) && !excludes(exclude, key->attnums[i]))
			list->attnums[list->count++] = key->attnums[i];
	}
	return list;
}

/* ---- texts ---- */

static void
put_string(JsonbParseState **state, JsonbIteratorToken token, const char *string)
{
	JsonbValue	v;

	v.type = jbvString;
	v.val.string.val = unconstify(char *, string);
	v.val.string.len = strlen(string);
	pushJsonbValue(state, token, &v);
}

static void
put_header(JsonbParseState **state, const char *name, const char *value)
{
	put_string(state, WJB_KEY, name);
	put_string(state, WJB_VALUE, value);
}

static void
put_true(JsonbParseState **state, const char *name)
{
	JsonbValue	v = {.type = jbvBool};

	v.val.boolean = true;
	put_string(state, WJB_KEY, name);
	pushJsonbValue(state, WJB_VALUE, &v);
}

static void
put_optional(JsonbParseState **state, const char *name, const char *value)
{
	if (value != NULL)
		put_header(state, name, value);
}

Jsonb *
cache_headers(const ChangeHeaders *headers)
{
	JsonbParseState *state = NULL;

	pushJsonbValue(&state, WJB_BEGIN_OBJECT, NULL);
	put_header(&state, "op", headers->op);
	put_header(&state, "schema", headers->schema);
	put_header(&state, "table", headers->table);
	put_header(&state, "format", headers->format);
	put_optional(&state, "old_key", headers->old_key);
	put_optional(&state, "key_columns", headers->key_columns);
	put_optional(&state, "via", headers->via);
	if (headers->taken)
		put_true(&state, "taken");
	return JsonbValueToJsonb(pushJsonbValue(&state, WJB_END_OBJECT, NULL));
}

void
cache_append_segment(StringInfo out, const char *name)
{
	const char *utf8 = name;

	if (GetDatabaseEncoding() != PG_SQL_ASCII)
		utf8 = (char *) pg_do_encoding_conversion((unsigned char *) unconstify(char *, name), strlen(name),
												  GetDatabaseEncoding(), PG_UTF8);
	appendStringInfoChar(out, '/');
	for (const char *c = utf8; *c != '\0'; c++)
	{
		if (isalnum((unsigned char) *c) && !IS_HIGHBIT_SET(*c))
			appendStringInfoChar(out, *c);
		else if (strchr("-._~", *c) != NULL)
			appendStringInfoChar(out, *c);
		else
			appendStringInfo(out, "%%%02X", (unsigned char) *c);
	}
}

static char *
uri_of(const char *database, const char *schema, const char *table)
{
	StringInfoData path;
	StringInfoData json;

	initStringInfo(&path);
	cache_append_segment(&path, database);
	cache_append_segment(&path, schema);
	cache_append_segment(&path, table);
	initStringInfo(&json);
	escape_json(&json, path.data);
	return json.data;
}

/* Texts that only depend on the table's name. */
static void
describe_entity(CaptureInfo *info, Relation entity)
{
	char	   *schema = get_namespace_name(RelationGetNamespace(entity));
	char	   *table = RelationGetRelationName(entity);
	char	   *database = get_database_name(MyDatabaseId);
	StringInfoData source;
	ChangeHeaders headers = {
		.schema = schema,.table = table,.format = topic_format_name[info->topic.format]
	};

	initStringInfo(&source);
	appendStringInfoString(&source, "{\"connector\":\"pg_fanout\",\"version\":\"" PG_FANOUT_VERSION "\",\"db\":");
	escape_json(&source, database);
	appendStringInfoString(&source, ",\"schema\":");
	escape_json(&source, schema);
	appendStringInfoString(&source, ",\"table\":");
	escape_json(&source, table);
	info->source = source.data;

	info->schema = schema;
	info->table = pstrdup(table);
	info->uri = uri_of(database, schema, table);

	for (int op = 0; op < CAPTURE_OPS; op++)
	{
		info->type[op] = psprintf("%s.%s.%s", schema, table, operation_name[op]);
		headers.op = capture_op_code[op];
		info->headers[op] = cache_headers(&headers);
	}
}

const char *
cache_option(char **args, int nargs, const char *name)
{
	for (int i = 1; i + 1 < nargs; i += 2)
	{
		if (strcmp(args[i], name) == 0)
			return args[i + 1];
	}
	return NULL;
}

/* ---- a key that is unique only in the end: see taken.c ---- */

/*
 * Tells whether an index keeps the key unique: that of a unique or exclusion constraint, all
 * columns of which are among the key's.
 */
static bool
is_on_key(Relation index, const ColumnList *key)
{
	Form_pg_index form = index->rd_index;

	if ((!form->indisunique && !form->indisexclusion) || !form->indisvalid ||
		!heap_attisnull(index->rd_indextuple, Anum_pg_index_indpred, NULL))
		return false;
	for (int i = 0; i < form->indnkeyatts; i++)
	{
		if (!has_attnum(key->attnums, key->count, form->indkey.values[i]))
			return false;
	}
	return true;
}

/*
 * Returns the unique index by which a key is unique only when the transaction or the
 * statement ends; InvalidOid: it is unique at each moment, or never.
 */
static Oid
deferrable_index(Relation rel, const ColumnList *key)
{
	List	   *indexes = RelationGetIndexList(rel);
	ListCell   *cell;
	Oid			deferrable = InvalidOid;
	bool		immediate = false;

	foreach(cell, indexes)
	{
		Relation	index = index_open(lfirst_oid(cell), AccessShareLock);

		if (is_on_key(index, key) && index->rd_index->indimmediate)
			immediate = true;
		else if (is_on_key(index, key))
			deferrable = RelationGetRelid(index);
		index_close(index, AccessShareLock);
	}
	list_free(indexes);
	return immediate ? InvalidOid : deferrable;
}

/* Is it the trigger of the same capture that tells of rows which leave the filter? */
static bool
tells_of_leaving(const Trigger *trigger, const Trigger *one)
{
	const char *sent_as = cache_option(trigger->tgargs, trigger->tgnargs, "sent_as");

	return trigger->tgfoid == one->tgfoid && trigger->tgnargs > 0 && trigger->tgqual != NULL &&
		strcmp(trigger->tgargs[0], one->tgargs[0]) == 0 &&
		cache_option(trigger->tgargs, trigger->tgnargs, "idle") == NULL &&
		sent_as != NULL && strcmp(sent_as, "delete") == 0;
}

/* Returns the condition's parts, but for the call of fanout.count_change(). */
static List *
condition_parts(const Trigger *trigger)
{
	List	   *parts = make_ands_implicit(stringToNode(trigger->tgqual));

	return parts != NIL && cache_is_count(llast(parts)) ? list_delete_last(parts) : parts;
}

/*
 * Returns the condition that a row must meet to be among those that the capture sends,
 * over OLD and NEW of which either may be the row, as the server writes expressions;
 * NULL: all rows are sent.  Where "when" is given, too, only the trigger of updates that
 * take a row out of the filter tells which part is the filter: its last one.  If there
 * is none, the condition counts as a whole.
 */
static char *
row_filter(Relation rel, Trigger *trigger)
{
	TriggerDesc *triggers = CopyTriggerDesc(rel->trigdesc);

	if (cache_option(trigger->tgargs, trigger->tgnargs, "where") == NULL || trigger->tgqual == NULL)
		return NULL;
	for (int i = 0; triggers != NULL && i < triggers->numtriggers; i++)
	{
		List	   *parts;

		if (!tells_of_leaving(&triggers->triggers[i], trigger))
			continue;
		parts = condition_parts(&triggers->triggers[i]);
		if (parts != NIL && IsA(llast(parts), BooleanTest) &&
			llast_node(BooleanTest, parts)->booltesttype == IS_NOT_TRUE)
			return nodeToString(llast_node(BooleanTest, parts)->arg);
	}
	return nodeToString(make_ands_explicit(condition_parts(trigger)));
}

/* ---- one capture ---- */

static AttrNumber *
keep_attnums(const ColumnList *list, MemoryContext context)
{
	AttrNumber *attnums = MemoryContextAlloc(context, (list->count + 1) * sizeof(AttrNumber));

	memcpy(attnums, list->attnums, list->count * sizeof(AttrNumber));
	return attnums;
}

/* The names of the key's columns as a JSON array, in the context. */
static char *
name_columns(const ColumnList *list, TupleDesc desc, MemoryContext context)
{
	StringInfoData names;

	initStringInfo(&names);
	for (int i = 0; i < list->count; i++)
	{
		appendStringInfoChar(&names, i == 0 ? '[' : ',');
		escape_json(&names, NameStr(TupleDescAttr(desc, list->attnums[i] - 1)->attname));
	}
	appendStringInfoChar(&names, ']');
	return MemoryContextStrdup(context, names.data);
}

/*
 * Plans message and key.  Called in a scratch context: the lists of a wide table
 * are large, and the cache lives as long as the session.
 */
static void
plan_columns(CaptureInfo *info, Relation rel, Relation entity, Trigger *trigger, const char *trigger_name)
{
	TupleDesc	desc = RelationGetDescr(rel);
	ColumnList *columns = column_option(trigger, trigger_name, entity, "columns");
	ColumnList *exclude = column_option(trigger, trigger_name, entity, "exclude");
	ColumnList *key = column_option(trigger, trigger_name, entity, "key");
	char	   *filter;

	key = key->given ? explicit_key(key, exclude, RelationGetDescr(entity)) : default_key(entity, exclude);
	map_columns(columns, entity, rel);
	map_columns(exclude, entity, rel);
	map_columns(key, entity, rel);

	columns = message_columns(columns, exclude, desc);
	info->row = rowjson_plan(desc, columns->attnums, columns->count, info->context);
	info->nkeys = key->count;
	info->key_columns = name_columns(key, desc, info->context);
	info->keys = keep_attnums(key, info->context);
	info->key = rowjson_plan(desc, key->attnums, key->count, info->context);
	info->key_index = deferrable_index(rel, key);
	filter = OidIsValid(info->key_index) ? row_filter(rel, trigger) : NULL;
	info->filter = (filter != NULL) ? MemoryContextStrdup(info->context, filter) : NULL;
}

/* What the messages of updates tell of, if it is not an update; else -1. */
static int
sent_as(Trigger *trigger)
{
	const char *operation = cache_option(trigger->tgargs, trigger->tgnargs, "sent_as");

	if (operation != NULL && strcmp(operation, operation_name[OP_INSERT]) == 0)
		return OP_INSERT;
	if (operation != NULL && strcmp(operation, operation_name[OP_DELETE]) == 0)
		return OP_DELETE;
	return -1;
}

/* By name, which needs no right on the schema. */
bool
cache_is_count(Node *condition)
{
	Oid			function;
	char	   *name;
	char	   *schema;

	if (!IsA(condition, FuncExpr))
		return false;
	function = ((FuncExpr *) condition)->funcid;
	name = get_func_name(function);
	schema = get_namespace_name(get_func_namespace(function));
	return name != NULL && strcmp(name, "count_change") == 0 &&
		schema != NULL && strcmp(schema, "fanout") == 0;
}

/* Does the trigger's condition end with the call of fanout.count_change()? */
static bool
is_counted(Trigger *trigger)
{
	if (trigger->tgqual == NULL)
		return false;
	return cache_is_count(llast(make_ands_implicit(stringToNode(trigger->tgqual))));
}

/*
 * Tells whether the trigger is one that fanout.capture(replace => true) had no use
 * for.  Its condition is false now, so what it fires for was queued, and counted,
 * before, by the statement that is still running.
 */
static bool
is_idle(Trigger *trigger)
{
	return cache_option(trigger->tgargs, trigger->tgnargs, "idle") != NULL;
}

/*
 * Declares the topic of a trigger that came here without it, by a dump of the
 * schema alone, as it was declared there.  By a function that runs with the
 * rights of pg_fanout: whoever writes to the table has none.
 */
static void
declare_topic(Trigger *trigger)
{
	const char *format = cache_option(trigger->tgargs, trigger->tgnargs, "format");
	const char *on_exhausted = cache_option(trigger->tgargs, trigger->tgnargs, "on_exhausted");
	Oid			types[3] = {TEXTOID, TEXTOID, TEXTOID};
	Oid			function = GetSysCacheOid3(PROCNAMEARGSNSP, Anum_pg_proc_oid,
										   CStringGetDatum("declare_captured_topic"),
										   PointerGetDatum(buildoidvector(types, 3)),
										   ObjectIdGetDatum(get_namespace_oid("fanout", false)));

	OidFunctionCall3(function,
					 CStringGetTextDatum(trigger->tgargs[0]),
					 CStringGetTextDatum(format != NULL ? format : "debezium"),
					 CStringGetTextDatum(on_exhausted != NULL ? on_exhausted : "hold"));
}

/* Returns the topic that a trigger names, which it declares if there is none. */
static TopicInfo
topic_of_trigger(Trigger *trigger)
{
	TopicInfo	info;

	if (find_topic(trigger->tgargs[0], &info))
		return info;
	declare_topic(trigger);
	return cache_topic(trigger->tgargs[0]);
}

static void
plan_capture(CaptureInfo *info, Relation rel, Trigger *trigger, const char *trigger_name)
{
	const char *old_row = cache_option(trigger->tgargs, trigger->tgnargs, "old_row");
	Relation	entity = relation_open(info->entity, AccessShareLock);
	MemoryContext scratch = AllocSetContextCreate(CurrentMemoryContext, "pg_fanout plan",
												  ALLOCSET_DEFAULT_SIZES);
	MemoryContext oldcontext = MemoryContextSwitchTo(scratch);

	plan_columns(info, rel, info->entity == info->relid ? rel : entity, trigger, trigger_name);
	info->counted = is_counted(trigger) || is_idle(trigger);
	MemoryContextSwitchTo(info->context);
	describe_entity(info, entity);
	MemoryContextSwitchTo(oldcontext);
	MemoryContextDelete(scratch);
	info->old_row = (old_row != NULL && strcmp(old_row, "true") == 0);
	info->sent_as = sent_as(trigger);
	relation_close(entity, AccessShareLock);
}

/*
 * Returns the trigger as it is now, in the current context.  A statement goes on
 * with the triggers that its table had when it began, and may have replaced this
 * one since, by way of an application's trigger.
 */
static Trigger *
current_trigger(Relation rel, Trigger *trigger)
{
	TriggerDesc *now = CopyTriggerDesc(rel->trigdesc);

	for (int i = 0; now != NULL && i < now->numtriggers; i++)
	{
		if (now->triggers[i].tgoid == trigger->tgoid)
			return &now->triggers[i];
	}
	return trigger;
}

/*
 * Makes a new entry, in a context of its own.  Should an invalidation come
 * meanwhile, the entry is good for this use, and made once more at the next.
 */
static CaptureInfo *
build_capture(Relation rel, Trigger *trigger)
{
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "pg_fanout capture",
												  ALLOCSET_SMALL_SIZES);
	CaptureInfo *info = MemoryContextAllocZero(context, sizeof(CaptureInfo));
	uint64		before = invalidations;
	char	   *trigger_name = trigger->tgname;

	if (trigger->tgnargs < 1)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("trigger \"%s\" names no topic", trigger->tgname),
				 errhint("Use fanout.capture() to create it.")));
	info->context = context;
	info->topic = topic_of_trigger(trigger);
	info->relid = RelationGetRelid(rel);
	info->entity = captured_entity(trigger->tgoid, &trigger_name);
	if (!OidIsValid(info->entity))
		info->entity = info->relid;
	plan_capture(info, rel, trigger, trigger_name);
	MemoryContextSetParent(context, CacheMemoryContext);
	info->valid = (before == invalidations);
	return info;
}

/* ---- the cache of captures ---- */

static void
free_unused(CaptureInfo *info)
{
	if (info->uses == 0)
		MemoryContextDelete(info->context);
}

/* Called when the context is reset in which the entry was asked for. */
static void
release_capture(void *arg)
{
	CaptureInfo *info = arg;

	info->uses--;
	if (!info->cached)
		free_unused(info);
}

static void
use_capture(CaptureInfo *info)
{
	MemoryContextCallback *callback = palloc(sizeof(MemoryContextCallback));

	callback->func = release_capture;
	callback->arg = info;
	info->uses++;
	MemoryContextRegisterResetCallback(CurrentMemoryContext, callback);
}

/* Takes an entry out of the cache; it is freed now, or by its last user. */
static void
drop_entry(CaptureEntry *entry)
{
	CaptureInfo *info = entry->info;

	(void) hash_search(captures, &entry->trigger, HASH_REMOVE, NULL);
	info->cached = false;
	free_unused(info);
}

/* Removes entries that are out of date, those of dropped triggers among them. */
static void
drop_invalid_entries(void)
{
	HASH_SEQ_STATUS scan;
	CaptureEntry *entry;

	hash_seq_init(&scan, captures);
	while ((entry = hash_seq_search(&scan)) != NULL)
	{
		if (!entry->info->valid)
			drop_entry(entry);
	}
}

CaptureInfo *
cache_of_trigger(TriggerData *trigdata)
{
	Oid			trigger = trigdata->tg_trigger->tgoid;
	CaptureEntry *entry;
	CaptureInfo *info;
	bool		found;

	init_caches();
	entry = hash_search(captures, &trigger, HASH_FIND, NULL);
	if (entry != NULL && entry->info->valid)
	{
		use_capture(entry->info);
		return entry->info;
	}

	info = build_capture(trigdata->tg_relation, current_trigger(trigdata->tg_relation, trigdata->tg_trigger));
	use_capture(info);
	drop_invalid_entries();
	entry = hash_search(captures, &trigger, HASH_ENTER, &found);
	if (found)
	{
		/* made meanwhile, by a call that building this one led to */
		entry->info->cached = false;
		free_unused(entry->info);
	}
	entry->info = info;
	info->cached = true;
	return info;
}
