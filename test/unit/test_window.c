/*
 * The window of a topic: each of its rules by name, and beside a model that
 * publishes to queues which refuse, by chance.
 */
#include "publish/window.h"

#include <stdlib.h>
#include <string.h>

#include "tap.h"

/* ---- for the model ---- */

static unsigned int seed;

/* Returns a number below n: xorshift, since it is the same everywhere. */
static int
choose(int n)
{
	seed ^= seed << 13;
	seed ^= seed >> 17;
	seed ^= seed << 5;
	return (int) (seed % (unsigned int) n);
}

#define MODEL_CHECK(condition) \
	do { \
		if (!(condition)) \
		{ \
			ok(false, "%s:%d: %s", __FILE__, __LINE__, #condition); \
			exit(done()); \
		} \
	} while (0)

#include "window_model.h"

/* ---- a small window, message by message ---- */

#define ITEMS_MAX 32

static Window window;
static WindowKeys keys;
static WindowKey *buckets[4];
static WindowItem *slots[ITEMS_MAX];
static WindowItem items[ITEMS_MAX];
static int	nitems;
static uint64_t newest_tag;

static void
begin(bool serial)
{
	memset(items, 0, sizeof(items));
	nitems = 0;
	newest_tag = 0;
	window_keys_init(&keys, buckets, 4);
	window_init(&window, &keys);
	window_set_slots(&window, slots, ITEMS_MAX);
	window_set_serial(&window, serial);
}

/* Adds a message with up to two keys ('-': none), or a barrier ('!'). */
static void
add(const char *text)
{
	WindowItem *item = &items[nitems++];

	item->bytes = nitems;
	for (; *text; text ++)
	{
		if (*text == '!')
			item->barrier = true;
		else if (*text !='-')
			item->keys[item->nkeys++].hash = *text;
	}
	window_add(&window, item);
}

static void
add_all(const char *texts)
{
	char		copy[200];

	snprintf(copy, sizeof(copy), "%s", texts);
	for (char *text = strtok(copy, " "); text !=NULL; text = strtok(NULL, " "))
		add(text);
}

static int
number(const WindowItem *item)
{
	return item != NULL ? (int) (item - items) + 1 : 0;
}

static bool
is(const char *got, const char *expected)
{
	if (strcmp(got, expected) != 0)
		diag("got \"%s\", expected \"%s\"", got, expected);
	return strcmp(got, expected) == 0;
}

/* Publishes all that may go, and writes down their numbers. */
static char *
publish_into(char *got, size_t size)
{
	WindowItem *item;

	got[0] = '\0';
	while ((item = window_next(&window)) != NULL)
	{
		snprintf(got + strlen(got), size - strlen(got), "%d ", number(item));
		newest_tag++;
		window_published(&window, item, newest_tag, (int64_t) newest_tag * 10);
	}
	return got;
}

/* Publishes all that may go: are it these, in this order? */
static bool
goes(const char *expected)
{
	char		got[200];

	return is(publish_into(got, sizeof(got)), expected);
}

static void
publish_all(void)
{
	char		ignored[200];

	(void) publish_into(ignored, sizeof(ignored));
}

/* Takes what is done: are it these, in this order? */
static bool
gives_back(const char *expected)
{
	char		got[200] = "";
	WindowItem *item;

	while ((item = window_take_done(&window)) != NULL)
		snprintf(got + strlen(got), sizeof(got) - strlen(got), "%d%s ", number(item),
				 item->state == WINDOW_DISCARDED ? "x" : "");
	return is(got, expected);
}

static bool
tells_refused(const char *expected)
{
	char		got[200] = "";
	WindowItem *item;

	while ((item = window_take_refused(&window)) != NULL)
		snprintf(got + strlen(got), sizeof(got) - strlen(got), "%d%s ", number(item),
				 item->refusal == WINDOW_RETURNED ? "r" : "n");
	return is(got, expected);
}

/* The states of all messages, a letter each. */
static bool
states(const char *expected)
{
	char		got[ITEMS_MAX + 1] = "";

	for (int i = 0; i < nitems; i++)
		got[i] = "ufrax"[items[i].state];
	return is(got, expected);
}

static void
ack(uint64_t tag)
{
	if (!window_ack(&window, tag, false))
		ok(false, "ack of %d", (int) tag);
}

static void
ack_up_to(uint64_t tag)
{
	if (!window_ack(&window, tag, true))
		ok(false, "ack up to %d", (int) tag);
}

static void
nack(uint64_t tag)
{
	if (!window_nack(&window, tag, false))
		ok(false, "nack of %d", (int) tag);
}

static void
lose(void)
{
	(void) window_lost(&window);
	newest_tag = 0;
}

/* ---- rules ---- */

static void
test_pipelined(void)
{
	begin(false);
	add_all("a b a ! a ab -");
	ok(goes("1 2 3 4 5 6 7 "), "pipelined: all go in order, whatever their keys, barriers too");
	ok(window.in_flight == 7 && window.bytes == 28, "messages and bytes in flight are counted");
	ok(number(window_oldest(&window)) == 1 && window_oldest(&window)->published_at == 10,
	   "the oldest in flight is known, and since when");
	ack(2);
	ack(4);
	ok(gives_back(""), "an accepted message is not done while one before it is in flight");
	ack(1);
	ok(gives_back("1 2 "), "it is done once all before it are");
	ok(number(window_oldest(&window)) == 3, "then the next one is the oldest");
	ack_up_to(7);
	ok(gives_back("3 4 5 6 7 "), "done is told in order");
	ok(window.count == 0 && window.in_flight == 0 && window.bytes == 0, "and nothing is left");
	ok(window_oldest(&window) == NULL, "an empty window has no oldest");
	add("a");
	ok(goes("8 ") && !window.serial, "without a refusal it stays pipelined");
}

static void
test_refused(void)
{
	begin(false);
	add_all("a b a b a");
	ok(goes("1 2 3 4 5 "), "pipelined");
	add("c");
	ack(1);
	nack(3);
	ok(goes("") && window.stopping, "after a nack nothing goes while anything is in flight");
	ok(gives_back("1 ") && tells_refused(""), "and the refusal is not told yet");
	ack(2);
	ack(5);
	ok(goes(""), "until the last one is settled");
	ack(4);
	ok(tells_refused("3n "), "then it is told");
	ok(tells_refused(""), "once");
	ok(gives_back("2 "), "what is before it is done");
	ok(window.serial, "the window is serial from then on");
	ok(goes("3 6 "), "the refused one goes again, ahead of what was not sent yet");
	ack(7);
	ok(goes("") && window_oldest(&window)->refusal == WINDOW_NOT_REFUSED, "and those of its key wait");
	ack(6);
	ok(goes("5 "), "then the later one of its key goes again, though it was accepted");
	ack(8);
	ok(gives_back("3 4 5 6 "), "then all are done");

	begin(false);
	add_all("a b a b");
	publish_all();
	nack(3);
	nack(2);
	ack(1);
	ack(4);
	ok(tells_refused("2n 3n "), "refusals are told in order of the messages");
	ok(goes("2 3 "), "in which they go again");
	nack(6);
	ack(5);
	ok(tells_refused("3n "), "each attempt is told");
	ok(goes("3 4 "), "and they go on");
}

static void
test_returned(void)
{
	begin(false);
	add_all("a a b");
	publish_all();
	window_returned(&window, &items[0]);
	add("c");
	ok(goes(""), "after a return nothing goes");
	ack_up_to(3);
	ok(tells_refused("1r ") && gives_back(""), "the ack after a return settles it as refused");
	ok(goes("1 4 "), "and it goes again");

	begin(false);
	add_all("a b");
	publish_all();
	window_returned(&window, &items[0]);
	lose();
	ok(tells_refused("1r ") && window.serial, "a returned message is refused, even if its ack does not come");

	begin(false);
	add_all("a");
	publish_all();
	window_returned(&window, &items[0]);
	nack(1);
	ok(tells_refused("1r "), "a return that is followed by a nack is a return");
}

static void
test_transitive(void)
{
	begin(false);
	add_all("a ab b c bc d c -");
	publish_all();
	nack(1);
	ack_up_to(8);
	ok(states("uuuauaua"), "a message of two keys that goes again takes the later ones of both along, "
	   "and nothing else");
}

static void
test_barrier(void)
{
	begin(false);
	add_all("a b ! a c -");
	publish_all();
	nack(2);
	ack_up_to(6);
	ok(states("auuuuu"), "what goes again takes a later barrier along, and that all behind it");

	begin(false);
	add_all("a ! b -");
	publish_all();
	nack(2);
	ack_up_to(4);
	ok(states("auuu"), "so does a barrier that was refused");

	ok(goes("2 ") && gives_back("1 "), "serial: a barrier goes alone");
	ack(5);
	ok(goes("3 4 "), "then what is behind it");

	begin(false);
	add_all("a ! b");
	publish_all();
	nack(3);
	ack_up_to(2);
	ok(states("aau") && gives_back("1 2 "), "a barrier before a refused message does not go again");
}

static void
test_serial(void)
{
	begin(true);
	add_all("a b a a -");
	ok(goes("1 2 5 "), "serial: one message per key goes, and all without a key");
	ack(2);
	ok(goes(""), "settling another key changes nothing");
	ack(1);
	ok(goes("3 "), "settling the first lets the second go");
	ack(4);
	ok(goes("4 "), "and then the third");

	begin(true);
	add_all("a b ba a b");
	ok(goes("1 2 "), "serial: a message of two keys waits for both");
	ack(1);
	ok(goes(""), "one of them is not enough");
	ack(2);
	ok(goes("3 "), "both are");
	ack(3);
	ok(goes("5 4 "), "and both keys wait for it");

	begin(true);
	add_all("aa a");
	ok(goes("1 "), "twice the same key is one key");
	ack(1);
	ok(goes("2 "), "and is forgotten once");

	begin(true);
	add_all("a ! ! b");
	ok(goes("1 "), "serial: a barrier waits for all before it, and all after it wait");
	ack(1);
	ok(goes("2 "), "barriers wait for each other");
	ack(2);
	ok(goes("3 "), "one after the other");
	ack(3);
	ok(goes("4 "), "then the others go");
}

static void
test_serial_refusal(void)
{
	begin(true);
	add_all("a b a b");
	ok(goes("1 2 "), "serial");
	nack(1);
	ok(window.stopping, "serial: a refusal stops the window, too");
	ack(2);
	ok(tells_refused("1n "), "it is told when all are settled");
	ok(states("uauu"), "and nothing that was accepted goes again");
	ok(goes("1 4 "), "the refused one is the first to go");
	ack(4);
	ok(goes("") && gives_back(""), "the one of its key waits on");
	ack(3);
	ok(goes("3 "), "until it is accepted");
}

static void
test_modes(void)
{
	begin(false);
	add_all("a a b");
	publish_all();
	add_all("b b");
	window_set_serial(&window, true);
	ok(goes("") && window.stopping && !window.serial, "to become serial what is in flight is awaited");
	ack_up_to(3);
	ok(goes("4 ") && window.serial, "then messages go one per key");
	window_set_serial(&window, false);
	add_all("c c");
	ok(goes(""), "to become pipelined what is in flight is awaited");
	ack(4);
	ok(goes("5 6 7 ") && !window.serial, "then all go");

	begin(true);
	add_all("a a b b");
	publish_all();
	window_set_serial(&window, false);
	nack(1);
	ack(2);
	ok(window.serial && goes("1 4 "), "a refusal meanwhile keeps it serial");

	begin(true);
	add_all("a a");
	window_set_serial(&window, false);
	ok(goes("1 2 "), "with nothing in flight the mode changes at once");
}

static void
test_lost(void)
{
	begin(false);
	add_all("a a b c b");
	publish_all();
	add("d");
	ack(2);
	ack(4);
	ok(window_lost(&window) == 4, "a loss tells how many go again");
	newest_tag = 0;
	ok(states("uuuauu") && window.in_flight == 0 && window.bytes == 0,
	   "what was in flight goes again, and what was accepted behind it of its key");
	ok(tells_refused("") && !window.serial, "a loss is no refusal, and changes no mode");
	ok(!window_ack(&window, 1, false) && !window_ack(&window, 1, true), "confirms of the old channel are told");
	ok(goes("1 2 3 5 6 "), "all go in order, with tags from 1 on");
	ack_up_to(5);
	ok(gives_back("1 2 3 4 5 6 "), "and are done");
	ok(window_lost(&window) == 0, "a loss of an empty window is nothing");

	begin(false);
	add_all("a a b");
	publish_all();
	nack(1);
	lose();
	ok(tells_refused("1n ") && window.serial && goes("1 3 "), "a loss ends the waiting after a refusal");

	begin(true);
	add_all("a b a b");
	publish_all();
	ack(2);
	lose();
	ok(goes("1 4 ") && window.serial, "serial: what was in flight is the first to go");
}

static void
test_discard(void)
{
	begin(false);
	add_all("a a b");
	window_discard(&window, window_next(&window));
	ok(goes("2 3 "), "pipelined: what can never be sent is passed over");
	ack_up_to(2);
	ok(gives_back("1x 2 3 "), "and given back in its turn");

	begin(true);
	add_all("a a ! b");
	window_discard(&window, window_next(&window));
	ok(goes("2 ") && gives_back("1x "), "serial: those that wait for it go on");
	window_discard(&window, &items[2]);
	ok(goes("4 "), "a barrier that waits may be discarded, and those behind it go");
	ack_up_to(2);
	ok(gives_back("2 3x 4 "), "and so on to the end");

	begin(true);
	add_all("a a a");
	publish_all();
	window_discard(&window, &items[1]);
	ok(goes(""), "discarding one that waits lets none pass that waits for an earlier one");
	ack(1);
	ok(goes("3 ") && gives_back("1 2x "), "it is passed over when its turn comes");

	begin(true);
	add_all("a b a b");
	window_discard(&window, &items[1]);
	ok(goes("1 4 "), "discarding one that is ready, behind another, lets its followers go");

	begin(true);
	add_all("a a b");
	window_published(&window, window_next(&window), ++newest_tag, 0);
	ack(1);
	window_discard(&window, &items[1]);
	ok(number(window_next(&window)) == 3 && gives_back("1 "), "one that is ready is given back no sooner");
	ok(goes("3 ") && gives_back("2x "), "than those that were ready before it are published");

	begin(false);
	add_all("a a b");
	publish_all();
	nack(1);
	ack_up_to(3);
	window_discard(&window, window_take_refused(&window));
	ok(goes("2 ") && gives_back("1x "), "what was given up after a refusal is done, and those of its key go on");

	begin(false);
	add_all("a b");
	publish_all();
	nack(1);
	ack(2);
	window_discard(&window, window_take_refused(&window));
	ok(gives_back("1x 2 "), "what is done may be taken before all refusals are");
	memset(items, 0xaa, sizeof(items));
	ok(window_take_refused(&window) == NULL, "an item given back is not looked at any more");

	begin(false);
	add_all("a a a");
	publish_all();
	nack(2);
	nack(1);
	ack(3);
	window_discard(&window, &items[1]);
	ok(tells_refused("1n "), "a discarded message is not told as refused any more");
	ok(goes("1 "), "the others keep their order");
	ack(4);
	ok(goes("3 ") && gives_back("1 2x "), "and so on to the end");
}

static void
test_confirms(void)
{
	begin(false);
	add_all("- - - - - - - - -");
	publish_all();
	/* as a broker did it: returns of 4 and 6 first, then all up to 5 */
	ack(4);
	ack(6);
	ack_up_to(5);
	ok(states("aaaaaafff"), "acks come out of order; multiple settles all still outstanding up to its tag");
	ack_up_to(8);
	ack_up_to(8);
	ack_up_to(3);
	ok(window.in_flight == 1, "a multiple that overlaps an earlier one settles nothing twice");
	ok(!window_ack(&window, 8, false) && !window_nack(&window, 8, false), "a second confirm of a tag is told");
	ok(!window_ack(&window, 10, false) && !window_ack(&window, 10, true) &&
	   !window_ack(&window, UINT64_MAX, true) && !window_ack(&window, UINT64_MAX, false),
	   "one of what was never published is told");
	ok(!window_ack(&window, 0, false) && !window_ack(&window, 0, true),
	   "and one of tag 0, which may mean fewer than are in flight now");
	ok(window.in_flight == 1 && states("aaaaaaaaf"), "and they settle nothing");

	begin(false);
	add_all("- - - -");
	publish_all();
	ok(window_nack(&window, 3, true), "nacks may be multiple");
	ack(4);
	ok(tells_refused("1n 2n 3n "), "and refuse all that they cover");
}

static void
test_room(void)
{
	static WindowItem *few[2];
	static WindowItem *more[4];

	begin(false);
	window_init(&window, &keys);
	ok(!window_has_room(&window, 1), "without slots there is no room");
	window_set_slots(&window, few, 2);
	add_all("- - - - -");
	window_published(&window, window_next(&window), 1, 0);
	window_published(&window, window_next(&window), 2, 0);
	ok(!window_has_room(&window, 3), "full at its capacity");
	ack(2);
	ok(!window_has_room(&window, 3), "a hole behind the oldest makes no room: tags are positions");
	window_set_slots(&window, more, 4);
	ok(window_has_room(&window, 3) && number(window_oldest(&window)) == 1, "more slots do");
	window_published(&window, window_next(&window), 4, 0);
	ok(!window_has_room(&window, 5), "tags of other topics on the channel take room");
	ok(!window_ack(&window, 3, false), "but are not the window's");
	ack(1);
	ok(window_has_room(&window, 5) && number(window_oldest(&window)) == 3, "settling the oldest makes room");
	ack_up_to(4);
	ok(window_has_room(&window, 1000), "with nothing in flight there is room for any tag");
}

/* A channel that another topic has used. */
static void
test_continued(void)
{
	begin(false);
	add_all("- - -");
	window_continue(&window, 41);
	ok(window_oldest(&window) == NULL && window.newest == 41, "nothing is in flight, whatever was sent on the channel");
	ok(!window_ack(&window, 41, false), "what was is not the window's");
	window_published(&window, window_next(&window), 42, 0);
	window_published(&window, window_next(&window), 43, 0);
	ok(window_ack(&window, 42, false) && number(window_oldest(&window)) == 2, "its own tags come behind it");
	ok(window_lost(&window) == 1 && window.newest == 0, "after a loss they begin anew");
}

static bool
has_bytes(const WindowItem *item, const void *arg)
{
	return item->bytes == *(const size_t *) arg;
}

static void
test_find(void)
{
	size_t		bytes = 2;

	begin(false);
	add_all("- - - -");
	publish_all();
	ok(number(window_find(&window, has_bytes, &bytes)) == 2, "finds a message in flight");
	items[2].bytes = 2;
	items[0].bytes = 2;
	ok(number(window_find(&window, has_bytes, &bytes)) == 3, "the next time the next one that fits");
	ok(number(window_find(&window, has_bytes, &bytes)) == 1, "and round to the oldest");
	window_returned(&window, &items[1]);
	ack(3);
	ok(number(window_find(&window, has_bytes, &bytes)) == 1, "but none that was returned or settled");
	ack(1);
	ok(window_find(&window, has_bytes, &bytes) == NULL, "or none at all");
}

static void
test_abandon(void)
{
	char		left[100] = "";

	begin(true);
	add_all("a b c c d d ! -");
	publish_all();
	ack(1);
	ack(3);
	window_returned(&window, &items[4]);
	ok(gives_back("1 "), "what is done before is given back before");
	for (WindowItem *item = window_abandon(&window); item != NULL; item = item->next)
		snprintf(left + strlen(left), sizeof(left) - strlen(left), "%d%s ", number(item),
				 item->state == WINDOW_UNSENT ? "u" : item->state == WINDOW_ACCEPTED ? "a" : "?");
	ok(is(left, "2u 3a 4u 5u 6u 7u 8u "), "all that is left is given back in order, and says what it is");
	ok(window.count == 0 && window.in_flight == 0 && window_next(&window) == NULL &&
	   !window_ack(&window, 1, true), "nothing of it stays behind");
	nitems = 0;
	newest_tag = 0;
	memset(items, 0, sizeof(items));
	add_all("a b d");
	ok(goes("1 2 3 "), "and the window can be used again");
}

static void
test_shared_keys(void)
{
	static Window other;
	WindowItem	item = {0};
	WindowItem	next_item;

	item.nkeys = 1;
	item.keys[0].hash = 'a';
	next_item = item;
	begin(true);
	window_init(&other, &keys);
	window_set_slots(&other, slots, ITEMS_MAX);
	window_set_serial(&other, true);
	add_all("a a");
	window_add(&other, &item);
	window_add(&other, &next_item);
	ok(window_next(&other) == &item && window_next(&window) == &items[0],
	   "windows that share the buckets share no keys");
	window_published(&other, &item, 1, 0);
	ok(window_ack(&other, 1, false) && window_next(&other) == &next_item &&
	   window_next(&window) == &items[0], "nor does one settle those of another");
}

/* ---- beside a model ---- */

static void
run_model(const char *name, int faults, bool serial, int rounds)
{
	int			refusals = 0;
	int			repeats = 0;
	int			losses = 0;

	for (int i = 0; i < rounds; i++)
	{
		model_begin(100, serial, 4 << choose(6));
		for (int step = 0; step < 1000; step++)
			model_step(faults);
		model_drain();
		refusals += model.refusals;
		repeats += model.repeats;
		losses += model.losses;
	}
	ok(true, "%s: %d rounds of 100 messages and %d queues, each has all in order at the end",
	   name, rounds, QUEUES);
	diag("%d refusals, %d losses, %d accepted messages went again", refusals, losses, repeats);
	ok((refusals > 0) == ((faults & MODEL_REFUSALS) != 0) &&
	   (losses > 0) == ((faults & MODEL_LOSSES) != 0) &&
	   (repeats > 0) == (faults != 0 && !serial), "and it had what it says");
}

static void
test_model(void)
{
	seed = getenv("SEED") != NULL ? (unsigned int) atoi(getenv("SEED")) : 1;
	run_model("pipelined, nothing goes wrong", MODEL_NO_FAULTS, false, 100);
	run_model("serial, nothing goes wrong", MODEL_NO_FAULTS, true, 100);
	run_model("pipelined, channels are lost, first copies in order, too", MODEL_LOSSES, false, 300);
	run_model("pipelined, refusals", MODEL_REFUSALS, false, 300);
	run_model("serial, refusals and losses, all copies in order", MODEL_REFUSALS | MODEL_LOSSES, true, 300);
	run_model("modes change, refusals and losses", MODEL_ALL, false, 1000);
}

int
main(void)
{
	test_pipelined();
	test_refused();
	test_returned();
	test_transitive();
	test_barrier();
	test_serial();
	test_serial_refusal();
	test_modes();
	test_lost();
	test_discard();
	test_confirms();
	test_room();
	test_continued();
	test_find();
	test_abandon();
	test_shared_keys();
	test_model();
	return done();
}
