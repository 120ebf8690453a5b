/*-------------------------------------------------------------------------
 *
 * tls.h
 *		What a TLS connection to a broker trusts, why it was refused, and
 *		reading from it and writing to it.
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
#include <sys/types.h>

/*
 * To be called first: forgets what went wrong before, allows TLS 1.2 and later
 * only (RFC 8996) and no renegotiation, so that a write never has to wait for
 * something to read, and tells the server the host's name (SNI, RFC 6066)
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
 * The session of the handshake since tls_begin(), to read and write; it lasts as long
 * as the socket of the AMQP library's.
 */
extern void *tls_session(void);

/*
 * Reads what there is, without waiting.  Returns the number of bytes; 0: the
 * peer has closed the session; -1: errno is EAGAIN if there is nothing, else
 * tls_reason() or errno says what is wrong.
 */
extern ssize_t tls_read(void *session, void *buffer, size_t size);

/*
 * Writes as much as the socket takes, without waiting.  Returns the number of bytes;
 * -1: errno is EAGAIN if it takes none now, else tls_reason() or errno says what is
 * wrong.  What it did not take must be written next.
 */
extern ssize_t tls_write(void *session, const void *buffer, size_t size);

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
