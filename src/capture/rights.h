/*-------------------------------------------------------------------------
 *
 * rights.h
 *		Who may do what with a topic.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_RIGHTS_H
#define PGF_RIGHTS_H

#include "postgres.h"

extern Oid	rights_administrator(void);
extern void rights_check(Oid role, const char *topic, const char *what, const char *consumer_group);

#endif							/* PGF_RIGHTS_H */
