/*-------------------------------------------------------------------------
 *
 * window_model.h
 *		A window beside a model that is slow and obvious, publishing to queues
 *		that refuse what they like.  For the unit test, which chooses by chance,
 *		and the fuzz target, which chooses by its input.
 *
 * The model knows what each message's state has to be, finds what has to go
 * again by comparing all with all, and looks at what is in the queues:
 *
 *	- of two messages that conflict (a key in common, or one is a barrier) the
 *	  later one's last copy is behind the earlier one's, in each queue;
 *	- a message given back as accepted is in every queue;
 *	- in serial mode, and if nothing was ever refused, also the first copies
 *	  are in order; in serial mode no copy at all is behind a later message's.
 *
 * Who includes this defines MODEL_CHECK(condition) and choose(n), a number
 * below n.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_WINDOW_MODEL_H
#define PGF_WINDOW_MODEL_H

#include "publish/window.h"

#include <string.h>

#define MESSAGES_MAX	128
#define QUEUES			3
#define TAGS_MAX		2000
#define SLOTS_MAX		256

typedef enum ModelState
{
	MODEL_UNSENT,
	MODEL_IN_FLIGHT,
	MODEL_REFUSED,
	MODEL_ACCEPTED,
	MODEL_DISCARDED,
	MODEL_DONE,
} ModelState;

typedef struct ModelMessage
{
	WindowItem	item;			/* first, so that the pointers are equal */
	uint64_t	keys[2];
	int			nkeys;
	bool		barrier;
	ModelState	state;
	bool		returned;		/* in flight: the window was told */
	bool		untold;			/* refused, and not reported yet */
	int			first_copy[QUEUES]; /* position; 0: not there */
	int			last_copy[QUEUES];
} ModelMessage;

/* What the broker knows of a tag. */
typedef struct ModelTag
{
	int			message;		/* -1: another topic's */
	bool		processed;
	bool		refused;
	bool		unroutable;
	bool		confirmed;
} ModelTag;

typedef struct Model
{
	Window		window;
	ModelMessage messages[MESSAGES_MAX];
	int			nmessages;
	int			limit;			/* messages to be added */
	int			ndone;

	/* what the window should say */
	bool		serial;
	bool		wants_serial;
	bool		stopping;
	int			in_flight;

	/* what may be promised of the queues */
	bool		always_serial;
	bool		ever_refused;

	/* the broker */
	ModelTag	tags[TAGS_MAX];
	int			published;		/* tags up to this one */
	int			processed;
	bool		refusing[QUEUES];
	bool		no_queues;
	int			copies[QUEUES];

	WindowItem *slots[2][SLOTS_MAX];
	int			which_slots;
	int			capacity;
	WindowKey  *buckets[8];
	WindowKeys	keys;

	/* what has happened, lest a test promises what it does not try */
	int			refusals;
	int			repeats;		/* of accepted ones */
	int			losses;
} Model;

static Model model;

static void
model_begin(int limit, bool serial, int capacity)
{
	memset(&model, 0, sizeof(model));
	model.limit = limit;
	model.capacity = capacity;
	window_keys_init(&model.keys, model.buckets, 8);
	window_init(&model.window, &model.keys);
	window_set_slots(&model.window, model.slots[0], capacity);
	window_set_serial(&model.window, serial);
	model.serial = model.wants_serial = model.always_serial = serial;
}

static ModelMessage *
model_message(WindowItem *item)
{
	return (ModelMessage *) item;
}

static bool
model_conflict(const ModelMessage *a, const ModelMessage *b)
{
	if (a->barrier || b->barrier)
		return true;
	for (int i = 0; i < a->nkeys; i++)
	{
		for (int j = 0; j < b->nkeys; j++)
		{
			if (a->keys[i] == b->keys[j])
				return true;
		}
	}
	return false;
}

static void
model_add(void)
{
	ModelMessage *message = &model.messages[model.nmessages];

	if (model.nmessages == model.limit)
		return;
	message->nkeys = choose(8) == 0 ? 0 : choose(5) == 0 ? 2 : 1;
	message->barrier = choose(25) == 0;
	for (int k = 0; k < message->nkeys; k++)
		message->item.keys[k].hash = message->keys[k] = choose(6);
	message->item.nkeys = message->nkeys;
	message->item.barrier = message->barrier;
	message->item.bytes = model.nmessages + 1;
	model.nmessages++;
	window_add(&model.window, &message->item);
}

/* ---- what has to go again ---- */

/* Compares all with all. */
static void
model_restart(void)
{
	static bool again[MESSAGES_MAX];

	for (int i = model.ndone; i < model.nmessages; i++)
	{
		ModelMessage *message = &model.messages[i];

		again[i] = (message->state == MODEL_REFUSED || message->state == MODEL_IN_FLIGHT);
		if (message->state == MODEL_REFUSED || message->returned)
		{
			message->untold = true;
			model.wants_serial = true;
		}
		if (message->state != MODEL_ACCEPTED)
			continue;
		for (int j = model.ndone; j < i; j++)
			again[i] |= again[j] && model_conflict(message, &model.messages[j]);
		MODEL_CHECK(!(again[i] && model.serial));
		model.repeats += again[i];
	}
	for (int i = model.ndone; i < model.nmessages; i++)
	{
		if (again[i])
			model.messages[i].state = MODEL_UNSENT;
		model.messages[i].returned = false;
	}
	model.stopping = false;
	model.serial = model.wants_serial;
}

static void
model_settled(void)
{
	if (model.stopping && model.in_flight == 0)
		model_restart();
}

/* ---- what the window says ---- */

/* May this message go, in serial mode? */
static bool
model_may_go(int i)
{
	for (int j = model.ndone; j < i; j++)
	{
		ModelState	state = model.messages[j].state;

		if ((state == MODEL_UNSENT || state == MODEL_IN_FLIGHT || state == MODEL_REFUSED) &&
			model_conflict(&model.messages[i], &model.messages[j]))
			return false;
	}
	return true;
}

static void
model_check_next(void)
{
	WindowItem *next = window_next(&model.window);
	bool		discarded = false;
	int			i;

	if (model.stopping)
	{
		MODEL_CHECK(next == NULL);
		return;
	}
	/* the first that may go, or in serial mode any */
	for (i = model.ndone; i < model.nmessages; i++)
	{
		if (model.messages[i].state == MODEL_UNSENT && (!model.serial || model_may_go(i)))
			break;
		discarded |= model.messages[i].state == MODEL_DISCARDED;
	}
	if (next == NULL)
	{
		/*
		 * In serial mode a discarded message holds its followers until those
		 * are settled that it waits for itself.
		 */
		MODEL_CHECK(i == model.nmessages || (model.serial && discarded && model.in_flight > 0));
		return;
	}
	MODEL_CHECK(model_message(next)->state == MODEL_UNSENT);
	if (model.serial)
		MODEL_CHECK(model_may_go(model_message(next) - model.messages));
	else
		MODEL_CHECK(next == &model.messages[i].item);
}

static void
model_check_states(void)
{
	static const WindowState states[] =
	{WINDOW_UNSENT, WINDOW_IN_FLIGHT, WINDOW_REFUSED, WINDOW_ACCEPTED, WINDOW_DISCARDED};
	const WindowItem *oldest = NULL;
	size_t		bytes = 0;
	int			in_flight = 0;

	for (int i = model.ndone; i < model.nmessages; i++)
	{
		const WindowItem *item = &model.messages[i].item;

		if (model.messages[i].state == MODEL_DONE)
			continue;
		MODEL_CHECK(item->state == states[model.messages[i].state]);
		if (item->state != WINDOW_IN_FLIGHT)
			continue;
		in_flight++;
		bytes += item->bytes;
		if (oldest == NULL || item->tag < oldest->tag)
			oldest = item;
	}
	MODEL_CHECK(in_flight == model.in_flight);
	MODEL_CHECK(model.window.in_flight == (size_t) in_flight);
	MODEL_CHECK(model.window.bytes == bytes);
	MODEL_CHECK(window_oldest(&model.window) == oldest);
	MODEL_CHECK(model.window.count == (size_t) (model.nmessages - model.ndone));
}

static void
model_check_window(void)
{
	MODEL_CHECK(model.window.serial == model.serial);
	MODEL_CHECK(model.window.stopping == model.stopping);
	model_check_states();
	model_check_next();
}

/* ---- the broker ---- */

/* A queue takes a message. */
static void
model_enqueue(int queue, int i)
{
	ModelMessage *message = &model.messages[i];
	int			position = ++model.copies[queue];

	if (message->first_copy[queue] == 0)
		message->first_copy[queue] = position;
	message->last_copy[queue] = position;
	for (int later = i + 1; model.always_serial && later < model.nmessages; later++)
		MODEL_CHECK(model.messages[later].last_copy[queue] == 0 ||
					!model_conflict(message, &model.messages[later]));
}

/* The broker looks at the next message that it was sent. */
static void
model_process(void)
{
	ModelTag   *tag;

	if (model.processed == model.published)
		return;
	tag = &model.tags[++model.processed];
	tag->processed = true;
	if (tag->message < 0)
		return;
	tag->unroutable = model.no_queues;
	for (int queue = 0; queue < QUEUES && !tag->unroutable; queue++)
	{
		if (model.refusing[queue] && choose(2) == 0)
			tag->refused = true;
		else
			model_enqueue(queue, tag->message);
	}
	model.ever_refused |= tag->refused || tag->unroutable;
}

static bool
model_is_message(const WindowItem *item, const void *arg)
{
	return item == arg;
}

static void
model_return(int t)
{
	ModelTag   *tag = &model.tags[t];
	ModelMessage *message = &model.messages[tag->message];

	if (!tag->unroutable || message->returned)
		return;
	MODEL_CHECK(window_find(&model.window, model_is_message, message) == &message->item);
	MODEL_CHECK(window_find(&model.window, model_is_message, &model) == NULL);
	window_returned(&model.window, &message->item);
	message->returned = true;
	model.stopping = true;
}

/* The model's part of a confirm. */
static void
model_confirm_one(int t)
{
	ModelTag   *tag = &model.tags[t];
	bool		refused = tag->refused || tag->unroutable;

	tag->confirmed = true;
	if (tag->message < 0)
		return;
	model.in_flight--;
	model.messages[tag->message].state = refused ? MODEL_REFUSED : MODEL_ACCEPTED;
	model.stopping |= refused;
	model.refusals += refused;
}

/*
 * Confirms a tag, or as many as one "multiple" can: all up to it that are not
 * confirmed yet must be processed and have the same answer.
 */
static void
model_confirm(int t, bool multiple)
{
	bool		refused = model.tags[t].refused;
	bool		known;

	for (int u = multiple ? 1 : t; u <= t; u++)
	{
		if (model.tags[u].confirmed)
			continue;
		if (!model.tags[u].processed || model.tags[u].refused != refused)
			return;
		if (model.tags[u].message >= 0)
			model_return(u);
	}
	for (int u = multiple ? 1 : t; u <= t; u++)
	{
		if (!model.tags[u].confirmed)
			model_confirm_one(u);
	}
	if (multiple && (uint64_t) t > model.window.newest)
		t = model.window.newest;	/* other topics' tags are at the end */
	known = refused ? window_nack(&model.window, t, multiple) :
		window_ack(&model.window, t, multiple);
	MODEL_CHECK(known == (t > 0 && (multiple || model.tags[t].message >= 0)));
	model_settled();
}

/* One that is not confirmed yet, or a "multiple" that may come late. */
static void
model_confirm_some(void)
{
	int			t;

	if (model.processed == 0)
		return;
	t = 1 + choose(model.processed);
	if (choose(3) == 0)
	{
		model_confirm(t, true);
		return;
	}
	for (int n = model.processed; n > 0 && model.tags[t].confirmed; n--)
		t = t % model.processed + 1;
	if (!model.tags[t].confirmed)
		model_confirm(t, false);
}

/* A confirm that cannot be. */
static void
model_lie(void)
{
	uint64_t	tag = 1 + choose(model.published + 1);
	bool		in_flight = tag <= (uint64_t) model.published && model.tags[tag].message >= 0 &&
		!model.tags[tag].confirmed;

	MODEL_CHECK(!window_ack(&model.window, model.window.newest + 1 + choose(3), true));
	MODEL_CHECK(!window_nack(&model.window, 0, choose(2)));
	if (!in_flight)
		MODEL_CHECK(!window_ack(&model.window, tag, false));
}

/* The channel is lost, with all that the broker has not looked at. */
static void
model_lose(void)
{
	int			unsent = 0;
	int			unsent_now = 0;
	bool		disturbed = model.in_flight > 0;

	for (int n = choose(1 + model.published - model.processed); n > 0; n--)
		model_process();
	for (int i = model.ndone; i < model.nmessages; i++)
		unsent += model.messages[i].state == MODEL_UNSENT;
	model.in_flight = 0;
	if (disturbed || model.stopping)
		model_restart();
	for (int i = model.ndone; i < model.nmessages; i++)
		unsent_now += model.messages[i].state == MODEL_UNSENT;
	MODEL_CHECK(window_lost(&model.window) == (size_t) (unsent_now - unsent));
	memset(model.tags, 0, (model.published + 1) * sizeof(ModelTag));
	model.published = model.processed = 0;
	model.losses++;
}

/* ---- the publisher ---- */

static void
model_publish(void)
{
	WindowItem *item = window_next(&model.window);
	uint64_t	oldest = model.in_flight > 0 ? window_oldest(&model.window)->tag : 0;
	int			gap = choose(10) == 0 ? choose(3) : 0;
	int			tag = model.published + 1 + gap;
	bool		room = (model.in_flight == 0 || tag - oldest < (uint64_t) model.capacity);

	if (item == NULL || tag >= TAGS_MAX)
		return;
	MODEL_CHECK(window_has_room(&model.window, tag) == room);
	if (!room)
		return;
	for (int t = model.published + 1; t < tag; t++)
		model.tags[t].message = -1;
	model.tags[tag].message = model_message(item) - model.messages;
	model.published = tag;
	model_message(item)->state = MODEL_IN_FLIGHT;
	MODEL_CHECK(!model_message(item)->untold);
	model.in_flight++;
	window_published(&model.window, item, tag, tag);
}

static void
model_discard(WindowItem *item)
{
	if (item == NULL || model_message(item)->state != MODEL_UNSENT)
		return;
	window_discard(&model.window, item);
	model_message(item)->state = MODEL_DISCARDED;
	model_message(item)->untold = false;
}

/* Takes the refusals, in order, and may give up on some. */
static void
model_take_refused(void)
{
	WindowItem *item;
	int			i = model.ndone;

	while ((item = window_take_refused(&model.window)) != NULL)
	{
		while (i < model.nmessages && !model.messages[i].untold)
			i++;
		MODEL_CHECK(i < model.nmessages && item == &model.messages[i].item);
		MODEL_CHECK(item->refusal == WINDOW_NACKED || item->refusal == WINDOW_RETURNED);
		model.messages[i].untold = false;
		if (choose(10) == 0)
			model_discard(item);
	}
	for (; i < model.nmessages; i++)
		MODEL_CHECK(!model.messages[i].untold);
}

/* Checks a message that is over against all before it. */
static void
model_check_done(int i)
{
	ModelMessage *message = &model.messages[i];

	for (int queue = 0; queue < QUEUES; queue++)
	{
		int			last = message->last_copy[queue];

		MODEL_CHECK(last > 0 || message->state == MODEL_DISCARDED);
		for (int j = 0; j < i && message->state == MODEL_ACCEPTED; j++)
		{
			const ModelMessage *earlier = &model.messages[j];

			if (!model_conflict(earlier, message))
				continue;
			MODEL_CHECK(earlier->last_copy[queue] < last);
			if (model.always_serial || !model.ever_refused)
				MODEL_CHECK(earlier->first_copy[queue] < message->first_copy[queue]);
		}
	}
}

static void
model_take_done(void)
{
	WindowItem *item;

	while ((item = window_take_done(&model.window)) != NULL)
	{
		ModelState	state = model.messages[model.ndone].state;

		MODEL_CHECK(item == &model.messages[model.ndone].item);
		MODEL_CHECK(state == MODEL_ACCEPTED || state == MODEL_DISCARDED);
		model_check_done(model.ndone);
		model.messages[model.ndone++].state = MODEL_DONE;
		memset(item, 0xaa, sizeof(*item));	/* nothing may point to it any
											 * more */
	}
	if (model.ndone < model.nmessages)
		MODEL_CHECK(model.messages[model.ndone].state != MODEL_ACCEPTED);
}

static void
model_set_serial(bool serial)
{
	window_set_serial(&model.window, serial);
	model.wants_serial = serial;
	if (serial == model.serial)
		return;
	model.always_serial = false;
	model.stopping = true;
	model_settled();
}

static void
model_set_slots(void)
{
	int			capacity = 4 << choose(7);

	if (model.in_flight > 0 &&
		model.window.newest - window_oldest(&model.window)->tag >= (uint64_t) capacity)
		return;
	model.which_slots ^= 1;
	model.capacity = capacity;
	window_set_slots(&model.window, model.slots[model.which_slots], capacity);
}

/*
 * The topic is detached, on a new channel: what is still unsent comes again,
 * in order.  What was accepted or discarded is over.
 */
static void
model_abandon(void)
{
	static ModelMessage left[MESSAGES_MAX];
	WindowItem *next;
	WindowItem *item;
	int			n = 0;

	model_lose();
	model.losses--;
	for (item = window_abandon(&model.window); item != NULL; item = next)
	{
		int			i = model_message(item) - model.messages;

		next = item->next;
		MODEL_CHECK(i == model.ndone + n++);
		MODEL_CHECK((item->state == WINDOW_UNSENT) == (model.messages[i].state == MODEL_UNSENT));
	}
	MODEL_CHECK(model.ndone + n == model.nmessages);
	MODEL_CHECK(model.window.count == 0 && window_next(&model.window) == NULL);
	for (size_t i = 0; i < model.keys.nbuckets; i++)
		MODEL_CHECK(model.buckets[i] == NULL);

	/* all of them again: those that need not be sent are discarded at once */
	memcpy(left, model.messages + model.ndone, n * sizeof(left[0]));
	for (int i = 0; i < n; i++)
	{
		item = &model.messages[model.ndone + i].item;
		window_add(&model.window, item);
		model.messages[model.ndone + i].untold = false;
		if (left[i].state == MODEL_UNSENT)
			continue;
		window_discard(&model.window, item);
		model.messages[model.ndone + i].state = MODEL_DISCARDED;
	}
}

/* ---- all of it ---- */

typedef enum ModelFaults
{
	MODEL_NO_FAULTS = 0,
	MODEL_REFUSALS = 1,
	MODEL_LOSSES = 2,
	MODEL_MODES = 4,
	MODEL_ALL = 7,
} ModelFaults;

static void
model_step_fault(int faults)
{
	int			queue = choose(QUEUES);

	switch (choose(12))
	{
		case 0:
		case 1:
			model.refusing[queue] = (faults & MODEL_REFUSALS) && !model.refusing[queue];
			break;
		case 2:
		case 3:
			memset(model.refusing, 0, sizeof(model.refusing));
			model.no_queues = false;
			break;
		case 4:
			model.no_queues = (faults & MODEL_REFUSALS) && choose(2);
			break;
		case 5:
		case 6:
			if (faults & MODEL_LOSSES)
				model_lose();
			break;
		case 7:
		case 8:
			if (faults & MODEL_MODES)
				model_set_serial(choose(2));
			break;
		case 9:
			model_lie();
			break;
		case 10:
			model_set_slots();
			if (model.nmessages > 0)
				model_discard(&model.messages[choose(model.nmessages)].item);
			break;
		case 11:
			if ((faults & MODEL_LOSSES) && choose(4) == 0)
				model_abandon();
			break;
	}
}

static void
model_step(int faults)
{
	switch (choose(12))
	{
		case 0:
		case 1:
		case 2:
			model_add();
			break;
		case 3:
		case 4:
		case 5:
			model_publish();
			break;
		case 6:
		case 7:
			model_process();
			break;
		case 8:
		case 9:
			model_confirm_some();
			break;
		case 10:
			model_take_done();
			break;
		case 11:
			if (choose(3) == 0)
				model_step_fault(faults);
			break;
	}
	model_take_refused();
	model_check_window();
}

/* All queues take everything; what is in the window has to come to its end. */
static void
model_drain(void)
{
	memset(model.refusing, 0, sizeof(model.refusing));
	model.no_queues = false;
	for (int round = 0; model.window.count > 0; round++)
	{
		/* a message may go twice more, and each round settles one at least */
		MODEL_CHECK(round < 4 * MESSAGES_MAX);
		if (model.published > TAGS_MAX / 2)
			model_lose();
		model_publish();
		while (model.processed < model.published)
			model_process();
		for (int t = 1; t <= model.published; t++)
		{
			if (!model.tags[t].confirmed)
				model_confirm(t, false);
		}
		model_take_refused();
		model_take_done();
		model_check_window();
	}
	MODEL_CHECK(model.ndone == model.nmessages && model.in_flight == 0);
	for (size_t i = 0; i < model.keys.nbuckets; i++)
		MODEL_CHECK(model.buckets[i] == NULL);
}

#endif							/* PGF_WINDOW_MODEL_H */
