/*-------------------------------------------------------------------------
 *
 * headers.c
 *		Reading the headers of a message, a jsonb object.
 *
 * Must never: trust that it is one, since a producer may send anything.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "capture/headers.h"

char *
headers_string(Jsonb *headers, const char *name)
{
	JsonbValue	buffer;
	JsonbValue *value = NULL;

	if (headers != NULL && JB_ROOT_IS_OBJECT(headers))
		value = getKeyJsonValueFromContainer(&headers->root, name, strlen(name), &buffer);
	if (value == NULL || value->type != jbvString)
		return NULL;
	return pnstrdup(value->val.string.val, value->val.string.len);
}
