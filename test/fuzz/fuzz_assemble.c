/*-------------------------------------------------------------------------
 *
 * fuzz_assemble.c
 *		Frames in any order into the assembler, beside a model that knows only
 *		what may follow what, and which bytes have come.
 *
 * Promised: a content is complete exactly when method, header and all announced
 * bytes have come in that order, and then it is those bytes; anything else is a
 * violation, after which the assembler can be used again.
 *
 *-------------------------------------------------------------------------
 */
#include "broker/assemble.h"
#include "fuzz.h"

#define MAX_BODY	70000

enum
{
	EXPECT_METHOD,
	EXPECT_HEADER,
	EXPECT_BODY,
};

static int	expect;
static uint64_t announced;
static size_t received;
static uint8_t body[MAX_BODY];
static char text[256];
static char message_id[256];
static int	code;

/* As a C string cut at 255 bytes. */
static void
keep(char *to, const uint8_t * from, size_t len)
{
	if (len > 255)
		len = 255;
	memset(to, 0, 256);
	if (len > 0)
		memcpy(to, from, len);
}

static void
check_complete(Assembler *a)
{
	char	   *taken;

	CHECK(a->code == code && strcmp(a->text, text) == 0);
	CHECK(strcmp(a->message_id, message_id) == 0);
	CHECK(a->body_size == announced);
	if (!a->keep_body || announced == 0)
	{
		CHECK(a->body == NULL);
		return;
	}
	CHECK(memcmp(a->body, body, received) == 0);
	taken = assemble_take_body(a);
	CHECK(a->body == NULL);
	free(taken);
}

/* The result must be as the model says; then both go on. */
static void
compare(Assembler *a, AssembleResult result, bool allowed, bool complete)
{
	CHECK(result == (!allowed ? ASSEMBLE_VIOLATION : complete ? ASSEMBLE_DONE : ASSEMBLE_MORE));
	if (!allowed)
		CHECK(a->problem != NULL && a->body == NULL);
	else if (complete)
		check_complete(a);
	if (!allowed || complete)
		expect = EXPECT_METHOD;
}

static void
method(Assembler *a, Tape * tape)
{
	size_t		len;
	bool		allowed = expect == EXPECT_METHOD;
	int			number = tape_byte(tape);
	const		uint8_t *bytes = tape_bytes(tape, tape_byte(tape) * 2, &len);

	if (allowed)
	{
		code = number;
		keep(text, bytes, len);
		expect = EXPECT_HEADER;
	}
	compare(a, assemble_method(a, number, bytes, len), allowed, false);
}

static void
header(Assembler *a, Tape * tape)
{
	size_t		len;
	uint64_t	size = tape_byte(tape);
	const		uint8_t *bytes;
	bool		allowed;

	if (size >= 250)
		size = tape_number(tape, 3);
	else if (size >= 240)
		size = UINT64_MAX - size;
	bytes = tape_bytes(tape, tape_byte(tape) * 2, &len);
	allowed = expect == EXPECT_HEADER && size <= a->max_body;
	if (allowed)
	{
		announced = size;
		received = 0;
		keep(message_id, bytes, len);
		expect = EXPECT_BODY;
	}
	compare(a, assemble_header(a, bytes, len, size), allowed, size == 0);
}

/* A piece is a run of one byte, so that a short input makes a long body. */
static void
piece(Assembler *a, Tape * tape)
{
	static uint8_t bytes[MAX_BODY];
	size_t		len = tape_byte(tape);
	bool		allowed;

	if (len >= 250)
		len = tape_number(tape, 2);
	memset(bytes, tape_byte(tape), len);
	allowed = expect == EXPECT_BODY && len > 0 && len <= announced - received;
	if (allowed)
	{
		memcpy(body + received, bytes, len);
		received += len;
	}
	compare(a, assemble_body(a, bytes, len), allowed, received == announced);
}

int
LLVMFuzzerTestOneInput(const uint8_t * data, size_t size)
{
	Tape		tape = {data, data + size};
	uint8_t		mode = tape_byte(&tape);
	Assembler	a;

	expect = EXPECT_METHOD;
	assemble_init(&a, mode & 1, mode & 2 ? MAX_BODY : 1000);
	while (!tape_ended(&tape))
	{
		switch (tape_byte(&tape) % 8)
		{
			case 0:
			case 1:
				method(&a, &tape);
				break;
			case 2:
			case 3:
				header(&a, &tape);
				break;
			case 4:
			case 5:
				piece(&a, &tape);
				break;
			case 6:
				compare(&a, assemble_other(&a), expect == EXPECT_METHOD, false);
				break;
			case 7:
				assemble_reset(&a);
				expect = EXPECT_METHOD;
				break;
		}
	}
	assemble_reset(&a);
	return 0;
}
