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
 * A transaction may handle several messages, which have come on different ways, and
 * what they leave for its end (deferred triggers) is anybody's.  That carries what all
 * of them have in common: a way that is too long would have a change left out where it
 * has never been, which loses it; one that is too short sends it there once more.
 *
 *		       via_begin()                via_begin_deferred()
 *		NONE -----------------> MESSAGE         NONE ----------------> DEFERRED
 *		  ^                        |              ^                       |
 *		  '----- via_end(), end of the transaction or a subtransaction that failed
 *
 * It must never cost anything where no message is being handled.
 *
 * State: what this session is handling, and what has come of it in the transaction,
 * until that ends or fails.  No locks.
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

/* In TopMemoryContext.  NULL: none is being handled, or its way is not known. */
static char *current = NULL;

/* The elements that are in the ways of all messages of the transaction; NULL: no message yet. */
static char *common = NULL;

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

/* A producer may send any header: an empty element is in no list. */
static bool
list_has(const char *list, const char *element)
{
	size_t		len = strlen(element);

	for (const char *p = list; len > 0 && (p = strstr(p, element)) != NULL; p += len)
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
replace(char **way, const char *by)
{
	if (*way != NULL)
		pfree(*way);
	*way = by != NULL ? MemoryContextStrdup(TopMemoryContext, by) : NULL;
}

static void
xact_ended(XactEvent event, void *arg)
{
	if (event != XACT_EVENT_COMMIT && event != XACT_EVENT_ABORT && event != XACT_EVENT_PREPARE)
		return;
	replace(&current, NULL);
	replace(&common, NULL);
}

static void
subxact_ended(SubXactEvent event, SubTransactionId subid, SubTransactionId parent, void *arg)
{
	if (event == SUBXACT_EVENT_ABORT_SUB)
		replace(&current, NULL);
}

static void
watch_transactions(void)
{
	static bool watching = false;

	if (watching)
		return;
	RegisterXactCallback(xact_ended, NULL);
	RegisterSubXactCallback(subxact_ended, NULL);
	watching = true;
}

/* Leaves in "common" what is in the list, too. */
static void
intersect(const char *via)
{
	StringInfoData both;
	char	   *rest = pstrdup(common);
	char	   *element;

	initStringInfo(&both);
	while ((element = strsep(&rest, ",")) != NULL)
	{
		if (list_has(via, element))
			appendStringInfo(&both, "%s%s", both.len > 0 ? "," : "", element);
	}
	replace(&common, both.data);
	pfree(both.data);
}

/*
 * via_begin
 *		Says that what is written from now on comes of a message that has come this
 *		way; NULL: the message does not tell.
 *
 * It ends with via_end(), with the transaction, and with an error.
 */
void
via_begin(const char *via)
{
	const char *way = via != NULL ? via : "";

	watch_transactions();
	replace(&current, via);
	if (common == NULL)
		replace(&common, way);
	else if (strcmp(common, way) != 0)
		intersect(way);
}

/*
 * via_begin_deferred
 *		Says that what is written from now on may come of any of the messages that
 *		the transaction has handled.  It ends as with via_begin().
 */
void
via_begin_deferred(void)
{
	replace(&current, common != NULL && common[0] != '\0' ? common : NULL);
}

/*
 * via_end
 *		Says that what is written from now on comes of no message.
 */
void
via_end(void)
{
	replace(&current, NULL);
}

/*
 * via_current
 *		Returns the way of the message that is being handled; NULL: none is, or it
 *		is not known.
 */
const char *
via_current(void)
{
	return current;
}
