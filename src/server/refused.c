/*-------------------------------------------------------------------------
 *
 * refused.c
 *		Settings whose value the server did not take.
 *
 * A value that cannot be right is refused when somebody sets it.  But where
 * nobody is there to be told, the server goes on with another value and a line
 * in the log:
 *
 * - When it starts, the values of our settings are not understood before the
 *	 library is loaded.  Those that are refused then, of configuration files and
 *	 of the command line, are replaced by the defaults.
 * - What ALTER DATABASE or ALTER ROLE stored while the library was not loaded is
 *	 looked at when a session begins.  If it is refused, what is set elsewhere is
 *	 in force: another broker, maybe.
 *
 * To go on with another value would send messages to a broker that nobody
 * meant, and count them as sent.  So what was refused is remembered here, and
 * workers do not connect while there is something (connection.c).
 *
 * A setting of a configuration file is put right by a reload: the files are
 * read again to find out whether they still have a value that is refused.  The
 * command line cannot be put right but by a restart, and would have overridden
 * the files.  What is stored is put right by ALTER DATABASE and ALTER ROLE; a
 * session takes that over only when it begins, so the worker ends itself.
 *
 * A reload that brings a wrong value changes nothing, as everywhere: the value
 * before stays in force, and was meant when it was set.
 *
 * Must never: change a setting, or show a value of pg_fanout.uri; the check
 * hooks in guc.c, which are asked here for the reasons, do not.
 *
 * Locks: AccessShareLock on pg_db_role_setting, for a moment.
 *
 * Scenarios, in test/t/046_connection.pl: values that cannot be parsed, are out
 * of range, or of the wrong type; settings that there are not; in
 * postgresql.conf, in an included file, by ALTER SYSTEM, on the command line;
 * stored for the database, for all roles; put right, or taken out, and reloaded.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/pg_db_role_setting.h"
#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/rel.h"

#include "server/compat.h"
#include "server/refused.h"

#define SETTING_PREFIX		"pg_fanout."

typedef struct AskedSetting
{
	char	   *name;
	char	   *value;
} AskedSetting;

typedef struct RefusedSetting
{
	char	   *name;
	char	   *reason;
	bool		in_file;		/* a configuration file has it; else the
								 * command line */
} RefusedSetting;

/* Since the server started; the postmaster's, and so every worker's. */
static List *refused = NIL;

/* Of this session: the first that was refused. */
static char *stored_reason = NULL;

static bool is_ours(const char *name);
static AskedSetting *asked_setting(const char *name, const char *value);
static char *why_refused(const char *name, const char *value);
static bool read_files(const char *name, char **value);
static char *check_stored(void);
static List *add_stored(List *asked, Relation relation, Oid database, Oid role);
static List *add_items(List *asked, ArrayType *items);
static bool has_name(List *asked, const char *name);
static char *still_refused(const RefusedSetting *setting);

/* ---- when the server starts ---- */

/* Before they are defined, our settings are placeholders, which take any value. */
List *
refused_collect(void)
{
	List	   *asked = NIL;
	int			n;
	struct config_generic **variables = pgf_guc_variables(&n);

	for (int i = 0; i < n; i++)
	{
		const char *name = variables[i]->name;
		const char *value;

		if ((variables[i]->flags & GUC_CUSTOM_PLACEHOLDER) == 0 || !is_ours(name))
			continue;
		value = GetConfigOption(name, true, false);
		if (value != NULL)
			asked = lappend(asked, asked_setting(name, value));
	}
	return asked;
}

static bool
is_ours(const char *name)
{
	return pg_strncasecmp(name, SETTING_PREFIX, strlen(SETTING_PREFIX)) == 0;
}

static AskedSetting *
asked_setting(const char *name, const char *value)
{
	AskedSetting *setting = palloc(sizeof(AskedSetting));

	setting->name = pstrdup(name);
	setting->value = pstrdup(value);
	return setting;
}

/*
 * Remembers the settings among "asked" whose value is refused.  One that the
 * configuration files have, too, is taken to come from there.
 */
void
refused_note(List *asked)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	ListCell   *cell;

	foreach(cell, asked)
	{
		AskedSetting *setting = lfirst(cell);
		char	   *reason = why_refused(setting->name, setting->value);
		char	   *value = NULL;
		RefusedSetting *one;

		if (reason == NULL)
			continue;
		one = palloc(sizeof(RefusedSetting));
		one->name = pstrdup(setting->name);
		one->reason = reason;
		one->in_file = read_files(setting->name, &value) && value != NULL &&
			strcmp(value, setting->value) == 0;
		refused = lappend(refused, one);
	}
	MemoryContextSwitchTo(oldcontext);
}

/*
 * Returns why a setting must not have a value, palloc'd in the server's own
 * words, or NULL if it may.  Asks as the server itself would, with the widest
 * rights, and changes nothing.
 */
static char *
why_refused(const char *name, const char *value)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	char	   *volatile reason = NULL;

	PG_TRY();
	{
		(void) set_config_option(name, value, PGC_POSTMASTER, PGC_S_FILE,
								 GUC_ACTION_SET, false, ERROR, false);
	}
	PG_CATCH();
	{
		ErrorData  *edata;

		MemoryContextSwitchTo(oldcontext);
		edata = CopyErrorData();
		FlushErrorState();
		reason = edata->detail ? psprintf("%s: %s", edata->message, edata->detail) : pstrdup(edata->message);
		FreeErrorData(edata);
	}
	PG_END_TRY();
	return reason;
}

/*
 * Reads the configuration files for a setting, as they are now, included ones
 * too.  *value: the last one, which counts, palloc'd, or NULL if they do not
 * have it.  Returns false if they cannot be read.
 */
static bool
read_files(const char *name, char **value)
{
	ConfigVariable *first = NULL;
	ConfigVariable *last = NULL;
	bool		ok = ParseConfigFile(ConfigFileName, true, NULL, 0, 0, DEBUG1, &first, &last) &&
		ParseConfigFile(PG_AUTOCONF_FILENAME, false, NULL, 0, 0, DEBUG1, &first, &last);

	*value = NULL;
	for (ConfigVariable *item = first; item != NULL; item = item->next)
	{
		if (item->name != NULL && item->value != NULL && pg_strcasecmp(item->name, name) == 0)
			*value = pstrdup(item->value);
	}
	FreeConfigVariables(first);
	return ok;
}

/* ---- when a session begins ---- */

void
refused_note_stored(void)
{
	char	   *reason = check_stored();

	stored_reason = reason ? MemoryContextStrdup(TopMemoryContext, reason) : NULL;
}

bool
refused_stored_mended(void)
{
	return stored_reason != NULL && check_stored() == NULL;
}

/*
 * Returns why the first of the settings stored for this session is refused,
 * palloc'd, or NULL if none is.  Of several values for one setting only that
 * counts which has precedence, as in the server's process_settings().
 */
static char *
check_stored(void)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	Relation	relation;
	List	   *asked = NIL;
	char	   *reason = NULL;
	ListCell   *cell;

	StartTransactionCommand();
	MemoryContextSwitchTo(oldcontext);
	relation = table_open(DbRoleSettingRelationId, AccessShareLock);
	asked = add_stored(asked, relation, MyDatabaseId, GetSessionUserId());
	asked = add_stored(asked, relation, InvalidOid, GetSessionUserId());
	asked = add_stored(asked, relation, MyDatabaseId, InvalidOid);
	asked = add_stored(asked, relation, InvalidOid, InvalidOid);
	table_close(relation, AccessShareLock);

	foreach(cell, asked)
	{
		AskedSetting *setting = lfirst(cell);

		if (reason == NULL)
			reason = why_refused(setting->name, setting->value);
	}
	CommitTransactionCommand();
	MemoryContextSwitchTo(oldcontext);
	return reason;
}

/* Adds what is stored for a database and a role, either of which may be any. */
static List *
add_stored(List *asked, Relation relation, Oid database, Oid role)
{
	ScanKeyData keys[2];
	SysScanDesc scan;
	HeapTuple	tuple;

	ScanKeyInit(&keys[0], Anum_pg_db_role_setting_setdatabase, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(database));
	ScanKeyInit(&keys[1], Anum_pg_db_role_setting_setrole, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(role));
	scan = systable_beginscan(relation, DbRoleSettingDatidRolidIndexId, true, NULL, 2, keys);
	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
	{
		bool		isnull;
		Datum		items = heap_getattr(tuple, Anum_pg_db_role_setting_setconfig,
										 RelationGetDescr(relation), &isnull);

		if (!isnull)
			asked = add_items(asked, DatumGetArrayTypeP(items));
	}
	systable_endscan(scan);
	return asked;
}

/* Adds the "name=value" that are ours, but for names that were added before. */
static List *
add_items(List *asked, ArrayType *items)
{
	Datum	   *elements;
	int			n;

	deconstruct_array(items, TEXTOID, -1, false, TYPALIGN_INT, &elements, NULL, &n);
	for (int i = 0; i < n; i++)
	{
		char	   *name = TextDatumGetCString(elements[i]);
		char	   *equals = strchr(name, '=');

		if (equals == NULL || !is_ours(name))
			continue;
		*equals = '\0';
		if (!has_name(asked, name))
			asked = lappend(asked, asked_setting(name, equals + 1));
	}
	return asked;
}

static bool
has_name(List *asked, const char *name)
{
	ListCell   *cell;

	foreach(cell, asked)
	{
		if (pg_strcasecmp(((AskedSetting *) lfirst(cell))->name, name) == 0)
			return true;
	}
	return false;
}

/* ---- whether to connect ---- */

char *
refused_setting(void)
{
	ListCell   *cell;

	if (stored_reason != NULL)
		return psprintf("a setting stored by ALTER DATABASE or ALTER ROLE is not valid: %s", stored_reason);
	foreach(cell, refused)
	{
		char	   *reason = still_refused(lfirst(cell));

		if (reason != NULL)
			return reason;
	}
	return NULL;
}

/*
 * What is wrong with a setting that was refused when the server started, or
 * NULL if it is put right.  Files that cannot be read put nothing right.
 */
static char *
still_refused(const RefusedSetting *setting)
{
	char	   *value;
	char	   *reason;

	if (!setting->in_file)
		return psprintf("a setting on the command line is not valid: %s", setting->reason);
	if (!read_files(setting->name, &value))
		reason = setting->reason;
	else
		reason = value != NULL ? why_refused(setting->name, value) : NULL;
	return reason ? psprintf("a setting in the configuration files is not valid: %s", reason) : NULL;
}
