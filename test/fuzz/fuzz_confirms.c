/*-------------------------------------------------------------------------
 *
 * fuzz_confirms.c
 *		The window of confirms beside a model that is slow and obvious: an
 *		array with the state of every tag there ever was.
 *
 * Promised: each message is settled once, in order of tag, by a confirm that
 * covers it and by no other; a confirm of what was not sent, or was settled
 * already, is told and changes nothing.
 *
 *-------------------------------------------------------------------------
 */
#include "broker/confirms.h"
#include "fuzz.h"

#define CAPACITY	16
#define TAGS_MAX	512

/* tags[t] is the item of tag t */
static bool unsettled[TAGS_MAX];
static int	items[TAGS_MAX];
static uint64_t next;

/* what the window has settled in this call: all tags so far are up to this */
static uint64_t last_settled;

static void
settled(void *item, void *arg)
{
	uint64_t	tag = (uint64_t) ((int *) item - items);

	CHECK(*(bool *) arg);
	CHECK(tag > last_settled && tag < next && unsettled[tag]);
	unsettled[tag] = false;
	last_settled = tag;
}

static uint64_t
oldest(void)
{
	uint64_t	tag = 1;

	while (tag < next && !unsettled[tag])
		tag++;
	return tag;
}

static uint64_t
outstanding(void)
{
	uint64_t	n = 0;

	for (uint64_t tag = 1; tag < next; tag++)
		n += unsettled[tag];
	return n;
}

static void
settle(Confirms *window, uint64_t tag, bool multiple)
{
	bool		right = tag > 0 && tag < next && (multiple || unsettled[tag]);

	last_settled = multiple ? 0 : tag - 1;
	CHECK(confirms_settle(window, tag, multiple, settled, &right) == right);
	if (!right)
		return;
	CHECK(!unsettled[tag]);
	for (uint64_t t = 1; multiple && t <= tag; t++)
		CHECK(!unsettled[t]);
	CHECK(last_settled <= tag);
}

static bool
is_item(void *item, void *arg)
{
	return item == arg;
}

static void
compare(const Confirms *window)
{
	uint64_t	first = oldest();

	CHECK(window->outstanding == outstanding());
	CHECK(window->next == next);
	CHECK(confirms_oldest(window) == (first < next ? &items[first] : NULL));
	CHECK(confirms_full(window) == (next - first >= CAPACITY));
	for (uint64_t tag = 1; tag < next; tag++)
		CHECK((confirms_find(window, is_item, &items[tag]) != NULL) == unsettled[tag]);
}

int
LLVMFuzzerTestOneInput(const uint8_t * data, size_t size)
{
	Tape		tape = {data, data + size};
	void	   *ring[CAPACITY];
	Confirms	window;

	memset(ring, 0x55, sizeof(ring));
	confirms_init(&window, ring, CAPACITY);
	next = 1;
	while (!tape_ended(&tape))
	{
		uint8_t		op = tape_byte(&tape);

		switch (op % 8)
		{
			case 0:
			case 1:
			case 2:
				if (!confirms_full(&window) && next < TAGS_MAX)
				{
					unsettled[next] = true;
					CHECK(confirms_add(&window, &items[next]) == next);
					next++;
				}
				break;
			case 3:
			case 4:
				/* one near the newest */
				settle(&window, next - op / 8, op % 8 == 4);
				break;
			case 5:
				settle(&window, tape_number(&tape, 2), op & 8);
				break;
			case 6:
				settle(&window, UINT64_MAX - tape_byte(&tape), op & 8);
				break;
			case 7:
				if (op == 255)
				{
					confirms_reset(&window);
					next = 1;
				}
				break;
		}
		compare(&window);
	}
	return 0;
}
