/*-------------------------------------------------------------------------
 *
 * settings.h
 *		The settings of the connection to the broker, and the password file.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_SETTINGS_H
#define PGF_SETTINGS_H

#include "postgres.h"

extern char *pgf_uri;			/* one or several URIs, comma-separated */
extern char *pgf_password_file; /* "" = none */
extern char *pgf_tls_ca_file;	/* "" = the system's */
extern char *pgf_tls_cert_file; /* "" = none */
extern char *pgf_tls_key_file;	/* "" = none */
extern bool pgf_tls_verify;
extern int	pgf_connect_timeout;	/* ms */
extern int	pgf_heartbeat;		/* s, 0 disables */

extern void settings_define(void);

extern char *settings_read_password(void);

#endif							/* PGF_SETTINGS_H */
