/*-------------------------------------------------------------------------
 *
 * flight.c
 *		Which message may be published next.
 *
 *		                  waits_for = 0
 *		arriving --admit--+-----------> ready --next--> (published) --settle-->
 *		 (barrier)        |               ^   <-put_back--
 *		                  +-> waiting ----+
 *		                       the item before it on the key was settled
 *
 * Items are the caller's; the flight links them and allocates nothing.  Keys
 * live in an open-addressing table that points to the newest item of each;
 * an item leaves it when it is settled as the newest.
 *
 * Pure data structure: no server, no socket.
 *
 *-------------------------------------------------------------------------
 */
#include "publish/flight.h"

#include <string.h>

/* ---- queues ---- */

static void
push_back(FlightQueue *queue, FlightItem *item)
{
	item->next = NULL;
	if (queue->tail != NULL)
		queue->tail->next = item;
	else
		queue->head = item;
	queue->tail = item;
}

static void
push_front(FlightQueue *queue, FlightItem *item)
{
	item->next = queue->head;
	queue->head = item;
	if (queue->tail == NULL)
		queue->tail = item;
}

static FlightItem *
pop_front(FlightQueue *queue)
{
	FlightItem *item = queue->head;

	if (item != NULL)
	{
		queue->head = item->next;
		if (queue->head == NULL)
			queue->tail = NULL;
		item->next = NULL;
	}
	return item;
}

/* ---- keys ---- */

size_t
flight_key_slots(size_t max_items)
{
	size_t		n = 16;

	/* two keys an item, at most half full */
	while (n < 4 * max_items)
		n *= 2;
	return n;
}

void
flight_init(Flight *flight, FlightKey *slots, size_t nslots)
{
	memset(flight, 0, sizeof(*flight));
	flight->keys = slots;
	flight->nslots = nslots;
}

static size_t
home(const Flight *flight, uint64_t key)
{
	return (size_t) ((key * UINT64_C(0x9E3779B97F4A7C15)) >> 32) & (flight->nslots - 1);
}

/* The key's slot, or the free one where it belongs. */
static FlightKey *
find_key(const Flight *flight, uint64_t key)
{
	size_t		i = home(flight, key);

	while (flight->keys[i].last != NULL && flight->keys[i].key != key)
		i = (i + 1) & (flight->nslots - 1);
	return &flight->keys[i];
}

/* Frees a slot, moving up those behind it that belong further ahead. */
static void
remove_key(Flight *flight, FlightKey *slot)
{
	size_t		mask = flight->nslots - 1;
	size_t		hole = (size_t) (slot - flight->keys);
	size_t		i = hole;

	flight->nkeys--;
	for (;;)
	{
		size_t		want;

		i = (i + 1) & mask;
		if (flight->keys[i].last == NULL)
			break;
		want = home(flight, flight->keys[i].key);
		/* movable unless its home lies cyclically behind the hole */
		if (((i - want) & mask) >= ((i - hole) & mask))
		{
			flight->keys[hole] = flight->keys[i];
			hole = i;
		}
	}
	flight->keys[hole].last = NULL;
}

/* Which of an item's keys is this? */
static int
key_index(const FlightItem *item, uint64_t key)
{
	return (item->nkeys > 0 && item->keys[0] == key) ? 0 : 1;
}

/* ---- admitting and settling ---- */

static void
line_up(Flight *flight, FlightItem *item)
{
	for (int k = 0; k < item->nkeys; k++)
	{
		FlightKey  *slot = find_key(flight, item->keys[k]);

		if (slot->last != NULL)
		{
			slot->last->waiting[key_index(slot->last, item->keys[k])] = item;
			item->waits_for++;
		}
		else
		{
			slot->key = item->keys[k];
			flight->nkeys++;
		}
		slot->last = item;
	}
}

static void
admit(Flight *flight)
{
	FlightItem *item;

	while ((item = flight->arriving.head) != NULL)
	{
		if (flight->unsettled > 0 && (flight->barrier || item->barrier))
			return;
		(void) pop_front(&flight->arriving);
		flight->unsettled++;
		flight->barrier = item->barrier;
		line_up(flight, item);
		if (item->waits_for == 0)
			push_back(&flight->ready, item);
	}
}

void
flight_add(Flight *flight, FlightItem *item)
{
	item->waits_for = 0;
	item->waiting[0] = NULL;
	item->waiting[1] = NULL;
	if (item->nkeys == 2 && item->keys[0] == item->keys[1])
		item->nkeys = 1;
	push_back(&flight->arriving, item);
	admit(flight);
}

FlightItem *
flight_next(Flight *flight)
{
	return pop_front(&flight->ready);
}

bool
flight_has_ready(const Flight *flight)
{
	return flight->ready.head != NULL;
}

void
flight_put_back(Flight *flight, FlightItem *item)
{
	push_front(&flight->ready, item);
}

void
flight_settle(Flight *flight, FlightItem *item)
{
	for (int k = 0; k < item->nkeys; k++)
	{
		FlightItem *waiting = item->waiting[k];

		if (waiting == NULL)
			remove_key(flight, find_key(flight, item->keys[k]));
		else if (--waiting->waits_for == 0)
			push_back(&flight->ready, waiting);
		item->waiting[k] = NULL;
	}
	flight->unsettled--;
	admit(flight);
}
