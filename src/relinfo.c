/*-------------------------------------------------------------------------
 *
 * relinfo.c
 *		What a capture trigger needs to know of its table and topic, cached.
 *
 * A capture is described by nothing but its trigger: arguments (topic, then
 * pairs of option and value) and the table it stands on.  Here that is
 * resolved once per session into attribute numbers, rendering plans and
 * constant texts, and forgotten whenever the table, the table above it, a
 * schema's name or the set of topics changes.
 *
 * Entries are only marked invalid by the callbacks, since those can come at
 * any catalog access; they are rebuilt at the next use.
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
#include "catalog/pg_trigger.h"
#include "catalog/pg_type.h"
#include "commands/dbcommands.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
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

#include "compat.h"
#include "relinfo.h"

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

const char *const capture_op_code[CAPTURE_OPS] = {"c", "u", "d", "t"};

static const char *const operation_name[CAPTURE_OPS] = {"insert", "update", "delete", "truncate"};

/* Value of an option that lists columns; an element may be NULL. */
typedef struct Names
{
	int			count;
	char	  **names;
} Names;

static HTAB *captures = NULL;
static HTAB *topics = NULL;

/* Oids of our own relations; 0 = look up. */
static Oid	topic_relid;
static Oid	segment_relid[OUTBOX_SEGMENTS];
static Oid	sequence_relid;
static Oid	topology_change_relid;

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
	CaptureInfo *info;

	if (captures == NULL)
		return;
	hash_seq_init(&scan, captures);
	while ((info = hash_seq_search(&scan)) != NULL)
	{
		if (!OidIsValid(relid) || info->relid == relid || info->entity == relid)
			info->valid = false;
	}
}

static bool
is_own_relation(Oid relid)
{
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
	{
		if (relid == segment_relid[i])
			return true;
	}
	return relid == topic_relid || relid == sequence_relid || relid == topology_change_relid;
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
	sequence_relid = InvalidOid;
	topology_change_relid = InvalidOid;
	memset(segment_relid, 0, sizeof(segment_relid));
	invalidate_captures(InvalidOid);
}

static void
relation_changed(Datum arg, Oid relid)
{
	if (!OidIsValid(relid) || is_own_relation(relid))
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
		ctl.entrysize = sizeof(CaptureInfo);
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

/* ---- our own relations ---- */

static Oid
own_relation(const char *name)
{
	Oid			schema = get_namespace_oid("fanout", true);
	Oid			relid = OidIsValid(schema) ? get_relname_relid(name, schema) : InvalidOid;

	if (!OidIsValid(relid))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("relation \"fanout.%s\" does not exist", name),
				 errhint("Create the extension pg_fanout in this database.")));
	return relid;
}

Oid
relinfo_segment(int segment)
{
	if (!OidIsValid(segment_relid[segment]))
	{
		char		name[NAMEDATALEN];

		init_caches();
		snprintf(name, sizeof(name), "outbox_%d", segment);
		segment_relid[segment] = own_relation(name);
	}
	return segment_relid[segment];
}

Oid
relinfo_outbox_sequence(void)
{
	if (!OidIsValid(sequence_relid))
	{
		init_caches();
		sequence_relid = own_relation("outbox_id_seq");
	}
	return sequence_relid;
}

Oid
relinfo_topology_change(void)
{
	if (!OidIsValid(topology_change_relid))
	{
		init_caches();
		topology_change_relid = own_relation("topology_change");
	}
	return topology_change_relid;
}

void
relinfo_invalidate_topics(void)
{
	CacheInvalidateRelcacheByRelid(own_relation("topic"));
}

/* ---- topics ---- */

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

TopicInfo
relinfo_topic(const char *topic)
{
	TopicEntry *entry;
	TopicInfo	info;
	Relation	rel;
	bool		found;

	init_caches();
	if (strlen(topic) < sizeof(entry->name))
	{
		entry = hash_search(topics, topic, HASH_FIND, NULL);
		if (entry != NULL)
			return entry->info;
	}

	/*
	 * The lock is kept: fanout.topic_changed() of a topic being dropped needs
	 * no conflict with it, but DROP EXTENSION does.
	 */
	topic_relid = own_relation("topic");
	rel = table_open(topic_relid, AccessShareLock);
	found = read_topic(rel, topic, &info);
	table_close(rel, NoLock);
	if (!found)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("topic \"%s\" does not exist", topic),
				 errhint("Declare it first, with fanout.declare_topic() or fanout.declare_binding().")));

	/* opening the table may have run the callbacks */
	init_caches();
	if (strlen(topic) < sizeof(entry->name))
	{
		entry = hash_search(topics, topic, HASH_ENTER, NULL);
		entry->info = info;
	}
	return info;
}

/* ---- triggers ---- */

char	  **
relinfo_trigger_arguments(Oid trigger, int *nargs, Oid *relid, Oid *parent)
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

/* The table on which the trigger was created that this one is a clone of. */
static Oid
captured_entity(Oid trigger)
{
	Oid			relid = InvalidOid;
	Oid			parent = trigger;

	while (OidIsValid(parent))
	{
		int			nargs;
		Oid			next = InvalidOid;

		if (relinfo_trigger_arguments(parent, &nargs, &relid, &next) == NULL)
			break;
		parent = next;
	}
	return relid;
}

/* Takes apart a text array in its external form, an option's value. */
static Names
parse_names(const char *array)
{
	ArrayType  *parsed = DatumGetArrayTypeP(OidFunctionCall3(F_ARRAY_IN, CStringGetDatum(array),
															 ObjectIdGetDatum(TEXTOID), Int32GetDatum(-1)));
	Names		names;
	Datum	   *elements;
	bool	   *nulls;

	deconstruct_array(parsed, TEXTOID, -1, false, TYPALIGN_INT, &elements, &nulls, &names.count);
	names.names = palloc((names.count + 1) * sizeof(char *));
	for (int i = 0; i < names.count; i++)
		names.names[i] = nulls[i] ? NULL : TextDatumGetCString(elements[i]);
	return names;
}

static bool
has_name(const Names *names, const char *name)
{
	for (int i = 0; i < names->count; i++)
	{
		if (names->names[i] != NULL && strcmp(names->names[i], name) == 0)
			return true;
	}
	return false;
}

static bool
can_render(Form_pg_attribute attr)
{
	return !attr->attisdropped && !PGF_IS_VIRTUAL_GENERATED(attr);
}

/* Columns for the message; columns and exclude are NULL if not given. */
static int
choose_columns(TupleDesc desc, const char *columns, const char *exclude, AttrNumber *attnums)
{
	Names		only = {0};
	Names		without = {0};
	int			n = 0;

	if (columns != NULL)
		only = parse_names(columns);
	if (exclude != NULL)
		without = parse_names(exclude);
	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute attr = TupleDescAttr(desc, i);

		if (!can_render(attr) ||
			(columns != NULL && !has_name(&only, NameStr(attr->attname))) ||
			has_name(&without, NameStr(attr->attname)))
			continue;
		attnums[n++] = attr->attnum;
	}
	return n;
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

/*
 * Columns of an explicit key, in the order given.  Each counts once: a trigger
 * made by hand may repeat it, and attnums has room for all columns only.
 */
static int
explicit_key(TupleDesc desc, const char *key, AttrNumber *attnums)
{
	Names		names = parse_names(key);
	int			found = 0;

	for (int k = 0; k < names.count; k++)
	{
		for (int i = 0; names.names[k] != NULL && i < desc->natts; i++)
		{
			Form_pg_attribute attr = TupleDescAttr(desc, i);

			if (can_render(attr) && strcmp(NameStr(attr->attname), names.names[k]) == 0 &&
				!has_attnum(attnums, found, attr->attnum))
				attnums[found++] = attr->attnum;
		}
	}
	return found;
}

/*
 * The primary key, else the index of the replica identity.  Before PostgreSQL
 * 17 rd_pkindex leaves out a deferrable primary key, which is good enough here:
 * nothing depends on its being unique at every moment.
 */
static Oid
key_index(Relation rel)
{
	List	   *indexes = RelationGetIndexList(rel);	/* sets rd_pkindex and
														 * rd_replidindex */
	ListCell   *lc;

	if (OidIsValid(rel->rd_pkindex))
		return rel->rd_pkindex;
	foreach(lc, indexes)
	{
		Relation	index = index_open(lfirst_oid(lc), AccessShareLock);
		bool		primary = index->rd_index->indisprimary;

		index_close(index, AccessShareLock);
		if (primary)
			return lfirst_oid(lc);
	}
	return rel->rd_replidindex;
}

/* Its columns. */
static int
default_key(Relation rel, AttrNumber *attnums)
{
	Oid			indexoid = key_index(rel);
	Relation	index;
	int			n;

	if (!OidIsValid(indexoid))
		return 0;
	index = index_open(indexoid, AccessShareLock);
	n = IndexRelationGetNumberOfKeyAttributes(index);
	for (int i = 0; i < n; i++)
		attnums[i] = index->rd_index->indkey.values[i];
	index_close(index, AccessShareLock);
	return n;
}

/* Column numbers of the entity, found by name in the partition. */
static int
partition_key(Relation entity, Relation rel, AttrNumber *attnums)
{
	int			n = default_key(entity, attnums);

	for (int i = 0; i < n; i++)
		attnums[i] = get_attnum(RelationGetRelid(rel),
								NameStr(TupleDescAttr(RelationGetDescr(entity), attnums[i] - 1)->attname));
	return n;
}

static void
put_header(JsonbParseState **state, const char *name, const char *value)
{
	JsonbValue	v;

	v.type = jbvString;
	v.val.string.val = unconstify(char *, name);
	v.val.string.len = strlen(name);
	pushJsonbValue(state, WJB_KEY, &v);
	v.val.string.val = unconstify(char *, value);
	v.val.string.len = strlen(value);
	pushJsonbValue(state, WJB_VALUE, &v);
}

Jsonb *
relinfo_headers(const char *op, const char *schema, const char *table, const char *old_key)
{
	JsonbParseState *state = NULL;

	pushJsonbValue(&state, WJB_BEGIN_OBJECT, NULL);
	put_header(&state, "op", op);
	put_header(&state, "schema", schema);
	put_header(&state, "table", table);
	if (old_key != NULL)
		put_header(&state, "old_key", old_key);
	return JsonbValueToJsonb(pushJsonbValue(&state, WJB_END_OBJECT, NULL));
}

/* A segment of a URI's path: all but RFC 3986's unreserved characters is escaped. */
static void
append_segment(StringInfo out, const char *name)
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
	append_segment(&path, database);
	append_segment(&path, schema);
	append_segment(&path, table);
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

	initStringInfo(&source);
	appendStringInfoString(&source, "{\"connector\":\"pg_fanout\",\"version\":\"" PG_FANOUT_VERSION "\",\"db\":");
	escape_json(&source, database);
	appendStringInfoString(&source, ",\"schema\":");
	escape_json(&source, schema);
	appendStringInfoString(&source, ",\"table\":");
	escape_json(&source, table);
	info->source = source.data;

	info->uri = uri_of(database, schema, table);

	for (int op = 0; op < CAPTURE_OPS; op++)
	{
		info->type[op] = psprintf("%s.%s.%s", schema, table, operation_name[op]);
		info->headers[op] = relinfo_headers(capture_op_code[op], schema, table, NULL);
	}
}

static const char *
option(char **args, int nargs, const char *name)
{
	for (int i = 1; i + 1 < nargs; i += 2)
	{
		if (strcmp(args[i], name) == 0)
			return args[i + 1];
	}
	return NULL;
}

/* Types whose text is the same in every session. */
static bool
has_constant_text(Oid type)
{
	switch (getBaseType(type))
	{
		case BOOLOID:
		case INT2OID:
		case INT4OID:
		case INT8OID:
		case OIDOID:
		case NUMERICOID:
		case TEXTOID:
		case VARCHAROID:
		case BPCHAROID:
		case NAMEOID:
		case CHAROID:
		case UUIDOID:
		case DATEOID:
		case TIMESTAMPOID:
		case TIMEOID:
			return true;
		default:
			return type_is_enum(type);
	}
}

static bool
key_needs_settings(CaptureInfo *info, TupleDesc desc)
{
	for (int i = 0; i < info->nkeys; i++)
	{
		if (!has_constant_text(TupleDescAttr(desc, info->keys[i] - 1)->atttypid))
			return true;
	}
	return false;
}

/*
 * The columns of message and key.  Called in a scratch context: the lists of a
 * wide table are large, and the cache lives as long as the session.
 */
static void
plan_columns(CaptureInfo *info, Relation rel, Relation entity, Trigger *trigger)
{
	TupleDesc	desc = RelationGetDescr(rel);
	AttrNumber *attnums = palloc((desc->natts + INDEX_MAX_KEYS + 1) * sizeof(AttrNumber));
	const char *key = option(trigger->tgargs, trigger->tgnargs, "key");
	int			n;

	n = choose_columns(desc, option(trigger->tgargs, trigger->tgnargs, "columns"),
					   option(trigger->tgargs, trigger->tgnargs, "exclude"), attnums);
	info->row = rowjson_plan(desc, attnums, n, info->context);

	if (key != NULL)
		info->nkeys = explicit_key(desc, key, attnums);
	else if (info->entity == info->relid)
		info->nkeys = default_key(rel, attnums);
	else
		info->nkeys = partition_key(entity, rel, attnums);
	if (info->nkeys == 0)
		return;
	info->keys = MemoryContextAlloc(info->context, info->nkeys * sizeof(AttrNumber));
	memcpy(info->keys, attnums, info->nkeys * sizeof(AttrNumber));
	info->key = rowjson_plan(desc, attnums, info->nkeys, info->context);
	info->key_needs_settings = key_needs_settings(info, desc);
}

static void
plan_capture(CaptureInfo *info, Relation rel, Trigger *trigger)
{
	const char *old_row = option(trigger->tgargs, trigger->tgnargs, "old_row");
	Relation	entity = relation_open(info->entity, AccessShareLock);
	MemoryContext scratch = AllocSetContextCreate(CurrentMemoryContext, "pg_fanout plan",
												  ALLOCSET_DEFAULT_SIZES);
	MemoryContext oldcontext = MemoryContextSwitchTo(scratch);

	plan_columns(info, rel, entity, trigger);
	MemoryContextSwitchTo(info->context);
	describe_entity(info, entity);
	MemoryContextSwitchTo(oldcontext);
	MemoryContextDelete(scratch);
	info->old_row = (old_row != NULL && strcmp(old_row, "true") == 0);
	relation_close(entity, AccessShareLock);
}

static void
build_capture(CaptureInfo *info, Relation rel, Trigger *trigger)
{
	if (trigger->tgnargs < 1)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("trigger \"%s\" names no topic", trigger->tgname),
				 errhint("Use fanout.capture() to create it.")));
	info->topic = relinfo_topic(trigger->tgargs[0]);
	info->relid = RelationGetRelid(rel);
	info->entity = captured_entity(trigger->tgoid);
	if (!OidIsValid(info->entity))
		info->entity = info->relid;

	info->context = AllocSetContextCreate(CacheMemoryContext, "pg_fanout capture",
										  ALLOCSET_SMALL_SIZES);
	plan_capture(info, rel, trigger);
}

CaptureInfo *
relinfo_of_trigger(TriggerData *trigdata)
{
	Oid			trigger = trigdata->tg_trigger->tgoid;
	CaptureInfo *info;
	bool		found;

	init_caches();
	info = hash_search(captures, &trigger, HASH_ENTER, &found);
	if (found && info->valid)
		return info;

	/* An error below leaves the entry invalid, with no context to leak. */
	if (found && info->context != NULL)
		MemoryContextDelete(info->context);
	memset(info, 0, sizeof(*info));
	info->trigger = trigger;

	/*
	 * Set before, not after: an invalidation that comes while the entry is
	 * being built must not be forgotten.  It is then built once more at the
	 * next call.
	 */
	info->valid = true;
	PG_TRY();
	{
		build_capture(info, trigdata->tg_relation, trigdata->tg_trigger);
	}
	PG_CATCH();
	{
		info->valid = false;
		PG_RE_THROW();
	}
	PG_END_TRY();
	return info;
}
