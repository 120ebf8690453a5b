/*-------------------------------------------------------------------------
 *
 * assemble.c
 *		Puts the frames of one channel's contents together.
 *
 * A content (AMQP 0-9-1, section 4.2.6) is one method frame, one header frame
 * that announces the size of the body, and as many body frames as it takes
 * to carry that size: none for an empty body.  On one channel nothing may
 * come between them; frames of other channels may, and never get here.
 *
 *		IDLE --method--> HEADER --header, size > 0--> BODY --last byte--> IDLE
 *						 HEADER --header, size = 0-----------------------> IDLE
 *
 * Responsible for: the order of frames, the sum of their sizes, the limit,
 * and the memory of the body.
 *
 * Must never: trust the announced size (memory grows only with what really
 * arrives), block, or end the process.  After a violation the connection is
 * to be given up; the assembler stays safe to call and to reset.
 *
 * Scenarios, each of them a test in test/unit/test_assemble.c: empty body;
 * body in one and in many frames; body dropped and body kept; announced size
 * over the limit; more bytes than announced; an empty body frame; header or
 * body out of turn; a method within a content; reset in the middle; a huge
 * announcement that never arrives.
 *
 *-------------------------------------------------------------------------
 */
#include <stdlib.h>
#include <string.h>

#include "broker/assemble.h"

#define INITIAL_CAPACITY	4096

static AssembleResult violation(Assembler *a, const char *problem);
static void copy_bytes(char *to, size_t size, const void *from, size_t len);
static bool append(Assembler *a, const void *data, size_t len);
static AssembleResult complete(Assembler *a);

void
assemble_init(Assembler *a, bool keep_body, uint64_t max_body)
{
	memset(a, 0, sizeof(*a));
	a->keep_body = keep_body;
	a->max_body = max_body;
}

void
assemble_reset(Assembler *a)
{
	bool		keep_body = a->keep_body;
	uint64_t	max_body = a->max_body;

	free(a->body);
	assemble_init(a, keep_body, max_body);
}

AssembleResult
assemble_method(Assembler *a, int code, const void *text, size_t text_len)
{
	if (a->state != ASSEMBLE_IDLE)
		return violation(a, "a content began within another");

	assemble_reset(a);
	a->code = code;
	copy_bytes(a->text, sizeof(a->text), text, text_len);
	a->state = ASSEMBLE_HEADER;
	return ASSEMBLE_MORE;
}

AssembleResult
assemble_header(Assembler *a, const void *message_id, size_t message_id_len,
				uint64_t body_size)
{
	if (a->state != ASSEMBLE_HEADER)
		return violation(a, "a content header came out of turn");
	if (body_size > a->max_body)
		return violation(a, "a content is larger than the limit");

	copy_bytes(a->message_id, sizeof(a->message_id), message_id, message_id_len);
	a->body_size = body_size;
	if (body_size == 0)
		return complete(a);
	a->state = ASSEMBLE_BODY;
	return ASSEMBLE_MORE;
}

AssembleResult
assemble_body(Assembler *a, const void *data, size_t len)
{
	if (a->state != ASSEMBLE_BODY)
		return violation(a, "a content body came out of turn");

	/* An empty one would let a peer keep us busy without ever ending. */
	if (len == 0)
		return violation(a, "a content body frame is empty");
	if (len > a->body_size - a->received)
		return violation(a, "a content body is longer than announced");
	if (a->keep_body && !append(a, data, len))
		return violation(a, "out of memory for a content body");

	a->received += len;
	return a->received == a->body_size ? complete(a) : ASSEMBLE_MORE;
}

AssembleResult
assemble_other(Assembler *a)
{
	if (a->state != ASSEMBLE_IDLE)
		return violation(a, "a method came within a content");
	return ASSEMBLE_MORE;
}

char *
assemble_take_body(Assembler *a)
{
	char	   *body = a->body;

	a->body = NULL;
	a->capacity = 0;
	return body;
}

static AssembleResult
violation(Assembler *a, const char *problem)
{
	assemble_reset(a);
	a->problem = problem;
	return ASSEMBLE_VIOLATION;
}

static void
copy_bytes(char *to, size_t size, const void *from, size_t len)
{
	if (len > size - 1)
		len = size - 1;
	if (len > 0)
		memcpy(to, from, len);
	to[len] = '\0';
}

/*
 * Doubles the buffer up to the announced size.  Both fit size_t: the size is
 * bounded by max_body, and what we hold has been received.
 */
static bool
append(Assembler *a, const void *data, size_t len)
{
	size_t		have = (size_t) a->received;
	size_t		need = have + len;

	if (need > a->capacity)
	{
		size_t		capacity = a->capacity ? a->capacity : INITIAL_CAPACITY;
		char	   *body;

		while (capacity < need)
			capacity *= 2;
		if (capacity > a->body_size)
			capacity = (size_t) a->body_size;
		body = realloc(a->body, capacity);
		if (body == NULL)
			return false;
		a->body = body;
		a->capacity = capacity;
	}

	memcpy(a->body + have, data, len);
	return true;
}

static AssembleResult
complete(Assembler *a)
{
	a->state = ASSEMBLE_IDLE;
	return ASSEMBLE_DONE;
}
