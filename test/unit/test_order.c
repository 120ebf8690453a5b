/*
 * Which messages wait for others: a key that waits blocks itself alone, barriers
 * block all, and a set that was emptied blocks nothing; against a model with
 * random keys.
 */
#include "consume/order.h"

#include <stdlib.h>
#include <string.h>

#include "tap.h"

#define MAX_ITEMS 400

static Order order;
static OrderItem items[MAX_ITEMS];
static bool waits[MAX_ITEMS];
static int	nitems;

static void
begin(void)
{
	order_clear(&order);
	memset(items, 0, sizeof(items));
	memset(waits, 0, sizeof(waits));
	nitems = 0;
}

static OrderItem *
make(uint64_t key, uint64_t old_key, bool barrier)
{
	OrderItem  *item = &items[nitems++];

	if (key != 0)
		item->keys[item->nkeys++] = key;
	if (old_key != 0)
		item->keys[item->nkeys++] = old_key;
	item->barrier = barrier;
	return item;
}

static void
fail(uint64_t key, uint64_t old_key, bool barrier)
{
	order_add(&order, make(key, old_key, barrier));
	waits[nitems - 1] = true;
}

/* A message comes, and waits if it must; true if so. */
static bool
comes(uint64_t key, uint64_t old_key, bool barrier)
{
	OrderItem  *item = make(key, old_key, barrier);

	waits[nitems - 1] = order_blocks(&order, item);
	if (waits[nitems - 1])
		order_add(&order, item);
	return waits[nitems - 1];
}

static void
test_keys(void)
{
	begin();
	ok(!comes(1, 0, false) && !comes(0, 0, false) && !comes(0, 0, true), "nothing waits if nothing failed");
	fail(1, 0, false);
	ok(comes(1, 0, false), "the key of what failed waits");
	ok(!comes(2, 0, false) && !comes(0, 0, false), "other keys, and none, do not");
	ok(comes(3, 1, false) && comes(3, 0, false), "one that changes its key waits, and blocks its other key");
	begin();
	ok(!comes(1, 0, false) && !comes(3, 0, false), "a set that was emptied blocks nothing");
	fail(0, 0, false);
	ok(!comes(0, 0, false) && !comes(1, 0, false), "what failed without a key blocks no key");
}

static void
test_barrier(void)
{
	begin();
	fail(1, 0, false);
	ok(comes(0, 0, true), "a barrier waits for what failed");
	ok(comes(2, 0, false) && comes(0, 0, false), "all that comes after it waits");
	begin();
	fail(0, 0, false);
	ok(comes(0, 0, true), "a barrier waits for what has no key");
	begin();
	fail(0, 0, true);
	ok(comes(7, 0, false) && comes(0, 0, true), "a barrier that failed blocks all");
	ok(!order_blocks(&order, &(OrderItem) {.free = true}), "but what waits for nothing");
	begin();
	ok(order_add(&order, &(OrderItem) {.free = true}) && !comes(0, 0, true), "for which no barrier waits, either");
}

static void
test_hashes(void)
{
	begin();
	for (uint64_t i = 0; i < 300; i++)
		fail((i + 1) << 32, 0, false);
	ok(order.nkeys == 300, "300 keys with equal low bits are 300 keys");
	ok(comes(300ULL << 32, 0, false) && !comes(301ULL << 32, 0, false), "and are found");
}

/* Must item i wait, by the definition? */
static bool
model_blocks(int i)
{
	for (int j = 0; j < i; j++)
	{
		if (!waits[j])
			continue;
		if (items[i].barrier || items[j].barrier)
			return true;
		for (int a = 0; a < items[i].nkeys; a++)
		{
			for (int b = 0; b < items[j].nkeys; b++)
			{
				if (items[i].keys[a] == items[j].keys[b])
					return true;
			}
		}
	}
	return false;
}

static bool
random_run(unsigned seed)
{
	srand(seed);
	begin();
	while (nitems < MAX_ITEMS - 1)
	{
		uint64_t	key = rand() % 100;
		uint64_t	old_key = rand() % 4 == 0 ? rand() % 100 : 0;
		bool		barrier = rand() % 300 == 0;

		if (comes(key, old_key, barrier) != model_blocks(nitems - 1))
			return false;
		if (!waits[nitems - 1] && rand() % 20 == 0)
		{
			order_add(&order, &items[nitems - 1]);
			waits[nitems - 1] = true;
		}
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
	test_keys();
	test_barrier();
	test_hashes();
	test_random();
	free(order.keys);
	return done();
}
