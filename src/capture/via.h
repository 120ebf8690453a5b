/*-------------------------------------------------------------------------
 *
 * via.h
 *		The way that a change has come: through which databases and tables.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_VIA_H
#define PGF_VIA_H

#include "postgres.h"

extern const char *via_database(void);
extern char *via_of_message(const char *header, const char *schema, const char *table);
extern bool via_contains(const char *via, const char *schema, const char *table);
extern void via_begin(const char *via);
extern void via_begin_deferred(void);
extern void via_end(void);
extern const char *via_current(void);

#endif							/* PGF_VIA_H */
