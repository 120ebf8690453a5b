/*-------------------------------------------------------------------------
 *
 * msgid.c
 *		Message ids: one random base per process, then a counter.
 *
 * Responsible for ids that no process of any server ever gives twice and that
 * look like any other version-4 UUID (RFC 4122, section 4.4).  It must never
 * be used where an id has to be hard to guess.
 *
 * Of the 122 free bits, 60 name the process and stay; the other 62 start
 * anywhere and count up, so that within a process ids repeat only after 2^62
 * of them.
 *
 * No locks: the state belongs to one process.  The library may be loaded in
 * the postmaster, whose children inherit its memory; hence the base is drawn
 * at first use and carries the pid of the process that drew it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <uuid/uuid.h>

#include "miscadmin.h"
#include "port/pg_bswap.h"

#include "capture/msgid.h"

/* Byte 6 has the version in its upper half; byte 8 begins with the variant. */
#define MSGID_VERSION		0x40
#define MSGID_VERSION_MASK	0xF0
#define MSGID_VARIANT		UINT64CONST(0x8000000000000000)
#define MSGID_COUNTER_MASK	UINT64CONST(0x3FFFFFFFFFFFFFFF)

static struct
{
	int			pid;			/* process that drew the base; 0: none yet */
	uint8		process[MSGID_HALF];	/* bytes 0 to 7, with the version */
	uint64		counter;		/* bytes 8 to 15, less the variant */
}			msgid_base;

static void
draw_base(void)
{
	uuid_t		random;
	uint64		counter;

	uuid_generate_random(random);

	memcpy(msgid_base.process, random, MSGID_HALF);
	msgid_base.process[6] &= ~MSGID_VERSION_MASK;
	msgid_base.process[6] |= MSGID_VERSION;

	memcpy(&counter, random + MSGID_HALF, sizeof(counter));
	msgid_base.counter = counter;
	msgid_base.pid = MyProcPid;
}

/*
 * msgid_new
 *		Gives a new id; raises no error and allocates nothing.
 */
void
msgid_new(pg_uuid_t *id)
{
	uint64		low;

	if (unlikely(msgid_base.pid != MyProcPid))
		draw_base();

	low = pg_hton64(MSGID_VARIANT | (msgid_base.counter++ & MSGID_COUNTER_MASK));

	memcpy(id->data, msgid_base.process, MSGID_HALF);
	memcpy(id->data + MSGID_HALF, &low, sizeof(low));
}

/*
 * msgid_format
 *		Writes id as 8-4-4-4-12 lower-case hexadecimal digits and a NUL, as
 *		uuid_out() would; raises no error and allocates nothing.
 */
void
msgid_format(const pg_uuid_t *id, char out[37])
{
	static const char digits[] = "0123456789abcdef";
	char	   *p = out;

	for (int i = 0; i < UUID_LEN; i++)
	{
		if (i == 4 || i == 6 || i == 8 || i == 10)
			*p++ = '-';
		*p++ = digits[id->data[i] >> 4];
		*p++ = digits[id->data[i] & 0x0F];
	}
	*p = '\0';
}
