/*-------------------------------------------------------------------------
 *
 * sender.c
 *		Publishes the messages of all topics, each on a channel of its own.
 *
 * A topic gets a channel when it has something to publish, and loses it when it has
 * been idle for IDLE_MS, when its state machine gives up what is in flight, or when
 * others wait for one of the pg_fanout.max_channels:
 *
 *		none -> waits -> asked for -> open -> (idle, given up, closed by the broker) -> none
 *		          |                    ^ |               ^
 *		          | handed over        | | others wait,  | nothing is in flight any more:
 *		          | by another         | | its turn ends | handed over; or no confirm comes
 *		          +--------------------+ +-> yields -----+
 *
 * Topics get channels in the order in which they began to wait.  A topic whose turn ended
 * without a confirm keeps the age of its oldest message (unconfirmed_since), and sends that
 * message alone in its next turns.  It is refused when the message is older than
 * confirm_timeout and one more turn has brought no confirm either, for HUNG_MS, so
 * that time spent waiting for a channel refuses no topic by itself.  Such topics, also
 * once they are paused and resumed, and those that are stalled, are ill: they wait in a
 * line of their own, for a part of the channels, so that many queues that hang do not keep channels from topics whose queues do not.  Whether a confirm
 * is late is told by those of other topics (is_behind()): a broker may be slow to all.  If there
 * are none, one topic is waited for patiently, which tells (wait_patiently()).
 *
 * Topics with something to publish stand in a ring, or in line for a channel, or nowhere
 * until it is open.  Each publishes at most TURN_MESSAGES and goes to the end of the ring;
 * confirms are taken after as many messages, of one topic or of several.  The window of each
 * is bounded by pg_fanout.max_in_flight, as long as others publish by a
 * part of it (window_part()), and what is in flight of all by MAX_WINDOW_BYTES, but for
 * OWN_WINDOW_BYTES of each: topics whose queues do not confirm may have the rest for long.
 *
 * Which message the broker has closed a channel for it does not say.  So the topic
 * isolates: it sends those again that were in flight, one at a time, and the one
 * that is alone in flight when it happens again is the culprit.  So do all topics
 * together, if the broker has closed the connection because of what it was sent.
 *
 * A connection that is lost otherwise may be the fault of a message as well: somebody on
 * the way to the broker, or the broker itself, may end it whenever that message comes.
 * So the sender suspects a topic if the connection was lost three times while messages of
 * that topic were in flight, and none of them was confirmed in between; or more often, if
 * some were.  Topics that are suspected publish one after the other:
 *
 *		none -> lost, three times: suspected -> on trial -> lost again, twice: refused
 *
 * and none again once all messages are settled that were in flight.  Nobody else publishes
 * from shortly before a trial to its first confirm, or for as long as a message may take to
 * have an effect (trial_ms()): there may be other messages of the kind.  A loss on trial
 * refuses nothing after a confirm: so it is where the network is bad.  Nor does one while a
 * request of topology.c's is under way, which may be the reason as well.  A topic that was
 * refused stays suspected.  It isolates, so that what came before the message is settled for
 * good, and each of its probes is a trial.  Where nothing at all is confirmed meanwhile, it is
 * the broker, and no topic is refused.
 *
 * If several topics have such messages, nothing might be confirmed before the connection is
 * lost again, and it could not be told whose fault that is.  So on a new connection those
 * that are suspected let the others go first (may_try()).  And if the last connection was
 * lost before anything was confirmed, topics go one at a time until something is, first
 * those that did not lose the connection in this way before.  A topic that lost it again and
 * again waits for longer and longer, but on a connection: nobody else is to wait for one.
 *
 * A confirm that does not come may be the fault of the topic's queue or of the whole
 * broker.  So something else is asked of the broker then, and if it answers, it was
 * the topic's.  If it does not, while it may have been sent more for a queue that hangs than it
 * takes before it stops reading, another connection is needed soon (may_be_stuck()).
 *
 * Must never: publish a message whose topic's topology is not there.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "broker/broker.h"
#include "publish/sender.h"
#include "publish/topology.h"
#include "server/guc.h"
#include "server/worker.h"

#define TURN_MESSAGES 100
#define ROUND_MESSAGES 1000
#define FEW_MESSAGES 10			/* that wait; see sender_lags() */
#define MAX_WINDOW_BYTES (16 * 1024 * 1024)
#define OWN_WINDOW_BYTES (MAX_WINDOW_BYTES / 16)	/* of each topic, whatever
													 * others have in flight */
#define SLOTS_AT_FIRST 64

/*
 * In flight of a topic of which nothing is confirmed: less than the credit that RabbitMQ
 * gives a connection for a channel, and a channel for a queue (400 each, or 32 of a quorum
 * queue; credit_flow.erl, rabbit_fifo_client.erl).
 */
#define UNPROVED_MESSAGES 200

/* How long a window that was full may wait for half of it to be confirmed. */
#define REFILL_MS 200
#define REFILL_LATE_MS 10		/* or more, so that nobody is woken all the
								 * time while nothing can be published */

/* A topic may fill its window if no other has published for so long. */
#define ALONE_MS 10000

/* Else it may fill this part of it, and more the longer the way to the broker is. */
#define SHARED_MS 5
#define WHOLE_MS 80

/* Or this one while the way is measured: so often, or after so many times its length. */
#define MEASURING_MS 1
#define MEASURE_MS 2000
#define MEASURE_TIMES 20

/* A longer way than before counts for so much the less at first. */
#define LEAST_TIMES 8

/* A confirm that takes less is never slow, however soon others come. */
#define LONG_FLIGHT_MS 200

/* After such a time without any confirm, it was the broker that was slow. */
#define ACKS_PAUSE_MS 500

/*
 * A loss of the connection counts more if nothing was confirmed since the last one; from
 * when a topic is suspected; how many losses on trial refuse it, since one may be chance where
 * the network is bad; how long it is on trial.
 */
#define STUCK_LOSS 5
#define SUSPECT_LOSSES (3 * STUCK_LOSS)
#define BLAMED_TRIALS 2
#define TRIAL_MS 1000
#define LONGEST_TRIAL_MS 5000	/* if it goes on publishing */

/* How long nobody else publishes around a trial, beside twice the way to the broker. */
#define QUIET_MS 500

/*
 * How many topics may have a channel one after the other.  The broker keeps something of each
 * for as long as the channel lasts, and so does a quorum queue of each channel.
 */
#define CHANNEL_TOPICS 32

#define IDLE_MS 60000			/* a channel that is not used is closed then */
#define YIELD_MS 1000			/* a turn, if others wait for a channel */
#define DELAY_CONFIRMS 16		/* over which their delay is averaged */
#define ROOM_MS 50				/* between looks for a channel that another
								 * may have, if nothing is heard */
#define HUNG_MS 3000			/* without a confirm: the channel is given up,
								 * if others wait for it */
#define ILL_PART 4				/* of the channels topics have that are ill */
#define ANSWER_MS 10000			/* to find out whether the broker is there, at
								 * most */
#define SILENCE_MS 1000			/* of the broker, before it is asked whether
								 * it reads what is sent to it */
#define STUCK_MS 2000			/* for its answer; after the connection was
								 * given up for that, twice as long */
#define MOST_STUCK_MS 8000		/* before the kernel gives up a peer that
								 * takes nothing (tcp.c) */
#define STUCK_FORGOTTEN_MS (10 * 60 * 1000)

static Connection *conn;
static dlist_head ring = DLIST_STATIC_INIT(ring);
static int	nring = 0;
static Flow **flows = NULL;		/* by channel */
static int	nflows = 0;
static uint64 in_flight = 0;
static size_t bytes_in_flight = 0;
static int	isolate = 0;		/* messages of all topics to be sent one at a
								 * time */
static bool careful = false;	/* the last connection was lost before
								 * anything was confirmed, and nothing was on
								 * this one */
static bool any_suspects = false;	/* a topic that is ready may be suspected */
static Flow *trial = NULL;		/* of those suspected, or while careful, the
								 * one that publishes */
static MonoTime trial_at = 0;	/* its last message went out */
static MonoTime trial_since = 0;	/* its first one did */
static MonoTime wanted_at = 0;	/* a trial waits since then for others to be
								 * quiet, which they are for a while; 0: none
								 * does */
static MonoTime acked_at = 0;	/* the last message of any topic was */
static MonoTime acked_since = 0;	/* since when there was no long pause
									 * between two of them */
static MonoTime confirmed_from = 0; /* when the newest of those messages was
									 * published that were confirmed */
static MonoTime delay = 0;		/* of confirms, on average, in microseconds */
static Flow *patient = NULL;	/* its turn does not end although nothing is
								 * confirmed, of any topic either */
static int	patience_in_vain = 0;	/* so many were refused, and nothing was
									 * confirmed since */
static int	nchannels = 0;		/* that topics have */
static int	nopening = 0;		/* of these, not open yet */
static MonoTime room_at = 0;	/* no channel can be given to another before */
static dlist_head waiters = DLIST_STATIC_INIT(waiters); /* for one, in order */
static dlist_head ill_waiters = DLIST_STATIC_INIT(ill_waiters);
static int	nwaiters = 0;
static int	nill_waiters = 0;
static bool handed_over = false;	/* a channel was, to one of them, since
									 * the last turns */
static Flow *latest = NULL;		/* who published the last message; to compare,
								 * it may be gone */
static MonoTime latest_at = 0;	/* when */
static MonoTime others_at = 0;	/* when anybody else did, the last time */
static MonoTime way = 0;		/* to the broker and back, in microseconds; 0:
								 * being measured */
static MonoTime way_since = 0;	/* with what was published since then */
static MonoTime last_way = 0;	/* while it is measured anew, and on a new
								 * connection: what it was */
static MonoTime least_way = 0;	/* of the last measurements; 0: none */
static MonoTime checked_at = 0;
static MonoTime counts_from = 0;	/* time counts against topics: the
									 * connection is new, or an alarm is over,
									 * since then */

/* Is the broker there at all? */
static int	ping = 0;			/* channel that was asked for, to find out */
static MonoTime ping_at = 0;	/* 0: nobody wants to know */
static MonoTime opened_at = 0;	/* it was opened */
static MonoTime heard_at = 0;	/* the broker answered anything */
static MonoTime spare_at = 0;	/* there were channels left */
static int	stuck_ms = STUCK_MS;
static MonoTime stuck_at = 0;	/* when the connection was given up for that */

void
sender_init(Connection *connection)
{
	conn = connection;
}

/* ---- what is in flight ---- */

/* Around everything that changes a window's messages in flight. */
static void
before_change(const Flow *flow)
{
	in_flight -= flow->window.in_flight;
	bytes_in_flight -= flow->window.bytes;
}

static void
after_change(const Flow *flow)
{
	in_flight += flow->window.in_flight;
	bytes_in_flight += flow->window.bytes;
	pg_atomic_write_u32(&worker_slot->in_flight, in_flight);
}

/* Is nothing in flight? */
bool
sender_idle(void)
{
	return in_flight == 0;
}

/* The broker said something that was not a heartbeat. */
void
sender_heard(void)
{
	heard_at = mono_now();
}

/* When it did. */
MonoTime
sender_heard_at(void)
{
	return heard_at;
}

/* What is in flight of the topic is unknown. */
static void
lose(Flow *flow)
{
	before_change(flow);
	(void) window_lost(&flow->window);
	after_change(flow);
}

/* ---- suspects ---- */

static bool
is_suspected(const Flow *flow)
{
	return flow->losses >= SUSPECT_LOSSES;
}

/* The topic is not the reason why the connection was lost. */
static void
acquit(Flow *flow)
{
	flow->losses = flow->doubtful = flow->trials = flow->blamed = 0;
	flow->progressed = false;
	if (trial == flow)
		trial = NULL;
}

/* To the broker and back. */
static int
way_ms(void)
{
	return (way != 0 ? way : last_way) / 1000;
}

/* How long may it take until it is known that the connection is lost for a message? */
static int
trial_ms(void)
{
	return QUIET_MS + 2 * way_ms();
}

/*
 * Can nobody else's messages be the reason, if the connection is lost for one that the topic
 * publishes at that time?
 */
static bool
is_quiet(const Flow *flow, MonoTime when)
{
	return in_flight == flow->window.in_flight ||
		mono_exceeds(flow == latest ? others_at : latest_at, when, trial_ms());
}

/* Is nobody to publish, so that a trial may begin? */
static bool
trial_awaits_quiet(MonoTime now)
{
	return wanted_at != 0 && !mono_exceeds(wanted_at, now, 2 * trial_ms());
}

/* Must the topic wait for another one's trial? */
static bool
waits_for_trial(const Flow *flow)
{
	MonoTime	now;

	if ((trial == NULL && wanted_at == 0) || flow == trial || is_suspected(flow))
		return false;
	now = mono_now();
	return trial_awaits_quiet(now) ||
		(trial != NULL && is_suspected(trial) && acked_at <= trial_since &&
		 !mono_exceeds(trial_since, now, trial_ms()));
}

/* Messages of the topic were settled, the first ones that were doubtful. */
static void
note_settled(Flow *flow, int count)
{
	flow->doubtful -= Min(count, flow->doubtful);
	flow->progressed = true;
	if (flow->doubtful == 0)
		acquit(flow);
}

/*
 * The connection was lost while n of the topic's messages were in flight.  alone: nothing
 * else may be the reason.
 */
static void
note_loss(Flow *flow, int n, bool alone, const BrokerEvent *event)
{
	bool		suspected = is_suspected(flow);
	bool		stuck = (flow->losses == 0 || !flow->progressed);

	/* if it is one of its messages, that was in flight the first time, too */
	if (flow->losses == 0)
	{
		flow->lost_at = mono_now();
		flow->doubtful = n;
	}
	flow->losses += stuck ? STUCK_LOSS : 1;
	flow->progressed = false;
	any_suspects = any_suspects || is_suspected(flow);
	if (!suspected || !alone || !stuck || acked_at <= flow->lost_at || ++flow->blamed < BLAMED_TRIALS)
		return;
	flow->isolate = Max(flow->isolate, n);
	/* its attempts have pauses from now on, but others go first */
	flow->trials = 1;
	flow_refused(flow, event->code,
				 psprintf("the connection was lost again and again while the topic's messages were published: %s",
						  event->code == 0 ? event->text : psprintf("%d %s", event->code, event->text)));
}

/* ---- the ring of those that may publish ---- */

static bool
may_send(const Flow *flow)
{
	const Topic *topic = topic_of(flow);

	return flow_may_send(flow) && (topology_ready(topic) || topic->declaration.gone || !topic->known);
}

/* How many topics wait for a channel, in both lines? */
static int
nwaiting(void)
{
	return nwaiters + nill_waiters;
}

/* Moves a topic to the end of a list of those that may publish, or to none. */
static void
move_to(Flow *flow, FlowList list)
{
	static dlist_head * const lists[] = {[IN_RING] = &ring,[IN_LINE] = &waiters,[IN_ILL_LINE] = &ill_waiters};

	if (flow->list == list)
		return;
	nring += (list == IN_RING) - (flow->list == IN_RING);
	nwaiters += (list == IN_LINE) - (flow->list == IN_LINE);
	nill_waiters += (list == IN_ILL_LINE) - (flow->list == IN_ILL_LINE);
	if (flow->list != IN_NONE)
		dlist_delete(&flow->ready_node);
	if (list != IN_NONE)
		dlist_push_tail(lists[list], &flow->ready_node);
	flow->list = list;
}

/* Puts a topic where it belongs that is ready or not, or has another channel or none. */
static void
find_place(Flow *flow)
{
	move_to(flow, flow->ready && (flow->channel == 0 || flow->channel_open) ? IN_RING : IN_NONE);
}

/* To be called when anything changes on which it depends whether a topic may publish. */
void
sender_update(Flow *flow)
{
	bool		ready = may_send(flow);

	/* what its messages wait for is declared before the rest */
	if (!ready && flow_may_send(flow))
		topology_request(topic_of(flow), true);
	if (ready == flow->ready)
		return;
	flow->ready = ready;
	any_suspects = any_suspects || (ready && is_suspected(flow));
	find_place(flow);
}

/* ---- channels ---- */

static void
set_channel(Flow *flow, int channel)
{
	if (flow->channel != 0)
		flows[flow->channel] = NULL;
	if (trial == flow)
		trial = NULL;
	if (patient == flow)
		patient = NULL;
	if (channel >= nflows)
	{
		int			n = Max(64, 2 * channel);

		flows = flows ? repalloc(flows, n * sizeof(Flow *)) :
			MemoryContextAlloc(TopMemoryContext, n * sizeof(Flow *));
		memset(flows + nflows, 0, (n - nflows) * sizeof(Flow *));
		nflows = n;
	}
	if (channel != 0)
		flows[channel] = flow;
	nopening += (channel != 0) - (flow->channel != 0 && !flow->channel_open);
	nchannels += (channel != 0) - (flow->channel != 0);
	flow->channel = channel;
	flow->channel_open = false;
	flow->channel_topics = 1;
	flow->channel_at = flow->channel_since = mono_now();
	flow->yields = false;
	find_place(flow);
}

/* Gives the topic's channel up, with what is in flight on it. */
static void
give_channel_up(Flow *flow)
{
	if (flow->channel == 0)
		return;
	if (conn->broker != NULL)
		broker_close_channel(conn->broker, flow->channel);
	set_channel(flow, 0);
	lose(flow);
}

/*
 * Gives up the channel of a topic that publishes nothing more for now.  Forgets how old its
 * oldest message is, but not that nothing was confirmed.
 */
void
sender_release(Flow *flow)
{
	give_channel_up(flow);
	flow->in_vain = flow_is_ill(flow);
	flow->unconfirmed_since = 0;
}

bool
sender_owns(int channel)
{
	return (channel != 0 && channel == ping) || (channel < nflows && flows[channel] != NULL);
}

/* The topic's channel is open. */
static void
channel_opened(Flow *flow)
{
	nopening--;
	flow->channel_open = true;
	flow->channel_since = flow->channel_at = mono_now();
	find_place(flow);
}

void
sender_opened(int channel)
{
	sender_heard();
	if (channel == ping)
	{
		broker_close_channel(conn->broker, ping);
		ping = 0;
		opened_at = heard_at;
		return;
	}
	channel_opened(flows[channel]);
}

/*
 * Gives the topic's channel to another one as it is: it is open, and nothing is in flight
 * on it.  To close one and to open another would cost the broker more than a few messages.
 */
static void
hand_over(Flow *from, Flow *to)
{
	int			channel = from->channel;
	int			topics = from->channel_topics;

	set_channel(from, 0);
	set_channel(to, channel);
	to->channel_topics = topics + 1;
	window_continue(&to->window, from->window.newest);
	lose(from);
	channel_opened(to);
	handed_over = true;
}

/* Has the topic waited for so long for a confirm, or for its channel to be opened? */
static bool
waits_in_vain(MonoTime since, MonoTime now, int ms)
{
	return mono_exceeds(Max(since, counts_from), now, ms);
}

/*
 * Has the topic's oldest message been in flight for so long and twice what confirms take
 * now, while others were confirmed that are not half as old, or none was?
 */
static bool
is_behind(const Flow *flow, MonoTime now, int ms)
{
	const WindowItem *item = window_oldest(&flow->window);
	MonoTime	took = 2 * Max(acked_at - confirmed_from, way_ms() * INT64CONST(1000));

	if (item == NULL || !waits_in_vain(item->published_at + 2 * delay, now, ms))
		return false;
	return (now - confirmed_from) * 2 <= now - item->published_at ||
		waits_in_vain(Max(acked_at, item->published_at) + took, now, ms);
}

/* Does it wait for HUNG_MS, and has nothing of the topic been confirmed for so long? */
static bool
hangs(const Flow *flow, MonoTime now)
{
	return waits_in_vain(flow->confirmed_at, now, HUNG_MS) && is_behind(flow, now, HUNG_MS);
}

/*
 * Is it the topic's own fault that others wait for its messages to be confirmed, at least for
 * so long?  Not if it waits for a channel, unless nothing came of its last turn; nor if the
 * broker is no faster with others.  It is if its messages go one after the other.
 */
bool
sender_is_late(const Flow *flow, MonoTime now, int ms)
{
	if (flow->ready && !flow->channel_open)
		return flow->unconfirmed_since != 0;
	if (flow->window.in_flight == 0)
		return !(flow->ready && flow->yields) && mono_exceeds(Max(flow->channel_at, flow->confirmed_at), now, ms);
	return flow->window.serial || flow->isolate > 0 || is_behind(flow, now, ms);
}

/*
 * Is it time to doubt a topic, or the broker?  The age of what was not confirmed in former
 * turns counts once it was not in this one either; but only if anything was confirmed, or two
 * topics were waited for patiently, and in vain.
 */
static bool
is_overdue(const Flow *flow, MonoTime now)
{
	const WindowItem *item = window_oldest(&flow->window);

	if (!flow->channel_open)
		return waits_in_vain(flow->channel_since, now, pgf_confirm_timeout);
	if (item == NULL)
		return false;
	if (flow->unconfirmed_since != 0 && hangs(flow, now) &&
		(acked_at >= item->published_at || patience_in_vain > 1))
		return waits_in_vain(flow->unconfirmed_since, now, pgf_confirm_timeout);
	return waits_in_vain(item->published_at, now, pgf_confirm_timeout);
}

/*
 * May the topic's channel be given at once to another that waits?  Not before it is open:
 * a broker that takes its time would do so in vain; nor while the topic is doubted.  Both
 * end by confirm_timeout (check_flow()).
 */
static bool
may_yield(const Flow *flow, MonoTime now)
{
	if (!flow->channel_open)
		return !flow->ready;
	if (window_oldest(&flow->window) != NULL)
		return flow != patient && hangs(flow, now) && !is_overdue(flow, now);
	return flow->yields || !flow->ready || mono_exceeds(flow->channel_since, now, YIELD_MS);
}

/* How many channels topics may have.  The broker may allow fewer than the setting. */
static int
max_channels(void)
{
	return Min(pgf_max_channels, broker_max_channels(conn->broker) - OTHER_CHANNELS);
}

/*
 * Do topics that are ill have as many channels as they may have?  The one that is waited for
 * patiently does not count.
 */
static bool
many_ill(void)
{
	int			n = 0;

	for (int i = 0; i < nflows; i++)
		n += (flows[i] != NULL && flows[i] != patient && flow_is_ill(flows[i]));
	return n >= max_channels() / ILL_PART;
}

/* May the topic's channel go to another one as it is? */
static bool
may_hand_over(const Flow *flow)
{
	return window_oldest(&flow->window) == NULL && flow->channel_open &&
		flow->channel_topics < CHANNEL_TOPICS && nchannels <= max_channels();
}

/*
 * Ends the topic's turn, since others wait, next the first of them.  What is in flight keeps
 * its age.
 */
static void
end_turn(Flow *flow, Flow *next)
{
	const WindowItem *item = window_oldest(&flow->window);

	if (item != NULL && flow->unconfirmed_since == 0)
		flow->unconfirmed_since = item->published_at;
	if (may_hand_over(flow))
		hand_over(flow, next);
	else
		give_channel_up(flow);
	flow_settle(flow);
}

/*
 * If the topic's turn would end, and nothing of any topic was confirmed since it published:
 * has it keep its channel, unless another does.  Whether its queue hangs or the broker is slow
 * to all is known once it is confirmed, or confirm_timeout is over; the turns of others can be
 * short all the time.
 */
static bool
wait_patiently(Flow *flow)
{
	const WindowItem *item = window_oldest(&flow->window);

	if (patient != NULL || item == NULL || acked_at >= item->published_at)
		return false;
	patient = flow;
	return true;
}

/*
 * Takes the channel that was not used for the longest time, for the topic that is next; of
 * those that are ill, or of all.  If all are in use, the topic that had one for the longest
 * time publishes nothing more, and will give it up once all is confirmed: so what was
 * published need not go again.  Returns whether it is to be called again, or a channel was
 * taken.
 */
static bool
make_room(Flow *next, bool of_ill)
{
	MonoTime	now = mono_now();
	Flow	   *chosen = NULL;
	Flow	   *longest = NULL;
	int			nyield = 0;
	int			most = of_ill ? nill_waiters : Max(nwaiters, 1);
	bool		scarce = topology_channels_scarce(conn);	/* one that is given up
															 * is not there for
															 * long, perhaps */

	if (room_at > now)
		return false;
	for (int i = 0; i < nflows; i++)
	{
		Flow	   *flow = flows[i];

		if (flow == NULL || (of_ill && !flow_is_ill(flow)))
			continue;
		nyield += flow->yields;
		if (may_yield(flow, now) && (!scarce || may_hand_over(flow)) && (chosen == NULL || flow->channel_since < chosen->channel_since))
			chosen = flow;
		if (!flow->yields && flow->channel_open && mono_exceeds(flow->channel_at, now, YIELD_MS) &&
			(longest == NULL || flow->channel_at < longest->channel_at))
			longest = flow;
	}
	if (chosen != NULL && !wait_patiently(chosen))
		end_turn(chosen, next);
	else if (chosen == NULL && longest != NULL && nyield < most)
		longest->yields = true;
	if (chosen == NULL)
		room_at = mono_plus(now, ROOM_MS);
	return chosen != NULL;
}

/* Does anybody wait who may have the topic's channel? */
static bool
is_channel_wanted(const Flow *flow)
{
	return nwaiters > 0 || (nill_waiters > 0 && (flow_is_ill(flow) || !many_ill()));
}

/* Does the topic have an open channel?  If it has none, it is in line for one then. */
static bool
has_channel(Flow *flow)
{
	if (flow->channel == 0)
	{
		if (!flow_is_ill(flow) && nwaiters == 0)
			room_at = 0;
		move_to(flow, flow_is_ill(flow) ? IN_ILL_LINE : IN_LINE);
		return false;
	}
	flow->yields = flow->yields && is_channel_wanted(flow);
	return flow->channel_open;
}

/*
 * Gives a channel to the topic that is first in line, or asks for one, unless it may not
 * publish any more: the connection is another one, say, on which its topology is not declared
 * yet.  Topics that are ill come first as long as they have few channels, and else only take
 * those of each other.  Returns false if that cannot be done now.
 */
static bool
serve_first(void)
{
	BrokerError error;
	bool		of_ill = nill_waiters > 0 && many_ill();
	bool		ill = nwaiters == 0 || (nill_waiters > 0 && !of_ill);
	Flow	   *flow = dlist_container(Flow, ready_node, dlist_head_node(ill ? &ill_waiters : &waiters));
	int			channel;

	if (!may_send(flow))
	{
		sender_update(flow);
		return true;
	}
	if (nchannels >= max_channels() || (ill && of_ill) || topology_channels_scarce(conn))
		return make_room(flow, ill && of_ill);
	channel = broker_open_channel(conn->broker, true, &error);
	if (channel == 0)
		return false;
	set_channel(flow, channel);
	return true;
}

static void
serve_line(void)
{
	while (sender_may_publish() && nwaiting() > 0 && serve_first())
		;
}

/* ---- publishing ---- */

/* May anything be published? */
bool
sender_may_publish(void)
{
	return conn->broker != NULL && !broker_blocked(conn->broker) && nring + nwaiting() > 0;
}

/*
 * A window that was full is filled again once half of it is confirmed.  A
 * message for each confirm would have the broker do for each what it can do for
 * many at once: a quorum queue writes and replicates them together.  The other
 * half keeps it busy meanwhile; if it is never confirmed, the rest is for those
 * that are.
 *
 * Quorum queues of RabbitMQ 4 take half as much again in this way, while 3.10
 * takes a few percent less (test/bench drain).
 */
static bool
worth_filling(const Flow *flow)
{
	return broker_major(conn->broker) < 4 || flow->window.in_flight <= pgf_max_in_flight / 2 ||
		flow->refill_at <= mono_now();
}

static void
note_published(Flow *flow, MonoTime now)
{
	if (flow != latest)
	{
		latest = flow;
		others_at = latest_at;
	}
	latest_at = now;
}

/* Has no other topic published for long? */
static bool
is_alone(const Flow *flow, MonoTime now)
{
	return mono_exceeds(flow == latest ? others_at : latest_at, now, ALONE_MS);
}

/* The part of its window that a topic may fill that is not alone, as long as the way is. */
static double
shared_part(MonoTime length)
{
	return Min((SHARED_MS + length / 1000.0) / WHOLE_MS, 1.0);
}

/*
 * Which part of its window may the topic fill?  The broker takes what comes on one
 * connection in turn, so what a topic with very many messages has in flight is before
 * those of all others.  As long as others publish, it has a few milliseconds' worth, on
 * top of what the way to the broker and back takes.  Now and then that is measured anew,
 * with little in flight, so that no message's way is to wait behind others.
 */
static double
window_part(const Flow *flow, MonoTime now)
{
	if (is_alone(flow, now))
		return 1.0;
	if (way != 0 && mono_exceeds(way_since, now, Max(MEASURE_MS, way * MEASURE_TIMES / 1000)))
	{
		way = 0;
		way_since = now;
	}
	return way == 0 ? (double) MEASURING_MS / WHOLE_MS : shared_part(way);
}

/*
 * Does the topic have twice as much in memory as it may have in flight, and not few; or, if
 * its messages go one after the other, some that wait?  Then what is last waits for others of
 * its own to be confirmed.
 */
bool
sender_lags(const Flow *flow)
{
	double		part = is_alone(flow, mono_now()) ? 1.0 : shared_part(least_way);

	if (flow->window.serial || flow->isolate > 0)
		return flow->window.count - flow->window.in_flight > FEW_MESSAGES;
	return flow->window.count > Max(2 * pgf_max_in_flight * part, TURN_MESSAGES);
}

/* How long may a confirm take, without being later than others? */
int
sender_patience_ms(void)
{
	return 2 * least_way / 1000;
}

/* Has a confirm of the topic's been awaited for long, and do others' come sooner? */
bool
sender_is_slow(const Flow *flow, MonoTime now)
{
	const WindowItem *item = window_oldest(&flow->window);

	return item != NULL && least_way != 0 &&
		mono_exceeds(item->published_at, now, Max(LONG_FLIGHT_MS, sender_patience_ms()));
}

/*
 * Has a confirm of the topic's been awaited for so long in which the broker has confirmed
 * other messages, and is that long?  Theirs may be as slow.
 */
bool
sender_is_passed(const Flow *flow, MonoTime now, int ms)
{
	const WindowItem *item = window_oldest(&flow->window);

	return sender_is_slow(flow, now) && mono_exceeds(Max(item->published_at, acked_since), acked_at, ms);
}

/* For sender_confirmed(): how long did the message take that was in flight for longest? */
static void
note_delay(const Flow *flow)
{
	const WindowItem *item = window_oldest(&flow->window);
	MonoTime	took;

	if (item == NULL)
		return;
	confirmed_from = Max(confirmed_from, item->published_at);
	took = Max(mono_now() - item->published_at, 1);
	delay += (took - delay) / DELAY_CONFIRMS;
	if (item->published_at >= way_since && (way == 0 || took < way))
	{
		way = last_way = took;
		least_way = (least_way == 0 || way < least_way) ? way : least_way + (way - least_way) / LEAST_TIMES;
	}
}

/* Is any topic of the list suspected, or not? */
static bool
any_in(dlist_head * list, bool suspected)
{
	dlist_iter	it;

	dlist_foreach(it, list)
	{
		if (is_suspected(dlist_container(Flow, ready_node, it.cur)) == suspected)
			return true;
	}
	return false;
}

/* Has any topic something to publish that is suspected, or any that is not? */
static bool
any_ready(bool suspected)
{
	for (int i = 0; i < nflows; i++)
	{
		if (flows[i] != NULL && flows[i]->ready && is_suspected(flows[i]) == suspected)
			return true;
	}
	return any_in(&ring, suspected) || any_in(&waiters, suspected) || any_in(&ill_waiters, suspected);
}

/* Is all that is to be published, or is in flight, of topics that are suspected? */
static bool
only_suspects(void)
{
	return in_flight <= (trial != NULL ? trial->window.in_flight : 0) && !any_ready(false);
}

/* Does the topic publish only while no other does that is tried as well? */
static bool
is_tried(const Flow *flow)
{
	return careful || is_suspected(flow);
}

/* How long does it wait for others on a new connection? */
static int
lets_others_first_ms(const Flow *flow)
{
	return Min(TRIAL_MS * Max(flow->trials, 1), MAX_RECONNECT_MS);
}

/*
 * May such a topic publish on this connection?  If it is suspected, not before others have
 * shown that the connection works, if there are any.  And the later, the more often the
 * connection was lost while the topic was tried: so all the others are before that.
 */
static bool
may_try(const Flow *flow)
{
	if (trial != NULL && trial != flow)
		return false;
	if (is_suspected(flow) && topology_asks())
		return false;
	if (acked_at <= conn->connected_at &&
		!mono_exceeds(conn->connected_at, mono_now(), lets_others_first_ms(flow)) &&
		(flow->trials > 0 || (is_suspected(flow) && !only_suspects())))
		return false;
	if (trial == flow || !is_suspected(flow) || is_quiet(flow, mono_now()))
		return true;
	if (wanted_at == 0 || mono_exceeds(wanted_at, mono_now(), 20 * trial_ms()))
		wanted_at = mono_now();
	return false;
}

/* Is there a topic that is suspected and is to be tried, or is one on trial? */
bool
sender_suspects(void)
{
	any_suspects = any_suspects && any_ready(true);
	return trial != NULL || any_suspects;
}

/*
 * How many messages may the topic have in flight?  Few, as long as none of its messages is
 * confirmed: its queue may hang.  Of one that does, RabbitMQ takes some hundred messages, and
 * then reads nothing more from the connection, which is that of all topics.
 */
static int
most_in_flight(const Flow *flow, double part, MonoTime now)
{
	int			most = Max(pgf_max_in_flight * part, 1);

	if (mono_exceeds(flow->confirmed_at, now, Max(LONG_FLIGHT_MS, sender_patience_ms())))
		most = Min(most, UNPROVED_MESSAGES);
	return most;
}

/* Has the window room for another message? */
static bool
has_room(const Flow *flow)
{
	MonoTime	now;
	double		part;

	if (flow->yields)
		return false;
	if ((is_tried(flow) && !may_try(flow)) || waits_for_trial(flow))
		return false;
	if (flow->window.in_flight == 0)
		return isolate == 0 || in_flight == 0;
	if (flow->unconfirmed_since != 0)
		return false;
	now = mono_now();
	part = window_part(flow, now);
	return flow->isolate == 0 && isolate == 0 &&
		flow->window.in_flight < most_in_flight(flow, part, now) &&
		flow->window.bytes < MAX_WINDOW_BYTES * part &&
		(bytes_in_flight < MAX_WINDOW_BYTES || flow->window.bytes < OWN_WINDOW_BYTES);
}

/* Has a slot for the next delivery tag. */
static uint64_t
next_tag(Flow *flow)
{
	uint64_t	tag = flow->window.newest + 1;
	uint64_t	capacity = Max(SLOTS_AT_FIRST, flow->window.capacity * 2);
	WindowItem **slots;

	if (window_has_room(&flow->window, tag))
		return tag;
	slots = MemoryContextAlloc(TopMemoryContext, capacity * sizeof(WindowItem *));
	{
		WindowItem **former = flow->window.slots;

		window_set_slots(&flow->window, slots, capacity);
		if (former != NULL)
			pfree(former);
	}
	return tag;
}

static void
discard(Flow *flow, Message *message, const char *reason)
{
	if (message->reason == NULL)
		message->reason = MemoryContextStrdup(message->run->context, reason);
	window_discard(&flow->window, &message->item);
	/* it was the oldest one, if its last turn was in vain */
	if (flow->window.in_flight == 0)
		flow->unconfirmed_since = 0;
	note_settled(flow, 1);
	flow_settle(flow);
}

/* Does any other topic have something that is not confirmed, or not published? */
static bool
others_wait(const Flow *flow)
{
	return in_flight > flow->window.in_flight ||
		nring + nwaiting() > (flow->list != IN_NONE);
}

/*
 * How long has the broker to show that it reads?  After the connection was given up for that,
 * longer: one that stands still now and then for all is not to lose it each time.
 */
static int
reading_ms(MonoTime now)
{
	if (mono_exceeds(stuck_at, now, STUCK_FORGOTTEN_MS))
		stuck_ms = STUCK_MS;
	return Min(stuck_ms + sender_patience_ms(), MOST_STUCK_MS);
}

static void
note_stuck(MonoTime now)
{
	stuck_ms = Min(2 * stuck_ms, MOST_STUCK_MS);
	stuck_at = now;
}

/* Publishes the message that is next. */
static void
publish(Flow *flow, Message *message)
{
	Topic	   *topic = topic_of(flow);
	BrokerMessage *wire = &message->wire;
	MonoTime	begun = mono_now();
	int			timeout = others_wait(flow) ? reading_ms(begun) : MOST_STUCK_MS;
	BrokerError error;
	BrokerResult result;

	wire->exchange = message->queue ? "" : topic->exchange;
	wire->routing_key = message->queue ? message->queue : "";
	wire->content_type = message->content_type ? message->content_type : topic->content_type;
	result = broker_publish(conn->broker, flow->channel, wire, timeout, &error);
	if (result == BROKER_LOST && mono_exceeds(begun, mono_now(), timeout - 1))
		note_stuck(mono_now());
	if (result == BROKER_TOO_LARGE)
	{
		discard(flow, message, error.text);
		return;
	}

	/*
	 * Even if the channel or the connection broke: then it is one of those to
	 * be put back, and an event will say so.
	 */
	before_change(flow);
	window_published(&flow->window, &message->item, next_tag(flow), mono_now());
	after_change(flow);
	if (is_tried(flow))
	{
		if (trial == NULL)
			trial_since = message->item.published_at;
		wanted_at = 0;
		trial = flow;
		trial_at = message->item.published_at;
	}
	note_published(flow, message->item.published_at);
	pg_atomic_fetch_add_u64(&worker_slot->published, 1);
}

/*
 * Is the message for one queue, of a backfill or a replay, whose binding was dropped?
 * Returned by the broker it would keep the topic's other messages waiting.
 */
static bool
queue_is_gone(const Topic *topic, const Message *message)
{
	if (message->queue == NULL)
		return false;
	for (int b = 0; b < topic->nbindings; b++)
	{
		const char *queue = topic->bindings[b].queue;

		if (queue != NULL && strcmp(queue, message->queue) == 0)
			return false;
	}
	return true;
}

/* Publishes or gives up one message; returns false if it cannot be done now. */
static bool
send_next(Flow *flow)
{
	Message    *message = message_of(window_next(&flow->window));

	if (message->reason == NULL && queue_is_gone(topic_of(flow), message))
	{
		discard(flow, message, "its queue is not bound any more");
		return true;
	}
	if (message->reason != NULL)
	{
		discard(flow, message, NULL);
		return true;
	}
	if (!has_channel(flow) || !has_room(flow))
		return false;
	publish(flow, message);
	return true;
}

/* Publishes some messages of a topic; returns how many. */
static int
send_some(Flow *flow)
{
	int			n = 0;

	if (!worth_filling(flow))
		return 0;
	while (n < TURN_MESSAGES && conn->broker != NULL && !broker_blocked(conn->broker) &&
		   flow->ready && may_send(flow) && send_next(flow))
		n++;
	if (n > 0)
		flow->channel_since = mono_now();
	flow->refill_at = flow->window.in_flight >= pgf_max_in_flight ? mono_later(REFILL_MS) : 0;
	sender_update(flow);
	return n;
}

/* Gives each of the topics in the ring a turn; returns how many messages went out. */
static int
round_of_turns(bool (*take_events) (void))
{
	int			sent = 0;
	int			since = 0;		/* events were taken */

	for (int i = nring; i > 0 && nring > 0 && sender_may_publish(); i--)
	{
		Flow	   *flow = dlist_container(Flow, ready_node, dlist_pop_head_node(&ring));
		int			n;

		dlist_push_tail(&ring, &flow->ready_node);
		n = send_some(flow);
		sent += n;
		since += n;
		/* confirms free the window, and must not pile up at the broker */
		if (since >= TURN_MESSAGES)
		{
			(void) take_events();
			since = 0;
		}
	}
	if (since > 0)
		(void) take_events();
	return sent;
}

/*
 * Publishes what may go, up to some thousand messages.  Returns whether anything went
 * out.
 */
bool
sender_publish(bool (*take_events) (void))
{
	int			sent = 0;
	int			n;

	if (!sender_may_publish())
		return false;
	broker_cork(conn->broker);
	do
	{
		handed_over = false;
		n = round_of_turns(take_events);
		sent += n;
		serve_line();
	} while ((n > 0 || handed_over) && sent < ROUND_MESSAGES);
	if (conn->broker != NULL)
		broker_uncork(conn->broker);
	return sent > 0;
}

/* ---- what the broker says ---- */

/* One that was alone in flight, as isolation wants it, is settled. */
static void
isolated_settled(Flow *flow)
{
	if (flow->window.in_flight == 0 && flow->isolate > 0)
		flow->isolate--;
	if (in_flight == 0 && isolate > 0)
		isolate--;
}

/* Takes an ack or a nack.  Returns what is wrong with it, or NULL. */
const char *
sender_confirmed(const BrokerEvent *event)
{
	Flow	   *flow = flows[event->channel];
	bool		ack = (event->type == BROKER_ACK);
	uint64		before = flow->window.in_flight;
	bool		ok;

	note_delay(flow);
	before_change(flow);
	ok = ack ? window_ack(&flow->window, event->tag, event->multiple) :
		window_nack(&flow->window, event->tag, event->multiple);
	after_change(flow);
	if (!ok)
		return "the broker confirmed a message that was not in flight";
	sender_heard();
	flow->confirmed_at = heard_at;
	flow->unconfirmed_since = 0;
	flow->in_vain = false;
	if (ack)
	{
		if (mono_exceeds(acked_at, heard_at, ACKS_PAUSE_MS))
			acked_since = heard_at;
		acked_at = heard_at;
		patient = NULL;
		patience_in_vain = 0;
		careful = false;
		connection_works(conn);
		flow->doubted = 0;
	}
	else
		pg_atomic_fetch_add_u64(&worker_slot->nacked, before - flow->window.in_flight);
	if (flow->window.in_flight == 0)
		room_at = 0;
	isolated_settled(flow);
	note_settled(flow, before - flow->window.in_flight);
	flow_settle(flow);
	return NULL;
}

static bool
has_message_id(const WindowItem *item, const void *arg)
{
	return strcmp(message_of(item)->message_id, arg) == 0;
}

/*
 * Takes a return; the ack that follows will settle the message.  Returns what is wrong
 * with it, or NULL.
 */
const char *
sender_returned(const BrokerEvent *event)
{
	Flow	   *flow = flows[event->channel];
	WindowItem *item = window_find(&flow->window, has_message_id, event->message_id);

	pg_atomic_fetch_add_u64(&worker_slot->returned, 1);
	if (item == NULL)
		return "the broker returned a message that was not in flight";
	sender_heard();
	if (flow->returned != NULL)
		pfree(flow->returned);
	flow->returned = MemoryContextStrdup(TopMemoryContext,
										 psprintf("returned: %d %s", event->code, event->text));
	window_returned(&flow->window, item);
	return NULL;
}

/* The broker has closed the channel because of a message: which one? */
static void
blame_message(Flow *flow, WindowItem *only, int n, const BrokerEvent *event)
{
	if (only != NULL)
		discard(flow, message_of(only), psprintf("%d %s", event->code, event->text));
	else
		flow->isolate = n;
}

/*
 * The broker has closed a channel.  404 and 403 are about the exchange; 406 of a
 * publish is about the message: larger than the limit.  Returns false if it is a 403
 * that is not to be believed yet: the caller is to log in anew.
 */
bool
sender_closed(const BrokerEvent *event)
{
	Flow	   *flow = event->channel == ping ? NULL : flows[event->channel];
	WindowItem *only;
	int			n;

	if (flow == NULL)
	{
		ping = 0;
		return true;
	}
	sender_heard();
	n = flow->window.in_flight;
	only = (n == 1) ? window_oldest(&flow->window) : NULL;
	set_channel(flow, 0);
	lose(flow);
	flow->unconfirmed_since = 0;
	flow->in_vain = false;
	if (event->code == BROKER_ACCESS_REFUSED &&
		!connection_believes(conn, &flow->doubted, flow->stalled && flow->code == BROKER_ACCESS_REFUSED))
	{
		flow_settle(flow);
		return false;
	}
	if (event->code == 406 && n > 0)
		blame_message(flow, only, n, event);
	else
		flow_refused(flow, event->code, psprintf("%d %s", event->code, event->text));
	flow_settle(flow);
	return true;
}

/*
 * Codes with which the broker closes a connection because of what it was sent
 * (AMQP 0-9-1, constants: hard errors about frames, syntax and commands).
 */
static bool
blames_content(const BrokerEvent *event)
{
	return event != NULL && event->code >= 501 && event->code <= 506;
}

/*
 * May a message be the reason why the connection was lost?  Not if the broker ends, or
 * an operator has closed it, or the broker says that it was something else.
 */
static bool
may_blame_message(const BrokerEvent *event)
{
	return event != NULL && event->code != BROKER_CONNECTION_FORCED && !broker_blocked(conn->broker) &&
		(event->class_id == 0 || broker_blames_publish(event->class_id, event->method_id));
}

/* Are messages in flight that were when the connection was lost before? */
static bool
is_doubtful(const Flow *flow)
{
	return flow->losses > 0 && flow->window.in_flight > 0;
}

/*
 * May the loss of the connection that is reported be the fault of messages that were in
 * flight when it was lost before?  To be asked before sender_lost().
 */
bool
sender_doubtful(const BrokerEvent *event)
{
	for (int i = 0; i < nflows && may_blame_message(event); i++)
	{
		if (flows[i] != NULL && is_doubtful(flows[i]))
			return true;
	}
	return false;
}

/*
 * The connection is lost to one topic; only: its message alone was in flight, of all
 * topics; alone: it was on trial, and nothing else may be the reason.
 */
static void
flow_lost(Flow *flow, bool only, bool alone, const BrokerEvent *event)
{
	Message    *culprit = only && blames_content(event) ? message_of(window_oldest(&flow->window)) : NULL;
	int			n = flow->window.in_flight;

	set_channel(flow, 0);
	lose(flow);
	if (culprit != NULL)
		discard(flow, culprit, psprintf("%d %s", event->code, event->text));
	else if (n > 0 && !blames_content(event) && may_blame_message(event))
		note_loss(flow, n, alone, event);
	flow_settle(flow);
}

/*
 * Counts a trial that ended with the loss of the connection.  The pauses grow on the next
 * connections, for this topic alone (may_try()): whoever has something to publish
 * meanwhile is not to wait for a connection.
 */
static void
note_trial(Flow *flow)
{
	flow->trials++;
	connection_hasten(conn);
}

/*
 * The connection is lost: all that was in flight is unknown.  event: with what the
 * broker has closed it, or NULL: this process did.  request: it may be the fault of one
 * that is under way.
 */
void
sender_lost(const BrokerEvent *event, bool request)
{
	uint64		n = in_flight;
	Flow	   *tried = (trial != NULL && !request && is_quiet(trial, trial_since)) ? trial : NULL;

	if (may_blame_message(event))
	{
		careful = careful || acked_at <= conn->connected_at;
		if (trial != NULL && trial->window.in_flight > 0)
			note_trial(trial);
	}
	for (int i = 0; i < nflows; i++)
	{
		if (flows[i] != NULL)
			flow_lost(flows[i], n == 1 && flows[i]->window.in_flight == 1, flows[i] == tried, event);
	}
	if (n > 1 && blames_content(event))
		isolate = n;
	way = way_since = wanted_at = 0;
	patience_in_vain = 0;
	ping = 0;
	ping_at = 0;
	counts_from = mono_now();
}

/* ---- by the clock ---- */

/* A topic's messages are not confirmed in time, and the broker is there. */
static void
give_up_confirms(Flow *flow)
{
	patience_in_vain += (flow == patient);
	sender_release(flow);
	flow_refused(flow, 0, "the broker did not confirm a message within pg_fanout.confirm_timeout");
	flow_settle(flow);
}

/*
 * Asks something of the broker, to know whether it answers.  If there is no room in the socket
 * for that, it does not read either.
 */
static void
ask_for_life(MonoTime now)
{
	BrokerError error;

	if (ping_at == 0)
		ping_at = now;
	if (ping == 0)
		ping = broker_open_channel(conn->broker, false, &error);
}

/*
 * May it be that the broker has stopped reading the connection, because a topic had more in
 * flight than it takes when its queue began to hang, and do others wait?  Those who come next
 * are not read either: only another connection helps.
 */
static bool
may_be_stuck(MonoTime now)
{
	if (in_flight <= UNPROVED_MESSAGES || !waits_in_vain(heard_at, now, SILENCE_MS + sender_patience_ms()))
		return false;
	for (int i = 0; i < nflows; i++)
	{
		Flow	   *flow = flows[i];

		if (flow != NULL && flow->window.in_flight > UNPROVED_MESSAGES && others_wait(flow) &&
			waits_in_vain(window_oldest(&flow->window)->published_at, now, SILENCE_MS))
			return true;
	}
	return false;
}

/*
 * Have channels been scarce for long, because the broker does not close those that were given
 * up?  It does not while a queue hangs that was to be declared on them.
 */
static bool
lacks_channels(MonoTime now)
{
	if (!topology_channels_scarce(conn) || broker_closing_channels(conn->broker) == 0)
		spare_at = now;
	return waits_in_vain(spare_at, now, ANSWER_MS);
}

/* The same, and has the broker opened one that was asked for since: does it work otherwise? */
static bool
closes_no_channels(void)
{
	return mono_exceeds(Max(spare_at, counts_from), opened_at, ANSWER_MS);
}

static void
check_flow(Flow *flow, MonoTime now)
{
	if (is_overdue(flow, now))
	{
		if (ping_at != 0 && heard_at > ping_at)
			give_up_confirms(flow);
		else
			ask_for_life(now);
	}
	else if (flow->window.in_flight == 0 && !flow->ready && mono_exceeds(flow->channel_since, now, IDLE_MS))
		sender_release(flow);
}

/*
 * Looks for confirms that do not come and for channels that are not used, a few times
 * a second.  Returns why the connection has to be given up, or NULL.
 */
const char *
sender_check(MonoTime now, MonoTime unblocked_at)
{
	bool		answered = (ping_at != 0 && heard_at > ping_at);
	bool		blocked = conn->broker != NULL && broker_blocked(conn->broker);
	bool		lacking;
	bool		stuck;

	/* an alarm's time does not count: the broker did not read what we sent */
	counts_from = Max(counts_from, blocked ? now : Max(unblocked_at, conn->connected_at));
	if (conn->broker == NULL || blocked || !mono_exceeds(checked_at, now, 100))
		return NULL;
	checked_at = now;
	for (int i = 0; i < nflows; i++)
	{
		if (flows[i] != NULL)
			check_flow(flows[i], now);
	}
	if (trial != NULL && (waits_in_vain(trial_at, now, TRIAL_MS) || waits_in_vain(trial_since, now, LONGEST_TRIAL_MS)))
	{
		acquit(trial);
		careful = false;
	}
	lacking = lacks_channels(now);
	if (lacking && closes_no_channels())
		return "the broker has not closed channels for some seconds, and none is left";
	stuck = may_be_stuck(now);
	if (!answered && (ping_at != 0 || lacking || stuck))
		ask_for_life(now);
	if (ping_at == 0)
		return NULL;
	if (answered)
		ping_at = 0;
	else if (stuck && waits_in_vain(ping_at, now, reading_ms(now)))
	{
		note_stuck(now);
		return "the broker has read nothing from the connection for some seconds";
	}
	else if (waits_in_vain(ping_at, now, Min(ANSWER_MS, pgf_confirm_timeout)))
		return "the broker did not confirm a message within pg_fanout.confirm_timeout";
	return NULL;
}

/* Milliseconds until something is to be done by the clock. */
long
sender_timeout(MonoTime now)
{
	long		timeout = IDLE_MS;
	bool		may_publish = sender_may_publish();

	if (in_flight > 0 || ping_at != 0)
		timeout = Min(timeout, 500);
	if (nwaiting() > 0 || trial != NULL || trial_awaits_quiet(now))
		timeout = Min(timeout, 100);
	if (nwaiting() > 0 && room_at > now)
		timeout = Min(timeout, ROOM_MS);
	if (nopening > 0)
		timeout = Min(timeout, 500);
	/* for those that are suspected, and wait for others, or for requests */
	if (may_publish && (acked_at <= conn->connected_at || sender_suspects()))
		timeout = Min(timeout, TRIAL_MS / 4);
	for (int i = 0; i < nflows && may_publish && broker_major(conn->broker) >= 4; i++)
	{
		if (flows[i] != NULL && flows[i]->ready && flows[i]->refill_at != 0)
			timeout = Min(timeout, Max(mono_left(now, flows[i]->refill_at), REFILL_LATE_MS));
	}
	return timeout;
}
