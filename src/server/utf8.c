/*-------------------------------------------------------------------------
 *
 * utf8.c
 *		Texts in the server's encoding, and in UTF-8, as the broker has them.
 *
 * Not every text has a form in the other encoding: SQL_ASCII takes any bytes, a peer
 * may send any, and LATIN1 has few characters.  That is a result, and never an error.
 *
 * The server's conversions are looked up once, since what the broker delivers is
 * read while no transaction is open, in which nothing can be looked up.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/namespace.h"
#include "fmgr.h"
#include "mb/pg_wchar.h"
#include "utils/memutils.h"

#include "server/utf8.h"

/* Longest text that the conversions take, and longest one whose result is a text. */
#define MAX_CONVERTED (INT_MAX / MAX_CONVERSION_GROWTH - 1)
#define MAX_DECODED (MaxAllocSize / MAX_CONVERSION_GROWTH - 1)

static bool initialized = false;
static FmgrInfo encoder;		/* fn_oid 0: there is no conversion */
static FmgrInfo decoder;

static void
look_up(int from, int to, FmgrInfo *conversion)
{
	Oid			proc = FindDefaultConversionProc(from, to);

	if (OidIsValid(proc))
		fmgr_info_cxt(proc, conversion, TopMemoryContext);
}

/*
 * Looks up what the other functions need, in a transaction.  They do that
 * themselves, but for a process that calls one first while there is none.
 */
void
utf8_init(void)
{
	int			encoding = GetDatabaseEncoding();

	if (initialized)
		return;
	if (encoding != PG_UTF8 && encoding != PG_SQL_ASCII)
	{
		Assert(IsTransactionState());
		look_up(encoding, PG_UTF8, &encoder);
		look_up(PG_UTF8, encoding, &decoder);
	}
	initialized = true;
}

/* Returns the converted text, terminated; NULL if a part of it cannot be. */
static char *
convert(FmgrInfo *conversion, int from, int to, const char *text, size_t len)
{
	char	   *out;
	Datum		converted;

	if (!OidIsValid(conversion->fn_oid) || len > MAX_CONVERTED)
		return NULL;
	out = palloc_extended(len * MAX_CONVERSION_GROWTH + 1, MCXT_ALLOC_HUGE);
	converted = FunctionCall6(conversion, Int32GetDatum(from), Int32GetDatum(to), CStringGetDatum(text),
							  CStringGetDatum(out), Int32GetDatum((int32) len), BoolGetDatum(true));
	if (DatumGetInt32(converted) == (int32) len)
		return out;
	pfree(out);
	return NULL;
}

/*
 * Is it a text of ASCII alone, without NUL?  It is the same in all encodings that the
 * server has.  Most are; eight bytes at a time, since each header of a message is looked at.
 */
static bool
is_ascii(const char *bytes, size_t len)
{
	const uint64 low = UINT64CONST(0x7f7f7f7f7f7f7f7f);
	uint64		any = 0;		/* bits that any byte has */
	uint64		nonzero = ~low; /* highest bit: no byte at that place was NUL */

	for (; len >= sizeof(uint64); len -= sizeof(uint64), bytes += sizeof(uint64))
	{
		uint64		word;

		memcpy(&word, bytes, sizeof(word));
		any |= word;
		nonzero &= (word & low) + low;
	}
	for (; len > 0; len--, bytes++)
	{
		if (*bytes == '\0' || (*bytes & 0x80) != 0)
			return false;
	}
	return (any & ~low) == 0 && (nonzero & ~low) == ~low;
}

/*
 * Returns a text of the server's in UTF-8, not necessarily terminated; *utf8_len: its
 * length.  In the current context, or the text itself.  NULL: it has no such form.
 */
const char *
utf8_encode(const char *text, size_t len, size_t *utf8_len)
{
	int			encoding = GetDatabaseEncoding();
	const char *utf8;

	*utf8_len = len;
	if (encoding == PG_UTF8)
		return text;

	if (encoding == PG_SQL_ASCII)
		return pg_verify_mbstr(PG_UTF8, text, len, true) ? text : NULL;

	utf8_init();
	utf8 = convert(&encoder, encoding, PG_UTF8, text, len);
	if (utf8 != NULL)
		*utf8_len = strlen(utf8);
	return utf8;
}

/*
 * Returns the peer's bytes in the server's encoding, not necessarily terminated;
 * *text_len: their length.  In the current context, or the bytes themselves.  NULL: they
 * are not UTF-8, or cannot be converted.
 */
const char *
utf8_view(const char *utf8, size_t len, size_t *text_len)
{
	int			encoding = GetDatabaseEncoding();
	const char *decoded;

	*text_len = len;
	if (len <= MAX_DECODED && is_ascii(utf8, len))
		return utf8;
	if (len > MAX_DECODED || !pg_verify_mbstr(PG_UTF8, utf8, len, true))
		return NULL;
	if (encoding == PG_UTF8 || encoding == PG_SQL_ASCII)
		return utf8;
	utf8_init();
	decoded = convert(&decoder, PG_UTF8, encoding, utf8, len);
	if (decoded != NULL)
		*text_len = strlen(decoded);
	return decoded;
}

/* The same, terminated and in the current context in any case. */
char *
utf8_decode(const char *utf8, size_t len)
{
	size_t		text_len;
	const char *view = utf8_view(utf8, len, &text_len);

	if (view == NULL || view != utf8)
		return unconstify(char *, view);
	return pnstrdup(view, text_len);
}

/*
 * The same; NULL also if encoding the text does not give the same bytes again.  Some
 * encodings have one character for several of Unicode's (EUC_JP: U+00A6 and U+FFE4), and
 * some have one that cannot be converted back (EUC_TW: U+4E04).
 */
char *
utf8_decode_exactly(const char *utf8, size_t len)
{
	char	   *text = utf8_decode(utf8, len);
	const char *again;
	size_t		again_len;

	if (text == NULL || GetDatabaseEncoding() == PG_UTF8 || GetDatabaseEncoding() == PG_SQL_ASCII)
		return text;

	again = utf8_encode(text, strlen(text), &again_len);
	if (again != NULL && again_len == len && memcmp(again, utf8, len) == 0)
		return text;

	pfree(text);
	return NULL;
}
