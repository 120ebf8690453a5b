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
 * One that has left is not done with: it may fail, and others that came after
 * it may still be here.  So each has a place, by which it waits for none but
 * those before it, and to which it comes back.
 *
 * Must never: look at anything but keys, or free an item.
 *
 * Scenarios, each a test in test/unit/test_order.c: nothing failed; one key
 * blocked, others free; two keys joined by one item; a barrier among others;
 * an item that stays in its place; one that comes back to it; one that is asked
 * about before its time; a model with random keys.
 *
 *-------------------------------------------------------------------------
 */
#include <stdlib.h>
#include <string.h>

#include "consume/order.h"

#define INITIAL_ROOM 64

static void link_item(Order *order, OrderItem *item);
static void unlink_item(Order *order, OrderItem *item);
static void clear_keys(Order *order);
static OrderKey *find_key(const Order *order, uint64_t key);
static bool add_keys(Order *order, const OrderItem *item);
static void add_key(Order *order, uint64_t key, uint64_t place);
static void lower(uint64_t *place, uint64_t other);
static bool make_room(Order *order);
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
	order->stale = false;
	clear_keys(order);
}

bool
order_blocks(const Order *order, const OrderItem *item)
{
	uint64_t	place = item->place != 0 ? item->place : UINT64_MAX;

	if (order->lowest == 0 || order->lowest >= place)
		return false;
	if (item->barrier || (order->barrier != 0 && order->barrier < place))
		return true;
	for (int i = 0; i < item->nkeys; i++)
	{
		const OrderKey *key = find_key(order, item->keys[i]);

		if (key->key != 0 && key->place < place)
			return true;
	}
	return false;
}

void
order_place(Order *order, OrderItem *item)
{
	if (item->place == 0)
		item->place = ++order->last_place;
}

bool
order_add(Order *order, OrderItem *item)
{
	order_place(order, item);
	if (!add_keys(order, item))
		return false;
	link_item(order, item);
	return true;
}

void
order_remove(Order *order, OrderItem *item)
{
	unlink_item(order, item);
	order->stale = true;
}

/* The set has room for what it held before. */
void
order_release(Order *order, OrderVerdict (*release) (OrderItem *item, void *arg), void *arg)
{
	OrderItem  *next;
	bool		complete = true;

	clear_keys(order);
	order->stale = false;
	for (OrderItem *item = order->first; item != NULL; item = next)
	{
		OrderVerdict verdict = ORDER_STAYS;

		next = item->next;
		if ((!item->pinned || item->waiting) && !order_blocks(order, item))
		{
			verdict = release(item, arg);
			if (verdict == ORDER_LEAVES)
				unlink_item(order, item);
		}
		if (verdict == ORDER_STAYS)
			(void) add_keys(order, item);
		complete = complete && verdict != ORDER_STAYS_ALONE;
	}
	for (OrderItem *item = order->first; item != NULL && !complete; item = item->next)
		(void) add_keys(order, item);
}

/* Mostly it is the last. */
static void
link_item(Order *order, OrderItem *item)
{
	OrderItem  *before = order->last;

	while (before != NULL && before->place > item->place)
		before = before->previous;
	item->previous = before;
	item->next = before != NULL ? before->next : order->first;
	if (item->previous != NULL)
		item->previous->next = item;
	else
		order->first = item;
	if (item->next != NULL)
		item->next->previous = item;
	else
		order->last = item;
	order->count++;
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

static void
clear_keys(Order *order)
{
	order->nkeys = 0;
	order->lowest = 0;
	order->barrier = 0;
	if (order->room > 0)
		memset(order->keys, 0, order->room * sizeof(OrderKey));
}

/* Where it is, or would be.  Once a key was added: before, there is no set. */
static OrderKey *
find_key(const Order *order, uint64_t key)
{
	size_t		i;

	key = nonzero(key);
	for (i = key & (order->room - 1); order->keys[i].key != 0; i = (i + 1) & (order->room - 1))
	{
		if (order->keys[i].key == key)
			break;
	}
	return &order->keys[i];
}

static void
add_key(Order *order, uint64_t key, uint64_t place)
{
	OrderKey   *entry = find_key(order, key);

	if (entry->key == 0)
		order->nkeys++;
	entry->key = nonzero(key);
	lower(&entry->place, place);
}

static bool
add_keys(Order *order, const OrderItem *item)
{
	if (!make_room(order))
		return false;
	for (int i = 0; i < item->nkeys; i++)
		add_key(order, item->keys[i], item->place);
	if (item->barrier)
		lower(&order->barrier, item->place);
	lower(&order->lowest, item->place);
	return true;
}

static void
lower(uint64_t *place, uint64_t other)
{
	if (*place == 0 || other < *place)
		*place = other;
}

/* For two more keys, at most half full. */
static bool
make_room(Order *order)
{
	Order		larger = *order;

	if (order->room > 0 && (order->nkeys + 2) * 2 <= order->room)
		return true;
	larger.room = order->room > 0 ? order->room * 2 : INITIAL_ROOM;
	larger.keys = calloc(larger.room, sizeof(OrderKey));
	if (larger.keys == NULL)
		return false;
	for (size_t i = 0; i < order->room; i++)
	{
		if (order->keys[i].key != 0)
			*find_key(&larger, order->keys[i].key) = order->keys[i];
	}
	free(order->keys);
	*order = larger;
	return true;
}

/* 0 marks a free place. */
static uint64_t
nonzero(uint64_t key)
{
	return key != 0 ? key : 1;
}
