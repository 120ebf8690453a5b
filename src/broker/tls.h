/*-------------------------------------------------------------------------
 *
 * tls.h
 *		What a TLS connection to a broker trusts, and why it was refused.
 *
 * Pure: OpenSSL only, no rabbitmq-c, no PostgreSQL.  A context is the SSL_CTX
 * of a connection that is not open yet.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_TLS_H
#define PGF_TLS_H

#include <stdbool.h>
#include <stddef.h>

/*
 * To be called first: forgets what went wrong before, allows TLS 1.2 and later
 * only (RFC 8996), and tells the server the host's name (SNI, RFC 6066)
 * whatever address is connected to.
 */
extern void tls_begin(void *context, const char *host);

/*
 * Trusts the authorities in a file, or with NULL those of the operating
 * system (SSL_CERT_FILE and SSL_CERT_DIR in the environment replace them).
 * False, with a reason in text, if they cannot be loaded.
 */
extern bool tls_trust(void *context, const char *ca_file, char *text, size_t text_size);

/*
 * Makes the handshake fail unless the server's certificate comes from a
 * trusted authority, is valid now, and is for that host: a name, or an
 * address, with which an iPAddress in the certificate is compared.
 */
extern bool tls_verify(void *context, const char *host);

/*
 * Shows a certificate (with its chain) to the server.  False, with a reason in
 * text, if the files cannot be loaded or do not belong together.  A key with a
 * passphrase is refused: nobody is there to type it.
 */
extern bool tls_identify(void *context, const char *cert_file, const char *key_file,
						 char *text, size_t text_size);

/*
 * Why the server's certificate was refused since tls_begin(), or NULL if it
 * was not.  A static text.
 */
extern const char *tls_rejection(void);

/*
 * What OpenSSL says about its last call that failed, or NULL.  Valid until the
 * next call.
 */
extern const char *tls_reason(void);

#endif							/* PGF_TLS_H */
