/*-------------------------------------------------------------------------
 *
 * order.c
 *		Which messages must wait for others, told by their keys.
 *
 * A set of keys that wait.  Messages are asked about one after the other, in the
 * order in which they came; one that has to wait is added, so that later ones of
 * its keys wait behind it.
 *
 * Must never: look at anything but keys, or be asked about messages in another
 * order than that in which they came.
 *
 * Scenarios, each a test in test/unit/test_order.c: nothing waits; one key waits,
 * others are free; two keys joined by one message; a barrier waits; a barrier
 * behind messages without a key; a message that waits for nothing, and for which nobody
 * waits; the set is used again;
 * a model with random keys.
 *
 *-------------------------------------------------------------------------
 */
#include <stdlib.h>
#include <string.h>

#include "consume/order.h"

#define INITIAL_ROOM 64

static uint64_t *find_key(uint64_t *keys, size_t room, uint64_t key);
static bool make_room(Order *order);
static uint64_t nonzero(uint64_t key);

/* Empties the set, and keeps its memory.  One that is all zeros is empty, too. */
void
order_clear(Order *order)
{
	order->nkeys = 0;
	order->any = order->barrier = false;
	if (order->room > 0)
		memset(order->keys, 0, order->room * sizeof(uint64_t));
}

/* Must the message wait for one that was added before? */
bool
order_blocks(const Order *order, const OrderItem *item)
{
	if (!order->any || item->free)
		return false;
	if (order->barrier || item->barrier)
		return true;
	for (int i = 0; i < item->nkeys && order->nkeys > 0; i++)
	{
		if (*find_key(order->keys, order->room, item->keys[i]) != 0)
			return true;
	}
	return false;
}

/*
 * Adds a message that waits; nobody waits for one that waits for nothing.  Returns false
 * if there is no memory.
 */
bool
order_add(Order *order, const OrderItem *item)
{
	if (item->free)
		return true;
	if (!make_room(order))
		return false;
	for (int i = 0; i < item->nkeys; i++)
	{
		uint64_t   *place = find_key(order->keys, order->room, item->keys[i]);

		if (*place == 0)
			order->nkeys++;
		*place = nonzero(item->keys[i]);
	}
	order->barrier = order->barrier || item->barrier;
	order->any = true;
	return true;
}

/* Where the key is, or would be. */
static uint64_t *
find_key(uint64_t *keys, size_t room, uint64_t key)
{
	size_t		i;

	key = nonzero(key);
	for (i = key & (room - 1); keys[i] != 0 && keys[i] != key; i = (i + 1) & (room - 1))
		;
	return &keys[i];
}

/* Makes room for two more keys, at most half of the places used. */
static bool
make_room(Order *order)
{
	size_t		room = order->room > 0 ? order->room * 2 : INITIAL_ROOM;
	uint64_t   *keys;

	if ((order->nkeys + 2) * 2 <= order->room)
		return true;
	keys = calloc(room, sizeof(uint64_t));
	if (keys == NULL)
		return false;
	for (size_t i = 0; i < order->room; i++)
	{
		if (order->keys[i] != 0)
			*find_key(keys, room, order->keys[i]) = order->keys[i];
	}
	free(order->keys);
	order->keys = keys;
	order->room = room;
	return true;
}

static uint64_t
nonzero(uint64_t key)
{
	return key != 0 ? key : 1;
}
