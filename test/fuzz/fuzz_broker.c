/*-------------------------------------------------------------------------
 *
 * fuzz_broker.c
 *		broker.c and rabbitmq-c against a broker that the fuzzer directs.
 *
 * The input is the script of a conversation.  Some of its bytes say what the
 * client does (open and close channels, publish, ask, fetch events), and whenever that waits,
 * the next ones say what the broker says: an honest answer, frames of every
 * kind in any order, frames cut short or with a wrong end, plain bytes, nothing.
 * Behind the end of the script the broker is honest.  Both ends live in this
 * process, on a socket pair, and time passes only in waits, so that the same
 * script always plays the same way and a timeout costs nothing.
 *
 * Built with CONSUMES, the client consumes, and does not publish: fuzz_consume.
 *
 * This file stands in for tcp.c.  Promised, besides that no sanitizer has
 * anything to say:
 *
 * - every call ends within its timeout;
 * - what does not wait takes no time;
 * - the confirms that come out are those that went in on that channel since it
 *   was opened, in that order, and none of them is for a message that was not
 *   published by then; nothing comes out of a channel that was closed;
 * - no delivery comes out but as it went in, in that order, by a tag of its own;
 *   only such are acked or given back;
 * - what the client writes is well-formed, whatever it reads; on a channel that
 *   it has closed, or whose closing it has confirmed, it writes nothing more;
 * - a connection that is lost stays lost, and no socket is left behind.
 *
 *-------------------------------------------------------------------------
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "broker/broker.h"
#include "broker/clock.h"
#include "confirms.h"
#include "fuzz.h"
#include "broker/tcp.h"

#ifdef CONSUMES
static const bool consumes = true;
#else
static const bool consumes = false;
#endif

#define CONNECT_TIMEOUT 2000
#define RPC_TIMEOUT		1000
#define PUBLISH_TIMEOUT 500
#define WINDOW			256
#define STEPS_MAX		400
#define CLAIMS_MAX		8192
#define REQUESTS_MAX	16
#define STREAM_MAX		(1024 * 1024)
#define FRAME_LIMIT		65536
#define HELD_MAX		64
#define CHANNELS		3		/* that the client opens */
#define FIRST			(consumes ? 2 : 1)	/* of their numbers */
#define LAST			(FIRST + CHANNELS)	/* the connection's own, for calls */

typedef struct Stream
{
	uint8_t		bytes[STREAM_MAX];
	size_t		first;			/* bytes before it are frames that were seen */
	size_t		last;
	bool		broken;			/* no more frames can be told apart */
} Stream;

/* A confirm that the broker has sent, or that a channel is open. */
typedef struct Claim
{
	int			channel;
	bool		opened;
	uint64_t	tag;
	bool		multiple;
	bool		nack;
} Claim;

/* What the client waits for an answer to. */
typedef struct Request
{
	int			channel;
	uint32_t	reply;			/* method */
	uint8_t		name[256];		/* of a queue or a consumer, as a short string */
} Request;

static Tape tape;
static int64_t now;
static int	here = -1;			/* the client's end */
static int	there = -1;			/* the broker's */
static int	announced;
static int	deaf;				/* waits in which the broker does not read */

/* The broker's side */
static Stream heard;
static Stream said;
static size_t unsent;			/* the end of said that is not written yet */
static Request requests[REQUESTS_MAX];
static int	nrequests;
static Claim claims[CLAIMS_MAX];
static int	nclaims;
static uint64_t begun[CLAIMS_MAX];	/* tags of deliveries */
static int	nbegun;
static uint64_t next_tag;		/* of a delivery, if the broker is honest */
static bool header_seen;

/* What the broker has heard of each channel */
static enum
{
	HEARD_NOTHING,				/* or close-ok */
	HEARD_OPEN,
	HEARD_CLOSE,
}			heard_of[CHANNELS + 3];
static int	talk_of;			/* the channel of what follows, less 1 */
static size_t cut;				/* of the next frame */
static bool wrong_end;
static uint8_t last_frame[FRAME_LIMIT + 8];
static size_t last_len;

/* The client's side */
static Broker *broker;
static struct
{
	enum
	{
		NOT_MINE, ASKED_FOR, MINE
	}			state;
	bool		confirms;
	int			asked;			/* requests of which no answer was fetched */
	Confirms	window;
	void	   *ring[WINDOW];
	uint64_t	published;
	int			next_claim;
}			mine[CHANNELS + 3];
static int	next_begun;
static uint64_t last_tag;		/* of the last delivery */
static BrokerDelivery *held[HELD_MAX];
static int	nheld;
static uint64_t settled_tags[STEPS_MAX];	/* acked or given back */
static int	nsettled;
static bool over;				/* nothing but closing makes sense */


/*
 * In place of tcp.c and clock.c
 */

int
tcp_connect(const char *host, int port, int64_t deadline,
			bool (*wait) (int fd, bool for_write, long timeout_ms),
			void (*fd_changed) (int fd), char *text, size_t text_size)
{
	int			pair[2];

	(void) host, (void) port, (void) deadline, (void) wait, (void) text ,
				(void) text_size;

	CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) == 0);
	here = pair[0];
	there = pair[1];
	fd_changed(here);
	return here;
}

bool
tcp_peer(int fd, char *address, size_t size)
{
	(void) fd, (void) address, (void) size;
	return false;
}

size_t
tcp_tune(int fd)
{
	(void) fd;
	return 65536;
}

void
tcp_set_user_timeout(int fd, int ms)
{
	(void) fd, (void) ms;
}

int
tcp_unsent(int fd)
{
	int			bytes = 0;

	(void) ioctl(fd, SIOCOUTQ, &bytes);
	return bytes;
}

bool
tcp_writable(int fd, bool *readable)
{
	struct pollfd p = {.fd = fd,.events = POLLIN | POLLOUT};

	CHECK(poll(&p, 1, 0) >= 0);
	if (readable != NULL)
		*readable = (p.revents & (POLLIN | POLLERR | POLLHUP)) != 0;
	return (p.revents & (POLLOUT | POLLERR | POLLHUP)) != 0;
}

int64_t
clock_ms(void)
{
	return now;
}

long
clock_left(int64_t deadline)
{
	return deadline > now ? (long) (deadline - now) : 0;
}


/*
 * What the broker says
 */

static void
note_confirm(int channel, const uint8_t * payload, size_t len)
{
	bool		nack = payload[3] == 120;
	Claim	   *claim = &claims[nclaims];

	if (len < 13 || payload[1] != 60 || (payload[3] != 80 && !nack) || nclaims == CLAIMS_MAX)
		return;
	claim->channel = channel;
	claim->opened = false;
	claim->tag = 0;
	for (int i = 4; i < 12; i++)
		claim->tag = claim->tag << 8 | payload[i];
	claim->multiple = payload[12] & 1;
	claim->nack = nack;
	nclaims++;
}

static void
note_opening(int channel, const uint8_t * payload, size_t len)
{
	if (len < 4 || payload[1] != 20 || payload[3] != 11 || nclaims == CLAIMS_MAX)
		return;
	claims[nclaims].channel = channel;
	claims[nclaims].opened = true;
	nclaims++;
}

static void
note_delivery(const uint8_t * payload, size_t len)
{
	size_t		at = 5 + (len > 4 ? payload[4] : 0);

	if (payload[1] != 60 || payload[3] != 60 || len < at + 8 || nbegun == CLAIMS_MAX)
		return;
	begun[nbegun] = 0;
	for (int i = 0; i < 8; i++)
		begun[nbegun] = begun[nbegun] << 8 | payload[at + i];
	nbegun++;
}

/* Finds the next whole frame in a stream, as the other side will. */
static const uint8_t *
next_frame(Stream *stream, size_t *len)
{
	const		uint8_t *frame = stream->bytes + stream->first;
	size_t		have = stream->last - stream->first;

	if (stream->broken || have < 8)
		return NULL;
	*len = ((size_t) frame[3] << 24) + ((size_t) frame[4] << 16) + ((size_t) frame[5] << 8) +
		frame[6] + 8;
	stream->broken = *len > FRAME_LIMIT || (have >= *len && frame[*len - 1] != 0xCE);
	if (stream->broken || have < *len)
		return NULL;
	stream->first += *len;
	return frame;
}

static void
write_said(void)
{
	while (unsent > 0)
	{
		ssize_t		n = send(there, said.bytes + said.last - unsent, unsent, MSG_NOSIGNAL);

		if (n <= 0)
			return;
		unsent -= (size_t) n;
	}
}

static void
say(const void *bytes, size_t len)
{
	const		uint8_t *frame;
	size_t		frame_len;

	if (len > STREAM_MAX - said.last)
		return;
	memcpy(said.bytes + said.last, bytes, len);
	said.last += len;
	unsent += len;
	while ((frame = next_frame(&said, &frame_len)) != NULL)
	{
		if (frame[0] == 1 && frame[1] == 0 && frame[7] == 0)
		{
			note_confirm(frame[2], frame + 7, frame_len - 8);
			note_opening(frame[2], frame + 7, frame_len - 8);
			if (frame[2] == 1)
				note_delivery(frame + 7, frame_len - 8);
		}
	}
}

static void
say_frame(int type, int channel, const void *payload, size_t len)
{
	uint8_t    *to = last_frame;

	*to++ = (uint8_t) type;
	*to++ = (uint8_t) (channel >> 8);
	*to++ = (uint8_t) channel;
	for (int shift = 24; shift >= 0; shift -= 8)
		*to++ = (uint8_t) (len >> shift);
	memcpy(to, payload, len);
	to[len] = wrong_end ? 0xCD : 0xCE;
	last_len = len + 8;
	say(last_frame, cut < last_len ? last_len - cut : 0);
	cut = 0;
	wrong_end = false;
}

/* A payload that is being put together. */
typedef struct Payload
{
	uint8_t		bytes[FRAME_LIMIT];
	size_t		len;
} Payload;

static Payload payload;

static void
put_number(uint64_t n, int bytes)
{
	for (int shift = 8 * (bytes - 1); shift >= 0; shift -= 8)
		payload.bytes[payload.len++] = (uint8_t) (n >> shift);
}

static void
put_bytes(const void *bytes, size_t len)
{
	memcpy(payload.bytes + payload.len, bytes, len);
	payload.len += len;
}

static void
put_run(size_t len)
{
	memset(payload.bytes + payload.len, 'x', len);
	payload.len += len;
}

static void
begin_method(int class, int method)
{
	payload.len = 0;
	put_number((uint64_t) class, 2);
	put_number((uint64_t) method, 2);
}

static void
put_method(int channel)
{
	say_frame(1, channel, payload.bytes, payload.len);
}

static void
say_start(int version, const char *mechanisms, size_t mechanisms_len)
{
	begin_method(10, 10);
	put_number((uint64_t) version, 2);
	put_number(0, 4);
	put_number(mechanisms_len, 4);
	put_bytes(mechanisms, mechanisms_len);
	put_number(5, 4);
	put_bytes("en_US", 5);
	put_method(0);
}

/* Server properties as deep or as wide as a frame allows. */
static void
say_start_with_table(int kind, size_t n)
{
	size_t		size = n > 9000 ? 9000 : n;

	begin_method(10, 10);
	put_number(9, 2);
	put_number(6 * size, 4);
	for (size_t left = size; left > 0; left--)
	{
		put_number(0, 1);
		put_number((uint64_t) kind, 1);
		put_number(6 * (left - 1), 4);
	}
	put_number(5, 4);
	put_bytes("PLAIN", 5);
	put_number(0, 4);
	put_method(0);
}

static void
say_tune(uint32_t channel_max, uint32_t frame_max, uint32_t heartbeat)
{
	begin_method(10, 30);
	put_number(channel_max, 2);
	put_number(frame_max, 4);
	put_number(heartbeat, 2);
	put_method(0);
}

static void
say_reply(const Request *request)
{
	int			class = (int) (request->reply >> 16);
	int			method = (int) (request->reply & 0xffff);

	if (class == 10 && method == 10)
		say_start(9, "AMQPLAIN PLAIN", 14);
	else if (class == 10 && method == 30)
		say_tune(2047, 131072, 60);
	else
	{
		begin_method(class, method);
		if (class == 10 && method == 41)
			put_number(0, 1);
		if ((class == 20 && method == 11) || (class == 50 && method == 41))
			put_number(0, 4);
		if ((class == 50 && method == 11) || (class == 60 && method > 20))
			put_bytes(request->name, request->name[0] + (size_t) 1);
		if (class == 50 && method == 11)
		{
			put_number(1, 4);
			put_number(2, 4);
		}
		if (class == 60 && method == 21)
			next_tag = 1;
		put_method(request->channel);
	}
}

static void
answer_honestly(void)
{
	for (int i = 0; i < nrequests; i++)
		say_reply(&requests[i]);
	nrequests = 0;
}

static void
say_confirm(int channel, int method)
{
	uint8_t		how = tape_byte(&tape);
	uint64_t	tag = how < 250 ? mine[channel].published - (how >> 1) % 16 : tape_number(&tape, 2);

	begin_method(60, method);
	put_number(how == 255 ? UINT64_MAX - tag : tag, 8);
	put_number(how & 1, 1);
	put_method(channel);
}

static void
say_return(int channel)
{
	begin_method(60, 50);
	put_number(312, 2);
	put_number(8, 1);
	put_bytes("NO_ROUTE", 8);
	put_number(0, 2);
	put_method(channel);
}

static void
say_deliver(int channel)
{
	uint8_t		how = tape_byte(&tape);
	uint64_t	tag = how < 250 ? next_tag++ : tape_number(&tape, 2);

	begin_method(60, 60);
	put_number(1, 1);
	put_bytes("c", 1);
	put_number(how == 255 ? UINT64_MAX - tag : tag, 8);
	put_number(how & 1, 1);
	put_number(0, 2);
	put_method(channel);
}

/* A basic.return; or on the channel that consumes, a delivery. */
static void
begin_content(int channel)
{
	if (consumes && channel == 1 && tape_byte(&tape) % 8 != 0)
		say_deliver(channel);
	else
		say_return(channel);
}

/* Every property that is looked at, and headers that are whatever they are. */
static void
say_properties(int channel, uint64_t size)
{
	size_t		len = tape_byte(&tape);
	size_t		got;
	const		uint8_t *table = tape_bytes(&tape, len, &got);

	begin_method(60, 0);
	put_number(size, 8);
	put_number(0xa0e0, 2);		/* content type, headers, id, timestamp, type */
	put_number(1, 1);
	put_bytes("j", 1);
	put_number(got, 4);
	put_bytes(table, got);
	put_number(2, 1);
	put_bytes("id", 2);
	put_number(1, 8);
	put_number(1, 1);
	put_bytes("t", 1);
	say_frame(2, channel, payload.bytes, payload.len);
}

static void
say_header(int channel, int class, uint64_t size)
{
	size_t		id_len = tape_byte(&tape);

	begin_method(class, 0);
	put_number(size, 8);
	put_number(0x80, 2);
	put_number(id_len, 1);
	put_run(id_len);
	say_frame(2, channel, payload.bytes, payload.len);
}

static void
say_body(int channel, size_t len)
{
	payload.len = 0;
	put_run(len);
	say_frame(3, channel, payload.bytes, payload.len);
}

static void
say_close(int channel, int class, int method, int code)
{
	size_t		len = tape_byte(&tape);

	begin_method(class, method);
	put_number((uint64_t) code, 2);
	put_number(len, 1);
	put_run(len);
	put_number(0, 4);
	put_method(channel);
}

static void
say_blocked(void)
{
	size_t		len = tape_byte(&tape);

	begin_method(10, 60);
	put_number(len, 1);
	put_run(len);
	put_method(0);
}

static void
say_anything(int type, int channel, size_t len)
{
	size_t		got;
	const		uint8_t *bytes = tape_bytes(&tape, len, &got);

	say_frame(type, channel, bytes, got);
}

/* One line of the broker's script; returns false if it ends the turn. */
static bool
speak(void)
{
	static const int codes[] = {200, 320, 403, 404, 406, 501, 505, 530};
	static const uint32_t replies[] = {
		10 << 16 | 10, 10 << 16 | 30, 10 << 16 | 41, 10 << 16 | 51, 20 << 16 | 11,
		20 << 16 | 41, 85 << 16 | 11, 40 << 16 | 11, 50 << 16 | 11, 50 << 16 | 21,
		60 << 16 | 11, 60 << 16 | 21, 60 << 16 | 31,
	};
	uint8_t		op = tape_ended(&tape) ? 0 : tape_byte(&tape);
	int			more = op / 32;
	Request		request = {.channel = more % (LAST + 1)};
	int			channel = 1 + talk_of;
	size_t		got;
	const		uint8_t *bytes;

	switch (op % 32)
	{
		case 0:
		case 1:
		case 2:
			answer_honestly();
			return false;
		case 3:
			nrequests = 0;
			return false;
		case 4:
		case 5:
			say_confirm(channel, 80);
			break;
		case 6:
			say_confirm(channel, 120);
			break;
		case 7:
			begin_content(channel);
			if (consumes && more % 2)
				say_properties(channel, (uint64_t) more);
			else
				say_header(channel, 60, (uint64_t) more);
			if (more > 0)
				say_body(channel, (size_t) more);
			break;
		case 8:
			begin_content(channel);
			break;
		case 9:
			say_header(channel, more == 7 ? 10 : 60, tape_byte(&tape));
			break;
		case 10:
			say_header(channel, 60, (uint64_t) tape_number(&tape, 4) << (8 * more % 40));
			break;
		case 11:
			say_body(channel, tape_byte(&tape));
			break;
		case 12:
			say_body(channel, tape_number(&tape, 2) % (FRAME_LIMIT - 8));
			break;
		case 13:
			say_close(channel, 20, 40, codes[more]);
			break;
		case 14:
			say_close(LAST, 20, 40, codes[more]);
			break;
		case 15:
			say_close(0, 10, 50, codes[more]);
			break;
		case 16:
			say_blocked();
			break;
		case 17:
			if (consumes && more % 2)
			{
				begin_method(60, 30);
				put_bytes("\1c\1", 3);
				put_method(1);
				break;
			}
			begin_method(10, 61);
			put_method(0);
			break;
		case 18:
			say_frame(8, more == 7 ? 300 : more % 4, "", 0);
			break;
		case 19:
		case 20:
			say_anything(more % 4, op % 32 == 19 ? 1 : (int) tape_number(&tape, 2), tape_byte(&tape));
			break;
		case 21:
			say_anything(tape_byte(&tape), more, tape_byte(&tape));
			break;
		case 22:
			bytes = tape_bytes(&tape, tape_byte(&tape), &got);
			say(bytes, got);
			break;
		case 23:
			cut = tape_byte(&tape);
			break;
		case 24:
			wrong_end = true;
			break;
		case 25:
		case 26:
			request.reply = replies[tape_byte(&tape) % (consumes ? 13 : 10)];
			request.name[0] = 1;
			request.name[1] = more % 2 ? 'q' : 'r';
			say_reply(&request);
			break;
		case 27:
			if (more == 0)
				talk_of = tape_byte(&tape) % LAST;
			for (int n = more == 7 ? 2000 : more; n > 0; n--)
				say(last_frame, last_len);
			break;
		case 28:
			(void) shutdown(there, more % 2 ? SHUT_WR : SHUT_RDWR);
			return false;
		case 29:
			say_start_with_table(more % 2 ? 'F' : 'A', tape_number(&tape, 2));
			break;
		case 30:
			if (more % 2)
				say_tune(tape_number(&tape, 2), tape_number(&tape, 4), tape_byte(&tape));
			else
			{
				bytes = tape_bytes(&tape, tape_byte(&tape), &got);
				say_start(more == 0 ? 9 : tape_byte(&tape), (const char *) bytes, got);
			}
			break;
		case 31:
			deaf = 8 * more;
			break;
	}
	return true;
}


/*
 * What the broker hears
 */

static void
expect_answer(int channel, int class, int method)
{
	Request    *request = &requests[nrequests];

	if (nrequests == REQUESTS_MAX)
		return;
	request->channel = channel;
	request->reply = (uint32_t) (class << 16 | method);
	request->name[0] = 0;
	nrequests++;
}

static void
hear_consuming(const uint8_t * method, int id, size_t len)
{
	const		uint8_t *name = method + (id == 20 ? 6 : 4);
	uint64_t	tag = 0;
	int			i = 0;

	if (id == 80 || id == 120)
	{
		CHECK(len == 13);
		for (int at = 4; at < 12; at++)
			tag = tag << 8 | method[at];
		while (i < nsettled && settled_tags[i] != tag)
			i++;
		CHECK(i < nsettled);
		return;
	}
	CHECK(id == 10 || id == 20 || id == 30);
	expect_answer(1, 60, id + 1);
	if (id == 10)
		return;
	if (id == 20)
		name += name[0] + 1;
	CHECK(name + name[0] < method + len);
	memcpy(requests[nrequests - 1].name, name, name[0] + (size_t) 1);
}

/* A channel is opened once, and silent once it is closed by either side. */
static void
note_life(int channel, int class, int id)
{
	if (class == 20 && id == 10)
	{
		CHECK(heard_of[channel] != HEARD_OPEN);
		heard_of[channel] = HEARD_OPEN;
	}
	else if (class == 20 && id == 41)
	{
		CHECK(heard_of[channel] != HEARD_NOTHING);
		if (heard_of[channel] == HEARD_OPEN)
			heard_of[channel] = HEARD_NOTHING;
	}
	else
	{
		CHECK(heard_of[channel] == HEARD_OPEN);
		if (class == 20 && id == 40)
			heard_of[channel] = HEARD_CLOSE;
	}
}

static void
hear_method(int channel, const uint8_t * method, size_t len)
{
	int			class = method[0] << 8 | method[1];
	int			id = method[2] << 8 | method[3];

	if (channel != 0)
		note_life(channel, class, id);
	if (class == 10 && id == 11)
		expect_answer(0, 10, 30);
	else if (class == 50 && id == 10)
	{
		expect_answer(channel, 50, 11);
		CHECK(len > 6 && len > 6 + (size_t) method[6]);
		memcpy(requests[nrequests - 1].name, method + 6, method[6] + (size_t) 1);
	}
	else if (class == 10 && id == 31)
		return;
	else if (class == 60 && consumes && channel == 1)
		hear_consuming(method, id, len);
	else if (id % 10 == 0 && class != 60)
		expect_answer(channel, class, id + 1);
	else
		CHECK((class == 60 && id == 40) || id == 41 || id == 51);
}

/* Contents must come in order, and whole, unless the connection or channel is lost. */
static void
check_content(int channel, int type, const uint8_t * bytes, size_t len)
{
	static int	expect[CHANNELS + 3];
	static uint64_t left[CHANNELS + 3];

	if (bytes == NULL)
		expect[channel] = 1;
	else if (type == 1)
	{
		bool		publish = bytes[1] == 60 && bytes[3] == 40;

		/* the closing of the channel ends a content early */
		CHECK(expect[channel] == 1 || bytes[1] == 20);
		expect[channel] = publish ? 2 : 1;
	}
	else if (type == 2)
	{
		CHECK(expect[channel] == 2 && len >= 14);
		left[channel] = 0;
		for (int i = 4; i < 12; i++)
			left[channel] = left[channel] << 8 | bytes[i];
		expect[channel] = left[channel] > 0 ? 3 : 1;
	}
	else
	{
		CHECK(expect[channel] == 3 && len > 0 && len <= left[channel]);
		left[channel] -= len;
		expect[channel] = left[channel] > 0 ? 3 : 1;
	}
}

static void
hear_frames(void)
{
	const		uint8_t *frame;
	size_t		len;

	while ((frame = next_frame(&heard, &len)) != NULL)
	{
		int			channel = frame[1] << 8 | frame[2];

		CHECK((frame[0] >= 1 && frame[0] <= 3) || (frame[0] == 8 && channel == 0));
		CHECK(channel <= LAST);
		if (channel != 0)
			check_content(channel, frame[0], frame + 7, len - 8);
		if (frame[0] == 1)
			hear_method(channel, frame + 7, len - 8);
	}
	CHECK(!heard.broken);
	memmove(heard.bytes, heard.bytes + heard.first, heard.last - heard.first);
	heard.last -= heard.first;
	heard.first = 0;
}

static void
hear(void)
{
	ssize_t		n;

	while ((n = recv(there, heard.bytes + heard.last, STREAM_MAX - heard.last, 0)) > 0)
	{
		heard.last += (size_t) n;
		if (!header_seen && heard.last >= 8)
		{
			CHECK(memcmp(heard.bytes, "AMQP\0\0\011\001", 8) == 0);
			heard.first = 8;
			header_seen = true;
			expect_answer(0, 10, 10);
		}
		if (header_seen)
			hear_frames();
	}
}

/* The client waits: the broker's turn. */
static void
broker_turn(void)
{
	if (deaf > 0)
		deaf--;
	else
		hear();
	write_said();
	if (unsent > 0)
		return;
	while (speak())
		;
	write_said();
}

static bool
wait_socket(int fd, bool for_write, long timeout_ms)
{
	bool		readable;
	bool		writable;

	CHECK(fd >= 0 && fd == here && timeout_ms >= 0);
	if (timeout_ms == 0)
		return false;
	broker_turn();
	writable = tcp_writable(fd, &readable);
	if (for_write ? writable : readable)
	{
		now++;
		return true;
	}
	now += timeout_ms;
	return false;
}

void
tcp_wait_readable(int fd, long timeout_ms)
{
	(void) wait_socket(fd, false, timeout_ms);
}

void
tcp_wait_writable(int fd, long timeout_ms)
{
	(void) wait_socket(fd, true, timeout_ms);
}


/*
 * The client's side
 */

static void
fd_changed(int fd)
{
	announced = fd;
}

static BrokerOptions options = {
	.connection_name = "fuzz",
	.connect_timeout_ms = CONNECT_TIMEOUT,
	.rpc_timeout_ms = RPC_TIMEOUT,
	.heartbeat_s = 10,
	.min_channels = 1,
	.max_channels = CHANNELS,
#ifdef CONSUMES
	.consumer = true,
#endif
	.wait = wait_socket,
	.fd_changed = fd_changed,
};

static void
check_result(BrokerResult result, const BrokerError *error)
{
	if (result == BROKER_OK)
		return;
	CHECK(memchr(error->text, '\0', sizeof(error->text)) != NULL);
	CHECK(strstr(error->text, "s3cret") == NULL && error->text[0] != '\0');
	if (result == BROKER_LOST)
		CHECK(broker_fd(broker) == -1 && announced == -1);
	over = over || result == BROKER_LOST;
}

static void
settled(void *item, void *arg)
{
	(void) item, (void) arg;
}

/*
 * The next confirm that the broker gave on the channel, if it is this one; or the
 * next after it said that the channel is open, for what comes before was dropped.
 */
static void
find_claim(const BrokerEvent *event)
{
	int		   *next = &mine[event->channel].next_claim;

	for (;; ++*next)
	{
		const Claim *claim = &claims[*next];

		CHECK(*next < nclaims);
		if (claim->channel != event->channel || claim->opened)
			continue;
		if (claim->tag == event->tag && claim->multiple == event->multiple &&
			claim->nack == (event->type == BROKER_NACK))
			break;
		while (*next < nclaims && !(claims[*next].channel == event->channel && claims[*next].opened))
			++* next;
	}
	++*next;
}

static void
take_confirm(const BrokerEvent *event)
{
	CHECK(event->channel >= FIRST && event->channel < LAST);
	CHECK(mine[event->channel].state == MINE && mine[event->channel].confirms);
	CHECK(event->tag >= 1 && event->tag <= mine[event->channel].published);
	if (nclaims < CLAIMS_MAX)
		find_claim(event);
	over = over || !confirms_settle(&mine[event->channel].window, event->tag, event->multiple, settled, NULL);
}

static void
drop_held(void)
{
	while (nheld > 0)
		broker_free_delivery(held[--nheld]);
}

/* The caller is told that a channel can be used. */
static void
channel_opened(int channel)
{
	int		   *next = &mine[channel].next_claim;

	CHECK(channel >= FIRST && channel < LAST && mine[channel].state == ASKED_FOR);
	mine[channel].state = MINE;
	while (*next < nclaims && !(claims[*next].channel == channel && claims[*next].opened))
		++* next;
	CHECK(*next < nclaims || nclaims == CLAIMS_MAX);
}

static void
open_channel(bool confirms)
{
	BrokerError error = {0};
	int64_t		begin = now;
	int			channel = broker_open_channel(broker, confirms, &error);

	CHECK(now == begin);
	if (channel == 0)
	{
		over = over || broker_fd(broker) == -1;
		return;
	}
	CHECK(channel >= FIRST && channel < LAST && mine[channel].state == NOT_MINE);
	mine[channel].state = ASKED_FOR;
	mine[channel].confirms = confirms;
	mine[channel].asked = 0;
	mine[channel].published = 0;
	confirms_init(&mine[channel].window, mine[channel].ring, WINDOW);
}

static void
close_channel(int channel)
{
	int64_t		begin = now;

	broker_close_channel(broker, channel);
	CHECK(now == begin);
	mine[channel].state = NOT_MINE;
}

static void
ask(int channel, int kind)
{
	static const BrokerField argument = {.name = "x-expires",.type = BROKER_VALUE_INT,.value.integer = 1};
	BrokerRequest request = {
		.kind = (BrokerRequestKind) (kind % 7),.queue = "q",.exchange = "x",
		.arguments = &argument,.narguments = kind % 7 == BROKER_DECLARE_QUEUE,
	};
	BrokerError error = {0};
	int64_t		begin = now;
	BrokerResult result = broker_request(broker, channel, &request, &error);

	CHECK(now == begin);
	check_result(result, &error);
	CHECK(result != BROKER_TOO_LARGE);
	if (result != BROKER_OK)
		return;
	CHECK(mine[channel].state != NOT_MINE && !mine[channel].confirms);
	mine[channel].asked++;
}

static size_t
read_fields(const BrokerField *fields, int count, int depth)
{
	size_t		bytes = 0;

	CHECK(depth < 20);
	for (int i = 0; i < count; i++)
	{
		bytes += strlen(fields[i].name);
		if (fields[i].type == BROKER_VALUE_STRING)
			bytes += strlen(fields[i].value.string.data) <= fields[i].value.string.len;
		else if (fields[i].type == BROKER_VALUE_TABLE || fields[i].type == BROKER_VALUE_ARRAY)
			bytes += read_fields(fields[i].value.nested.fields, fields[i].value.nested.count, depth + 1);
	}
	return bytes;
}

static void
take_delivery(BrokerDelivery *delivery)
{
	size_t		bytes;

	CHECK(consumes && delivery != NULL && delivery->tag > last_tag);
	last_tag = delivery->tag;
	while (next_begun < nbegun && begun[next_begun] != delivery->tag)
		next_begun++;
	CHECK(next_begun++ < nbegun || nbegun == CLAIMS_MAX);
	bytes = read_fields(delivery->headers, delivery->nheaders, 0);
	for (size_t i = 0; i < delivery->body_len; i++)
		bytes += (size_t) (delivery->body[i] == 'x');
	CHECK(bytes <= delivery->size);
	if (nheld == HELD_MAX)
		drop_held();
	held[nheld++] = delivery;
}

/* Returns false if there is nothing more. */
static bool
take_event(void)
{
	BrokerEvent event;

	broker_next_event(broker, &event);
	switch (event.type)
	{
		case BROKER_ACK:
		case BROKER_NACK:
			take_confirm(&event);
			break;
		case BROKER_RETURN:
			CHECK((consumes && event.channel == 1) ||
				  (mine[event.channel].state == MINE && mine[event.channel].confirms));
			CHECK(memchr(event.message_id, '\0', sizeof(event.message_id)) != NULL);
			CHECK(memchr(event.text, '\0', sizeof(event.text)) != NULL);
			break;
		case BROKER_CHANNEL_OPENED:
			channel_opened(event.channel);
			break;
		case BROKER_REPLY:
			CHECK(mine[event.channel].state == MINE && mine[event.channel].asked > 0);
			mine[event.channel].asked--;
			break;
		case BROKER_CHANNEL_CLOSED:
			if (consumes && event.channel == 1)
			{
				over = true;	/* as the consumer does */
				break;
			}
			CHECK(mine[event.channel].state != NOT_MINE);
			mine[event.channel].state = NOT_MINE;
			open_channel(mine[event.channel].confirms);
			break;
		case BROKER_DISCONNECTED:
			CHECK(broker_fd(broker) == -1 && announced == -1);
			broker_next_event(broker, &event);
			CHECK(event.type == BROKER_DISCONNECTED);
			over = true;
			break;
		case BROKER_NOTHING:
		case BROKER_MORE:
			return false;
		case BROKER_BLOCKED:
		case BROKER_UNBLOCKED:
			break;
		case BROKER_DELIVERY:
			take_delivery(event.delivery);
			break;
		case BROKER_CANCELLED:
			CHECK(consumes);
			break;
	}
	return !over;
}

static void
publish(int channel)
{
	static const char body[200000];
	static const BrokerField headers[] = {
		{.name = "a",.type = BROKER_VALUE_INT,.value.integer = 1},
		{.name = "b",.type = BROKER_VALUE_STRING,.value.string = {"text", 4}},
	};
	uint8_t		size = tape_byte(&tape);
	BrokerMessage message = {
		.exchange = "x",.routing_key = "",.message_id = "xxxx",.content_type = "text/plain",
		.headers = headers,.nheaders = size % 3,
		.body = body,.body_len = size < 250 ? size / 16 : size * (size_t) 700,
	};
	BrokerError error = {0};
	BrokerResult result;

	if (mine[channel].state != NOT_MINE && confirms_full(&mine[channel].window))
		return;
	result = broker_publish(broker, channel, &message, PUBLISH_TIMEOUT, &error);
	check_result(result, &error);
	CHECK(result != BROKER_TOO_LARGE);
	if (result != BROKER_OK)
		return;
	CHECK(mine[channel].state != NOT_MINE && mine[channel].confirms);
	(void) confirms_add(&mine[channel].window, &message);
	mine[channel].published++;
}

static void
settle(bool requeue)
{
	BrokerError error = {0};
	BrokerDelivery *delivery;

	if (nheld == 0)
		return;
	delivery = held[--nheld];
	settled_tags[nsettled++] = delivery->tag;
	check_result(requeue ? broker_requeue(broker, delivery->tag, PUBLISH_TIMEOUT, &error) :
				 broker_ack(broker, delivery->tag, delivery->tag % 2, PUBLISH_TIMEOUT, &error), &error);
	broker_free_delivery(delivery);
}

/* What a consumer does instead of publishing. */
static void
consume(int which)
{
	BrokerError error = {0};

	if (which == 0)
		check_result(broker_consume(broker, "q", "c", 10, NULL, &error), &error);
	else if (which == 1)
		check_result(broker_cancel(broker, "c", &error), &error);
	else
		settle(which == 3);
}

static void
call(int which)
{
	static const BrokerField argument = {
		.name = "x-queue-type",.type = BROKER_VALUE_STRING,.value.string = {"quorum", 6}
	};
	BrokerError error = {0};
	uint32_t	messages = 0;
	uint32_t	consumers = 0;
	int64_t		begin = now;

	switch (which)
	{
		case 0:
			check_result(broker_declare_exchange(broker, "x", &error), &error);
			break;
		case 1:
			check_result(broker_declare_queue(broker, "q", &argument, 1, &error), &error);
			break;
		case 2:
			check_result(broker_bind_queue(broker, "q", "x", &error), &error);
			break;
		case 3:
			check_result(broker_inspect_queue(broker, "q", &messages, &consumers, &error), &error);
			break;
		case 4:
			check_result(broker_delete_queue(broker, "q", true, true, &error), &error);
			break;
		case 5:
			check_result(broker_unbind_queue(broker, "q", "x", &error), &error);
			break;
	}
	CHECK(now - begin <= 2 * RPC_TIMEOUT + 100);
}

static void
step(void)
{
	uint8_t		op = tape_byte(&tape);
	int			channel = FIRST + op / 16 % CHANNELS;

	switch (op % 16)
	{
		case 0:
		case 1:
		case 2:
		case 3:
			if (consumes && op / 16 < 14)
				consume(op % 16);
			else
				publish(channel);
			break;
		case 4:
		case 5:
		case 6:
			(void) wait_socket(here, false, 1 + op / 16 * 500);
			while (take_event())
				;
			break;
		case 7:
			(void) wait_socket(here, false, 1);
			break;
		case 8:
			(void) take_event();
			break;
		case 9:
		case 10:
		case 11:
		case 12:
			call(op % 16 - 9);
			break;
		case 13:
			if (op / 16 % 2 == 0)
				call(4 + op / 32 % 2);
			else if (mine[FIRST + op / 32 % CHANNELS].state != NOT_MINE)
				close_channel(FIRST + op / 32 % CHANNELS);
			else
				open_channel(op / 128);
			break;
		case 14:
			if (op / 16 < 4)
				broker_cork(broker);
			else if (op / 16 < 8)
				open_channel(op / 16 % 2);
			else
				ask(channel, tape_byte(&tape));
			break;
		case 15:
			broker_uncork(broker);
			CHECK(broker_next_heartbeat(broker) >= 0);
			(void) broker_writable(broker, op * (size_t) 100);
			break;
	}
}

static void
begin_conversation(void)
{
	now = 1000;
	announced = -1;
	deaf = 0;
	heard.first = heard.last = 0;
	said.first = said.last = unsent = 0;
	heard.broken = said.broken = false;
	nrequests = nclaims = nbegun = next_begun = 0;
	memset(mine, 0, sizeof(mine));
	memset(heard_of, 0, sizeof(heard_of));
	header_seen = false;
	talk_of = 0;
	last_tag = 0;
	next_tag = 1;
	nsettled = 0;
	cut = last_len = 0;
	wrong_end = over = false;
	for (int channel = 0; channel <= LAST; channel++)
		check_content(channel, 0, NULL, 0);
}

static void
connect_broker(void)
{
	BrokerAddress address = {
		.host = "broker",.port = 5672,.user = "guest",.password = "s3cret",.vhost = "/",
	};
	BrokerError error = {0};
	int64_t		begin = now;

	broker = broker_connect(&address, NULL, &options, &error);
	CHECK(now - begin <= 2 * CONNECT_TIMEOUT + 100);
	if (broker == NULL)
		CHECK(announced == -1 && strstr(error.text, "s3cret") == NULL && error.text[0] != '\0');
	else
		open_channel(true);
}

int
LLVMFuzzerTestOneInput(const uint8_t * data, size_t size)
{
	static const uint8_t honest[] = {0, 0, 0, 0, 0, 0, 0, 0};
	uint8_t		mode;

	begin_conversation();
	tape.at = data;
	tape.end = data + size;
	mode = tape_byte(&tape);
	if (mode % 4 != 0)
	{
		/* the script begins behind the login */
		Tape		script = tape;

		tape.at = honest;
		tape.end = honest + sizeof(honest);
		connect_broker();
		CHECK(broker != NULL);
		(void) wait_socket(here, false, 1);
		(void) take_event();
		CHECK(mine[FIRST].state == MINE);
		tape = script;
	}
	else
		connect_broker();

	if (broker != NULL)
	{
		for (int i = 0; i < STEPS_MAX && !tape_ended(&tape) && !over; i++)
			step();
		drop_held();
		broker_close(broker, mode & 4);
		CHECK(announced == -1);
	}
	CHECK(fcntl(here, F_GETFD) < 0 && errno == EBADF);
	close(there);
	return 0;
}
