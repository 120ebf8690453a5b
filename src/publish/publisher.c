/*-------------------------------------------------------------------------
 *
 * publisher.c
 *		The worker that publishes one database's outbox.
 *
 * One loop, each round of which does whatever can be done without waiting:
 *
 *		take requests -> connect -> take what the broker said -> read (main cursor,
 *		topics that read by themselves) -> declare -> publish -> record
 *		-> try again what was refused
 *
 * and then waits for the first of: the latch (a commit, a request), the
 * broker's socket, the next thing due by the clock.
 *
 * This file has the connection, the main cursor, requests and the clock.  Each topic
 * has a state machine of its own (flow.c), its messages a window (window.c) and a
 * channel (sender.c), and its declaration is asked of the broker on other channels
 * (topology.c).  What the main cursor has read and is not recorded yet is in
 * chunks.c.
 *
 * What SQL declares, pauses or drops is looked at whenever a commit has woken the
 * publisher, broker or not, before anything more is published.
 *
 * No transaction is open while the broker is waited for.  An error in here
 * ends the process, the launcher starts it again, and the ledger says where
 * to go on: messages not recorded are sent again with the same message id.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "commands/dbcommands.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/ipc.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "broker/broker.h"
#include "broker/connection.h"
#include "publish/alert.h"
#include "publish/catchup.h"
#include "publish/chunks.h"
#include "publish/flow.h"
#include "publish/ledger.h"
#include "publish/maintenance.h"
#include "publish/progress.h"
#include "publish/publisher.h"
#include "publish/reader.h"
#include "publish/recount.h"
#include "publish/sender.h"
#include "publish/topic.h"
#include "publish/topology.h"
#include "server/backlog.h"
#include "server/compat.h"
#include "server/guc.h"
#include "server/monotime.h"
#include "server/worker.h"

#define FIRST_STATISTICS_MS 1000
#define STATISTICS_MS 10000
#define TALLIES_MS 1000
#define ALARM_LOG_MS 1000
#define EVENTS_AT_ONCE 10000
#define RECORD_AGAIN_MS 500
#define RECORD_FLOWS_MS 50
#define LOOK_MS 10
#define LOOK_AWAY_MS 100		/* without a broker */
#define RECHECK_TOPICS 50		/* each time maintain() runs */

/* How long a new login waits for what is in flight. */
#define LOGIN_WAIT_MS 5000

#define BATCH_MS 2

/* Blocks of the outbox that are read before others get their turn. */
#define READ_BLOCKS 256

/* A topic that others have waited for so long makes way. */
#define SLOW_MS 200
#define SLOW_ANYWAY_MS 1000

/*
 * How often such topics are looked for; with so many messages in memory they need not be late;
 * with less than so many bytes they do not leave the main cursor.
 */
#define LATE_MS 50
#define MANY_MESSAGES (RUN_MESSAGES / 2)
#define PASSING_BYTES (64 * 1024)

/* How many leave at once while there is no room, and what is long then. */
#define LONG_TOPICS 10
#define LONG_MS 3000

/* For how long it counts that a chunk was waited for for SLOW_ANYWAY_MS. */
#define STOOD_STILL_MS 10000

typedef struct Publisher
{
	Connection	conn;
	MonoTime	unblocked_at;	/* end of the last alarm */
	char		alarm[256];		/* why it blocks us */
	bool		alarm_logged;	/* the log says that we are blocked */
	MonoTime	alarm_log_at;	/* no sooner */
	MonoTime	login_at;		/* a new login is wanted; 0: none */
	char		refusal[600];	/* the 403 that asks for it */

	/* the main cursor */
	Cursor		cursor;
	bool		more;			/* there may be something to read */
	bool		look;			/* the catalog may have changed */
	MonoTime	look_at;		/* it is looked at no sooner */
	bool		load;			/* it has */
	MonoTime	batch_at;		/* the next one begins no sooner, under load */
	uint64		recorded;		/* number of the base according to the ledger */
	uint64		batch_ticket;	/* flush() before the batch that is being read */
	uint64		flush_noted;	/* the last one that is behind a batch */
	bool		batch_found;	/* that was found while there was no broker */
	bool		unfound;		/* there may be something to find ahead of it */
	MonoTime	stood_still_at; /* the oldest chunk did, with no room for
								 * another */
	bool		much;			/* a topic may have much in memory of what it
								 * has read */

	/* requests */
	FlushTicket flush_due;		/* what is behind the ledger, to be served
								 * next */
	FlushTicket flush_recorded; /* and the last one */
	uint64		verify_pending; /* verify() tickets not served */
	uint32		batch_load;		/* of the catalog, before the batch that is
								 * being read */

	/* what waits */
	uint64		start_number;	/* of the base behind which it is all new */
	bool		start_found;	/* what was there at the start */

	/* by the clock */
	uint64		counted;		/* of those sent, in statistics */
	MonoTime	statistics_at;	/* 0: nothing to count */
	MonoTime	statistics_since;
	MonoTime	maintenance_at;
	MonoTime	tallies_at;		/* 0: not before there are many */
	MonoTime	record_at;		/* answers not recorded yet: no sooner */
	MonoTime	record_flows_at;	/* how far topics have come: no sooner */
	MonoTime	late_at;		/* topics that are late are looked for: no
								 * sooner */
} Publisher;

static Publisher pub;

static bool
connected(void)
{
	return pub.conn.broker != NULL;
}

/* Would the broker take anything now? */
static bool
usable(void)
{
	return connected() && !broker_blocked(pub.conn.broker) && pub.login_at == 0;
}

/* ---- losing the connection ---- */

/* event: with what the broker has closed it, or NULL. */
static void
forget_connection(const BrokerEvent *event)
{
	bool		message = sender_doubtful(event);
	bool		request = topology_doubtful(event);

	sender_lost(event, request);
	topology_lost(event, message);
	pub.alarm_logged = false;
	pub.login_at = 0;
}

static void
broker_failed(const char *text)
{
	if (connected())
		forget_connection(NULL);
	connection_failed(&pub.conn, text);
}

static void
disconnect(bool polite)
{
	if (!connected())
		return;
	forget_connection(NULL);
	connection_close(&pub.conn, polite);
}

/*
 * Asks for a new login once nothing is in flight, so that nothing need be sent
 * twice for its sake; until then nothing is published.
 */
static void
want_login(const BrokerEvent *event)
{
	snprintf(pub.refusal, sizeof(pub.refusal), "%d %s", event->code, event->text);
	if (pub.login_at == 0)
		pub.login_at = mono_now();
}

static bool
may_log_in(void)
{
	return connected() && pub.login_at != 0 && !broker_blocked(pub.conn.broker) &&
		(sender_idle() || mono_exceeds(pub.login_at, mono_now(), LOGIN_WAIT_MS));
}

static bool
log_in_anew(void)
{
	if (!may_log_in())
		return false;
	forget_connection(NULL);
	connection_log_in_anew(&pub.conn, pub.refusal);
	return true;
}

/* ---- what the broker says ---- */

/*
 * Alarms may come and go faster than anybody reads of them: what is logged is
 * how it stands, at most once in ALARM_LOG_MS.
 */
static bool
alarm_untold(void)
{
	return connected() && broker_blocked(pub.conn.broker) != pub.alarm_logged;
}

static void
log_alarm(void)
{
	if (!alarm_untold() || pub.alarm_log_at > mono_now())
		return;
	pub.alarm_logged = !pub.alarm_logged;
	pub.alarm_log_at = mono_later(ALARM_LOG_MS);
	if (pub.alarm_logged)
		ereport(LOG, (errmsg("pg_fanout publisher is blocked by the broker"),
					  errdetail("%s", pub.alarm)));
	else
		ereport(LOG, (errmsg("pg_fanout publisher is no longer blocked by the broker")));
}

/* Something about a channel: its owner takes it. */
static void
handle_channel_event(BrokerEvent *event)
{
	const char *wrong = NULL;
	bool		believed = true;

	if (topology_owns(event->channel))
	{
		sender_heard();
		if (event->type == BROKER_CHANNEL_OPENED)
			topology_opened(&pub.conn, event->channel);
		else if (event->type == BROKER_REPLY)
			topology_replied(&pub.conn, event);
		else if (event->type == BROKER_CHANNEL_CLOSED)
			believed = topology_refused(&pub.conn, event);
	}
	else if (sender_owns(event->channel))
	{
		if (event->type == BROKER_CHANNEL_OPENED)
			sender_opened(event->channel);
		else if (event->type == BROKER_RETURN)
			wrong = sender_returned(event);
		else if (event->type == BROKER_CHANNEL_CLOSED)
			believed = sender_closed(event);
		else if (event->type == BROKER_ACK || event->type == BROKER_NACK)
			wrong = sender_confirmed(event);
	}
	if (wrong != NULL)
		broker_failed(wrong);
	else if (!believed)
		want_login(event);
}

static void
handle_event(BrokerEvent *event)
{
	switch (event->type)
	{
		case BROKER_CHANNEL_OPENED:
		case BROKER_CHANNEL_CLOSED:
		case BROKER_REPLY:
		case BROKER_ACK:
		case BROKER_NACK:
		case BROKER_RETURN:
			handle_channel_event(event);
			break;
		case BROKER_BLOCKED:
			strlcpy(pub.alarm, event->text, sizeof(pub.alarm));
			log_alarm();
			break;
		case BROKER_UNBLOCKED:
			pub.unblocked_at = mono_now();
			topology_unblocked();
			log_alarm();
			break;
		case BROKER_DISCONNECTED:
			forget_connection(event);
			connection_failed(&pub.conn, event->text);
			break;
		case BROKER_NOTHING:
		case BROKER_MORE:
		case BROKER_DELIVERY:	/* these come to consumers only */
		case BROKER_CANCELLED:
			break;
	}
}

/*
 * Returns false if all that the broker has said is taken.  However much that
 * is, the rest of the work gets its turn.
 */
static bool
take_events(void)
{
	BrokerEvent event;

	for (int i = 0; i < EVENTS_AT_ONCE && connected(); i++)
	{
		broker_next_event(pub.conn.broker, &event);
		if (event.type == BROKER_NOTHING)
			return false;
		if (event.type == BROKER_MORE)
			return true;
		handle_event(&event);
	}
	return connected();
}

/* ---- connecting ---- */

static void
use_settings(void)
{
	if (!connection_settings_changed(&pub.conn))
		return;
	disconnect(true);
	connection_use_settings(&pub.conn);
	pub.conn.options.min_channels = 2 * OTHER_CHANNELS;
	pub.conn.options.max_channels = MOST_CHANNELS + OTHER_CHANNELS;
}

static bool
connect_broker(void)
{
	if (connected() || pub.conn.connect_at > mono_now())
		return false;
	if (!connection_open(&pub.conn))
		return true;
	if (pub.conn.logins > 1)
		pg_atomic_fetch_add_u64(&worker_slot->reconnects, 1);
	topology_forget_confirmed(true);
	/* nothing goes out before that */
	pub.look = true;
	pub.look_at = 0;
	return true;
}

/* ---- the catalog ---- */

/*
 * Reads the catalog.  Inside a transaction.  What is marked in it to be dropped goes once
 * a batch is recorded that begins later, hence another batch.
 */
static void
load_topics(void)
{
	Topic	   *topic;
	int			i = 0;

	pub.load = false;
	pub.more = true;
	topic_load();
	flow_load_stalls();
	flow_find_held();
	while ((topic = topic_next(&i)) != NULL)
		flow_reconsider(topic);
	flow_load_purges();
	topology_request_all();
}

/* May something have been committed that was not looked at? */
static bool
commits_unseen(void)
{
	return pub.look || pg_atomic_read_u32(&worker_slot->dirty) != 0;
}

/* Looks whether anything was declared, paused or dropped.  Inside a transaction. */
static void
look_at_catalog(void)
{
	pub.look = false;
	if (topic_changed())
		pub.load = true;
}

/* Does the main cursor come to it soon, with its next batch? */
static bool
may_begin_batch(void)
{
	return usable() && pub.cursor.batch == NULL && chunks_room();
}

/*
 * The same while the main cursor cannot read, or does not come to it: whenever
 * something was committed, but seldom while there is no broker, since writers may be
 * many then.
 */
static bool
look_meanwhile(void)
{
	if (!commits_unseen() || pub.look_at > mono_now() || (!pub.look && may_begin_batch()))
		return false;
	pg_atomic_write_u32(&worker_slot->dirty, 0);
	pg_memory_barrier();
	pub.more = true;
	worker_begin();
	look_at_catalog();
	if (pub.load)
		load_topics();
	worker_commit();
	pub.unfound = true;
	pub.look_at = mono_later(connected() ? LOOK_MS : LOOK_AWAY_MS);
	return true;
}

/* ---- reading with the main cursor ---- */

static void
batch_recorded(FlushTicket flush, uint32 load)
{
	if (flush.ticket > pub.flush_recorded.ticket)
		pub.flush_recorded = flush;
	if (topology_keeps(load))
		topology_drop(load);
}

/*
 * What has to wait until this batch is recorded: a flush() that began before
 * its snapshot, and the dropping of what was seen marked before that, since a queue must
 * still get what was written before.  A batch that was found long before it was read
 * is too old for either; the next one is not.
 */
static void
note_end_of_batch(void)
{
	Chunk	   *chunk = chunks_last();
	FlushTicket flush = {pub.batch_ticket, pub.cursor.number};

	if (pub.batch_found)
	{
		/* rows that were found may have been taken away before they were read */
		if (!reader_is_ahead())
			flow_count_riding();
		return;
	}
	if (flush.ticket <= pub.flush_noted)
		flush.ticket = flush.number = 0;
	else
		pub.flush_noted = flush.ticket;
	if (chunk == NULL)
	{
		batch_recorded(flush, pub.batch_load);
		return;
	}
	if (flush.ticket > 0)
		chunk->flush = flush;
	chunk->load = pub.batch_load;
}

/*
 * Begins a batch.  The flag of commits is cleared before the snapshot is taken, so
 * that no commit is missed, and before the ticket is read, so that no flush() is: it
 * sets the flag after it has drawn its ticket.
 */
static void
begin_batch(void)
{
	pub.batch_at = mono_later(BATCH_MS);
	if (pub.cursor.batch == NULL)
		pub.batch_found = reader_is_ahead();
	if (pub.cursor.batch == NULL && !pub.batch_found)
	{
		pub.more = false;
		pg_atomic_write_u32(&worker_slot->dirty, 0);
		pg_memory_barrier();
		pub.batch_ticket = pg_atomic_read_u64(&worker_slot->flush_requested);
		pub.batch_load = topic_loads();
	}
	flow_unknown_topic = false;
	reader_begin_batch(&pub.cursor, flow_wanted);
}

/* Reads the next chunk, once its rows are found.  Inside a transaction. */
static Chunk *
fill_chunk(void)
{
	Chunk	   *chunk;

	look_at_catalog();
	if (pub.load || flow_unknown_topic)
		load_topics();
	flow_unknown_topic = false;
	flow_leave_large();
	chunk = chunks_create();
	reader_fill(&pub.cursor, chunk, chunks_limit(), flow_run_for);
	return chunk;
}

/*
 * May the topic ride on, if others do not wait for it?  It has little in memory, and may only be
 * unlucky: many that leave the main cursor read much by themselves.
 */
static bool
may_let_pass(const Flow *flow)
{
	return flow->window.in_flight > 0 && flow_memory(flow) <= PASSING_BYTES &&
		!flow->window.serial && flow->isolate == 0;
}

/* Has others wait for a topic no more. */
static void
make_way(Flow *flow)
{
	if (may_let_pass(flow))
		flow_let_pass(flow);
	else
		flow_leave(flow, true);
}

/* Has topics that let others pass, and are late still, do so with what was read now. */
static void
let_pass_again(Chunk *chunk)
{
	MonoTime	now = mono_now();
	Run		   *next;

	for (Run *run = chunk->runs; run != NULL; run = next)
	{
		next = run->next_of_chunk;
		if (run->flow->state == FLOW_JOINING && may_let_pass(run->flow) && sender_is_late(run->flow, now, SLOW_MS))
			flow_let_pass(run->flow);
	}
}

/* Takes in what was read. */
static void
admit_chunk(Chunk *chunk)
{
	bool		ended = chunk->ends_batch;

	pub.much = true;
	flow_end_runs(chunk);
	if (chunk->runs == NULL)
		chunks_free(chunk);
	else
	{
		chunks_append(chunk);
		for (Run *run = chunk->runs; run != NULL; run = run->next_of_chunk)
			flow_admit(run);
		let_pass_again(chunk);
	}
	if (ended)
		note_end_of_batch();
	if (!ended || pub.batch_found)
		pub.more = true;
}

/* Takes a step with the main cursor. */
static void
read_main(void)
{
	Chunk	   *chunk = NULL;

	if (pub.cursor.batch == NULL)
		flow_join_all(usable());
	worker_begin();
	if (!pub.cursor.open)
		begin_batch();
	if (reader_find(&pub.cursor, READ_BLOCKS))
		chunk = fill_chunk();
	worker_commit();
	if (chunk != NULL)
		admit_chunk(chunk);
	else
		pub.more = true;
}

/*
 * While messages are awaited, batches begin no sooner than BATCH_MS one after the
 * other, so that one gets what several transactions commit in that time.
 */
static bool
may_read(void)
{
	if (!usable() || !pub.more || !chunks_room() || reader_finds_ahead())
		return false;
	return pub.cursor.batch != NULL || chunks_first() == NULL || pub.batch_at <= mono_now();
}

/* ---- finding rows while nothing can be read ---- */

/* Finds rows of the main cursor's batch, which is read once the broker is there. */
static void
find_main(void)
{
	worker_begin();
	if (!pub.cursor.open)
		begin_batch();
	(void) reader_find(&pub.cursor, READ_BLOCKS);
	worker_commit();
	pub.more = true;
}

/* Finds rows behind that. */
static void
find_ahead(void)
{
	if (!reader_finds_ahead())
		pub.unfound = false;
	worker_begin();
	flow_unknown_topic = false;
	(void) reader_find_ahead(&pub.cursor, READ_BLOCKS, flow_found);
	if (flow_unknown_topic)
		load_topics();
	flow_unknown_topic = false;
	worker_commit();
	pub.more = true;
}

/*
 * While there is no broker, finds what is committed, so that it is known how much
 * waits.  What was begun is ended in any case, before the main cursor goes on.  Returns
 * whether there was anything to find.
 */
static bool
find_meanwhile(void)
{
	if (reader_finds_ahead())
		find_ahead();
	else if (usable())
		return false;
	else if (pub.cursor.batch != NULL && (!pub.cursor.open || pub.cursor.scan.passing))
		find_main();
	else if (pub.unfound)
		find_ahead();
	else
		return false;
	return true;
}

/* Has the main cursor found all that was there at the start? */
static bool
is_start_found(void)
{
	if (reader_is_ahead())
		return !reader_finds_ahead();
	return pub.cursor.number > pub.start_number ||
		(pub.cursor.number == pub.start_number && pub.cursor.open && !pub.cursor.scan.passing);
}

/*
 * Tells sessions whether what they see of backlogs is true: all that was there at the
 * start is found, no topic has to be counted anew, and all have a place to be shown in.
 */
static void
show_backlogs(void)
{
	pub.start_found = pub.start_found || is_start_found();
	pg_atomic_write_u32(&worker_slot->backlog_known,
						pub.start_found && flow_backlogs_counted() && flow_backlogs_shown());
}

/* Sessions see nothing of backlogs any more. */
static void
forget_backlogs(void)
{
	pg_atomic_write_u32(&worker_slot->backlog_known, 0);
	backlog_clear();
}

/*
 * Has topics make way that keep a chunk waiting, because they have many messages or by
 * their own fault.
 */
static void
pass_late(Chunk *chunk, MonoTime now)
{
	Run		   *next;

	for (Run *run = chunk->runs; run != NULL; run = next)
	{
		next = run->next_of_chunk;
		if (run->done < run->count &&
			(run->flow->window.count >= MANY_MESSAGES || sender_is_late(run->flow, now, SLOW_MS)))
			make_way(run->flow);
	}
}

/*
 * Does the topic keep the oldest chunk waiting by its own fault?  Its messages are behind many
 * of its own, whose confirms are slow, or that are there for long; or, if chunks stood still of
 * late, they are passed by those of others: a broker may be busy with much from all.
 */
static bool
takes_long(const Flow *flow, const Chunk *chunk, MonoTime now)
{
	if (flow->window.in_flight == 0 || flow->yields)
		return false;
	if (sender_lags(flow) && (sender_is_slow(flow, now) || mono_exceeds(chunk->read_at, now, LONG_MS)))
		return true;
	return !mono_exceeds(pub.stood_still_at, now, STOOD_STILL_MS) && sender_is_passed(flow, now, SLOW_ANYWAY_MS);
}

/*
 * While there is no room for what is to be read, has topics make way that take long, those
 * with the most in memory first.  Those that lag leave: they would soon be in the way again.
 */
static void
leave_long(Chunk *chunk, MonoTime now)
{
	for (int i = 0; i < LONG_TOPICS && !chunks_room(); i++)
	{
		Flow	   *most = NULL;

		for (Run *run = chunk->runs; run != NULL; run = run->next_of_chunk)
		{
			if (run->done < run->count && takes_long(run->flow, chunk, now) &&
				(most == NULL || flow_memory(run->flow) > flow_memory(most)))
				most = run->flow;
		}
		if (most == NULL)
			return;
		if (sender_lags(most))
			flow_leave(most, true);
		else
			make_way(most);
	}
}

/*
 * Has topics make way that others wait for, because they have much in memory, or their
 * messages are slow; or, while there is no room, their queues.
 */
static void
leave_slow(void)
{
	MonoTime	since;
	MonoTime	now = mono_now();
	Chunk	   *chunk;
	MonoTime	from = Max(pub.unblocked_at, pub.conn.connected_at);

	if (!usable())
		return;
	if (pub.much && pub.more && !chunks_room())
		pub.much = flow_leave_much();
	chunk = chunks_awaited(&since);
	if (chunk == NULL || pub.late_at > now)
		return;
	if (pub.more && !chunks_room() && mono_exceeds(Max(chunk->read_at, from), now, SLOW_ANYWAY_MS))
	{
		if (mono_exceeds(Max(since, from), now, SLOW_ANYWAY_MS))
			pub.stood_still_at = now;
		leave_long(chunk, now);
		pub.late_at = mono_plus(now, LATE_MS);
	}
	if (!mono_exceeds(Max(since, from), now, SLOW_MS))
		return;
	pub.late_at = mono_plus(now, LATE_MS);
	if (!chunks_room() || chunks_one_waits() || mono_exceeds(since, now, SLOW_ANYWAY_MS))
		pass_late(chunk, now);
}

/* ---- recording ---- */

/*
 * Does somebody wait until it is recorded?  As long as more is in flight, that would not
 * end the wait, and recording a few messages at a time would make it longer.
 */
static bool
flush_waits(void)
{
	return sender_idle() &&
		pg_atomic_read_u64(&worker_slot->flush_requested) > pg_atomic_read_u64(&worker_slot->flush_done);
}

static bool
chunks_to_record(void)
{
	return chunks_due() || (chunks_due_at() != 0 && (flush_waits() || topology_keeps(chunks_first()->load)));
}

static bool
flows_to_record(void)
{
	return flow_unrecorded() && (flush_waits() || pub.record_flows_at <= mono_now());
}

/* Records the main cursor's chunks that are done.  Returns the last of them, or NULL. */
static Chunk *
record_chunks(void)
{
	int			count;
	Chunk	   *chunk = chunks_record(flow_record_run, &count);
	LedgerEntry entry = {0};

	if (chunk == NULL)
		return NULL;
	entry.base = chunk->ends_batch ? chunk->batch->target : chunk->batch->base;
	entry.target = chunk->batch->target;
	entry.last_id = chunk->last_id;
	entry.unread = chunk->ends_batch ? chunk->batch->end_unread : chunk->batch->unread;
	ledger_record(&entry, count);
	pub.recorded = chunk->batch->number - (chunk->ends_batch ? 0 : 1);
	return chunk;
}

/*
 * Records what is done, and where topics are that do not ride with the main cursor.
 * That comes first: an entry of the main cursor must not be true for a topic that
 * has left it.
 */
static bool
record_settled(void)
{
	Chunk	   *chunk;

	if (!chunks_to_record() && !flows_to_record())
		return false;
	worker_begin();
	flow_record_stalls();
	flow_record_all(&pub.recorded);
	chunk = record_chunks();
	worker_commit();
	pub.record_flows_at = mono_later(RECORD_FLOWS_MS);
	if (chunk != NULL)
	{
		batch_recorded(chunk->flush, chunk->load);
		chunks_free(chunk);
	}
	return true;
}

static bool
answers_to_record(void)
{
	return topology_unrecorded() || flow_stalls_unrecorded();
}

/*
 * Rows that somebody's open transaction has locked are left for later: no
 * topic may wait for a user who has paused another one and not committed yet.
 */
static void
record_answers(void)
{
	if (!answers_to_record() || pub.record_at > mono_now())
		return;
	worker_begin();
	topology_record();
	flow_record_stalls();
	worker_commit();
	pub.record_at = answers_to_record() ? mono_later(RECORD_AGAIN_MS) : 0;
}

/* ---- flush() and verify() ---- */

/* Is there a flush() to be served that is behind the ledger? */
static bool
flush_is_due(void)
{
	uint64		done = pg_atomic_read_u64(&worker_slot->flush_done);

	if (pub.flush_due.ticket <= done)
		pub.flush_due = pub.flush_recorded;
	return pub.flush_due.ticket > done;
}

/* One after the other, so that none waits for what was written before later ones. */
static void
serve_flush(void)
{
	while (flush_is_due() && connected() && !topology_busy() && !flow_anything_waits(pub.flush_due.number))
	{
		pg_atomic_write_u64(&worker_slot->flush_done, pub.flush_due.ticket);
		ConditionVariableBroadcast(&worker_slot->progress);
	}
}

static void
serve_verify(void)
{
	if (pub.verify_pending <= pg_atomic_read_u64(&worker_slot->verify_done) ||
		!connected() || topology_busy())
		return;
	pg_atomic_write_u64(&worker_slot->verify_done, pub.verify_pending);
	ConditionVariableBroadcast(&worker_slot->progress);
}

/* ---- subscriptions ---- */

/*
 * The launcher cannot read the table, so it is told through shared memory
 * which workers there should be; also while there is no broker.
 */
static void
read_subscriptions(void)
{
	static bool logged = false;
	int			without;

	pg_atomic_write_u32(&worker_slot->subscriptions_dirty, 0);
	pg_memory_barrier();
	worker_begin();
	without = maintenance_publish_subscriptions();
	if (without > 0 && !logged)
		ereport(LOG,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("pg_fanout cannot start a consumer for %d of the subscriptions of database \"%s\"",
						without, get_database_name(MyDatabaseId)),
				 errhint("Increase pg_fanout.max_subscriptions.")));
	worker_commit();
	shmem_wake_launcher(0);
	logged = (without > 0);
}

/* ---- requests ---- */

/* ms */
static long
maintenance_interval(void)
{
	return Max(1, Min(60, Min(pgf_retention, pgf_inbox_retention) / 4)) * 1000L;
}

static void
take_requests(void)
{
	uint64		verify = pg_atomic_read_u64(&worker_slot->verify_requested);

	if (verify > pub.verify_pending)
	{
		pub.verify_pending = verify;
		topology_forget_confirmed(false);
	}
	if (pg_atomic_read_u32(&worker_slot->rows_removed) != 0)
	{
		pg_atomic_write_u32(&worker_slot->rows_removed, 0);
		pg_memory_barrier();
		flow_uncount_detached();
	}
	if (pg_atomic_read_u32(&worker_slot->dirty) != 0)
		pub.more = true;
	if (pg_atomic_read_u32(&worker_slot->subscriptions_dirty) != 0)
		read_subscriptions();
	if (worker_reloaded())
	{
		use_settings();
		pub.maintenance_at = Min(pub.maintenance_at, mono_later(maintenance_interval()));
	}
}

/* ---- by the clock ---- */

static void
count_sent(void)
{
	Topic	   *topic;
	int			i = 0;
	int			n = 0;
	Datum	   *ids = palloc(sizeof(Datum) * 64);
	Datum	   *counts = palloc(sizeof(Datum) * 64);
	int			room = 64;

	while ((topic = topic_next(&i)) != NULL)
	{
		if (topic->sent == 0)
			continue;
		if (n == room)
		{
			room *= 2;
			ids = repalloc(ids, sizeof(Datum) * room);
			counts = repalloc(counts, sizeof(Datum) * room);
		}
		ids[n] = Int32GetDatum(topic->topic_id);
		counts[n++] = Int64GetDatum(topic->sent);
		topic->sent = 0;
	}
	pub.counted = pg_atomic_read_u64(&worker_slot->confirmed);
	maintenance_count_sent(ids, counts, n,
						   Max(1.0, (mono_now() - pub.statistics_since) / (double) USECS_PER_SEC));
	pfree(ids);
	pfree(counts);
}

/* Were messages sent that are not counted? */
static bool
sent_uncounted(void)
{
	return pg_atomic_read_u64(&worker_slot->confirmed) != pub.counted;
}

/*
 * The first messages after a pause are counted soon; then seldom, because each
 * time leaves a dead tuple behind.
 */
static void
keep_statistics(MonoTime now)
{
	bool		uncounted;

	if (pub.statistics_at > now)
		return;
	uncounted = sent_uncounted();
	if (pub.statistics_at == 0)
	{
		if (uncounted)
		{
			pub.statistics_since = now;
			pub.statistics_at = mono_plus(now, FIRST_STATISTICS_MS);
		}
		return;
	}
	if (uncounted)
	{
		worker_begin();
		count_sent();
		worker_commit();
	}
	pub.statistics_since = now;
	pub.statistics_at = uncounted ? mono_plus(now, STATISTICS_MS) : 0;
}

/*
 * Adds up the entries of fanout.tally once there are many, because each look at the counts
 * would have to; and again TALLIES_MS later, because the transactions that made them many
 * may not have committed yet.  Entries that are committed even later, or are few, are added
 * up with the next maintenance.
 */
static void
add_tallies(MonoTime now)
{
	bool		many = pg_atomic_read_u32(&worker_slot->tallies) >= MANY_TALLIES;

	if (!many && (pub.tallies_at == 0 || now < pub.tallies_at))
		return;
	pub.tallies_at = many ? mono_plus(now, TALLIES_MS) : 0;
	worker_begin();
	maintenance_add_tallies();
	worker_commit();
}

static void
maintain(MonoTime now)
{
	int			segment;

	if (now < pub.maintenance_at)
		return;
	worker_begin();

	/*
	 * What a wrong setting was to keep may be longer than the default.  Where
	 * the main cursor looks for the rows of a batch, no segment may go.
	 */
	segment = pub.conn.problem || pub.cursor.scan.passing || reader_finds_ahead() ? maintenance_current_segment() :
		maintenance_rotate(pgf_retention, flow_move_to_held);
	flow_find_held();
	worker_commit();
	worker_begin();
	if (pub.conn.problem == NULL)
		maintenance_rotate_inbox(pgf_inbox_retention);
	maintenance_bind_grants();
	worker_commit();
	read_subscriptions();
	pg_atomic_write_u32(&worker_slot->current_segment, segment);
	/* the safety nets: under the wake-ups, and under the topology */
	pub.more = pub.look = true;
	topology_recheck(RECHECK_TOPICS);
	pub.tallies_at = now;
	pub.maintenance_at = mono_plus(now, maintenance_interval());
}

static void
work_by_the_clock(void)
{
	MonoTime	now = mono_now();
	const char *problem = sender_check(now, pub.unblocked_at);

	if (problem == NULL && usable())
		problem = topology_check(now, sender_heard_at());
	if (problem != NULL)
		broker_failed(problem);
	log_alarm();
	connection_lasts(&pub.conn, now);
	leave_slow();
	maintain(now);
	keep_statistics(now);
	add_tallies(now);
}

/* ---- the loop ---- */

static void
earlier(long *timeout, MonoTime now, MonoTime when)
{
	if (when != 0)
		*timeout = Min(*timeout, mono_left(now, when));
}

/* What is due by the clock whether there is a broker or not. */
static long
time_left(MonoTime now)
{
	MonoTime	since;
	long		timeout = 60000;

	earlier(&timeout, now, pub.maintenance_at);
	earlier(&timeout, now, pub.statistics_at);
	earlier(&timeout, now, pub.tallies_at);
	if (commits_unseen())
		earlier(&timeout, now, may_begin_batch() ? pub.batch_at : Max(pub.look_at, 1));
	if (pub.more && usable() && chunks_room())
		earlier(&timeout, now, pub.batch_at);
	earlier(&timeout, now, chunks_due_at());
	earlier(&timeout, now, flow_next_retry(usable()));
	if (answers_to_record())
		earlier(&timeout, now, pub.record_at);
	if (flow_unrecorded())
		earlier(&timeout, now, pub.record_flows_at);
	if (chunks_awaited(&since) != NULL)
		timeout = Min(timeout, mono_exceeds(since, now, SLOW_MS) ? LATE_MS : SLOW_MS);
	return timeout;
}

static void
wait_for_work(void)
{
	MonoTime	now = mono_now();
	long		timeout = time_left(now);
	int			fd = -1;

	if (connected())
	{
		fd = broker_fd(pub.conn.broker);
		timeout = Min(timeout, broker_next_heartbeat(pub.conn.broker));
		timeout = Min(timeout, sender_timeout(now));
		earlier(&timeout, now, topology_timeout());
		if (alarm_untold())
			earlier(&timeout, now, pub.alarm_log_at);
		if (pub.login_at != 0)
			timeout = Min(timeout, 1000);
		worker_set_state(broker_blocked(pub.conn.broker) ? WORKER_BLOCKED :
						 chunks_first() != NULL || !sender_idle() ? WORKER_PUBLISHING : WORKER_IDLE);
	}
	else
		earlier(&timeout, now, Max(pub.conn.connect_at, 1));
	(void) worker_wait(fd, false, timeout);
}

/* Everything that can be done without waiting; false if that was nothing. */
static bool
work(void)
{
	bool		any = false;

	take_requests();
	any = connect_broker() || any;
	any = take_events() || any;
	any = log_in_anew() || any;
	if (may_read())
	{
		read_main();
		any = true;
	}
	any = look_meanwhile() || any;
	any = find_meanwhile() || any;
	show_backlogs();
	any = flow_try_all(usable()) || any;
	any = flow_read_all(usable()) || any;
	chunks_set_room(flow_main_share());
	if (pub.cursor.batch == NULL)
		flow_join_all(usable());
	if (usable())
	{
		any = topology_step(&pub.conn) || any;
		any = sender_publish(take_events) || any;
	}
	any = take_events() || any;
	any = record_settled() || any;
	serve_flush();
	record_answers();
	alert_send();
	work_by_the_clock();
	serve_verify();
	return any || may_read() || pub.load;
}

static void
start(void)
{
	static const TopicKeepers keepers = {
		.create = flow_create,
		.at_rest = flow_at_rest,
		.free = flow_free,
		.drop_changed = topology_drop_changed,
		.inherit = topology_inherit,
		.gone = topology_forget,
	};
	static const FlowSender sender = {
		.update = sender_update,
		.release = sender_release,
		.lags = sender_lags,
		.patience_ms = sender_patience_ms,
	};

	forget_backlogs();
	topic_init(&keepers);
	topology_init(flow_declared, flow_may_drop, sender_suspects);
	flow_init(&pub.cursor, &sender);
	sender_init(&pub.conn);
	worker_begin();
	reader_load_cursor(&pub.cursor);
	pub.recorded = pub.cursor.number;
	pub.start_number = pub.cursor.number + (pub.cursor.batch ? 1 : 0);
	pub.unfound = true;
	flow_load_detached();
	pg_atomic_write_u32(&worker_slot->current_segment, maintenance_current_segment());
	load_topics();
	/* before any of them goes on */
	recount_begin();
	worker_commit();
	read_subscriptions();
	pub.more = true;
	pub.counted = pg_atomic_read_u64(&worker_slot->confirmed);
	pub.maintenance_at = mono_later(1000);
	connection_init(&pub.conn, "publisher", "pg_fanout publisher");
	use_settings();
}

/* The libraries know nothing of exit(); say goodbye if that is possible. */
static void
say_goodbye(int code, Datum arg)
{
	if (pub.conn.broker != NULL)
		broker_close(pub.conn.broker, true);
	pub.conn.broker = NULL;
	forget_backlogs();
}

void
pg_fanout_publisher_main(Datum main_arg)
{
	worker_attach(main_arg, "publisher");
	before_shmem_exit(say_goodbye, (Datum) 0);

	/*
	 * Plans are made once, when the tables may be empty; they must be right
	 * for millions of rows.
	 */
	SetConfigOption("enable_seqscan", "off", PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("plan_cache_mode", "force_generic_plan", PGC_SUSET, PGC_S_OVERRIDE);

	worker_run(start, work, wait_for_work);
}
