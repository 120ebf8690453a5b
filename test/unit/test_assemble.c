/*-------------------------------------------------------------------------
 *
 * test_assemble.c
 *		Unit tests of assemble.c.
 *
 *-------------------------------------------------------------------------
 */
#include <stdlib.h>
#include <string.h>

#include "broker/assemble.h"
#include "tap.h"

static Assembler a;

static void
begin(bool keep_body, uint64_t max_body)
{
	assemble_reset(&a);
	assemble_init(&a, keep_body, max_body);
}

static void
test_empty_body(void)
{
	begin(true, 100);
	ok(assemble_method(&a, 312, "NO_ROUTE", 8) == ASSEMBLE_MORE, "a method begins a content");
	ok(assemble_header(&a, "id-1", 4, 0) == ASSEMBLE_DONE, "an empty body needs no frame");
	ok(a.code == 312 && strcmp(a.text, "NO_ROUTE") == 0 && strcmp(a.message_id, "id-1") == 0 &&
	   a.body == NULL, "code, text and message id are kept");
	ok(assemble_other(&a) == ASSEMBLE_MORE, "other methods may follow a complete content");
}

static void
test_frames(void)
{
	begin(true, 100);
	assemble_method(&a, 0, NULL, 0);
	ok(assemble_header(&a, NULL, 0, 10) == ASSEMBLE_MORE, "a body is waited for");
	ok(assemble_body(&a, "0123", 4) == ASSEMBLE_MORE && assemble_body(&a, "4", 1) == ASSEMBLE_MORE &&
	   assemble_body(&a, "56789", 5) == ASSEMBLE_DONE, "a body comes in many frames");
	ok(a.body != NULL && memcmp(a.body, "0123456789", 10) == 0, "and is put together in order");
	ok(a.message_id[0] == '\0' && a.text[0] == '\0', "absent properties are empty");

	assemble_method(&a, 0, NULL, 0);
	ok(a.body == NULL, "the next content frees the last");
	assemble_header(&a, NULL, 0, 3);
	assemble_body(&a, "abc", 3);
	{
		char	   *body = assemble_take_body(&a);

		assemble_reset(&a);
		ok(memcmp(body, "abc", 3) == 0 && a.body == NULL, "a body that was taken outlives a reset");
		free(body);
	}
}

static void
test_large(void)
{
	static char piece[65528];
	AssembleResult result = ASSEMBLE_MORE;
	size_t		total = 0;

	begin(true, 10 * 1024 * 1024);
	assemble_method(&a, 0, NULL, 0);
	assemble_header(&a, NULL, 0, 100 * sizeof(piece));
	while (result == ASSEMBLE_MORE)
	{
		memset(piece, (int) (total / sizeof(piece)), sizeof(piece));
		result = assemble_body(&a, piece, sizeof(piece));
		total += sizeof(piece);
	}
	ok(result == ASSEMBLE_DONE && total == 100 * sizeof(piece), "a body of 6 MB is complete");
	ok(a.body[0] == 0 && a.body[total - 1] == 99 && a.capacity == total,
	   "in memory of exactly its size");
}

static void
test_dropped(void)
{
	begin(false, 100);
	assemble_method(&a, 312, "NO_ROUTE", 8);
	assemble_header(&a, "id", 2, 6);
	ok(assemble_body(&a, "abc", 3) == ASSEMBLE_MORE && assemble_body(&a, "def", 3) == ASSEMBLE_DONE,
	   "a body that is not wanted is counted");
	ok(a.body == NULL, "and dropped");
}

static void
test_limit(void)
{
	begin(true, 100);
	assemble_method(&a, 0, NULL, 0);
	ok(assemble_header(&a, NULL, 0, 101) == ASSEMBLE_VIOLATION, "a body over the limit is refused");
	ok(a.problem != NULL && a.state == ASSEMBLE_IDLE, "with a reason");

	begin(true, UINT64_MAX);
	assemble_method(&a, 0, NULL, 0);
	ok(assemble_header(&a, NULL, 0, UINT64_MAX) == ASSEMBLE_MORE &&
	   assemble_body(&a, "x", 1) == ASSEMBLE_MORE && a.capacity <= 4096,
	   "memory grows with what arrives, not with what is announced");
}

static void
test_violations(void)
{
	begin(true, 100);
	ok(assemble_header(&a, NULL, 0, 0) == ASSEMBLE_VIOLATION, "a header out of turn is refused");
	begin(true, 100);
	ok(assemble_body(&a, "x", 1) == ASSEMBLE_VIOLATION, "a body out of turn is refused");
	begin(true, 100);
	assemble_method(&a, 0, NULL, 0);
	ok(assemble_body(&a, "x", 1) == ASSEMBLE_VIOLATION, "a body before its header is refused");
	begin(true, 100);
	assemble_method(&a, 0, NULL, 0);
	ok(assemble_method(&a, 0, NULL, 0) == ASSEMBLE_VIOLATION, "a content within a content is refused");
	begin(true, 100);
	assemble_method(&a, 0, NULL, 0);
	ok(assemble_other(&a) == ASSEMBLE_VIOLATION, "a method within a content is refused");
	begin(true, 100);
	assemble_method(&a, 0, NULL, 0);
	assemble_header(&a, NULL, 0, 3);
	assemble_body(&a, "ab", 2);
	ok(assemble_other(&a) == ASSEMBLE_VIOLATION && a.body == NULL,
	   "a method within a body is refused, and the body freed");
	begin(true, 100);
	assemble_method(&a, 0, NULL, 0);
	assemble_header(&a, NULL, 0, 3);
	ok(assemble_body(&a, "abcd", 4) == ASSEMBLE_VIOLATION, "more than announced is refused");
	begin(true, 100);
	assemble_method(&a, 0, NULL, 0);
	assemble_header(&a, NULL, 0, 3);
	ok(assemble_body(&a, "", 0) == ASSEMBLE_VIOLATION, "an empty body frame is refused");
	begin(true, 100);
	assemble_method(&a, 0, NULL, 0);
	assemble_header(&a, NULL, 0, 3);
	ok(assemble_header(&a, NULL, 0, 3) == ASSEMBLE_VIOLATION, "a second header is refused");
}

static void
test_reset_and_cut(void)
{
	char		large[1000];

	memset(large, 'x', sizeof(large));
	begin(true, 100);
	assemble_method(&a, 0, NULL, 0);
	assemble_header(&a, NULL, 0, 3);
	assemble_body(&a, "a", 1);
	assemble_reset(&a);
	ok(a.body == NULL && a.keep_body && a.max_body == 100, "a reset keeps the settings only");
	ok(assemble_method(&a, 1, large, sizeof(large)) == ASSEMBLE_MORE &&
	   assemble_header(&a, large, sizeof(large), 0) == ASSEMBLE_DONE &&
	   strlen(a.text) == 255 && strlen(a.message_id) == 255, "overlong texts are cut");
}

int
main(void)
{
	assemble_init(&a, false, 0);
	test_empty_body();
	test_frames();
	test_large();
	test_dropped();
	test_limit();
	test_violations();
	test_reset_and_cut();
	assemble_reset(&a);
	return done();
}
