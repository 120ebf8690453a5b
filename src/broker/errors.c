/*-------------------------------------------------------------------------
 *
 * errors.c
 *		Texts about what went wrong with the broker.
 *
 * Must never: let bytes of the peer's into a log but as plain ASCII.
 *
 *-------------------------------------------------------------------------
 */
#include <stdio.h>

#include "broker/errors.h"

/* Fills *error; the text is cut at its size.  No request is named. */
void
error_set(BrokerError *error, int code, const char *format,...)
{
	va_list		args;

	va_start(args, format);
	error_set_args(error, code, format, args);
	va_end(args);
}

void
error_set_args(BrokerError *error, int code, const char *format, va_list args)
{
	error->code = code;
	error->class_id = error->method_id = 0;
	vsnprintf(error->text, sizeof(error->text), format, args);
}

/*
 * Copies len bytes of the peer's for our logs, cut at size - 1 and terminated:
 * whatever is not plain ASCII becomes a question mark.
 */
void
error_copy_text(char *to, size_t size, const void *from, size_t len)
{
	const unsigned char *bytes = from;

	if (len > size - 1)
		len = size - 1;
	for (size_t i = 0; i < len; i++)
		to[i] = bytes[i] >= ' ' && bytes[i] < 0x7f ? (char) bytes[i] : '?';
	to[len] = '\0';
}
