/*-------------------------------------------------------------------------
 *
 * rights.c
 *		Who may do what with a topic.
 *
 * EXECUTE on a function lets a role call it; for which topics is said by rows of
 * fanout.topic_grant, which fanout.grant_topic() writes.  Members of the role that
 * owns the extension, superusers among them, need none.
 *
 *		what		asked by
 *		---------	--------------------------------------------------------------
 *		declare		declare_topic(), declare_binding() and the like, drop_...()
 *		capture		CREATE TRIGGER of a capture, hence capture()
 *		publish		publish()
 *		subscribe	subscribe(), sync_table()
 *
 * A write to a captured table asks nothing.
 *
 * Must never: run SQL, or depend on the search path; publish() comes here with the
 * rights of anybody.  The newest snapshot counts, as for topics (cache.c), so a grant
 * holds as soon as it is committed.  The table has a few rows, and is read whole.
 *
 * Locks: ACCESS SHARE on fanout.topic_grant and fanout.topic_grant_bound, until the transaction ends.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/namespace.h"
#include "catalog/pg_namespace.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/uuid.h"

#include "capture/cache.h"
#include "capture/rights.h"
#include "server/tables.h"

PG_FUNCTION_INFO_V1(pgf_check_topic_grant);
PG_FUNCTION_INFO_V1(pgf_check_capture_grant);

/* Columns of fanout.topic_grant. */
#define GRANT_ID 1
#define GRANT_ROLE 2
#define GRANT_TOPIC 3
#define GRANT_CONSUMER_GROUP 4
#define GRANT_WHAT 5

/* And of fanout.topic_grant_bound. */
#define BOUND_ID 1
#define BOUND_ROLE 2

/* Returns the owner of the schema fanout, who is that of the extension. */
Oid
rights_administrator(void)
{
	Oid			schema = get_namespace_oid("fanout", false);
	HeapTuple	tuple = SearchSysCache1(NAMESPACEOID, ObjectIdGetDatum(schema));
	Oid			result;

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for schema %u", schema);
	result = ((Form_pg_namespace) GETSTRUCT(tuple))->nspowner;
	ReleaseSysCache(tuple);
	return result;
}

/* Is a column that, or NULL, which stands for anything? */
static bool
covers(HeapTuple tuple, TupleDesc desc, int column, const char *value)
{
	bool		isnull;
	Datum		found = heap_getattr(tuple, column, desc, &isnull);

	return isnull || (value != NULL && strcmp(TextDatumGetCString(found), value) == 0);
}

/* Finds the role that a grant is bound to; InvalidOid: to none. */
static Oid
bound_role(const pg_uuid_t *grant_id, Snapshot snapshot)
{
	Relation	rel = table_open(tables_oid("topic_grant_bound"), AccessShareLock);
	SysScanDesc scan = systable_beginscan(rel, InvalidOid, false, snapshot, 0, NULL);
	HeapTuple	tuple;
	Oid			role = InvalidOid;
	bool		isnull;

	while (!OidIsValid(role) && HeapTupleIsValid(tuple = systable_getnext(scan)))
	{
		pg_uuid_t  *id = DatumGetUUIDP(heap_getattr(tuple, BOUND_ID, RelationGetDescr(rel), &isnull));

		if (memcmp(id, grant_id, UUID_LEN) == 0)
			role = DatumGetObjectId(heap_getattr(tuple, BOUND_ROLE, RelationGetDescr(rel), &isnull));
	}
	systable_endscan(scan);
	table_close(rel, NoLock);
	return role;
}

/* Returns the role that has a grant; InvalidOid: there is none. */
static Oid
granted_role(HeapTuple tuple, TupleDesc desc, Snapshot snapshot)
{
	bool		isnull;
	Oid			role = bound_role(DatumGetUUIDP(heap_getattr(tuple, GRANT_ID, desc, &isnull)), snapshot);

	if (OidIsValid(role))
		return SearchSysCacheExists1(AUTHOID, ObjectIdGetDatum(role)) ? role : InvalidOid;
	return get_role_oid(TextDatumGetCString(heap_getattr(tuple, GRANT_ROLE, desc, &isnull)), true);
}

static bool
permits(HeapTuple tuple, TupleDesc desc, Snapshot snapshot, Oid role, const char *topic, const char *what,
		const char *consumer_group)
{
	Oid			granted;

	if (!covers(tuple, desc, GRANT_WHAT, what) || !covers(tuple, desc, GRANT_TOPIC, topic) ||
		!covers(tuple, desc, GRANT_CONSUMER_GROUP, consumer_group))
		return false;
	granted = granted_role(tuple, desc, snapshot);
	return OidIsValid(granted) && has_privs_of_role(role, granted);
}

static bool
is_granted(Oid role, const char *topic, const char *what, const char *consumer_group)
{
	Relation	rel = table_open(tables_oid("topic_grant"), AccessShareLock);
	Snapshot	snapshot = RegisterSnapshot(GetLatestSnapshot());
	SysScanDesc scan = systable_beginscan(rel, InvalidOid, false, snapshot, 0, NULL);
	HeapTuple	tuple;
	bool		found = false;

	while (!found && HeapTupleIsValid(tuple = systable_getnext(scan)))
		found = permits(tuple, RelationGetDescr(rel), snapshot, role, topic, what, consumer_group);
	systable_endscan(scan);
	UnregisterSnapshot(snapshot);
	table_close(rel, NoLock);
	return found;
}

static char *
hint_call(Oid role, const char *topic, const char *what, const char *consumer_group)
{
	char	   *call = psprintf("fanout.grant_topic(%s, %s, '{%s}'", quote_literal_cstr(topic),
								quote_literal_cstr(quote_identifier(GetUserNameFromId(role, false))), what);

	return consumer_group == NULL ? psprintf("%s)", call) :
		psprintf("%s, consumer_group => %s)", call, quote_literal_cstr(consumer_group));
}

/*
 * Raises an error (42501) unless the role may do that with a topic: declare, capture,
 * publish or subscribe.  consumer_group: with its queue; NULL: with all of the topic.
 */
void
rights_check(Oid role, const char *topic, const char *what, const char *consumer_group)
{
	if (has_privs_of_role(role, rights_administrator()) || is_granted(role, topic, what, consumer_group))
		return;
	ereport(ERROR,
			(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
			 consumer_group != NULL ? errmsg("permission denied for queue \"%s_%s\"", topic, consumer_group) :
			 errmsg("permission denied for topic \"%s\"", topic),
			 errhint("An administrator may use %s.", hint_call(role, topic, what, consumer_group))));
}

static char *
text_argument(FunctionCallInfo fcinfo, int n)
{
	return PG_ARGISNULL(n) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(n));
}

/* For functions in SQL; what has no name is refused by them. */
Datum
pgf_check_topic_grant(PG_FUNCTION_ARGS)
{
	if (!PG_ARGISNULL(1))
		rights_check(PG_GETARG_OID(0), text_argument(fcinfo, 1), text_argument(fcinfo, 2), text_argument(fcinfo, 3));
	PG_RETURN_VOID();
}

/* May the caller have created this capture trigger? */
Datum
pgf_check_capture_grant(PG_FUNCTION_ARGS)
{
	int			nargs;
	Oid			relid;
	Oid			parent;
	char	   *name;
	char	  **args = cache_trigger_arguments(PG_GETARG_OID(0), &nargs, &relid, &parent, &name);

	if (args != NULL && nargs > 0)
		rights_check(GetUserId(), args[0], "capture", NULL);
	PG_RETURN_VOID();
}
