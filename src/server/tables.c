/*-------------------------------------------------------------------------
 *
 * tables.c
 *		The extension's own tables: their oids, and what must be in them.
 *
 * Whoever writes to a captured table needs the oids of some of our relations at
 * each statement, so a session looks them up once.  It looks them up again after
 * any of them was dropped or rewritten, or a schema got another name.
 *
 * This must never read a table, and needs no right on one.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/namespace.h"
#include "commands/extension.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/syscache.h"

#include "server/tables.h"

/* 0: to be looked up */
static Oid	segment_relid[OUTBOX_SEGMENTS];
static Oid	sequence_relid;
static Oid	topology_change_relid;
static Oid	scattered_relid;

/* ---- invalidation ---- */

static void
forget_oids(void)
{
	memset(segment_relid, 0, sizeof(segment_relid));
	sequence_relid = InvalidOid;
	topology_change_relid = InvalidOid;
	scattered_relid = InvalidOid;
}

static bool
is_known(Oid relid)
{
	for (int i = 0; i < OUTBOX_SEGMENTS; i++)
	{
		if (relid == segment_relid[i])
			return true;
	}
	return relid == sequence_relid || relid == topology_change_relid || relid == scattered_relid;
}

static void
relation_changed(Datum arg, Oid relid)
{
	if (!OidIsValid(relid) || is_known(relid))
		forget_oids();
}

static void
schema_changed(Datum arg, int cacheid, uint32 hashvalue)
{
	forget_oids();
}

static void
watch_relations(void)
{
	static bool registered = false;

	if (registered)
		return;
	CacheRegisterRelcacheCallback(relation_changed, (Datum) 0);
	CacheRegisterSyscacheCallback(NAMESPACEOID, schema_changed, (Datum) 0);
	registered = true;
}

/* ---- oids ---- */

/*
 * Returns the oid of a relation in the schema fanout.  Raises an error (55000) if
 * it is not there, because the extension is not, or because it was renamed.
 */
Oid
tables_oid(const char *name)
{
	Oid			schema = get_namespace_oid("fanout", true);
	Oid			relid = OidIsValid(schema) ? get_relname_relid(name, schema) : InvalidOid;

	if (!OidIsValid(relid))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("relation \"fanout.%s\" does not exist", name),
				 OidIsValid(get_extension_oid("pg_fanout", true)) ?
				 errhint("The extension pg_fanout is there, but its schema \"fanout\" or a part of it was renamed. Give it its name back.") :
				 errhint("Create the extension pg_fanout in this database.")));
	return relid;
}

/*
 * Return oids that are looked up once, and again after any of these relations was
 * dropped or rewritten.  Raise the errors of tables_oid().
 */
Oid
tables_segment(int segment)
{
	if (!OidIsValid(segment_relid[segment]))
	{
		char		name[NAMEDATALEN];

		watch_relations();
		snprintf(name, sizeof(name), "outbox_%d", segment);
		segment_relid[segment] = tables_oid(name);
	}
	return segment_relid[segment];
}

Oid
tables_outbox_sequence(void)
{
	if (!OidIsValid(sequence_relid))
	{
		watch_relations();
		sequence_relid = tables_oid("outbox_id_seq");
	}
	return sequence_relid;
}

Oid
tables_topology_change(void)
{
	if (!OidIsValid(topology_change_relid))
	{
		watch_relations();
		topology_change_relid = tables_oid("topology_change");
	}
	return topology_change_relid;
}

Oid
tables_scattered(void)
{
	if (!OidIsValid(scattered_relid))
	{
		watch_relations();
		scattered_relid = tables_oid("scattered");
	}
	return scattered_relid;
}

/* ---- contents ---- */

/* Raises the error for a table of the schema fanout that does not have its only row. */
void
tables_row_missing(const char *name)
{
	ereport(ERROR,
			(errcode(ERRCODE_DATA_CORRUPTED),
			 errmsg("table \"fanout.%s\" must have one row", name),
			 errhint("Use fanout.activate().")));
}
