/*-------------------------------------------------------------------------
 *
 * alert.c
 *		Notifications of topics that the broker refuses, on the channel
 *		pg_fanout_alert.
 *
 * An alert must never stop anything.  NOTIFY can fail, and only when its
 * transaction commits: the server's queue of notifications is full, or another
 * transaction that notified has not ended.  So alerts are queued while
 * something else is recorded, and sent in a transaction of their own whose
 * error is caught.  What cannot be sent is skipped: fanout.stat_topics and the
 * server log tell the same.
 *
 * Scenarios:
 *
 * - The transaction commits: listeners are notified, the queue is empty.
 *
 * - It fails, for whatever reason: the queue is emptied all the same.  The first
 *	 failure is logged, and the first success after one.
 *
 * - The server's queue of notifications was full, and is not any more, since whoever
 *	 did not take them out has: the server notices that when a notification succeeds,
 *	 which none does, or when somebody asks how full it is (make_room()).
 *
 * - Another transaction that notified holds the server's lock on notifications
 *	 (commits take turns; one that waits for a synchronous standby keeps the
 *	 lock): that is waited for LOCK_TIMEOUT at most.
 *
 * - The process ends before it sends: the alerts are lost.
 *
 * Locks: the server's lock on notifications, while the transaction commits.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/memutils.h"

#include "publish/alert.h"
#include "server/query.h"
#include "server/worker.h"

/* Bounds the memory; more than that at once are skipped. */
#define MAX_ALERTS 100

#define LOCK_TIMEOUT "500ms"

typedef struct Alert
{
	char	   *topic;
	int			attempts;
	char	   *error;
} Alert;

static Alert alerts[MAX_ALERTS];
static int	nalerts = 0;
static bool failing = false;	/* the log says that alerts cannot be sent */

/*
 * Queues a notification that the broker has refused a topic so many times.  The
 * texts are copied.  May be called in a transaction or outside of one.
 */
void
alert_queue(const char *topic, int attempts, const char *error)
{
	Alert	   *alert = &alerts[nalerts];

	if (nalerts == MAX_ALERTS)
		return;
	alert->topic = MemoryContextStrdup(TopMemoryContext, topic);
	alert->attempts = attempts;
	alert->error = MemoryContextStrdup(TopMemoryContext, error);
	nalerts++;
}

static void
notify(const Alert *alert)
{
	static CachedQuery query = {
		"select set_config('lock_timeout', '" LOCK_TIMEOUT "', true),"
		" pg_notify('pg_fanout_alert',"
		" json_build_object('topic', $1, 'attempts', $2, 'error', left($3, 1000))::text)"
	};
	Oid			types[3] = {TEXTOID, INT4OID, TEXTOID};
	Datum		values[3] = {
		CStringGetTextDatum(alert->topic), Int32GetDatum(alert->attempts), CStringGetTextDatum(alert->error)
	};

	query_execute(&query, 3, types, values, NULL);
}

/*
 * Has the server look whether its queue of notifications is still full.  Else it would
 * stay so until somebody asks.
 */
static void
make_room(void)
{
	static CachedQuery query = {"select pg_notification_queue_usage()"};

	query_execute(&query, 0, NULL, NULL, NULL);
}

static void
notify_all(void)
{
	worker_begin();
	if (failing)
		make_room();
	for (int i = 0; i < nalerts; i++)
		notify(&alerts[i]);
	worker_commit();
}

/* Logs a change of state.  error: why alerts cannot be sent; NULL: they were. */
static void
log_outcome(const ErrorData *error)
{
	if (failing == (error != NULL))
		return;
	failing = (error != NULL);
	if (error != NULL)
		ereport(WARNING,
				(errcode(error->sqlerrcode),
				 errmsg("pg_fanout cannot notify listeners on channel \"pg_fanout_alert\""),
				 errdetail("%s.", error->message),
				 errhint("Alerts are skipped, and messages are published. See fanout.stat_topics.")));
	else
		ereport(LOG,
				(errmsg("pg_fanout notifies listeners on channel \"pg_fanout_alert\" again")));
}

static void
forget_all(void)
{
	for (int i = 0; i < nalerts; i++)
	{
		pfree(alerts[i].topic);
		pfree(alerts[i].error);
	}
	nalerts = 0;
}

/*
 * Sends what is queued, in a transaction of its own, and raises no error.  Waits
 * at most LOCK_TIMEOUT for other transactions.
 */
void
alert_send(void)
{
	MemoryContext context = CurrentMemoryContext;

	if (nalerts == 0)
		return;
	worker_allow_cancel(true);	/* else there is no lock_timeout */
	PG_TRY();
	{
		notify_all();
		log_outcome(NULL);
	}
	PG_CATCH();
	{
		ErrorData  *error;

		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		FlushErrorState();
		worker_abort();
		log_outcome(error);
	}
	PG_END_TRY();
	worker_allow_cancel(false);
	MemoryContextSwitchTo(context);
	forget_all();
}
