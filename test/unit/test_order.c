/*
 * Which deliveries wait behind which: a key that failed blocks itself alone,
 * barriers block all, what is released is released in order, and comes back to
 * its place if it fails then; against a model with random keys.
 */
#include "consume/order.h"

#include <stdlib.h>
#include <string.h>

#include "tap.h"

#define MAX_ITEMS 200

typedef struct Item
{
	OrderItem	order;			/* first, so that the pointers are equal */
	int			number;
	bool		waits;			/* of the model: it is in the order */
} Item;

static Order order;
static Item items[MAX_ITEMS];
static int	nitems;
static char released[4000];

static void
begin(void)
{
	order_clear(&order);
	memset(items, 0, sizeof(items));
	nitems = 0;
}

static Item *
make(uint64_t key, uint64_t old_key, bool barrier)
{
	Item	   *item = &items[nitems];

	item->number = ++nitems;
	if (key != 0)
		item->order.keys[item->order.nkeys++] = key;
	if (old_key != 0)
		item->order.keys[item->order.nkeys++] = old_key;
	item->order.barrier = barrier;
	return item;
}

static Item *
fail(uint64_t key, uint64_t old_key, bool barrier)
{
	Item	   *item = make(key, old_key, barrier);

	item->order.pinned = true;
	order_add(&order, &item->order);
	return item;
}

/* Comes: waits if it must; true if so. */
static bool
comes(uint64_t key, uint64_t old_key, bool barrier)
{
	Item	   *item = make(key, old_key, barrier);

	if (!order_blocks(&order, &item->order))
		return false;
	order_add(&order, &item->order);
	return true;
}

static OrderVerdict
release(OrderItem *item, void *arg)
{
	OrderVerdict verdict = arg != NULL ? *(OrderVerdict *) arg : ORDER_LEAVES;

	snprintf(released + strlen(released), sizeof(released) - strlen(released), "%d ",
			 ((Item *) item)->number);
	((Item *) item)->waits = verdict != ORDER_LEAVES;
	item->waiting = false;
	item->pinned = item->pinned || verdict != ORDER_LEAVES;
	return verdict;
}

static bool
releases(const char *expected)
{
	released[0] = '\0';
	order_release(&order, release, NULL);
	if (strcmp(released, expected) != 0)
		diag("released \"%s\", expected \"%s\"", released, expected);
	return strcmp(released, expected) == 0;
}

static void
test_keys(void)
{
	Item	   *failed;

	begin();
	ok(!comes(1, 0, false) && !comes(0, 0, false) && !comes(0, 0, true), "nothing waits if nothing failed");
	failed = fail(1, 0, false);
	ok(comes(1, 0, false), "the key of what failed waits");
	ok(!comes(2, 0, false) && !comes(0, 0, false), "other keys, and none, do not");
	ok(comes(1, 0, false) && comes(3, 1, false), "nor do later ones, or those that leave the key, overtake");
	ok(comes(3, 0, false), "who waits blocks its other key");
	ok(releases(""), "nothing goes as long as it is there");
	order_remove(&order, &failed->order);
	ok(order.stale && releases("5 8 9 10 ") && order.count == 0, "then all go, in the order of coming");
}

static void
test_chain(void)
{
	Item	   *first;
	Item	   *second;

	begin();
	first = fail(1, 0, false);
	second = fail(2, 0, false);
	ok(comes(1, 2, false) && comes(2, 0, false) && comes(1, 0, false), "two failed, one waits for both");
	order_remove(&order, &first->order);
	ok(releases(""), "it still waits for the other, and those behind it for it");
	order_remove(&order, &second->order);
	ok(releases("3 4 5 "), "until that is done, too");
}

/* It fails only after one behind it was found to wait for another. */
static void
test_fails_late(void)
{
	Item	   *failed;
	Item	   *late;

	begin();
	failed = fail(1, 0, false);
	late = make(2, 0, false);
	order_place(&order, &late->order);
	ok(!order_blocks(&order, &late->order) && comes(2, 1, false), "one goes, the next of its key waits for another");
	late->order.pinned = true;
	order_add(&order, &late->order);
	order_remove(&order, &failed->order);
	ok(releases(""), "the first fails meanwhile: the next waits for that, too");
	order_remove(&order, &late->order);
	ok(releases("3 "), "until that is done");
}

static void
test_barrier(void)
{
	Item	   *failed;

	begin();
	failed = fail(1, 0, false);
	ok(comes(0, 0, true), "a barrier waits for what failed");
	ok(comes(2, 0, false) && comes(0, 0, false), "all that comes after it waits");
	order_remove(&order, &failed->order);
	ok(releases("2 3 4 "), "and goes behind it");
	begin();
	failed = fail(0, 0, true);
	ok(comes(7, 0, false), "a barrier that failed blocks all");
	failed->order.pinned = true;
	ok(releases(""), "as long as it is there");
}

static bool
asks(OrderVerdict verdict, const char *expected)
{
	released[0] = '\0';
	order_release(&order, release, &verdict);
	return strcmp(released, expected) == 0;
}

static void
test_kept(void)
{
	Item	   *failed;

	begin();
	failed = fail(1, 0, false);
	ok(comes(1, 0, false) && comes(1, 0, false) && comes(1, 0, false), "three wait");
	order_remove(&order, &failed->order);
	ok(asks(ORDER_STAYS, "2 "), "one that cannot go yet lets none go behind it");
	ok(order.count == 3 && order.first == &items[1].order && order.last == &items[3].order,
	   "and keeps its place");
	ok(!order_blocks(&order, &items[1].order) && order_blocks(&order, &items[2].order),
	   "it does not wait for itself");
	ok(asks(ORDER_STAYS, ""), "pinned as it is, it is not asked about again");
	items[1].order.waiting = true;
	ok(asks(ORDER_STAYS_ALONE, "2 3 4 "), "unless it waits; those behind it can be asked about, too");
	ok(!order_blocks(&order, &items[1].order) && order_blocks(&order, &items[2].order) &&
	   order_blocks(&order, &items[3].order), "they wait all the same");
}

static void
test_place(void)
{
	Item	   *failed;
	Item	   *other;

	begin();
	failed = fail(1, 0, false);
	other = fail(2, 0, false);
	ok(comes(1, 0, false) && comes(1, 2, false), "one waits for a key, one behind it for two");
	order_remove(&order, &failed->order);
	ok(releases("3 "), "the first goes");
	ok(!order_blocks(&order, &items[2].order), "what stays does not block what was before it");
	items[2].order.pinned = true;
	order_add(&order, &items[2].order);
	ok(order.last == &items[3].order && order.last->previous == &items[2].order, "if it fails, it comes back to its place");
	order_remove(&order, &other->order);
	ok(releases("") && order_blocks(&order, &items[3].order), "and the other waits for it");
	order_remove(&order, &items[2].order);
	ok(releases("4 "), "until it is done");
}

/* Must item i wait, by the definition? */
static bool
model_blocks(int i)
{
	for (int j = 0; j < i; j++)
	{
		if (!items[j].waits)
			continue;
		if (items[i].order.barrier || items[j].order.barrier)
			return true;
		for (int a = 0; a < items[i].order.nkeys; a++)
		{
			for (int b = 0; b < items[j].order.nkeys; b++)
			{
				if (items[i].order.keys[a] == items[j].order.keys[b])
					return true;
			}
		}
	}
	return false;
}

static bool
model_agrees(void)
{
	size_t		count = 0;

	for (int i = 0; i < nitems; i++)
	{
		bool		waited = items[i].waits;

		if (items[i].waits && !items[i].order.pinned && !model_blocks(i))
			return false;		/* it should have been released */
		if (items[i].order.place != 0 && order_blocks(&order, &items[i].order) != model_blocks(i))
			return false;
		count += waited;
	}
	return count == order.count;
}

static bool
random_run(unsigned seed)
{
	srand(seed);
	begin();
	while (nitems < MAX_ITEMS)
	{
		Item	   *item = make(rand() % 8, rand() % 4 == 0 ? rand() % 8 : 0, rand() % 40 == 0);
		bool		blocked = order_blocks(&order, &item->order);

		if (blocked != model_blocks(nitems - 1))
			return false;
		item->order.pinned = !blocked && rand() % 5 == 0;
		item->waits = blocked || item->order.pinned;
		if (item->waits)
			order_add(&order, &item->order);
		for (int i = 0; i < nitems; i++)
		{
			if (items[i].waits && items[i].order.pinned && rand() % 10 == 0)
			{
				items[i].waits = items[i].order.pinned = false;
				order_remove(&order, &items[i].order);
			}
			else if (!items[i].waits && items[i].order.place != 0 && rand() % 50 == 0)
			{
				/* one that had left fails */
				items[i].waits = items[i].order.pinned = true;
				order_add(&order, &items[i].order);
			}
		}
		released[0] = '\0';
		order_release(&order, release, NULL);
		if (!model_agrees())
			return false;
	}
	return true;
}

static void
test_random(void)
{
	int			good = 0;

	for (unsigned seed = 1; seed <= 300; seed++)
		good += random_run(seed);
	ok(good == 300, "300 random runs agree with the model");
}

int
main(void)
{
	order_init(&order);
	test_keys();
	test_chain();
	test_fails_late();
	test_barrier();
	test_kept();
	test_place();
	test_random();
	order_clear(&order);
	free(order.keys);
	return done();
}
