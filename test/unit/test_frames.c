/*-------------------------------------------------------------------------
 *
 * test_frames.c
 *		Unit tests of frames.c.
 *
 *-------------------------------------------------------------------------
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "broker/frames.h"
#include "tap.h"

static FrameBuffer buffer;
static int	pair[2];

static void
arrives(const void *bytes, size_t len)
{
	if (write(pair[0], bytes, len) != (ssize_t) len)
		abort();
}

static void
test_heads(void)
{
	FrameHead	head;

	ok(frames_fill(&buffer, pair[1]) < 0 && errno == EAGAIN, "nothing is waited for");
	arrives("\3\1\2\0\1\0", 6);
	(void) frames_fill(&buffer, pair[1]);
	ok(!frames_head(&buffer, &head), "a head that is cut is none");
	arrives("\5xxxx", 5);
	(void) frames_fill(&buffer, pair[1]);
	ok(frames_head(&buffer, &head) && !head.protocol && head.type == 3 && head.channel == 258 &&
	   head.payload == 65541, "a head has a type, a channel and a size");
	frames_hide_channel(&buffer);
	ok(frames_head(&buffer, &head) && head.type == 3 && head.channel == 0 && head.payload == 65541,
	   "the channel can be hidden, and nothing else changes");
	buffer.first += 7;
	arrives("\1\377\377\377\377\377\377", 7);
	(void) frames_fill(&buffer, pair[1]);
	ok(buffer.first == 0 && buffer.last == 11 && memcmp(buffer.bytes, "xxxx\1", 5) == 0, "what is left comes before what is new");
	buffer.first += 4;
	ok(frames_head(&buffer, &head) && head.channel == 65535 && head.payload == 0xffffffff, "numbers are unsigned");
	buffer.first = buffer.last;
	arrives("AMQP\0\1\0\0", 8);
	(void) frames_fill(&buffer, pair[1]);
	ok(frames_head(&buffer, &head) && head.protocol, "a protocol header is no frame");
	buffer.first = buffer.last;
}

static void
test_pieces(void)
{
	static char many[FRAMES_SIZE + 1000];

	arrives(many, sizeof(many));
	ok(frames_fill(&buffer, pair[1]) == FRAMES_SIZE && buffer.last == FRAMES_SIZE, "no more is taken than fits");
	buffer.first = FRAMES_SIZE - 6;
	ok(frames_fill(&buffer, pair[1]) == 1000 && buffer.last == 1006, "the rest follows");
	close(pair[0]);
	ok(frames_fill(&buffer, pair[1]) == 0, "the end of the connection is seen");
}

int
main(void)
{
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) != 0)
		return 1;
	test_heads();
	test_pieces();
	return done();
}
