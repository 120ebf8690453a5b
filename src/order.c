/*-------------------------------------------------------------------------
 *
 * order.c
 *		Which deliveries wait behind which.
 *
 * Responsible for: that no message of a key is handled before an earlier one
 * that failed, and that all other keys go on.
 *
 * Those that failed or wait are a list in the order in which they came, and
 * the keys of the list are a set: a delivery with a key in the set joins the
 * list.  When one leaves, the set is made anew in a walk along the list, in
 * which those that find their keys free leave, too.  So what is decided is
 * always decided by the order of coming alone.
 *
 * Must never: look at anything but keys, or free an item.
 *
 * Scenarios, each a test in test/unit/test_order.c: nothing failed; one key
 * blocked, others free; two keys joined by one item; a barrier among others;
 * an item that comes back in its old place; a model with random keys.
 *
 *-------------------------------------------------------------------------
 */
#include <stdlib.h>
#include <string.h>

#include "order.h"

#define INITIAL_PLACES 64

static void unlink_item(Order *order, OrderItem *item);
static bool has_key(const Order *order, uint64_t key);
static bool add_keys(Order *order, const OrderItem *item);
static bool make_room(Order *order);
static void put_key(uint64_t *keys, size_t nplaces, uint64_t key, size_t *nkeys);
static uint64_t nonzero(uint64_t key);

void
order_init(Order *order)
{
	memset(order, 0, sizeof(*order));
}

void
order_clear(Order *order)
{
	order->first = order->last = NULL;
	order->count = 0;
	order->nkeys = 0;
	order->blocking = 0;
	order->barrier = false;
	order->stale = false;
	if (order->nplaces > 0)
		memset(order->keys, 0, order->nplaces * sizeof(uint64_t));
}

bool
order_blocks(const Order *order, const OrderItem *item)
{
	if (order->blocking == 0)
		return false;
	if (order->barrier || item->barrier)
		return true;
	for (int i = 0; i < item->nkeys; i++)
	{
		if (has_key(order, item->keys[i]))
			return true;
	}
	return false;
}

bool
order_add(Order *order, OrderItem *item)
{
	if (!add_keys(order, item))
		return false;
	item->next = NULL;
	item->previous = order->last;
	if (order->last != NULL)
		order->last->next = item;
	else
		order->first = item;
	order->last = item;
	order->count++;
	return true;
}

void
order_remove(Order *order, OrderItem *item)
{
	unlink_item(order, item);
	order->stale = true;
}

/* The set has room: it holds no more keys than before. */
void
order_release(Order *order, bool (*release) (OrderItem *item, void *arg), void *arg)
{
	OrderItem  *next;

	order->nkeys = 0;
	order->blocking = 0;
	order->barrier = false;
	order->stale = false;
	if (order->nplaces > 0)
		memset(order->keys, 0, order->nplaces * sizeof(uint64_t));
	for (OrderItem *item = order->first; item != NULL; item = next)
	{
		next = item->next;
		if (item->pinned || order_blocks(order, item))
			(void) add_keys(order, item);
		else
		{
			unlink_item(order, item);
			if (!release(item, arg))
			{
				/* back to where it was */
				item->next = next;
				item->previous = next != NULL ? next->previous : order->last;
				if (item->previous != NULL)
					item->previous->next = item;
				else
					order->first = item;
				if (next != NULL)
					next->previous = item;
				else
					order->last = item;
				order->count++;
				(void) add_keys(order, item);
			}
		}
	}
}

static void
unlink_item(Order *order, OrderItem *item)
{
	if (item->previous != NULL)
		item->previous->next = item->next;
	else
		order->first = item->next;
	if (item->next != NULL)
		item->next->previous = item->previous;
	else
		order->last = item->previous;
	item->previous = item->next = NULL;
	order->count--;
}

static bool
has_key(const Order *order, uint64_t key)
{
	size_t		place;

	if (order->nkeys == 0)
		return false;
	key = nonzero(key);
	for (place = key & (order->nplaces - 1); order->keys[place] != 0;
		 place = (place + 1) & (order->nplaces - 1))
	{
		if (order->keys[place] == key)
			return true;
	}
	return false;
}

static bool
add_keys(Order *order, const OrderItem *item)
{
	if (!make_room(order))
		return false;
	for (int i = 0; i < item->nkeys; i++)
		put_key(order->keys, order->nplaces, nonzero(item->keys[i]), &order->nkeys);
	order->barrier = order->barrier || item->barrier;
	order->blocking++;
	return true;
}

/* For two more keys, at most half full. */
static bool
make_room(Order *order)
{
	size_t		nplaces = order->nplaces > 0 ? order->nplaces * 2 : INITIAL_PLACES;
	size_t		nkeys = 0;
	uint64_t   *keys;

	if (order->nplaces > 0 && (order->nkeys + 2) * 2 <= order->nplaces)
		return true;
	keys = calloc(nplaces, sizeof(uint64_t));
	if (keys == NULL)
		return false;
	for (size_t i = 0; i < order->nplaces; i++)
	{
		if (order->keys[i] != 0)
			put_key(keys, nplaces, order->keys[i], &nkeys);
	}
	free(order->keys);
	order->keys = keys;
	order->nplaces = nplaces;
	return true;
}

static void
put_key(uint64_t *keys, size_t nplaces, uint64_t key, size_t *nkeys)
{
	size_t		place = key & (nplaces - 1);

	while (keys[place] != 0 && keys[place] != key)
		place = (place + 1) & (nplaces - 1);
	if (keys[place] == 0)
		(*nkeys)++;
	keys[place] = key;
}

/* 0 marks a free place. */
static uint64_t
nonzero(uint64_t key)
{
	return key != 0 ? key : 1;
}
