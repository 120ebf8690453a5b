/*-------------------------------------------------------------------------
 *
 * guc.h
 *		The settings pg_fanout.*
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_GUC_H
#define PGF_GUC_H

extern char *pgf_uri;			/* one or several URIs, comma-separated */
extern char *pgf_password_file; /* "" = none */
extern char *pgf_tls_ca_file;	/* "" = the system's */
extern char *pgf_tls_cert_file; /* "" = none */
extern char *pgf_tls_key_file;	/* "" = none */
extern bool pgf_tls_verify;
extern int	pgf_connect_timeout;	/* ms */
extern int	pgf_heartbeat;		/* s, 0 disables */
extern int	pgf_confirm_timeout;	/* ms */
extern int	pgf_max_in_flight;	/* messages */
extern int	pgf_retry_interval; /* ms */
extern int	pgf_retry_limit;	/* attempts */
extern int	pgf_retention;		/* s */
extern int	pgf_inbox_retention;	/* s */
extern int	pgf_consumer_memory;	/* kB */
extern int	pgf_max_databases;
extern int	pgf_max_subscriptions;

/*
 * Defines the settings.  preloading: the library is being loaded by the
 * postmaster, so that those that need it (max_databases, ...) can be defined too.
 */
extern void guc_init(bool preloading);

/*
 * The password from pg_fanout.password_file: its first line without the line
 * end, palloc'd in the current context, or NULL if no file is set.  Raises an
 * error if the file cannot be read, if it is empty, or if others than its
 * owner may read it (the server's rule for ssl_key_file: a file of root may be
 * readable by a group).  The error names the file and quotes nothing of it.
 */
extern char *guc_read_password(void);

#endif							/* PGF_GUC_H */
