/*-------------------------------------------------------------------------
 *
 * fuzz_flight.c
 *		Messages with few keys through the flight, in any interleaving of
 *		publishing, putting back and settling.
 *
 * Promised: a message is handed out only when all before it that share a key
 * with it are settled, and all before it if it or one of them is a barrier;
 * and in the end every message is handed out, and nothing is left behind.
 *
 *-------------------------------------------------------------------------
 */
#include "publish/flight.h"
#include "fuzz.h"

#define ITEMS_MAX	64
#define KEYS_MAX	5

enum
{
	WAITING,
	HANDED_OUT,
	SETTLED,
};

static FlightItem items[ITEMS_MAX];
static uint64_t keys[ITEMS_MAX][2]; /* the flight may drop a double one */
static int	nkeys[ITEMS_MAX];
static int	states[ITEMS_MAX];
static int	count;

static bool
share_key(int a, int b)
{
	for (int i = 0; i < nkeys[a]; i++)
	{
		for (int j = 0; j < nkeys[b]; j++)
		{
			if (keys[a][i] == keys[b][j])
				return true;
		}
	}
	return false;
}

static void
check_order(int item)
{
	for (int before = 0; before < item; before++)
	{
		if (items[before].barrier || items[item].barrier || share_key(before, item))
			CHECK(states[before] == SETTLED);
	}
}

static void
add(Flight *flight, Tape * tape)
{
	uint8_t		shape = tape_byte(tape);
	FlightItem *item = &items[count];

	if (count == ITEMS_MAX)
		return;
	memset(item, 0, sizeof(*item));
	item->barrier = shape % 16 == 0;
	item->nkeys = nkeys[count] = shape / 16 % 3;
	for (int i = 0; i < item->nkeys; i++)
		item->keys[i] = keys[count][i] = tape_byte(tape) % KEYS_MAX;
	states[count++] = WAITING;
	flight_add(flight, item);
}

/* Returns whether there was one. */
static bool
hand_out(Flight *flight)
{
	bool		any = flight_has_ready(flight);
	FlightItem *item = flight_next(flight);
	int			i = (int) (item - items);

	CHECK(any == (item != NULL));
	if (item == NULL)
		return false;
	CHECK(i >= 0 && i < count && states[i] == WAITING);
	check_order(i);
	states[i] = HANDED_OUT;
	return true;
}

/* The nth that is handed out, or -1. */
static int
nth_out(int n)
{
	int			out = 0;

	for (int i = 0; i < count; i++)
		out += states[i] == HANDED_OUT;
	n = out > 0 ? n % out : -1;
	for (int i = 0; i < count && n >= 0; i++)
	{
		if (states[i] == HANDED_OUT && n-- == 0)
			return i;
	}
	return -1;
}

static bool
settle(Flight *flight, int n)
{
	int			i = nth_out(n);

	if (i < 0)
		return false;
	states[i] = SETTLED;
	flight_settle(flight, &items[i]);
	return true;
}

/* As after a lost connection: all of them, the last one first. */
static void
put_back_all(Flight *flight)
{
	int			first = nth_out(0);

	for (int i = count - 1; i >= 0; i--)
	{
		if (states[i] != HANDED_OUT)
			continue;
		states[i] = WAITING;
		flight_put_back(flight, &items[i]);
	}
	if (first < 0)
		return;
	CHECK(flight_next(flight) == &items[first]);
	flight_put_back(flight, &items[first]);
}

int
LLVMFuzzerTestOneInput(const uint8_t * data, size_t size)
{
	Tape		tape = {data, data + size};
	size_t		nslots = flight_key_slots(ITEMS_MAX);
	FlightKey  *slots = calloc(nslots, sizeof(FlightKey));
	Flight		flight;

	count = 0;
	flight_init(&flight, slots, nslots);
	while (!tape_ended(&tape))
	{
		uint8_t		op = tape_byte(&tape);

		switch (op % 8)
		{
			case 0:
			case 1:
			case 2:
				add(&flight, &tape);
				break;
			case 3:
			case 4:
				(void) hand_out(&flight);
				break;
			case 5:
			case 6:
				(void) settle(&flight, op / 8);
				break;
			case 7:
				put_back_all(&flight);
				break;
		}
	}

	while (hand_out(&flight) || settle(&flight, 0))
		;
	for (int i = 0; i < count; i++)
		CHECK(states[i] == SETTLED);
	CHECK(flight.unsettled == 0 && flight.nkeys == 0 && flight.arriving.head == NULL);
	for (size_t i = 0; i < nslots; i++)
		CHECK(slots[i].last == NULL);
	free(slots);
	return 0;
}
