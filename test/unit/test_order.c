/*
 * Which deliveries wait behind which: a key that failed blocks itself alone,
 * barriers block all, and what is released is released in order; against a
 * model with random keys.
 */
#include "order.h"

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

static bool
release(OrderItem *item, void *arg)
{
	snprintf(released + strlen(released), sizeof(released) - strlen(released), "%d ",
			 ((Item *) item)->number);
	((Item *) item)->waits = false;
	return arg == NULL;
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

static void
test_kept(void)
{
	Item	   *failed;

	begin();
	failed = fail(1, 0, false);
	ok(comes(1, 0, false) && comes(1, 0, false), "two wait");
	order_remove(&order, &failed->order);
	released[0] = '\0';
	/* as one whose body was let go: it is pinned by release() */
	items[1].order.pinned = false;
	order_release(&order, release, &order);
	ok(order.count == 2 && order.first == &items[1].order && order.last == &items[2].order,
	   "one that cannot go yet keeps its place");
	ok(order_blocks(&order, &items[2].order), "and its key blocked");
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
				items[i].waits = false;
				order_remove(&order, &items[i].order);
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
	test_barrier();
	test_kept();
	test_random();
	order_clear(&order);
	free(order.keys);
	return done();
}
