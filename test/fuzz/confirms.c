/*-------------------------------------------------------------------------
 *
 * confirms.c
 *		The window of messages published and not confirmed yet.
 *
 * RabbitMQ's confirms are a set, not a sequence: acks come out of order, a
 * "multiple" covers everything still outstanding up to its tag, tags acked
 * singly before included, and may well overlap an earlier one.  So each tag is
 * a slot that is settled once, and what was settled is skipped.
 *
 * Must never: settle a message for a confirm that may not mean it.
 *
 * Pure data structure: no server, no socket, no allocation.
 *
 *-------------------------------------------------------------------------
 */
#include "confirms.h"

#include <stddef.h>

static void **
slot(const Confirms *window, uint64_t tag)
{
	return &window->items[tag % window->capacity];
}

void
confirms_init(Confirms *window, void **items, uint64_t capacity)
{
	window->items = items;
	window->capacity = capacity;
	confirms_reset(window);
}

void
confirms_reset(Confirms *window)
{
	window->oldest = 1;
	window->next = 1;
	window->outstanding = 0;
}

bool
confirms_full(const Confirms *window)
{
	return window->next - window->oldest >= window->capacity;
}

uint64_t
confirms_add(Confirms *window, void *item)
{
	*slot(window, window->next) = item;
	window->outstanding++;
	return window->next++;
}

static void
settle_one(Confirms *window, uint64_t tag, ConfirmsSettled settled, void *arg)
{
	void	   *item = *slot(window, tag);

	if (item == NULL)
		return;
	*slot(window, tag) = NULL;
	window->outstanding--;
	settled(item, arg);
}

static void
advance(Confirms *window)
{
	while (window->oldest < window->next && *slot(window, window->oldest) == NULL)
		window->oldest++;
}

bool
confirms_settle(Confirms *window, uint64_t tag, bool multiple, ConfirmsSettled settled, void *arg)
{
	if (tag == 0 || tag >= window->next)
		return false;
	if (!multiple)
	{
		if (tag < window->oldest || *slot(window, tag) == NULL)
			return false;
		settle_one(window, tag, settled, arg);
	}
	else
	{
		for (uint64_t t = window->oldest; t <= tag; t++)
			settle_one(window, t, settled, arg);
	}
	advance(window);
	return true;
}

void *
confirms_find(const Confirms *window, bool (*visit) (void *item, void *arg), void *arg)
{
	for (uint64_t t = window->oldest; t < window->next; t++)
	{
		void	   *item = *slot(window, t);

		if (item != NULL && visit(item, arg))
			return item;
	}
	return NULL;
}

void *
confirms_oldest(const Confirms *window)
{
	return window->outstanding > 0 ? *slot(window, window->oldest) : NULL;
}
