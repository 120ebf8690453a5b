/*-------------------------------------------------------------------------
 *
 * isotime.h
 *		Dates and timestamps in ISO 8601.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_ISOTIME_H
#define PGF_ISOTIME_H

#include "postgres.h"

#include "lib/stringinfo.h"

extern void isotime_append(StringInfo out, Oid type, Datum value);

#endif							/* PGF_ISOTIME_H */
