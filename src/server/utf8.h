/*-------------------------------------------------------------------------
 *
 * utf8.h
 *		Texts in the server's encoding, and in UTF-8, as the broker has them.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_UTF8_H
#define PGF_UTF8_H

#include "postgres.h"

extern void utf8_init(void);
extern const char *utf8_encode(const char *text, size_t len, size_t *utf8_len);
extern char *utf8_decode(const char *utf8, size_t len);
extern char *utf8_decode_exactly(const char *utf8, size_t len);
extern const char *utf8_view(const char *utf8, size_t len, size_t *text_len);

#endif							/* PGF_UTF8_H */
