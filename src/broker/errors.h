/*-------------------------------------------------------------------------
 *
 * errors.h
 *		Texts about what went wrong with the broker.
 *
 * Pure: no socket, no rabbitmq-c, no PostgreSQL.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_ERRORS_H
#define PGF_ERRORS_H

#include <stdarg.h>

#include "broker/types.h"

extern void error_set(BrokerError *error, int code, const char *format,...)
			__attribute__((format(printf, 3, 4)));
extern void error_set_args(BrokerError *error, int code, const char *format, va_list args)
			__attribute__((format(printf, 3, 0)));
extern void error_copy_text(char *to, size_t size, const void *from, size_t len);

#endif							/* PGF_ERRORS_H */
