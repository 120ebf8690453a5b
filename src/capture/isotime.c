/*-------------------------------------------------------------------------
 *
 * isotime.c
 *		Dates and timestamps in ISO 8601.
 *
 * The texts are those of JsonEncodeDateTime(), in UTC.  Of the years 1 to 9999, which
 * are nearly all, they are written here: the server's function takes three times as
 * long, and was a tenth of the cost of a captured row.
 *
 * Must never: look at a setting of the session.  No state, no locks.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/date.h"
#include "utils/datetime.h"
#include "utils/json.h"
#include "utils/timestamp.h"

#include "capture/isotime.h"
#include "server/append.h"

/* Julian days of 1 January 1 and 31 December 9999. */
#define FIRST_DAY	1721426
#define LAST_DAY	5373484

static char *
put_two_digits(char *p, int number)
{
	*p++ = '0' + number / 10;
	*p++ = '0' + number % 10;
	return p;
}

/* day: Julian */
static char *
put_date(char *p, int day)
{
	int			year;
	int			month;
	int			day_of_month;

	j2date(day, &year, &month, &day_of_month);
	p = put_two_digits(p, year / 100);
	p = put_two_digits(p, year % 100);
	*p++ = '-';
	p = put_two_digits(p, month);
	*p++ = '-';
	return put_two_digits(p, day_of_month);
}

/* A point and up to six digits; nothing if there are no microseconds. */
static char *
put_fraction(char *p, int microseconds)
{
	if (microseconds == 0)
		return p;
	*p++ = '.';
	p = put_two_digits(p, microseconds / 10000);
	p = put_two_digits(p, microseconds / 100 % 100);
	p = put_two_digits(p, microseconds % 100);
	while (p[-1] == '0')
		p--;
	return p;
}

/* microseconds: since midnight */
static char *
put_time(char *p, int64 microseconds)
{
	int			seconds = microseconds / USECS_PER_SEC;

	p = put_two_digits(p, seconds / SECS_PER_HOUR);
	*p++ = ':';
	p = put_two_digits(p, seconds / SECS_PER_MINUTE % MINS_PER_HOUR);
	*p++ = ':';
	p = put_two_digits(p, seconds % SECS_PER_MINUTE);
	return put_fraction(p, microseconds % USECS_PER_SEC);
}

/*
 * Takes a date or a timestamp apart: the Julian day, and microseconds since midnight.
 * Returns whether it is of an ordinary year, which neither infinity is.
 */
static bool
split(Oid type, Datum value, int64 *day, int64 *microseconds)
{
	if (type == DATEOID)
	{
		*day = (int64) DatumGetDateADT(value) + POSTGRES_EPOCH_JDATE;
		*microseconds = 0;
	}
	else
	{
		Timestamp	timestamp = DatumGetTimestamp(value);

		*day = timestamp / USECS_PER_DAY + POSTGRES_EPOCH_JDATE;
		*microseconds = timestamp % USECS_PER_DAY;
		if (*microseconds < 0)
		{
			*microseconds += USECS_PER_DAY;
			*day -= 1;
		}
	}
	return *day >= FIRST_DAY && *day <= LAST_DAY;
}

/*
 * Appends a date, a timestamp or a timestamptz, this one in UTC, as to_json() writes
 * it, without quotes.  Infinity comes as that word.  Raises an error (22008) for a
 * value that is none.
 */
void
isotime_append(StringInfo out, Oid type, Datum value)
{
	char	   *p = append_room(out, MAXDATELEN + 1);
	int64		day;
	int64		microseconds;
	int			utc = 0;

	if (!split(type, value, &day, &microseconds))
	{
		JsonEncodeDateTime(p, value, type, &utc);
		append_done(out, p + strlen(p));
		return;
	}
	p = put_date(p, day);
	if (type != DATEOID)
	{
		*p++ = 'T';
		p = put_time(p, microseconds);
	}
	if (type == TIMESTAMPTZOID)
	{
		memcpy(p, "+00:00", 6);
		p += 6;
	}
	append_done(out, p);
}
