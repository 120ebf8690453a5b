/*-------------------------------------------------------------------------
 *
 * fuzz.h
 *		What the fuzz targets share: an input that is read like a tape, and a
 *		check that ends the process, by which libFuzzer knows a failure.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_FUZZ_H
#define PGF_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct Tape
{
	const		uint8_t *at;
	const		uint8_t *end;
}			Tape;

extern int	LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);

#define CHECK(condition) \
	do { \
		if (!(condition)) \
		{ \
			fprintf(stderr, "%s:%d: broken: %s\n", __FILE__, __LINE__, #condition); \
			abort(); \
		} \
	} while (0)

static inline bool
tape_ended(const Tape * tape)
{
	return tape->at == tape->end;
}

/* The next byte; 0 behind the end. */
static inline uint8_t
tape_byte(Tape * tape)
{
	return tape_ended(tape) ? 0 : *tape->at++;
}

static inline uint32_t
tape_number(Tape * tape, int bytes)
{
	uint32_t	n = 0;

	for (int i = 0; i < bytes; i++)
		n = n << 8 | tape_byte(tape);
	return n;
}

/* Up to len bytes as they stand; *got says how many there are. */
static inline const uint8_t *
tape_bytes(Tape * tape, size_t len, size_t *got)
{
	const		uint8_t *bytes = tape->at;

	*got = len < (size_t) (tape->end - tape->at) ? len : (size_t) (tape->end - tape->at);
	tape->at += *got;
	return bytes;
}

#endif							/* PGF_FUZZ_H */
