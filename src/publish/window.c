/*-------------------------------------------------------------------------
 *
 * window.c
 *		The messages of one topic between its reading and its end: which may be
 *		published next, what is in flight, and what has to go again.
 *
 * A window belongs to one topic and the channel on which it is published.
 * Its items are the caller's, are added in order of id, and move so:
 *
 *		          published           ack                      take_done
 *		UNSENT -------------> IN_FLIGHT ------> ACCEPTED -------------------> the
 *		 |  ^                  |  |               |                         caller's
 *		 |  |    nack, or ack  |  | channel lost  | sent behind an item       again
 *		 |  |    of a returned |  |               | that goes again            ^
 *		 |  |                  v  |               |                            |
 *		 |  |<---- REFUSED <---+  |               |                            |
 *		 |  |                     |               |                            |
 *		 |  +<------- restart() --+---------------+                            |
 *		 |                                                      take_done      |
 *		 +------- discard ------> DISCARDED -----------------------------------+
 *
 * Two items conflict if they have a key in common, or one of them is a barrier.
 *
 * In pipelined mode items go out in order of id, conflicting or not, and the
 * channel keeps their order in every queue.  In serial mode an item goes out
 * only when all items before it that conflict with it are settled.
 *
 * The window itself moves so:
 *
 *		PIPELINED --- refusal, set_serial(true) ---+
 *		                                           +--> stopping --> restart()
 *		SERIAL ----- refusal, set_serial(false) ---+                     |
 *		                                                                 |
 *		          SERIAL after a refusal, otherwise what the caller wants <
 *
 * While it is stopping, window_next() gives nothing.  It ends when nothing is in
 * flight any more, or the channel is lost; if nothing was in flight, at once.
 *
 * restart() makes unsent again: what was refused; what is unknown, since it was
 * in flight when the channel was lost; and each accepted item that conflicts
 * with an earlier one that goes again.  So a queue that took the later of two
 * without the earlier gets both, in order.  In serial mode nothing is ever sent
 * behind an item that it conflicts with, and nothing accepted goes again.
 *
 * Therefore an accepted item is done, and given back, only when all items
 * before it are: until then it may have to go again.
 *
 * A refusal makes the mode serial.  The loss of a channel does not, because the
 * broker has taken what was published before some point and nothing after it.
 *
 * Confirms are a set, not a sequence: acks come out of order, a "multiple"
 * covers everything still outstanding up to its tag, tags settled before
 * included, and may overlap an earlier one.  So each tag is a slot that is
 * settled once, and what was settled is skipped.
 *
 * Cost: constant for each item and confirm, and a walk over the window for each
 * restart.  In pipelined mode keys are not looked at.
 *
 * Must never: settle a message for a confirm that may not mean it; let an item
 * overtake, for good, one that it conflicts with.
 *
 * Pure data structure: no server, no socket, no allocation.
 *
 *-------------------------------------------------------------------------
 */
#include "publish/window.h"

#include <string.h>

/* ---- the newest item of each key ---- */

/*
 * Sets up the buckets, which the caller provides.  With as many as there are
 * items in all windows that use them, looking up a key takes constant time;
 * with fewer it takes longer.
 */
void
window_keys_init(WindowKeys *keys, WindowKey **buckets, size_t nbuckets)
{
	keys->buckets = buckets;
	keys->nbuckets = nbuckets;
	memset(buckets, 0, nbuckets * sizeof(*buckets));
}

static WindowKey **
bucket(const WindowKeys *keys, uint64_t hash)
{
	size_t		i = (size_t) ((hash * UINT64_C(0x9E3779B97F4A7C15)) >> 32);

	return &keys->buckets[i & (keys->nbuckets - 1)];
}

/* Returns the link to the window's key of this hash, or to NULL. */
static WindowKey **
find_key(const Window *window, uint64_t hash)
{
	WindowKey **link = bucket(window->keys, hash);

	while (*link != NULL && ((*link)->hash != hash || (*link)->window != window))
		link = &(*link)->chain;
	return link;
}

/* Enters the key, in place of an older item's. */
static void
enter_key(const Window *window, WindowKey *key)
{
	WindowKey **link = find_key(window, key->hash);

	key->chain = (*link != NULL) ? (*link)->chain : NULL;
	*link = key;
}

/* Takes out the key, unless a newer item's has its place. */
static void
remove_key(const Window *window, WindowKey *key)
{
	WindowKey **link = find_key(window, key->hash);

	if (*link == key)
		*link = key->chain;
}

static void
remove_keys(const Window *window, WindowItem *item)
{
	for (int k = 0; k < item->nkeys; k++)
		remove_key(window, &item->keys[k]);
}

/* ---- serial mode: who waits for whom ---- */

static void
push_ready(Window *window, WindowItem *item)
{
	item->next_ready = NULL;
	if (window->first_ready != NULL)
		window->last_ready->next_ready = item;
	else
		window->first_ready = item;
	window->last_ready = item;
}

static WindowItem *
pop_ready(Window *window)
{
	WindowItem *item = window->first_ready;

	window->first_ready = item->next_ready;
	return item;
}

/* Has the item wait for the one before it on each of its keys. */
static void
line_up(Window *window, WindowItem *item)
{
	for (int k = 0; k < item->nkeys; k++)
	{
		WindowKey  *key = &item->keys[k];
		WindowKey  *before = *find_key(window, key->hash);

		if (before != NULL)
		{
			before->waiting = item;
			item->waits_for++;
		}
		enter_key(window, key);
	}
	item->lined_up = true;
	window->nlined_up++;
	window->barrier = item->barrier;
	if (item->waits_for == 0)
		push_ready(window, item);
}

/* Takes out an item that is settled: those that wait for it alone are ready. */
static void
leave_line(Window *window, WindowItem *item)
{
	for (int k = 0; k < item->nkeys; k++)
	{
		WindowItem *waiting = item->keys[k].waiting;

		if (waiting == NULL)
			remove_key(window, &item->keys[k]);
		else if (--waiting->waits_for == 0)
			push_ready(window, waiting);
		item->keys[k].waiting = NULL;
	}
	item->lined_up = false;
	window->nlined_up--;
}

static void
advance_cursor(Window *window)
{
	while (window->cursor != NULL &&
		   (window->cursor->state != WINDOW_UNSENT || window->cursor->lined_up))
		window->cursor = window->cursor->next;
}

/*
 * Lines up all items for which no barrier has to wait, and which have to wait
 * for no barrier.  Discarded items stay in line until they are the first that
 * are ready, so that nothing need be searched for to discard one.
 */
static void
admit(Window *window)
{
	WindowItem *item;

	while (window->first_ready != NULL && window->first_ready->state == WINDOW_DISCARDED)
		leave_line(window, pop_ready(window));
	while ((item = window->cursor) != NULL)
	{
		if (window->nlined_up > 0 && (window->barrier || item->barrier))
			return;
		line_up(window, item);
		advance_cursor(window);
	}
}

/* Forgets who waits for whom. */
static void
break_lines(Window *window)
{
	for (WindowItem *item = window->first; item != NULL; item = item->next)
	{
		if (!item->lined_up)
			continue;
		remove_keys(window, item);
		item->keys[0].waiting = NULL;
		item->keys[1].waiting = NULL;
		item->waits_for = 0;
		item->lined_up = false;
	}
	window->first_ready = NULL;
	window->nlined_up = 0;
}

/* ---- stopping and starting again ---- */

/* What goes again, so far; its keys are in the table. */
typedef struct Again
{
	size_t		count;
	bool		barrier;
} Again;

/* Tells whether the item conflicts with one that goes again. */
static bool
conflicts(const Window *window, const WindowItem *item, const Again *again)
{
	if (again->barrier || (item->barrier && again->count > 0))
		return true;
	for (int k = 0; k < item->nkeys; k++)
	{
		if (*find_key(window, item->keys[k].hash) != NULL)
			return true;
	}
	return false;
}

/*
 * Tells whether the item goes again, when nothing is in flight any more; one
 * still in that state is unknown.
 */
static bool
goes_again(const Window *window, const WindowItem *item, const Again *again)
{
	switch (item->state)
	{
		case WINDOW_REFUSED:
		case WINDOW_IN_FLIGHT:
			return true;
		case WINDOW_ACCEPTED:
			return conflicts(window, item, again);
		case WINDOW_UNSENT:		/* nothing that conflicts was sent behind it */
		case WINDOW_DISCARDED:
			break;
	}
	return false;
}

/*
 * Makes unsent what has to go again; returns how many items that are.
 */
static size_t
unsend(Window *window)
{
	Again		again = {0};

	for (WindowItem *item = window->first; item != NULL; item = item->next)
	{
		if (!goes_again(window, item, &again))
			continue;
		if (item->refusal != WINDOW_NOT_REFUSED)
		{
			item->untold = true;
			window->untold = window->first;
			window->wants_serial = true;
		}
		item->state = WINDOW_UNSENT;
		again.count++;
		again.barrier |= item->barrier;
		for (int k = 0; k < item->nkeys; k++)
			enter_key(window, &item->keys[k]);
	}
	for (WindowItem *item = window->first; item != NULL; item = item->next)
		remove_keys(window, item);
	return again.count;
}

/*
 * Goes on in the mode that is wanted, from the first unsent item on, since
 * nothing is in flight any more.  Returns how many items go again.
 */
static size_t
restart(Window *window)
{
	size_t		again;

	break_lines(window);
	again = unsend(window);
	window->stopping = false;
	window->serial = window->wants_serial;
	window->cursor = window->first;
	advance_cursor(window);
	if (window->serial)
		admit(window);
	return again;
}

/* ---- setting up ---- */

/*
 * Begins an empty window in pipelined mode.  It has no room for anything in
 * flight before window_set_slots().
 */
void
window_init(Window *window, WindowKeys *keys)
{
	memset(window, 0, sizeof(*window));
	window->keys = keys;
	window->oldest = 1;
}

/*
 * Provides room for tags, capacity (a power of two) from the oldest in flight
 * to the newest.  May be called again at any time, with at least as much room
 * as is in use; the former slots are the caller's again then.
 */
void
window_set_slots(Window *window, WindowItem **slots, uint64_t capacity)
{
	for (uint64_t tag = window->oldest; tag <= window->newest; tag++)
		slots[tag & (capacity - 1)] = window->slots[tag & (window->capacity - 1)];
	window->slots = slots;
	window->capacity = capacity;
}

/*
 * Chooses the mode: serial for queues that refuse by design, and pipelined
 * again if the caller thinks that they will not refuse any more.  What is in
 * flight is awaited first, and a refusal among it makes the mode serial.
 */
void
window_set_serial(Window *window, bool serial)
{
	window->wants_serial = serial;
	if (serial == window->serial)
		return;
	if (window->in_flight > 0)
		window->stopping = true;
	else
		(void) restart(window);
}

/* ---- publishing ---- */

/*
 * Adds an item behind all others.  It must stay where it is until
 * window_take_done() or window_abandon() gives it back.
 */
void
window_add(Window *window, WindowItem *item)
{
	if (item->nkeys == 2 && item->keys[0].hash == item->keys[1].hash)
		item->nkeys = 1;
	for (int k = 0; k < 2; k++)
	{
		item->keys[k].window = window;
		item->keys[k].waiting = NULL;
	}
	item->state = WINDOW_UNSENT;
	item->refusal = WINDOW_NOT_REFUSED;
	item->tag = 0;
	item->next = NULL;
	item->waits_for = 0;
	item->lined_up = false;
	item->untold = false;

	if (window->first != NULL)
		window->last->next = item;
	else
		window->first = item;
	window->last = item;
	window->count++;
	if (window->cursor == NULL)
		window->cursor = item;
	if (window->serial)
		admit(window);
}

/*
 * Returns the item that may be published next, or NULL; it is the same one
 * until window_published() or window_discard() is told what became of it.
 */
WindowItem *
window_next(const Window *window)
{
	if (window->stopping)
		return NULL;
	return window->serial ? window->first_ready : window->cursor;
}

/*
 * Tells whether there is a slot for this tag, which is to be published next.
 * Otherwise window_set_slots() can make one, or confirms do.
 */
bool
window_has_room(const Window *window, uint64_t tag)
{
	return window->capacity > 0 &&
		(window->in_flight == 0 || tag - window->oldest < window->capacity);
}

/* Puts the item into the slot of its tag, for which there is room. */
static void
occupy_slot(Window *window, WindowItem *item)
{
	uint64_t	tag = item->tag;

	if (window->in_flight == 0)
		window->oldest = tag;
	else
	{
		/* tags in between are those of other topics on the channel */
		for (uint64_t t = window->newest + 1; t < tag; t++)
			window->slots[t & (window->capacity - 1)] = NULL;
	}
	window->slots[tag & (window->capacity - 1)] = item;
	window->newest = tag;
}

/*
 * Records that the item, which window_next() gave, was published at this time
 * with this tag, for which window_has_room().  Tags rise; between two of them
 * may be others if several topics share the channel.
 */
void
window_published(Window *window, WindowItem *item, uint64_t tag, int64_t now)
{
	item->state = WINDOW_IN_FLIGHT;
	item->refusal = WINDOW_NOT_REFUSED;
	item->untold = false;
	item->tag = tag;
	item->published_at = now;
	occupy_slot(window, item);
	window->in_flight++;
	window->bytes += item->bytes;
	if (!window->serial)
		advance_cursor(window);
	else
	{
		(void) pop_ready(window);
		admit(window);
	}
}

/*
 * Gives up an item in state UNSENT, because no broker can ever take it, or it
 * goes to the dead letters.  Those that wait for it go on, once those are
 * settled for which it waits itself; those that are to go again because of it
 * still do.  window_take_done() gives it back in its turn.
 */
void
window_discard(Window *window, WindowItem *item)
{
	item->state = WINDOW_DISCARDED;
	item->untold = false;
	advance_cursor(window);
	if (window->serial)
		admit(window);
}

/* ---- confirms ---- */

/* Settles the item in the slot, if there is one. */
static void
settle_slot(Window *window, WindowItem **slot, bool acked)
{
	WindowItem *item = *slot;

	if (item == NULL)
		return;
	*slot = NULL;
	window->in_flight--;
	window->bytes -= item->bytes;
	if (acked && item->refusal == WINDOW_NOT_REFUSED)
	{
		item->state = WINDOW_ACCEPTED;
		if (item->lined_up)
			leave_line(window, item);
		return;
	}
	item->state = WINDOW_REFUSED;
	if (item->refusal == WINDOW_NOT_REFUSED)
		item->refusal = WINDOW_NACKED;
	window->stopping = true;
}

/* Goes on after a confirm. */
static void
after_confirm(Window *window)
{
	while (window->oldest <= window->newest &&
		   window->slots[window->oldest & (window->capacity - 1)] == NULL)
		window->oldest++;
	if (window->stopping && window->in_flight == 0)
		(void) restart(window);
	else if (window->serial)
		admit(window);
}

/*
 * Settles one tag, or with multiple everything in flight up to it, in which
 * tags settled already are no error.  Returns false, and settles nothing, for a
 * tag that was never published, or single and settled already: the broker has
 * lost count, and must not be trusted any longer.  So it is with tag 0, by
 * which AMQP means "all" (basic.ack): all that the broker had seen when it said
 * so, which nobody knows here.  RabbitMQ does not send it.
 */
static bool
confirm(Window *window, uint64_t tag, bool multiple, bool acked)
{
	uint64_t	mask = window->capacity - 1;

	if (tag == 0 || tag > window->newest)
		return false;
	if (!multiple && (tag < window->oldest || window->slots[tag & mask] == NULL))
		return false;
	for (uint64_t t = multiple ? window->oldest : tag; t <= tag; t++)
		settle_slot(window, &window->slots[t & mask], acked);
	after_confirm(window);
	return true;
}

/*
 * Takes an ack of this tag, or with multiple of all up to it.  Returns false,
 * and changes nothing, if that cannot be; see confirm().  If several windows
 * share the channel, each is told, of a multiple ack no higher tag than its
 * newest; false from all of them means that it cannot be.
 */
bool
window_ack(Window *window, uint64_t tag, bool multiple)
{
	return confirm(window, tag, multiple, true);
}

/* Takes a nack; as window_ack(). */
bool
window_nack(Window *window, uint64_t tag, bool multiple)
{
	return confirm(window, tag, multiple, false);
}

/*
 * Finds the first item in flight and not returned yet that matches, or NULL:
 * a return carries no tag.  Begins behind the last one found, since returns
 * come in the order of publishing, and goes on from the oldest.
 */
WindowItem *
window_find(Window *window, bool (*matches) (const WindowItem *item, const void *arg),
			const void *arg)
{
	uint64_t	tag = window->found;

	for (uint64_t t = window->oldest; t <= window->newest; t++)
	{
		WindowItem *item;

		tag = (tag >= window->oldest && tag < window->newest) ? tag + 1 : window->oldest;
		item = window->slots[tag & (window->capacity - 1)];
		if (item != NULL && item->refusal == WINDOW_NOT_REFUSED && matches(item, arg))
		{
			window->found = tag;
			return item;
		}
	}
	return NULL;
}

/*
 * Records that the broker returned the item, which is in flight: no queue took
 * it.  The ack that follows settles it as refused.
 */
void
window_returned(Window *window, WindowItem *item)
{
	item->refusal = WINDOW_RETURNED;
	window->stopping = true;
}

/*
 * Makes unsent what is in flight, because the channel was closed or the
 * connection lost: it is unknown, except what was returned, which is refused.
 * Tags begin at 1 again.  Returns how many items go again, those accepted
 * behind an unknown one included.
 */
size_t
window_lost(Window *window)
{
	bool		disturbed = (window->in_flight > 0 || window->stopping);

	window->in_flight = 0;
	window->bytes = 0;
	window->oldest = 1;
	window->newest = 0;
	return disturbed ? restart(window) : 0;
}

/* Goes on with a channel on which this tag was the last one. Nothing is in flight. */
void
window_continue(Window *window, uint64_t tag)
{
	window->oldest = tag + 1;
	window->newest = tag;
}

/*
 * Returns the item that has been in flight for the longest time, or NULL.
 */
WindowItem *
window_oldest(const Window *window)
{
	return window->in_flight > 0 ? window->slots[window->oldest & (window->capacity - 1)] : NULL;
}

/* ---- what became of them ---- */

/*
 * Returns the next item that was refused, in order of id and each refusal once,
 * or NULL.  It is told when the window has stopped and starts again, before
 * which nothing can be decided; the item is UNSENT, with its refusal.  To be
 * asked after each confirm and loss, before anything more is published.
 */
WindowItem *
window_take_refused(Window *window)
{
	WindowItem *item = window->untold;

	while (item != NULL && !item->untold)
		item = item->next;
	window->untold = item;
	if (item != NULL)
	{
		item->untold = false;
		window->untold = item->next;
	}
	return item;
}

/*
 * Gives back the oldest item if it is done, ACCEPTED or DISCARDED, or returns
 * NULL.
 */
WindowItem *
window_take_done(Window *window)
{
	WindowItem *item = window->first;

	if (item == NULL || item->lined_up ||
		(item->state != WINDOW_ACCEPTED && item->state != WINDOW_DISCARDED))
		return NULL;
	window->first = item->next;
	if (window->untold == item)
		window->untold = item->next;
	window->count--;
	item->next = NULL;
	return item;
}

/*
 * Gives back all items, linked by next in order of id, and leaves the window
 * empty and in its mode.  What is in flight is unknown, so that the channel has
 * to be a new one.  Of the items those in state UNSENT are still to be sent, in
 * this order, and the others need not be.
 */
WindowItem *
window_abandon(Window *window)
{
	WindowItem *items;

	(void) window_lost(window);
	break_lines(window);
	items = window->first;
	window->first = NULL;
	window->cursor = NULL;
	window->untold = NULL;
	window->count = 0;
	return items;
}
