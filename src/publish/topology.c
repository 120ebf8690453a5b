/*-------------------------------------------------------------------------
 *
 * topology.c
 *		Declares on the broker what the catalog says.
 *
 * Nothing here waits for the broker.  Topics of which something has to be asked
 * stand in a line.  Up to CONTROL_CHANNELS of them are worked on at a time, each
 * on a channel of its own, one request after the other:
 *
 *		exchange.declare -> for each queue: queue.declare -> queue.bind
 *		-> for each queue to be dropped: (if it never was declared, that) -> look at it
 *		-> queue.delete
 *		-> exchange.delete, if the topic is to be dropped
 *
 * Where a queue has a queue of dead letters, that one is declared first, so that there
 * is no time in which a dead letter has no place to go to, and deleted last.  Both are
 * looked at before any of them is deleted.  How many messages are in the queue of dead
 * letters is in the answer to its declaration.
 *
 * An answer is remembered as "answered" and written into the catalog by the next
 * transaction that records.
 *
 * Every request is charged to its topic:
 *
 * - A refusal (403, 404, 405, 406) closes that channel.  It is the error of that
 *	 exchange or binding, which is not tried again until topology_forget_topic() is
 *	 called.  A 403 first asks for a new login (connection_believes()).
 *
 * - A request that is not answered within REPLY_TIMEOUT_MS is refused.  RabbitMQ closes
 *	 no channel before the queue has answered, so the channel is kept, if there is room,
 *	 and the same is not asked again: once the answer comes after all, everything is.
 *
 * A queue that hangs does not keep others waiting: a request that takes longer than SLOW_MS
 * does not count, and topics of which something hung the last time, or whose messages are
 * not confirmed, stand in a line of their own, for ILL_CONTROLS.
 *
 *		well_line -> CONTROL_CHANNELS -+-> answered
 *		ill_line --> ILL_CONTROLS -----+-> slow -> answered, or late: refused, the channel is kept
 *
 * - If the connection is lost with a code that blames a request, that may be each
 *	 of those under way.  On the next connection they go one at a time, and the one
 *	 that is under way when it happens again is refused.  So it is if the connection is
 *	 lost without a word (somebody on the way may not like a request), but that may be
 *	 chance: then once more is needed.  A loss does not count while messages are in
 *	 flight that were when it was lost before, because it may be theirs: sender.c
 *	 finds out.  While it does, the request is held back, so that it can.  But if the
 *	 connection is lost meanwhile, the request goes first on the next one: perhaps it is
 *	 what messages wait for that would show whose fault it is.
 *
 * Must never: wait; have more than one request under way on a channel.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "utils/builtins.h"
#include "utils/memutils.h"

#include "broker/broker.h"
#include "publish/topic.h"
#include "publish/topology.h"
#include "server/monotime.h"

#define CONTROL_CHANNELS 8
#define ILL_CONTROLS 2

/*
 * With those on which a request takes long, of which the ill ones leave CONTROL_CHANNELS to the
 * others; and those on which one was not answered in time.
 */
#define MAX_CONTROLS 20
#define MAX_LATE 128

/* A request takes long. */
#define SLOW_MS 300

/* No more is asked of the ill ones if the broker allows no more channels than these. */
#define FEW_CHANNELS (CONTROL_CHANNELS + SPARE_CHANNELS)

/* Channels that are left for finding out whether the broker answers: here, and in sender.c. */
#define SPARE_CHANNELS 2

/*
 * A queue that does not answer the broker is looked at so many times before it is kept.  Each
 * look takes a quarter of a second or more.
 */
#define MAX_DOUBTS 40

/* How long the broker has for the answer to a request. */
#define REPLY_TIMEOUT_MS 10000

/*
 * A request during which the connection is lost so often in a row is refused: with a code
 * that blames it; otherwise.
 */
#define BLAMED_LOSSES 2
#define SILENT_LOSSES 3

/* How often it is looked for whether a late answer is still to be waited for. */
#define WITNESS_MS 500

/* A request that was made so long ago is not why the connection is lost without a word. */
#define OLD_REQUEST_MS 2000

/* How often it is looked for whether a request may be made that is held back. */
#define HELD_MS 100

/* A channel on which requests are made, and the one that is under way. */
typedef struct Control
{
	int			channel;		/* 0: none */
	bool		open;
	bool		asked;			/* a request is under way */
	MonoTime	asked_at;		/* it, or the channel */
	int32		topic_id;		/* 0: it has no topic to work on */
	BrokerRequestKind kind;
	char	   *group;			/* of the binding that it is about, or NULL */
	char	   *signature;
	bool		dead;			/* it is about the queue of dead letters */
	bool		dropping;
	bool		held;			/* its request waits until no topic is
								 * suspected */
	bool		ill;			/* the topic has come out of the ill line */
} Control;

static void (*tell_declared) (Topic *topic);
static bool (*topic_may_drop) (Topic *topic, uint32 load);
static bool (*messages_suspected) (void);
static Control controls[MAX_CONTROLS];
static Control late[MAX_LATE];	/* only what was asked, and the channel */
static dlist_head well_line = DLIST_STATIC_INIT(well_line);
static dlist_head ill_line = DLIST_STATIC_INIT(ill_line);
static dlist_head unrecorded = DLIST_STATIC_INIT(unrecorded);
static int	nqueued = 0;		/* in the lines, and being worked on */
static bool one_at_a_time = false;
static bool few_channels = false;	/* are free */
static bool may_hold = true;	/* requests may be held back on this
								 * connection */

/*
 * A request may wait behind messages that are slow to get to the broker.  So one that
 * is not answered in time is the topic's failure only if a channel was opened that was
 * asked for later.
 */
static int	witness = 0;		/* this channel; 0: none is asked for */
static MonoTime witness_at = 0; /* when it was asked for */
static MonoTime witnessed = 0;	/* when the last one was that was opened */
static uint32 drop_load = 0;	/* what topic_load() had found to be dropped
								 * up to this one may go */

/* A queue of dead letters keeps what it has, however often it is given back. */
static const BrokerField dead_queue_arguments[] = {
	{.name = "x-queue-type",.type = BROKER_VALUE_STRING,.value.string = {"quorum", 6}},
	{.name = "x-delivery-limit",.type = BROKER_VALUE_INT,.value.integer = NO_DELIVERY_LIMIT},
};

static const char *const request_name[] = {
	[BROKER_DECLARE_EXCHANGE] = "declare exchange",
	[BROKER_DELETE_EXCHANGE] = "delete exchange",
	[BROKER_DECLARE_QUEUE] = "declare queue",
	[BROKER_INSPECT_QUEUE] = "look at queue",
	[BROKER_BIND_QUEUE] = "bind queue",
	[BROKER_UNBIND_QUEUE] = "unbind queue",
	[BROKER_DELETE_QUEUE] = "delete queue",
};

/*
 * declared: told each topic of which all was asked, or something was refused.
 * may_drop: has the topic sent what was written before that topic_load(), which found
 * something of it to be dropped?  What it has not sent must be before drop_load.
 * suspected: may messages be the reason why the connection was lost, and is it going to be
 * found out?
 */
void
topology_init(void (*declared) (Topic *topic), bool (*may_drop) (Topic *topic, uint32 load),
			  bool (*suspected) (void))
{
	tell_declared = declared;
	topic_may_drop = may_drop;
	messages_suspected = suspected;
}

/* ---- what is known of a topic ---- */

/* Returns the first refusal that keeps a topic from flowing, or NULL. */
const char *
topology_error(const Topic *topic)
{
	if (topic->declaration.error != NULL)
		return topic->declaration.error;
	for (int b = 0; b < topic->nbindings; b++)
	{
		if (topic->bindings[b].answer.error != NULL && !topic->bindings[b].dropping)
			return topic->bindings[b].answer.error;
	}
	return NULL;
}

/*
 * Must what is to be dropped be declared before?  Messages may have been written to it, if it
 * was declared and dropped while nobody looked.  They would be returned if nothing else is
 * bound, and the topic would wait for a queue that nobody declares.
 */
static bool
is_declared_first(const Topic *topic, const Binding *binding)
{
	return binding->dropping && binding->undeclared && !binding->answer.bound &&
		binding->answer.error == NULL && topic->declaration.error == NULL && !topic->dropping;
}

/*
 * Tells whether all that the topic's messages need is there, as far as is known.
 * What is only looked at again counts as there.
 */
bool
topology_ready(const Topic *topic)
{
	const Declaration *declaration = &topic->declaration;

	if (topic->dropping)
		return true;
	if (declaration->error != NULL || !(declaration->confirmed || declaration->rechecked))
		return false;
	for (int b = 0; b < topic->nbindings; b++)
	{
		const BindingAnswer *answer = &topic->bindings[b].answer;

		if (is_declared_first(topic, &topic->bindings[b]))
			return false;
		if (!topic->bindings[b].dropping &&
			(answer->error != NULL || !(answer->confirmed || answer->rechecked)))
			return false;
	}
	return true;
}

static void
set_error(Declaration *declaration, char *error)
{
	if (declaration->error != NULL)
		pfree(declaration->error);
	declaration->error = error;
}

/*
 * The topic is to be dropped, or not any more: what was answered to the contrary is no
 * news, and no reason not to ask.
 */
void
topology_drop_changed(Topic *topic)
{
	Declaration *declaration = &topic->declaration;

	set_error(declaration, NULL);
	declaration->gone = false;
	declaration->answered = false;
	if (topic->dropping)
		return;
	/* refused to be dropped, or declared again meanwhile */
	declaration->confirmed = false;
	declaration->rechecked = true;
}

/*
 * Carries over what was known of the same binding before the catalog was read again;
 * old: NULL if there was none.  Something new about a stalled topic is worth a try
 * at once.  In the topic's context.
 */
void
topology_inherit(Topic *topic, Binding *binding, const Binding *old)
{
	BindingAnswer *answer = &binding->answer;

	if (old == NULL)
	{
		topic->flow.retry_at = 0;
		return;
	}
	if (old->dropping != binding->dropping)
	{
		/* refused to be dropped, it is still what it was */
		answer->confirmed = old->dropping && old->answer.confirmed && !old->answer.gone;
		return;
	}
	if (answer->lasting)
		return;
	*answer = old->answer;
	if (answer->error != NULL)
		answer->error = pstrdup(answer->error);
}

/* The topic is not in the catalog any more. */
void
topology_forget(Topic *topic)
{
	Declaration *declaration = &topic->declaration;

	set_error(declaration, NULL);
	declaration->confirmed = declaration->rechecked = false;
	declaration->answered = false;
	declaration->gone = true;
	if (declaration->unrecorded)
		dlist_delete(&declaration->unrecorded_node);
	declaration->unrecorded = false;
}

/* Has all requests of a binding made again. */
static void
forget_answer(BindingAnswer *answer)
{
	answer->confirmed = false;
	answer->declared = answer->dead_declared = false;
	answer->inspected = answer->dead_inspected = answer->deleted = false;
	answer->doubts = 0;
}

/* Has everything of the topic declared again, whatever the broker said before. */
void
topology_forget_topic(Topic *topic)
{
	topic->declaration.confirmed = false;
	topic->declaration.rechecked = false;
	topic->declaration.lost_for_it = false;
	set_error(&topic->declaration, NULL);
	for (int b = 0; b < topic->nbindings; b++)
	{
		BindingAnswer *answer = &topic->bindings[b].answer;

		forget_answer(answer);
		answer->rechecked = false;
		if (answer->error != NULL && !answer->lasting)
		{
			pfree(answer->error);
			answer->error = NULL;
		}
	}
	topology_request(topic, false);
}

/* ---- looking again ---- */

/* Has all of the topic declared again; until then it counts as there. */
static void
recheck_topic(Topic *topic)
{
	Declaration *declaration = &topic->declaration;

	declaration->rechecked = declaration->rechecked || declaration->confirmed;
	declaration->confirmed = false;
	for (int b = 0; b < topic->nbindings; b++)
	{
		BindingAnswer *answer = &topic->bindings[b].answer;

		answer->rechecked = answer->rechecked || answer->confirmed;
		forget_answer(answer);
	}
	topology_request(topic, false);
}

/*
 * Everything has to be declared again: another connection (anew), or verify().  What
 * costs the connection is left to the topic's next attempt: else connections would be
 * made and lost for it all the time.  verify() keeps no topic from publishing of which
 * all was there.
 */
void
topology_forget_confirmed(bool anew)
{
	Topic	   *topic;
	int			i = 0;

	while ((topic = topic_next(&i)) != NULL)
	{
		if (anew && topic->declaration.lost_for_it && topic->flow.stalled)
			continue;
		if (anew || topology_error(topic) != NULL || topic->dropping ||
			!(topic->declaration.confirmed || topic->declaration.rechecked))
			topology_forget_topic(topic);
		else
			recheck_topic(topic);
	}
}

static Topic *
longest_unchecked(uint32 round)
{
	Topic	   *topic;
	Topic	   *chosen = NULL;
	int			i = 0;

	while ((topic = topic_next(&i)) != NULL)
	{
		const Declaration *declaration = &topic->declaration;

		if (declaration->recheck == round || topic->dropping || !declaration->confirmed ||
			topology_error(topic) != NULL)
			continue;
		if (chosen == NULL || declaration->recheck < chosen->declaration.recheck)
			chosen = topic;
	}
	return chosen;
}

/*
 * Has some of the topics declared again, those that were longest not looked at: a
 * queue or a binding that somebody deleted comes back even if nothing tells of it,
 * as when a topic's other queues still take its messages.
 */
void
topology_recheck(int count)
{
	static uint32 round = 0;
	Topic	   *topic;

	round++;
	while (count-- > 0 && (topic = longest_unchecked(round)) != NULL)
	{
		topic->declaration.recheck = round;
		recheck_topic(topic);
	}
}

/* ---- the queue ---- */

/* What is to be asked next. */
typedef struct Next
{
	BrokerRequestKind kind;
	Binding    *binding;		/* NULL: about the exchange */
	bool		dead;			/* about the binding's queue of dead letters */
} Next;

/* Of a binding whose queue is to be dropped. */
static void
next_drop(const Binding *binding, Next *next)
{
	const BindingAnswer *answer = &binding->answer;

	next->dead = binding->dead_queue != NULL && (!answer->dead_inspected || answer->deleted);
	if (next->dead)
		next->kind = answer->dead_inspected ? BROKER_DELETE_QUEUE : BROKER_INSPECT_QUEUE;
	else
		next->kind = answer->inspected ? BROKER_DELETE_QUEUE : BROKER_INSPECT_QUEUE;
}

/* May what that topic_load() has found to be dropped go? */
static bool
may_drop(Topic *topic, uint32 load)
{
	return load <= drop_load && topic_may_drop(topic, load);
}

static bool
next_of_binding(Topic *topic, Binding *binding, Next *next)
{
	const BindingAnswer *answer = &binding->answer;

	if (answer->confirmed || answer->error != NULL)
		return false;
	next->binding = binding;
	next->dead = binding->dead_queue != NULL && !answer->dead_declared;
	if (!binding->dropping || is_declared_first(topic, binding))
	{
		next->kind = answer->declared ? BROKER_BIND_QUEUE : BROKER_DECLARE_QUEUE;
		return topic->declaration.confirmed;
	}
	next_drop(binding, next);
	/* once begun, it goes on */
	return answer->inspected || answer->dead_inspected || may_drop(topic, binding->drop_load);
}

/* Finds out what has to be asked next of a topic; false: nothing. */
static bool
find_next(Topic *topic, Next *next)
{
	const Declaration *declaration = &topic->declaration;

	next->binding = NULL;
	next->dead = false;
	if (!topic->known || declaration->gone)
		return false;
	if (!declaration->confirmed && declaration->error == NULL && !topic->dropping)
	{
		next->kind = BROKER_DECLARE_EXCHANGE;
		return true;
	}
	for (int b = 0; b < topic->nbindings; b++)
	{
		if (next_of_binding(topic, &topic->bindings[b], next))
			return true;
	}
	next->binding = NULL;
	next->dead = false;
	next->kind = BROKER_DELETE_EXCHANGE;
	return topic->dropping && declaration->error == NULL && may_drop(topic, topic->drop_load);
}

/* Puts the topic into its line if anything has to be asked; first: at its head. */
void
topology_request(Topic *topic, bool first)
{
	Declaration *declaration = &topic->declaration;
	dlist_head *line = (declaration->hangs || flow_is_ill(&topic->flow)) ? &ill_line : &well_line;
	Next		next;

	if (declaration->asking || !find_next(topic, &next))
		return;
	if (declaration->queued && !first)
		return;
	if (declaration->queued)
		dlist_delete(&declaration->queue_node);
	else
		nqueued++;
	declaration->queued = true;
	if (first)
		dlist_push_head(line, &declaration->queue_node);
	else
		dlist_push_tail(line, &declaration->queue_node);
}

/* The same of all topics. */
void
topology_request_all(void)
{
	Topic	   *topic;
	int			i = 0;

	while ((topic = topic_next(&i)) != NULL)
		topology_request(topic, false);
}

/* Is what that topic_load(), or one before it, found to be dropped not to go yet? */
bool
topology_keeps(uint32 load)
{
	return drop_load < load;
}

/*
 * Lets go what that topic_load(), or one before it, found to be dropped, because all that
 * was written before was sent.
 */
void
topology_drop(uint32 load)
{
	drop_load = load;
	topology_request_all();
}

/* ---- answers ---- */

static void
note_answer(Topic *topic)
{
	Declaration *declaration = &topic->declaration;

	if (declaration->unrecorded)
		return;
	declaration->unrecorded = true;
	dlist_push_tail(&unrecorded, &declaration->unrecorded_node);
}

static Binding *
binding_asked(const Control *control, const Topic *topic)
{
	Binding    *binding = topic_binding(topic, control->group);

	if (binding == NULL || strcmp(binding->signature, control->signature) != 0 ||
		binding->dropping != control->dropping)
		return NULL;
	return binding;
}

/* The answer about an exchange; error: NULL if it is yes. */
static void
exchange_answered(Topic *topic, BrokerRequestKind kind, int code, const char *error)
{
	Declaration *declaration = &topic->declaration;

	if ((kind == BROKER_DELETE_EXCHANGE) != topic->dropping)
		return;					/* what is wanted of it has changed meanwhile */
	if (topic->dropping)
	{
		declaration->confirmed = true;
		declaration->gone = (error == NULL || code == 404);
		declaration->answered = true;
		if (declaration->gone)
			error = NULL;
	}
	else
	{
		declaration->confirmed = (error == NULL);
		declaration->answered = declaration->answered || error != NULL || !declaration->rechecked;
		declaration->rechecked = false;
	}
	set_error(declaration, error ? MemoryContextStrdup(TopMemoryContext, error) : NULL);
	if (declaration->answered)
		note_answer(topic);
}

/* The answer about a queue or a binding, but for queues that are only looked at. */
static void
binding_answered(Topic *topic, Binding *binding, BrokerRequestKind kind, int code, const char *error)
{
	BindingAnswer *answer = &binding->answer;

	if (kind == BROKER_DECLARE_QUEUE && error == NULL)
	{
		answer->declared = true;
		return;
	}
	if (binding->dropping && (kind == BROKER_DECLARE_QUEUE || kind == BROKER_BIND_QUEUE))
	{
		answer->bound = true;
		return;
	}
	if (binding->dropping)
	{
		answer->answered = true;
		answer->confirmed = true;
		answer->gone = (error == NULL || code == 404);
		if (answer->gone)
			error = NULL;
	}
	else
	{
		answer->confirmed = (error == NULL);
		answer->answered = answer->answered || error != NULL || !answer->rechecked;
		answer->rechecked = false;
	}
	answer->error = error ? MemoryContextStrdup(topic->context, error) : NULL;
	if (answer->answered)
		note_answer(topic);
}

/* The queue of dead letters was declared: the answer says how many it has. */
static void
dead_declared(Topic *topic, BindingAnswer *answer, uint32_t messages)
{
	answer->dead_declared = true;
	if (answer->depth_known && answer->depth == messages)
		return;
	answer->depth_known = answer->depth_changed = true;
	answer->depth = messages;
	note_answer(topic);
}

/*
 * Takes an answer about dropping that is not the last one, if it is: what was looked
 * at may be deleted, or one of two queues is gone.
 */
static bool
drop_goes_on(Binding *binding, const Control *control, int code, const char *error)
{
	BindingAnswer *answer = &binding->answer;

	if (!binding->dropping || binding->dead_queue == NULL || (error != NULL && code != 404) ||
		control->kind == BROKER_DECLARE_QUEUE || control->kind == BROKER_BIND_QUEUE)
		return false;
	if (control->dead && control->kind == BROKER_INSPECT_QUEUE)
		answer->dead_inspected = true;
	else if (!control->dead)
		answer->deleted = true;
	else
		return false;
	return true;
}

/*
 * Decides whether a queue may be deleted.  Quorum queues know neither if-unused nor
 * if-empty (RabbitMQ closes the connection with 540 NOT_IMPLEMENTED), and a queue may
 * be of another type than the catalog says, so its counts decide alone.  If they do not
 * tell, it is asked again, up to MAX_DOUBTS times.
 */
static void
queue_inspected(Topic *topic, Binding *binding, const Control *control, uint32_t messages, uint32_t consumers)
{
	bool		dead = control->dead;
	const char *what = dead ? "queue of dead letters" : "queue";
	char	   *error = NULL;

	if ((binding->if_unused || binding->if_empty) && broker_counts_doubtful(messages, consumers, mono_now() - control->asked_at))
	{
		if (++binding->answer.doubts < MAX_DOUBTS)
			return;
		error = psprintf("not dropped: the %s does not answer the broker", what);
	}
	else if (binding->if_unused && consumers > 0)
		error = psprintf("not dropped: the %s has %u consumers", what, consumers);
	else if (binding->if_empty && messages > 0)
		error = psprintf("not dropped: the %s has %u messages", what, messages);
	binding->answer.doubts = 0;
	if (error == NULL && dead)
		binding->answer.dead_inspected = true;
	else if (error == NULL)
		binding->answer.inspected = true;
	else
		binding_answered(topic, binding, BROKER_INSPECT_QUEUE, 0, error);
}

/* Is it the request during which the connection was lost? */
static bool
is_lost_request(const Control *control, const Declaration *declaration)
{
	return declaration->losses > 0 && declaration->lost_kind == control->kind &&
		declaration->lost_dead == control->dead &&
		(declaration->lost_group == NULL) == (control->group == NULL) &&
		(control->group == NULL || strcmp(control->group, declaration->lost_group) == 0);
}

/* What was asked is answered: with an error, or NULL. */
static void
answered(Control *control, int code, const char *error, const BrokerEvent *event)
{
	Topic	   *topic = topic_find(control->topic_id);
	Binding    *binding;

	control->asked = false;
	if (topic == NULL || !topic->known)
		return;
	if (is_lost_request(control, &topic->declaration))
		topic->declaration.losses = 0;
	topic->declaration.code = code;
	if (control->group == NULL)
		exchange_answered(topic, control->kind, code, error);
	else if ((binding = binding_asked(control, topic)) == NULL)
		return;					/* it was declared otherwise meanwhile */
	else if (control->kind == BROKER_INSPECT_QUEUE && error == NULL)
		queue_inspected(topic, binding, control, event->messages, event->consumers);
	else if (control->kind == BROKER_DECLARE_QUEUE && control->dead && error == NULL)
		dead_declared(topic, &binding->answer, event->messages);
	else if (!drop_goes_on(binding, control, code, error))
		binding_answered(topic, binding, control->kind, code, error);
}

/* ---- channels ---- */

static Control *
find_control(Control *list, int n, int channel)
{
	for (int i = 0; i < n; i++)
	{
		if (channel != 0 && list[i].channel == channel)
			return &list[i];
	}
	return NULL;
}

static Control *
control_of(int channel)
{
	return find_control(controls, MAX_CONTROLS, channel);
}

static Control *
late_of(int channel)
{
	return find_control(late, MAX_LATE, channel);
}

/* Is it a channel of this file? */
bool
topology_owns(int channel)
{
	return channel != 0 && (channel == witness || control_of(channel) != NULL || late_of(channel) != NULL);
}

/* The broker has taken in all that it was asked before it was asked for the witness. */
static void
take_witness(void)
{
	witnessed = witness_at;
	witness = 0;
}

void
topology_opened(Connection *conn, int channel)
{
	if (channel != witness)
	{
		control_of(channel)->open = true;
		return;
	}
	broker_close_channel(conn->broker, witness);
	take_witness();
}

/* The channel has no topic any more; again: it is not done with it. */
static void
release_topic(Control *control, bool again)
{
	Topic	   *topic = topic_find(control->topic_id);

	control->asked = false;
	control->topic_id = 0;
	nqueued--;
	if (topic == NULL)
		return;
	topic->declaration.asking = false;
	if (!again && topology_error(topic) == NULL)
		topic->declaration.hangs = false;
	if (again)
		topology_request(topic, true);
	else
		topic->declaration.doubted = 0;
	tell_declared(topic);
}

static void
close_control(Connection *conn, Control *control)
{
	if (conn->broker != NULL)
		broker_close_channel(conn->broker, control->channel);
	control->channel = 0;
	control->open = false;
}

/* Are there no channels but those that are kept to find out whether the broker answers? */
bool
topology_channels_scarce(const Connection *conn)
{
	return broker_free_channels(conn->broker) <= SPARE_CHANNELS;
}

static void
open_control(Connection *conn, Control *control)
{
	BrokerError error;

	if (topology_channels_scarce(conn))
		return;
	control->channel = broker_open_channel(conn->broker, false, &error);
	control->open = false;
	control->asked_at = mono_now();
}

/* Does the request that is under way take long? */
static bool
is_slow(const Control *control)
{
	return control->asked && mono_exceeds(control->asked_at, mono_now(), SLOW_MS);
}

/* Topics of a line that are worked on; all: those, too, of which a request takes long. */
static int
count_taken(bool ill, bool all)
{
	int			n = 0;

	for (int i = 0; i < MAX_CONTROLS; i++)
		n += (controls[i].topic_id != 0 && controls[i].ill == ill && (all || !is_slow(&controls[i])));
	return n;
}

/* The line whose first topic may be worked on, or NULL. */
static dlist_head *
line_to_take(void)
{
	if (!dlist_is_empty(&well_line) && count_taken(false, false) < CONTROL_CHANNELS)
		return &well_line;
	if (!dlist_is_empty(&ill_line) && !few_channels && count_taken(true, false) < ILL_CONTROLS &&
		count_taken(true, true) < MAX_CONTROLS - CONTROL_CHANNELS)
		return &ill_line;
	return NULL;
}

/* May the channel take a topic?  One that is open goes before one that is not. */
static bool
is_next(const Control *control)
{
	if (control->topic_id != 0)
		return false;
	for (int i = 0; i < MAX_CONTROLS && control->channel == 0; i++)
	{
		if (controls[i].topic_id == 0 && controls[i].channel != 0)
			return false;
	}
	return true;
}

static bool
lines_are_empty(void)
{
	return dlist_is_empty(&well_line) && dlist_is_empty(&ill_line);
}

static void
take_topic(Control *control, dlist_head * line)
{
	Topic	   *topic = dlist_container(Topic, declaration.queue_node, dlist_pop_head_node(line));

	topic->declaration.queued = false;
	topic->declaration.asking = true;
	control->topic_id = topic->topic_id;
	control->ill = (line == &ill_line);
	control->asked = control->held = false;
}

static void
forget_request(Control *control)
{
	if (control->group == NULL)
		return;
	pfree(control->group);
	pfree(control->signature);
	control->group = control->signature = NULL;
}

/* Remembers what is being asked, whatever becomes of the topic meanwhile. */
static void
note_request(Control *control, const Next *next)
{
	forget_request(control);
	control->kind = next->kind;
	control->dead = next->dead;
	if (next->binding == NULL)
		return;
	control->group = MemoryContextStrdup(TopMemoryContext, next->binding->consumer_group);
	control->signature = MemoryContextStrdup(TopMemoryContext, next->binding->signature);
	control->dropping = next->binding->dropping;
}

/* ---- what was not answered in time ---- */

/* Is the broker still to answer the very request? */
static bool
is_late(const Control *control)
{
	for (int i = 0; i < MAX_LATE; i++)
	{
		const Control *other = &late[i];

		if (other->channel != 0 && other->topic_id == control->topic_id && other->kind == control->kind &&
			other->dead == control->dead && (other->group == NULL) == (control->group == NULL) &&
			(other->group == NULL ||
			 (strcmp(other->group, control->group) == 0 && strcmp(other->signature, control->signature) == 0)))
			return true;
	}
	return false;
}

/*
 * Keeps the channel on which a request was not answered, apart from the others.  False: there is
 * no room for that.
 */
static bool
keep_late(Control *control)
{
	for (int i = 0; i < MAX_LATE; i++)
	{
		if (late[i].channel != 0)
			continue;
		late[i] = *control;
		control->group = control->signature = NULL;
		control->channel = 0;
		control->open = false;
		return true;
	}
	return false;
}

/* The broker has answered after all, or closed the channel: whatever hung does no more. */
static void
late_answered(Connection *conn, Control *control, bool closed)
{
	Topic	   *topic = topic_find(control->topic_id);

	if (!closed)
		broker_close_channel(conn->broker, control->channel);
	control->channel = 0;
	forget_request(control);
	if (topic == NULL || !topic->known)
		return;
	topic->declaration.hangs = false;
	topic->flow.retry_at = 0;
	topology_forget_topic(topic);
}

/* Names the request that waits for an answer, and the queue or topic it is about, for error texts. */
static char *
request_text(const Control *control)
{
	Topic	   *topic = topic_find(control->topic_id);
	Binding    *binding = control->group && topic ? topic_binding(topic, control->group) : NULL;
	const char *name = topic ? topic->name : "";

	if (binding != NULL && binding->queue != NULL)
		name = control->dead && binding->dead_queue ? binding->dead_queue : binding->queue;
	return psprintf("%s \"%s\"", request_name[control->kind], name);
}

static char *
unanswered_text(const Control *control)
{
	return psprintf("%s: the broker did not answer", request_text(control));
}

/* ---- requests ---- */

/* Makes the next request of the topic, or has done with it.  *busy: not now. */
static void
ask_next(Connection *conn, Control *control, bool *busy)
{
	Topic	   *topic = topic_find(control->topic_id);
	BrokerRequest request = {0};
	BrokerError error;
	BrokerResult result;
	Next		next;

	if (topic == NULL || !find_next(topic, &next))
	{
		release_topic(control, false);
		return;
	}
	note_request(control, &next);
	if (is_late(control))
	{
		topic->declaration.hangs = true;
		answered(control, 0, unanswered_text(control), NULL);
		return;
	}
	control->held = may_hold && is_lost_request(control, &topic->declaration) && messages_suspected();
	if (control->held)
	{
		*busy = true;
		return;
	}
	request.kind = next.kind;
	request.exchange = topic->exchange;
	if (next.dead)
	{
		request.queue = next.binding->dead_queue;
		request.arguments = dead_queue_arguments;
		request.narguments = lengthof(dead_queue_arguments);
	}
	else if (next.binding != NULL)
	{
		request.queue = next.binding->queue;
		request.arguments = next.binding->arguments;
		request.narguments = next.binding->narguments;
	}
	request.if_unused = (next.kind == BROKER_DELETE_EXCHANGE);
	if (topic->exchange == NULL)
	{
		answered(control, 0, "name cannot be converted to UTF-8", NULL);
		return;
	}
	result = broker_request(conn->broker, control->channel, &request, &error);
	control->asked = (result == BROKER_OK);
	control->asked_at = mono_now();
	*busy = (result == BROKER_BUSY || result == BROKER_REFUSED || result == BROKER_LOST);
	if (result == BROKER_TOO_LARGE)
		answered(control, 0, error.text, NULL);
}

static void
call_witness(Connection *conn)
{
	BrokerError error;

	if (witness != 0)
		return;
	witness_at = mono_now();
	witness = broker_open_channel(conn->broker, false, &error);
}

/* Gives up a request that is not answered, and its channel. */
static void
check_timeout(Connection *conn, Control *control)
{
	if (control->channel == 0 || (control->open && !control->asked) ||
		!mono_exceeds(control->asked_at, mono_now(), REPLY_TIMEOUT_MS))
		return;
	if (witnessed <= control->asked_at)
	{
		call_witness(conn);
		return;
	}
	if (control->asked)
	{
		Topic	   *topic = topic_find(control->topic_id);

		answered(control, 0, unanswered_text(control), NULL);
		if (topic != NULL)
			topic->declaration.hangs = true;
		if (!keep_late(control))
			close_control(conn, control);
		release_topic(control, true);
	}
	else
		close_control(conn, control);
}

/* Does what can be done on one channel. */
static void
step(Connection *conn, Control *control)
{
	dlist_head *line;
	bool		busy = false;

	check_timeout(conn, control);
	if (is_next(control) && (line = line_to_take()) != NULL)
		take_topic(control, line);
	if (control->topic_id != 0 && control->channel == 0)
		open_control(conn, control);
	while (control->open && !control->asked && control->topic_id != 0 && !busy)
		ask_next(conn, control, &busy);
	/* at once, for the next step may be a minute away */
	if (control->topic_id == 0 && control->channel != 0 && lines_are_empty())
		close_control(conn, control);
}

/* Is there a channel that is not closed yet? */
static bool
has_channels(void)
{
	for (int i = 0; i < MAX_CONTROLS; i++)
	{
		if (controls[i].channel != 0)
			return true;
	}
	return false;
}

/*
 * Asks the broker for what is to be asked, without waiting.  Returns whether
 * anything was asked just now.
 */
bool
topology_step(Connection *conn)
{
	bool		any = false;
	bool		another = true; /* topic may be taken */

	if (nqueued == 0 && !has_channels())
		return false;
	few_channels = broker_free_channels(conn->broker) <= FEW_CHANNELS;
	for (int i = 0; i < MAX_CONTROLS; i++)
	{
		bool		asked = controls[i].asked;

		if (!another && (controls[i].topic_id == 0 || controls[i].held))
			continue;
		step(conn, &controls[i]);
		any = any || (controls[i].asked && !asked);
		another = another && (!one_at_a_time || controls[i].topic_id == 0 || controls[i].held);
	}
	if (nqueued == 0)
		one_at_a_time = false;
	return any;
}

/* An answer has come, on a channel of this file. */
void
topology_replied(Connection *conn, const BrokerEvent *event)
{
	Control    *control = control_of(event->channel);

	if (control != NULL && control->asked)
		answered(control, 0, NULL, event);
	else if ((control = late_of(event->channel)) != NULL)
		late_answered(conn, control, false);
}

/*
 * The broker has closed a channel of this file.  Returns false if that is a 403 that
 * is not to be believed yet: the caller is to log in anew.
 */
bool
topology_refused(Connection *conn, const BrokerEvent *event)
{
	Control    *control = control_of(event->channel);
	Control    *late_one = late_of(event->channel);
	Topic	   *topic;

	if (late_one != NULL)
	{
		late_answered(conn, late_one, true);
		return true;
	}
	if (control == NULL)
	{
		take_witness();
		return true;
	}
	topic = topic_find(control->topic_id);
	control->channel = 0;
	control->open = false;
	if (!control->asked || topic == NULL)
		return true;
	if (event->code == BROKER_ACCESS_REFUSED &&
		!connection_believes(conn, &topic->declaration.doubted,
							 topic->flow.stalled && topic->flow.code == BROKER_ACCESS_REFUSED))
	{
		control->asked = false;
		return false;
	}
	answered(control, event->code, psprintf("%d %s", event->code, event->text), event);
	release_topic(control, true);
	return true;
}

/* Counts how often in a row the connection was lost during the same request. */
static int
count_losses(const Control *control, Declaration *declaration)
{
	bool		same = is_lost_request(control, declaration);

	if (declaration->lost_group != NULL)
		pfree(declaration->lost_group);
	declaration->lost_group = control->group ? MemoryContextStrdup(TopMemoryContext, control->group) : NULL;
	declaration->lost_kind = control->kind;
	declaration->lost_dead = control->dead;
	declaration->losses = same ? declaration->losses + 1 : 1;
	return declaration->losses;
}

/* May the request be the reason why the connection was lost? */
static bool
may_blame_request(const Control *control, const BrokerEvent *event)
{
	return control->asked && event != NULL && event->code != BROKER_CONNECTION_FORCED &&
		(event->class_id == 0 || broker_blames_request(event->class_id, event->method_id, control->kind));
}

/* Was it made so long ago that it would have had its effect? */
static bool
is_old(const Control *control)
{
	return control->asked && mono_exceeds(control->asked_at, mono_now(), OLD_REQUEST_MS);
}

/*
 * May the loss of the connection that is reported be the fault of a request?  To be asked
 * before topology_lost().
 */
bool
topology_doubtful(const BrokerEvent *event)
{
	for (int i = 0; i < MAX_CONTROLS; i++)
	{
		if (may_blame_request(&controls[i], event) && (event->class_id != 0 || !is_old(&controls[i])))
			return true;
	}
	return false;
}

/* The connection was lost while the topic's request was under way; alone: no other was. */
static void
request_lost(Control *control, Topic *topic, bool alone, const BrokerEvent *event)
{
	bool		blamed = event->code >= 500;
	int			losses = count_losses(control, &topic->declaration);

	if (blamed || losses > 1)
		one_at_a_time = true;
	if (!alone || losses < (blamed ? BLAMED_LOSSES : SILENT_LOSSES))
		return;
	answered(control, event->code, blamed ?
			 psprintf("%s: the broker closed the connection: %d %s", request_text(control), event->code, event->text) :
			 psprintf("%s: the connection was lost each time: %s", request_text(control), event->text), event);
	/* when it is tried again, once will do */
	topic->declaration.losses = losses;
	topic->declaration.lost_for_it = true;
}

/*
 * The connection is lost.  event: with what the broker has closed it, or how it was
 * lost; NULL: in another way, which is no request's fault.  doubtful: messages may be the
 * reason that were in flight when it was lost before.
 */
void
topology_lost(const BrokerEvent *event, bool doubtful)
{
	int			asked = 0;
	bool		any_held = false;

	witness = 0;
	for (int i = 0; i < MAX_LATE; i++)
	{
		late[i].channel = 0;
		forget_request(&late[i]);
	}
	for (int i = 0; i < MAX_CONTROLS; i++)
	{
		asked += controls[i].asked;
		any_held = any_held || (controls[i].topic_id != 0 && controls[i].held);
	}
	may_hold = !any_held;
	for (int i = 0; i < MAX_CONTROLS; i++)
	{
		Control    *control = &controls[i];
		Topic	   *topic = topic_find(control->topic_id);

		control->channel = 0;
		control->open = false;
		if (topic != NULL && !doubtful && may_blame_request(control, event))
			request_lost(control, topic, asked == 1, event);
		if (control->topic_id != 0)
			release_topic(control, true);
	}
}

/* The broker did not read for a time: that does not count. */
void
topology_unblocked(void)
{
	for (int i = 0; i < MAX_CONTROLS; i++)
		controls[i].asked_at = mono_now();
	witness_at = mono_now();
}

/*
 * Returns why the connection has to be given up, or NULL: not even a channel was opened
 * in REPLY_TIMEOUT_MS, and the broker has said nothing else.  heard_at: when it last
 * said anything but heartbeats.
 */
const char *
topology_check(MonoTime now, MonoTime heard_at)
{
	if (witness == 0 || !mono_exceeds(Max(witness_at, heard_at), now, REPLY_TIMEOUT_MS))
		return NULL;
	return "the broker did not answer a request";
}

/* Is there anything that the broker has not answered yet? */
bool
topology_busy(void)
{
	return nqueued > 0;
}

/*
 * Is there anything that the broker is being asked, or will be next?  Not what it takes
 * very long to answer: messages are not to wait for that.
 */
bool
topology_asks(void)
{
	bool		any_free = false;

	for (int i = 0; i < MAX_CONTROLS; i++)
	{
		if (controls[i].topic_id == 0)
			any_free = true;
		else if (!controls[i].held && !is_old(&controls[i]))
			return true;
	}
	return any_free && line_to_take() != NULL;
}

/* When the next answer is overdue, or what is held back is to be looked at; or 0. */
MonoTime
topology_timeout(void)
{
	MonoTime	first = 0;

	for (int i = 0; i < MAX_CONTROLS; i++)
	{
		MonoTime	when = mono_plus(controls[i].asked_at, REPLY_TIMEOUT_MS);

		if (controls[i].topic_id != 0 && controls[i].held)
			return mono_later(HELD_MS);
		/* then another topic may be taken */
		if (controls[i].asked && !is_slow(&controls[i]) && !lines_are_empty())
			when = mono_plus(controls[i].asked_at, SLOW_MS + 1);
		if (when <= mono_now())
			when = mono_later(WITNESS_MS);
		/* none is free */
		if (controls[i].topic_id != 0 && controls[i].channel == 0)
			when = mono_later(WITNESS_MS);
		else if (controls[i].channel == 0 || (controls[i].open && !controls[i].asked))
			continue;
		if (first == 0 || when < first)
			first = when;
	}
	return first;
}

/* ---- recording ---- */

/* Is there an answer to be written into the catalog? */
bool
topology_unrecorded(void)
{
	return !dlist_is_empty(&unrecorded);
}

static void
execute(const char *sql, int nargs, Oid *types, Datum *values, const char *nulls)
{
	int			result = SPI_execute_with_args(sql, nargs, types, values, nulls, false, 0);

	if (result < 0)
		elog(ERROR, "could not execute \"%s\": %s", sql, SPI_result_code_string(result));
}

static bool
row_exists(const char *table, const char *where, int nargs, Oid *types, Datum *values)
{
	char	   *sql = psprintf("select from %s where %s", table, where);

	execute(sql, nargs, types, values, NULL);
	pfree(sql);
	return SPI_processed > 0;
}

/*
 * Runs an UPDATE or DELETE of one row that some transaction may have locked,
 * without waiting for it; returns whether it was done.
 */
static bool
change_unlocked(const char *command, const char *table, const char *where,
				int nargs, Oid *types, Datum *values, const char *nulls)
{
	/* no stronger lock than the command's own: KEY SHARE may be held long */
	const char *strength = (strncmp(command, "delete", 6) == 0) ? "update" : "no key update";
	char	   *sql = psprintf("%s and ctid = (select ctid from %s where %s for %s skip locked)",
							   command, table, where, strength);

	execute(sql, nargs, types, values, nulls);
	pfree(sql);
	return SPI_processed > 0;
}

#define BINDING_KEY "topic_id = $1 and consumer_group = $2"

static void
record_binding(Topic *topic, Binding *binding)
{
	Oid			types[3] = {INT4OID, TEXTOID, TEXTOID};
	Datum		values[3] = {Int32GetDatum(topic->topic_id), CStringGetTextDatum(binding->consumer_group), (Datum) 0};
	char		nulls[3] = {' ', ' ', 'n'};
	const char *command;

	if (binding->answer.error != NULL)
	{
		values[2] = CStringGetTextDatum(binding->answer.error);
		nulls[2] = ' ';
	}
	if (binding->answer.gone)
		command = "delete from fanout.binding where drop_if_unused is not null and " BINDING_KEY;
	else if (binding->dropping)
		command = "update fanout.binding set drop_if_unused = null, drop_if_empty = null, last_error = $3,"
			" declared_at = coalesce(declared_at, clock_timestamp()) where " BINDING_KEY;
	else
		command = "update fanout.binding set last_error = $3,"
			" declared_at = case when $3 is null then clock_timestamp() else declared_at end where " BINDING_KEY;
	binding->answer.answered = !change_unlocked(command, "fanout.binding", BINDING_KEY,
												binding->answer.gone ? 2 : 3, types, values, nulls) &&
		row_exists("fanout.binding", BINDING_KEY, 2, types, values);
}

/* Records how many messages a queue of dead letters has. */
static void
record_depth(Topic *topic, Binding *binding)
{
	Oid			types[3] = {INT4OID, TEXTOID, INT8OID};
	Datum		values[3] = {
		Int32GetDatum(topic->topic_id), CStringGetTextDatum(binding->consumer_group),
		Int64GetDatum(binding->answer.depth)
	};

	binding->answer.depth_changed =
		!change_unlocked("update fanout.binding set dead_letters = $3 where " BINDING_KEY,
						 "fanout.binding", BINDING_KEY, 3, types, values, NULL) &&
		row_exists("fanout.binding", BINDING_KEY, 2, types, values);
}

static void
forget_topic_rows(Topic *topic)
{
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum(topic->topic_id)};

	execute("delete from fanout.stall where topic_id = $1", 1, types, values, NULL);
	execute("delete from fanout.topic_stat where topic_id = $1", 1, types, values, NULL);
}

#define TOPIC_KEY "topic_id = $1"

static void
record_topic(Topic *topic)
{
	Declaration *declaration = &topic->declaration;
	Oid			types[2] = {INT4OID, TEXTOID};
	Datum		values[2] = {Int32GetDatum(topic->topic_id), (Datum) 0};
	char		nulls[2] = {' ', 'n'};
	const char *command;

	if (declaration->error != NULL)
	{
		values[1] = CStringGetTextDatum(declaration->error);
		nulls[1] = ' ';
	}
	if (declaration->gone)
		command = "delete from fanout.topic where dropping and " TOPIC_KEY;
	else if (topic->dropping)
		command = "update fanout.topic set dropping = false, last_error = $2 where " TOPIC_KEY;
	else
		command = "update fanout.topic set last_error = $2,"
			" declared_at = case when $2 is null then clock_timestamp() else declared_at end where " TOPIC_KEY;
	if (!change_unlocked(command, "fanout.topic", TOPIC_KEY, declaration->gone ? 1 : 2, types, values, nulls))
		declaration->answered = row_exists("fanout.topic", TOPIC_KEY, 1, types, values);
	else
	{
		declaration->answered = false;
		if (declaration->gone)
			forget_topic_rows(topic);
	}
}

/* Records the answers of one topic; returns whether all are. */
static bool
record_answers(Topic *topic)
{
	bool		all = true;

	for (int b = 0; b < topic->nbindings; b++)
	{
		Binding    *binding = &topic->bindings[b];

		if (binding->answer.depth_changed)
			record_depth(topic, binding);
		if (binding->answer.answered)
			record_binding(topic, binding);
		all = all && !binding->answer.answered && !binding->answer.depth_changed;
	}
	if (topic->declaration.answered)
		record_topic(topic);
	return all && !topic->declaration.answered;
}

/*
 * Records the answers, in the current transaction; those whose rows are locked by
 * others stay to be recorded.
 */
void
topology_record(void)
{
	dlist_mutable_iter it;

	dlist_foreach_modify(it, &unrecorded)
	{
		Topic	   *topic = dlist_container(Topic, declaration.unrecorded_node, it.cur);

		if (!record_answers(topic))
			continue;
		dlist_delete(&topic->declaration.unrecorded_node);
		topic->declaration.unrecorded = false;
	}
}
