/*
 * Which message may be published next: one in flight per key, barriers, and
 * nothing forgotten, against a model with random keys and failures.
 */
#include "publish/flight.h"

#include <stdlib.h>
#include <string.h>

#include "tap.h"

#define MAX_ITEMS 64

typedef struct Item
{
	FlightItem	flight;			/* first, so that the pointers are equal */
	int			number;
	bool		published;
	bool		settled;
} Item;

static FlightKey slots[1024];
static Flight flight;
static Item items[MAX_ITEMS];
static int	nitems;

static void
begin(void)
{
	memset(slots, 0, sizeof(slots));
	memset(items, 0, sizeof(items));
	nitems = 0;
	flight_init(&flight, slots, flight_key_slots(MAX_ITEMS));
}

static Item *
add(uint64_t key, uint64_t old_key, bool barrier)
{
	Item	   *item = &items[nitems];

	item->number = ++nitems;
	if (key != 0)
		item->flight.keys[item->flight.nkeys++] = key;
	if (old_key != 0)
		item->flight.keys[item->flight.nkeys++] = old_key;
	item->flight.barrier = barrier;
	flight_add(&flight, &item->flight);
	return item;
}

/* The numbers of all that may go now. */
static bool
goes(const char *expected)
{
	char		got[1000] = "";
	FlightItem *next;

	while ((next = flight_next(&flight)) != NULL)
		snprintf(got + strlen(got), sizeof(got) - strlen(got), "%d ", ((Item *) next)->number);
	if (strcmp(got, expected) != 0)
		diag("goes \"%s\", expected \"%s\"", got, expected);
	return strcmp(got, expected) == 0;
}

static void
test_keys(void)
{
	Item	   *a1;
	Item	   *b1;
	Item	   *a2;

	begin();
	a1 = add(10, 0, false);
	b1 = add(20, 0, false);
	a2 = add(10, 0, false);
	(void) add(10, 0, false);
	(void) add(0, 0, false);
	ok(goes("1 2 5 "), "one message per key may go, and all without a key");
	flight_settle(&flight, &b1->flight);
	ok(goes(""), "settling another key changes nothing");
	flight_settle(&flight, &a1->flight);
	ok(goes("3 "), "settling the first lets the second go");
	flight_settle(&flight, &a2->flight);
	ok(goes("4 "), "and then the third");
}

static void
test_put_back(void)
{
	Item	   *a1;
	Item	   *b1;

	begin();
	a1 = add(10, 0, false);
	b1 = add(20, 0, false);
	(void) add(10, 0, false);
	(void) add(30, 0, false);
	(void) flight_next(&flight);
	(void) flight_next(&flight);
	flight_put_back(&flight, &b1->flight);
	flight_put_back(&flight, &a1->flight);
	ok(goes("1 2 4 "), "what was put back is first in line, in its order, and nobody of its key passes");
}

static void
test_two_keys(void)
{
	Item	   *a;
	Item	   *b;
	Item	   *move;

	begin();
	a = add(10, 0, false);
	b = add(20, 0, false);
	move = add(20, 10, false);
	(void) add(10, 0, false);
	(void) add(20, 0, false);
	ok(goes("1 2 "), "a message of two keys waits for both");
	flight_settle(&flight, &a->flight);
	ok(goes(""), "one of them is not enough");
	flight_settle(&flight, &b->flight);
	ok(goes("3 "), "both are");
	flight_settle(&flight, &move->flight);
	ok(goes("5 4 "), "and both keys wait for it");

	begin();
	(void) add(10, 10, false);
	ok(goes("1 "), "twice the same key is one key");
	flight_settle(&flight, &items[0].flight);
	ok(flight.nkeys == 0, "and is forgotten once");
}

static void
test_barrier(void)
{
	Item	   *a;
	Item	   *barrier;

	begin();
	a = add(10, 0, false);
	barrier = add(0, 0, true);
	(void) add(20, 0, false);
	ok(goes("1 "), "a barrier waits for all before it, and all after it wait");
	flight_settle(&flight, &a->flight);
	ok(goes("2 "), "then it goes alone");
	flight_settle(&flight, &barrier->flight);
	ok(goes("3 "), "then the others");

	begin();
	(void) add(0, 0, true);
	(void) add(0, 0, true);
	ok(goes("1 "), "barriers wait for each other");
	flight_settle(&flight, &items[0].flight);
	ok(goes("2 "), "one after the other");
}

/*
 * Random keys, settles in random order, put-backs.  No two of a key may be
 * out at once, a key's items must be settled in order, and all must be.
 */
static void
test_random(void)
{
	static Item many[20000];
	static Item *out[2000];
	static FlightKey table[16384];
	static int	newest[50];
	int			nout = 0;
	int			added = 0;
	int			settled = 0;
	bool		order_kept = true;

	srand(2);
	memset(newest, 0, sizeof(newest));
	flight_init(&flight, table, flight_key_slots(2000));
	while (settled < 20000)
	{
		FlightItem *next;

		if (added < 20000 && added - settled < 2000 && rand() % 2)
		{
			Item	   *item = &many[added++];

			item->number = added;
			if (rand() % 10 != 0)
				item->flight.keys[item->flight.nkeys++] = 1 + rand() % 49;
			if (rand() % 20 == 0)
				item->flight.keys[item->flight.nkeys++] = 1 + rand() % 49;
			item->flight.barrier = (rand() % 500 == 0);
			flight_add(&flight, &item->flight);
		}
		else if (rand() % 2 && (next = flight_next(&flight)) != NULL)
			out[nout++] = (Item *) next;
		else if (nout > 0)
		{
			int			i = rand() % nout;
			Item	   *item = out[i];

			out[i] = out[--nout];
			if (rand() % 10 == 0)
			{
				flight_put_back(&flight, &item->flight);
				continue;
			}
			for (int k = 0; k < item->flight.nkeys; k++)
			{
				if (newest[item->flight.keys[k]] > item->number)
					order_kept = false;
				newest[item->flight.keys[k]] = item->number;
			}
			flight_settle(&flight, &item->flight);
			settled++;
		}
	}
	ok(order_kept, "20,000 random messages: each key's are settled in order");
	ok(flight.unsettled == 0 && flight.nkeys == 0 && !flight_has_ready(&flight),
	   "and nothing is left behind");
}

int
main(void)
{
	test_keys();
	test_put_back();
	test_two_keys();
	test_barrier();
	test_random();
	return done();
}
