/*-------------------------------------------------------------------------
 *
 * test_channels.c
 *		Unit tests of channels.c: every transition, then random ones.
 *
 *-------------------------------------------------------------------------
 */
#include <stdlib.h>
#include <string.h>

#include "broker/channels.h"
#include "tap.h"

#define DECLARE_OK METHOD_NUMBER(50, 11)
#define ACK METHOD_NUMBER(60, 80)
#define LIMIT 7

static Channels channels;

static void
begin(int limit)
{
	channels_destroy(&channels);
	ok(channels_init(&channels, limit), "room for channels up to %d", limit);
}

static ChannelState
state(int number)
{
	return channels.all[number].state;
}

/* A channel that is open. */
static int
open_one(ChannelUse use)
{
	int			number = channels_open(&channels, use);

	(void) channels_method(&channels, number, METHOD_CHANNEL_OPEN_OK);
	if (use == CHANNEL_PUBLISHES)
		(void) channels_method(&channels, number, METHOD_CONFIRM_SELECT_OK);
	return number;
}

static void
pay(void)
{
	while (channels_debtor(&channels) != 0)
		channels_paid(&channels);
}

static void
test_numbers(void)
{
	begin(3);
	ok(channels_get(&channels, 1) == NULL && channels_get(&channels, 0) == NULL &&
	   channels_get(&channels, 4) == NULL && channels_get(&channels, -1) == NULL,
	   "no channel exists before it is opened");
	ok(channels_open(&channels, CHANNEL_PUBLISHES) == 1 && channels_open(&channels, CHANNEL_REQUESTS) == 2,
	   "numbers begin at 1");
	ok(channels_open(&channels, CHANNEL_PUBLISHES) == 0, "the last number is for calls");
	ok(channels_get(&channels, 3) == NULL && channels_open(&channels, CHANNEL_CALLS) == 3 &&
	   channels_get(&channels, 3) != NULL, "which have it whatever else is open");
	ok(channels_open(&channels, CHANNEL_CALLS) == 0, "once at a time");
	channels_destroy(&channels);
	ok(channels_open(&channels, CHANNEL_PUBLISHES) == 0 && channels_open(&channels, CHANNEL_CALLS) == 0 &&
	   channels_get(&channels, 1) == NULL, "without room nothing is opened");
}

static void
test_opening(void)
{
	int			number;

	begin(LIMIT);
	number = channels_open(&channels, CHANNEL_PUBLISHES);
	ok(state(number) == CHANNEL_OPENING, "a channel is being opened");
	ok(channels_method(&channels, number, METHOD_CONFIRM_SELECT_OK) == CHANNEL_VIOLATION,
	   "select-ok before open-ok is a violation");
	ok(channels_method(&channels, number, METHOD_CHANNEL_OPEN_OK) == CHANNEL_NO_NEWS &&
	   state(number) == CHANNEL_SELECTING, "open-ok of a channel that publishes is not all");
	ok(channels_method(&channels, number, ACK) == CHANNEL_VIOLATION, "nor is an ack what it waits for");
	ok(channels_method(&channels, number, METHOD_CONFIRM_SELECT_OK) == CHANNEL_OPENED &&
	   state(number) == CHANNEL_OPEN, "select-ok is");
	ok(channels_method(&channels, number, ACK) == CHANNEL_OTHER &&
	   channels_method(&channels, number, METHOD_CHANNEL_CLOSE_OK) == CHANNEL_OTHER, "the rest is for the caller to judge");
	ok(channels.all[number].content != NULL, "it can receive contents");
	number = channels_open(&channels, CHANNEL_REQUESTS);
	ok(channels_method(&channels, number, METHOD_CHANNEL_OPEN_OK) == CHANNEL_OPENED,
	   "open-ok opens a channel for requests");
	ok(channels.all[number].content == NULL, "it has no memory for contents");
	ok(channels_method(&channels, LIMIT + 1, ACK) == CHANNEL_VIOLATION &&
	   channels_method(&channels, LIMIT - 1, ACK) == CHANNEL_VIOLATION,
	   "a method of a channel that never was is a violation");
}

static void
test_asking(void)
{
	int			number;

	begin(LIMIT);
	number = open_one(CHANNEL_REQUESTS);
	channels_ask(&channels, number, DECLARE_OK, "q");
	ok(state(number) == CHANNEL_ASKED && strcmp(channels.all[number].queue, "q") == 0, "a request is under way");
	ok(channels_method(&channels, number, ACK) == CHANNEL_OTHER && state(number) == CHANNEL_ASKED,
	   "another method is no answer");
	ok(channels_method(&channels, number, DECLARE_OK) == CHANNEL_ANSWERED && state(number) == CHANNEL_OPEN,
	   "the answer ends it");
	ok(channels_method(&channels, number, DECLARE_OK) == CHANNEL_OTHER, "a second answer is none");
	channels_ask(&channels, number, DECLARE_OK, NULL);
	ok(channels.all[number].queue == NULL, "a request without a queue expects none");
	ok(channels_method(&channels, number, METHOD_CHANNEL_CLOSE) == CHANNEL_REFUSED &&
	   state(number) == CHANNEL_CLOSED, "a close refuses it");
}

static void
test_closed_by_broker(void)
{
	BrokerError why = {.code = 404};
	int			number;
	uint32_t	life;

	begin(LIMIT);
	number = open_one(CHANNEL_PUBLISHES);
	life = channels.all[number].life;
	ok(channels_method(&channels, number, METHOD_CHANNEL_CLOSE) == CHANNEL_REFUSED, "the broker closes a channel");
	channels_set_reason(&channels, number, &why);
	ok(channels_debtor(&channels) == number && channels.all[number].debt == CHANNEL_OWES_CLOSE_OK,
	   "close-ok is owed");
	ok(channels.all[number].content == NULL && channels.all[number].why->code == 404 &&
	   channels.all[number].life == life, "its contents are freed, its events live");
	ok(channels_method(&channels, number, METHOD_CHANNEL_CLOSE) == CHANNEL_NO_NEWS, "a second close is dropped");
	channels_paid(&channels);
	ok(state(number) == CHANNEL_CLOSED && channels_open(&channels, CHANNEL_REQUESTS) != number,
	   "the number stays taken until the caller has been told");
	channels_told(&channels, number);
	ok(state(number) == CHANNEL_FREE && channels.all[number].why == NULL && channels.all[number].life != life,
	   "then it is free");
	ok(channels_method(&channels, number, METHOD_CHANNEL_CLOSE) == CHANNEL_NO_NEWS &&
	   channels_debtor(&channels) == 0, "what comes for it later is dropped");
	ok(open_one(CHANNEL_PUBLISHES) == number, "and it is the next to be used");

	(void) channels_method(&channels, number, METHOD_CHANNEL_CLOSE);
	channels_told(&channels, number);
	ok(state(number) == CHANNEL_ENDED, "told before close-ok is written, it stays taken");
	channels_close(&channels, number);
	channels_told(&channels, number);
	ok(state(number) == CHANNEL_ENDED, "closing what is over changes nothing");
	channels_paid(&channels);
	ok(state(number) == CHANNEL_FREE, "until that is written");

	number = open_one(CHANNEL_PUBLISHES);
	life = channels.all[number].life;
	(void) channels_method(&channels, number, METHOD_CHANNEL_CLOSE);
	pay();
	channels_close(&channels, number);
	ok(state(number) == CHANNEL_FREE && channels.all[number].life != life,
	   "a caller that closes it need not be told, and its events are void");
}

static void
test_closed_by_us(void)
{
	int			number;
	uint32_t	life;

	begin(LIMIT);
	number = open_one(CHANNEL_PUBLISHES);
	life = channels.all[number].life;
	channels_close(&channels, number);
	ok(state(number) == CHANNEL_CLOSING && channels.all[number].debt == CHANNEL_OWES_CLOSE &&
	   channels.all[number].life != life, "closing a channel owes a close, and voids its events");
	ok(channels_method(&channels, number, METHOD_CHANNEL_CLOSE_OK) == CHANNEL_NO_NEWS &&
	   state(number) == CHANNEL_CLOSING, "close-ok for a close that is not written is dropped");
	channels_paid(&channels);
	ok(channels_method(&channels, number, ACK) == CHANNEL_NO_NEWS, "an ack that was on its way is dropped");
	ok(state(number) == CHANNEL_CLOSING, "the number stays taken until close-ok");
	(void) channels_method(&channels, number, METHOD_CHANNEL_CLOSE_OK);
	ok(state(number) == CHANNEL_FREE, "then it is free");

	number = open_one(CHANNEL_PUBLISHES);
	channels_close(&channels, number);
	pay();
	ok(channels_method(&channels, number, METHOD_CHANNEL_CLOSE) == CHANNEL_NO_NEWS &&
	   channels.all[number].debt == CHANNEL_OWES_CLOSE_OK && state(number) == CHANNEL_CLOSING,
	   "when the closes cross, both are answered");
	(void) channels_method(&channels, number, METHOD_CHANNEL_CLOSE_OK);
	ok(state(number) == CHANNEL_ENDED, "close-ok has come, but not gone");
	pay();
	ok(state(number) == CHANNEL_FREE, "now the number is free");

	number = open_one(CHANNEL_PUBLISHES);
	channels_close(&channels, number);
	(void) channels_method(&channels, number, METHOD_CHANNEL_CLOSE);
	ok(state(number) == CHANNEL_ENDED && channels.all[number].debt == CHANNEL_OWES_CLOSE_OK,
	   "the broker's close takes the place of one that was not written");
	pay();
	ok(state(number) == CHANNEL_FREE, "after close-ok the number is free");

	for (int i = 0; i < 2; i++)
	{
		number = channels_open(&channels, CHANNEL_PUBLISHES);
		if (i == 1)
			(void) channels_method(&channels, number, METHOD_CHANNEL_OPEN_OK);
		channels_close(&channels, number);
		pay();
		ok(channels_method(&channels, number, METHOD_CHANNEL_OPEN_OK) == CHANNEL_NO_NEWS &&
		   channels_method(&channels, number, METHOD_CONFIRM_SELECT_OK) == CHANNEL_NO_NEWS &&
		   channels_method(&channels, number, METHOD_CHANNEL_CLOSE_OK) == CHANNEL_NO_NEWS &&
		   state(number) == CHANNEL_FREE, "a channel can be closed while it is being opened");
	}
	channels_close(&channels, number);
	channels_close(&channels, 0);
	channels_close(&channels, LIMIT + 1);
	ok(channels_debtor(&channels) == 0, "closing what is not open does nothing");
}

/* Every number is in the lists where its state says, once. */
static bool
consistent(void)
{
	int			seen_free[LIMIT + 1] = {0};
	int			debtors[LIMIT + 1] = {0};
	int			last = 0;
	int			taken = 0;
	int			closing = 0;

	for (int number = channels.free; number != 0; number = channels.all[number].next)
	{
		if (state(number) != CHANNEL_FREE || seen_free[number]++)
			return false;
	}
	for (int number = channels.first_debtor; number != 0; number = channels.all[number].next)
	{
		if (channels.all[number].debt == CHANNEL_OWES_NOTHING || debtors[number]++)
			return false;
		last = number;
	}
	if (last != channels.last_debtor)
		return false;
	for (int number = 1; number <= LIMIT; number++)
	{
		const Channel *channel = &channels.all[number];
		bool		live = channel_is_open(channel) || channel_awaits_answer(channel);

		taken += (number < LIMIT && channel->state != CHANNEL_FREE);
		closing += (number < LIMIT && channel->state == CHANNEL_CLOSING);
		if ((channel->debt != CHANNEL_OWES_NOTHING) != debtors[number] ||
			(number <= channels.used && (channel->state == CHANNEL_FREE) != seen_free[number]) ||
			(live && channel->debt != CHANNEL_OWES_NOTHING) ||
			(live && channel->use == CHANNEL_PUBLISHES) != (channel->content != NULL) ||
			(channel->why != NULL && channel->state != CHANNEL_CLOSED) ||
			(channel->state == CHANNEL_ENDED && channel->debt == CHANNEL_OWES_NOTHING))
			return false;
	}
	return taken == channels.taken && closing == channels_closing(&channels);
}

static void
random_step(void)
{
	static const uint32_t methods[] = {
		METHOD_CHANNEL_OPEN_OK, METHOD_CHANNEL_CLOSE, METHOD_CHANNEL_CLOSE_OK,
		METHOD_CONFIRM_SELECT_OK, DECLARE_OK, ACK,
	};
	BrokerError why = {.code = 1};
	int			number = rand() % (LIMIT + 2);

	switch (rand() % 8)
	{
		case 0:
			(void) channels_open(&channels, rand() % 2 ? CHANNEL_PUBLISHES : CHANNEL_REQUESTS);
			break;
		case 1:
			(void) channels_open(&channels, CHANNEL_CALLS);
			break;
		case 2:
			if (number >= 1 && number <= LIMIT && state(number) == CHANNEL_OPEN)
				channels_ask(&channels, number, DECLARE_OK, rand() % 2 ? "q" : NULL);
			break;
		case 3:
			channels_close(&channels, number);
			break;
		case 4:
			channels_told(&channels, number);
			break;
		case 5:
			if (channels_debtor(&channels) != 0)
				channels_paid(&channels);
			break;
		default:
			if (channels_method(&channels, number, methods[rand() % 6]) == CHANNEL_REFUSED)
				channels_set_reason(&channels, number, &why);
			break;
	}
}

static void
test_random(void)
{
	int			steps = 0;

	begin(LIMIT);
	srand(1);
	while (steps < 200000 && consistent())
	{
		random_step();
		steps++;
	}
	ok(steps == 200000, "lists and states agree after %d random steps", steps);
	pay();
	for (int number = 1; number <= LIMIT; number++)
	{
		channels_told(&channels, number);
		channels_close(&channels, number);
		pay();
		(void) channels_method(&channels, number, METHOD_CHANNEL_CLOSE_OK);
	}
	for (steps = 0; channels_open(&channels, CHANNEL_REQUESTS) != 0; steps++)
		;
	ok(steps == LIMIT - 1, "and no number is lost");
	channels_destroy(&channels);
}

int
main(void)
{
	test_numbers();
	test_opening();
	test_asking();
	test_closed_by_broker();
	test_closed_by_us();
	test_random();
	return done();
}
