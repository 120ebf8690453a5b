/*-------------------------------------------------------------------------
 *
 * fuzz_window.c
 *		The window of a topic beside the model of the unit test, whose choices
 *		are those of the input: messages, refusals, lost channels, confirms in
 *		any order, changes of mode.
 *
 * Promised: see test/unit/window_model.h.
 *
 *-------------------------------------------------------------------------
 */
#include "publish/window.h"
#include "fuzz.h"

#define MODEL_CHECK(condition) CHECK(condition)

static Tape tape;

static int
choose(int n)
{
	return tape_byte(&tape) % n;
}

#include "../unit/window_model.h"

int
LLVMFuzzerTestOneInput(const uint8_t * data, size_t size)
{
	int			faults;
	bool		serial;

	tape.at = data;
	tape.end = data + size;
	faults = choose(MODEL_ALL + 1);
	serial = choose(2);
	model_begin(MESSAGES_MAX, serial, 4 << choose(7));
	while (!tape_ended(&tape))
		model_step(faults);
	model_drain();
	return 0;
}
