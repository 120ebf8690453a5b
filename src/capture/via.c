/*-------------------------------------------------------------------------
 *
 * via.c
 *		The way that a change has come: through which databases and tables.
 *
 * The header "via" is a list, separated by commas, the oldest first.  A message
 * has its own database's id as the last element, which the publisher adds.  Who
 * handles it adds the table, and what it writes meanwhile carries the whole:
 *
 *		A publishes a change of public.u			A
 *		B handles it, and changes its public.u:		A/public.u
 *		B publishes that change						A/public.u,B
 *		A gets it: A/public.u,B/public.u			has come through A's public.u
 *
 * The tables are in the list because a change may rightly come back to the database
 * where it was made, to another table: only one that comes back to the very table is
 * left out.  An id is that of the server's data and of the database in it: that of
 * a promoted standby stays, a copy made from a dump has another.
 *
 * It must never cost anything where no message is being handled.
 *
 * State: what this session is handling, until the transaction ends or fails.
 * No locks.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/memutils.h"

#include "capture/cache.h"
#include "capture/via.h"

/* in TopMemoryContext; NULL: no message is being handled */
static char *current = NULL;

/*
 * via_database
 *		Returns the id of this database; static.
 */
const char *
via_database(void)
{
	static char id[32] = "";

	if (id[0] == '\0')
		snprintf(id, sizeof(id), "%016llx.%u", (unsigned long long) GetSystemIdentifier(), MyDatabaseId);
	return id;
}

static void
append_table(StringInfo out, const char *schema, const char *table)
{
	cache_append_segment(out, schema);
	cache_append_segment(out, table);
}

static bool
list_has(const char *list, const char *element)
{
	size_t		len = strlen(element);

	for (const char *p = list; (p = strstr(p, element)) != NULL; p += len)
	{
		if ((p == list || p[-1] == ',') && (p[len] == ',' || p[len] == '\0'))
			return true;
	}
	return false;
}

/*
 * via_of_message
 *		Returns the way of a message, its own table included.
 *
 * header: its header "via"; schema, table: of the change; NULL: none.  Each table
 * is named once, so that the list does not grow in a loop.  palloc'd; NULL if the
 * message does not tell.
 */
char *
via_of_message(const char *header, const char *schema, const char *table)
{
	const char *last;
	StringInfoData element;
	StringInfoData via;

	if (header == NULL || schema == NULL || table == NULL)
		return header != NULL ? pstrdup(header) : NULL;
	last = strrchr(header, ',');
	initStringInfo(&element);
	appendStringInfoString(&element, last != NULL ? last + 1 : header);
	append_table(&element, schema, table);
	initStringInfo(&via);
	if (last != NULL)
		appendBinaryStringInfo(&via, header, last - header);
	if (!list_has(via.data, element.data))
		appendStringInfo(&via, "%s%s", via.len > 0 ? "," : "", element.data);
	return via.data;
}

/*
 * via_contains
 *		Tells whether a change has come through a table of this database.
 *
 * via: of via_of_message().
 */
bool
via_contains(const char *via, const char *schema, const char *table)
{
	StringInfoData element;

	if (via == NULL || strstr(via, via_database()) == NULL)
		return false;
	initStringInfo(&element);
	appendStringInfoString(&element, via_database());
	append_table(&element, schema, table);
	return list_has(via, element.data);
}

static void
forget(void)
{
	if (current != NULL)
		pfree(current);
	current = NULL;
}

static void
xact_ended(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT || event == XACT_EVENT_PREPARE)
		forget();
}

static void
subxact_ended(SubXactEvent event, SubTransactionId subid, SubTransactionId parent, void *arg)
{
	if (event == SUBXACT_EVENT_ABORT_SUB)
		forget();
}

/*
 * via_set
 *		Says that what is written from now on comes of a message that has come this
 *		way; NULL: of none.  It ends with the transaction, and with an error.
 */
void
via_set(const char *via)
{
	static bool watching = false;

	if (via == NULL && current == NULL)
		return;
	if (!watching)
	{
		RegisterXactCallback(xact_ended, NULL);
		RegisterSubXactCallback(subxact_ended, NULL);
		watching = true;
	}
	forget();
	if (via != NULL)
		current = MemoryContextStrdup(TopMemoryContext, via);
}

/*
 * via_add
 *		Says that what is written from now on may come of such a message, too.
 */
void
via_add(const char *via)
{
	if (via == NULL || (current != NULL && strcmp(current, via) == 0))
		return;
	if (current == NULL)
		via_set(via);
	else
	{
		StringInfoData both;
		char	   *rest = pstrdup(via);
		char	   *element;

		initStringInfo(&both);
		appendStringInfoString(&both, current);
		while ((element = strsep(&rest, ",")) != NULL)
		{
			if (!list_has(both.data, element))
				appendStringInfo(&both, ",%s", element);
		}
		via_set(both.data);
	}
}

/*
 * via_current
 *		Returns the way of the message that is being handled; NULL: none is.
 */
const char *
via_current(void)
{
	return current;
}
