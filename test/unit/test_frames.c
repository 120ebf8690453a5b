/*-------------------------------------------------------------------------
 *
 * test_frames.c
 *		Unit tests of frames.c.
 *
 *-------------------------------------------------------------------------
 */
#include <string.h>

#include "broker/frames.h"
#include "tap.h"

static FrameBuffer buffer;

/* Receives as many of the bytes as there is room for. */
static size_t
arrives(const void *bytes, size_t len)
{
	size_t		room;
	void	   *to = frames_room(&buffer, &room);

	if (len > room)
		len = room;
	memcpy(to, bytes, len);
	frames_add(&buffer, len);
	return len;
}

static void
test_heads(void)
{
	FrameHead	head;

	ok(!frames_head(&buffer, &head), "an empty buffer has no frame");
	arrives("\3\1\2\0\1\0", 6);
	ok(!frames_head(&buffer, &head), "a head that is cut is none");
	arrives("\5xxxx", 5);
	ok(frames_head(&buffer, &head) && !head.protocol && head.type == 3 && head.channel == 258 &&
	   head.payload == 65541, "a head has a type, a channel and a size");
	frames_hide_channel(&buffer);
	ok(frames_head(&buffer, &head) && head.type == 3 && head.channel == 0 && head.payload == 65541,
	   "the channel can be hidden, and nothing else changes");
	buffer.first += 7;
	arrives("\1\377\377\377\377\377\377", 7);
	ok(buffer.first == 0 && buffer.last == 11 && memcmp(buffer.bytes, "xxxx\1", 5) == 0, "what is left comes before what is new");
	buffer.first += 4;
	ok(frames_head(&buffer, &head) && head.channel == 65535 && head.payload == 0xffffffff, "numbers are unsigned");
	buffer.first = buffer.last;
	arrives("AMQP\0\1\0\0", 8);
	ok(frames_head(&buffer, &head) && head.protocol, "a protocol header is no frame");
	buffer.first = buffer.last;
}

static void
test_pieces(void)
{
	static char many[FRAMES_SIZE + 1000];

	ok(arrives(many, sizeof(many)) == FRAMES_SIZE && buffer.last == FRAMES_SIZE, "no more is taken than fits");
	buffer.first = FRAMES_SIZE - 6;
	ok(arrives(many, 1000) == 1000 && buffer.last == 1006, "the rest follows");
}

int
main(void)
{
	test_heads();
	test_pieces();
	return done();
}
