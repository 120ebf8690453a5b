/*
 * The window of unconfirmed messages, against the orders in which RabbitMQ
 * was seen to confirm, and against a simple model with random orders.
 */
#include "broker/confirms.h"

#include <stdlib.h>
#include <string.h>

#include "tap.h"

#define CAPACITY 8

static int	items[100000];
static char order[1000];

static void
note(void *item, void *arg)
{
	(void) arg;
	snprintf(order + strlen(order), sizeof(order) - strlen(order), "%d ", *(int *) item);
}

static void
publish(Confirms *window, int n)
{
	for (int i = 0; i < n; i++)
	{
		items[window->next] = (int) window->next;
		(void) confirms_add(window, &items[window->next]);
	}
}

static bool
settle(Confirms *window, uint64_t tag, bool multiple, const char *expected)
{
	bool		known;

	order[0] = '\0';
	known = confirms_settle(window, tag, multiple, note, NULL);
	if (strcmp(order, expected) != 0)
		diag("settled \"%s\", expected \"%s\"", order, expected);
	return known && strcmp(order, expected) == 0;
}

static void
test_orders(void)
{
	void	   *ring[CAPACITY];
	Confirms	window;

	confirms_init(&window, ring, CAPACITY);
	ok(confirms_oldest(&window) == NULL, "an empty window has no oldest item");
	publish(&window, 6);

	/* as a broker did it: returns of 4 and 6 first, then all up to 5 */
	ok(settle(&window, 4, false, "4 "), "a single ack settles its tag");
	ok(settle(&window, 6, false, "6 "), "acks may come out of order");
	ok(settle(&window, 5, true, "1 2 3 5 "), "multiple settles all still outstanding up to its tag, once");
	ok(window.outstanding == 0 && window.oldest == 7, "nothing is left");

	publish(&window, 3);
	ok(settle(&window, 8, true, "7 8 "), "multiple in the middle");
	ok(settle(&window, 8, true, ""), "a multiple that overlaps an earlier one settles nothing twice");
	ok(settle(&window, 9, true, "9 "), "and the newest");
}

static void
test_lies(void)
{
	void	   *ring[CAPACITY];
	Confirms	window;

	confirms_init(&window, ring, CAPACITY);
	publish(&window, 2);
	ok(!confirms_settle(&window, 3, false, note, NULL), "an ack of what was never published is told");
	ok(!confirms_settle(&window, 0, false, note, NULL), "a single ack of tag 0 is told");
	ok(settle(&window, 1, false, "1 "), "the others are untouched");
	ok(!confirms_settle(&window, 1, false, note, NULL), "a second ack of the same tag is told");
	ok(!confirms_settle(&window, 3, true, note, NULL) && window.outstanding == 1,
	   "a multiple beyond the newest tag is told, and settles nothing");
	ok(!confirms_settle(&window, UINT64_MAX, true, note, NULL) && window.outstanding == 1,
	   "so is one of the highest tag there is");
	ok(!confirms_settle(&window, 0, true, note, NULL) && window.outstanding == 1,
	   "so is a multiple of tag 0, which may mean fewer than are in flight now");
	ok(settle(&window, 2, true, "2 "), "a true one settles the rest");
}

static void
test_room(void)
{
	void	   *ring[CAPACITY];
	Confirms	window;

	confirms_init(&window, ring, CAPACITY);
	publish(&window, CAPACITY);
	ok(confirms_full(&window), "full at its capacity");
	(void) settle(&window, 2, false, "2 ");
	ok(confirms_full(&window), "a hole behind the oldest makes no room: tags are positions");
	(void) settle(&window, 1, false, "1 ");
	ok(!confirms_full(&window) && window.next - window.oldest == CAPACITY - 2, "settling the oldest does");
	ok(*(int *) confirms_oldest(&window) == 3, "the oldest is the lowest unsettled tag");

	confirms_reset(&window);
	publish(&window, 1);
	ok(window.next == 2 && settle(&window, 1, false, "1 "), "tags start at 1 on a new channel");
}

static bool
is_even(void *item, void *arg)
{
	(void) arg;
	return *(int *) item % 2 == 0;
}

static void
test_find(void)
{
	void	   *ring[CAPACITY];
	Confirms	window;

	confirms_init(&window, ring, CAPACITY);
	publish(&window, 5);
	(void) settle(&window, 2, false, "2 ");
	ok(*(int *) confirms_find(&window, is_even, NULL) == 4, "finds the first outstanding item that fits");
	(void) settle(&window, 4, false, "4 ");
	ok(confirms_find(&window, is_even, NULL) == NULL, "or none");
}

static int	settled_times[100000];

static void
count(void *item, void *arg)
{
	(void) arg;
	settled_times[*(int *) item]++;
}

static void
test_random(void)
{
	static void *ring[1000];
	Confirms	window;
	int			wrong = 0;

	srand(1);
	memset(settled_times, 0, sizeof(settled_times));
	confirms_init(&window, ring, 1000);
	while (window.next < 90000)
	{
		if (!confirms_full(&window) && rand() % 3 != 0)
			publish(&window, 1);
		else if (window.outstanding > 0)
		{
			uint64_t	tag = window.oldest + rand() % (window.next - window.oldest);

			(void) confirms_settle(&window, tag, rand() % 50 == 0, count, NULL);
		}
	}
	(void) confirms_settle(&window, window.next - 1, true, count, NULL);
	for (uint64_t t = 1; t < window.next; t++)
		wrong += settled_times[t] != 1;
	ok(wrong == 0, "90,000 tags in random order: each settled exactly once");
}

int
main(void)
{
	test_orders();
	test_lies();
	test_room();
	test_find();
	test_random();
	return done();
}
