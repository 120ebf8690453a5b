/*-------------------------------------------------------------------------
 *
 * jsonbuild.h
 *		jsonb of what a message has: headers, and a body.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_JSONBUILD_H
#define PGF_JSONBUILD_H

#include "postgres.h"

#include "utils/jsonb.h"

#include "broker/types.h"

extern Jsonb *jsonbuild_fields(const BrokerField *fields, int count);
extern Jsonb *jsonbuild_text(const char *json, size_t len);

#endif							/* PGF_JSONBUILD_H */
