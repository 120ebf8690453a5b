/*-------------------------------------------------------------------------
 *
 * tls.c
 *		What a TLS connection to a broker trusts, why it was refused, and
 *		reading from it and writing to it.
 *
 * The AMQP library opens the connection, and could verify it; but it only
 * tells that a certificate is bad, not in which way, it does not compare
 * addresses, before 0.14 it does not know the system's authorities, and it
 * would ask on the terminal for the passphrase of a key.  So its SSL_CTX is
 * set up here, and OpenSSL verifies chain and host name within the handshake:
 * before a certificate of ours, or a password, has been shown.
 *
 * The library's own reading swallows heartbeats and unknown frames for as long
 * as a peer sends them, and its writing waits without limit; so both are done here.
 *
 * Must never: fall back to trusting more than it was told; wait for anything.
 *
 * Not for threads: what went wrong last, and the server's name, are kept in
 * static variables.
 *
 * Scenarios, in test/t/024_tls.pl: certificates that are good, expired, for
 * another host, from an unknown authority; files that are missing, unreadable,
 * garbage, or do not belong together; no authorities at all; a peer that does
 * not speak TLS.  In test/t/046_connection.pl: the name that a server is told.
 *
 *-------------------------------------------------------------------------
 */
#include <arpa/inet.h>
#include <errno.h>
#include <limits.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <string.h>

#include "broker/tls.h"

/* X509_V_OK, or what the last certificate was refused for */
static long rejection = X509_V_OK;

/* did a key ask for its passphrase? */
static bool passphrase_wanted = false;

/* of the last handshake */
static SSL *last_session = NULL;

/* whom the server is to be, "" for an address */
static char server_name[256];

static bool is_address(const char *host);
static void handshake_begins(const SSL *ssl, int where, int value);
static int	remember_rejection(int ok, X509_STORE_CTX *store);
static int	explain_failure(void *session, int n);
static int	no_passphrase(char *buffer, int size, int for_writing, void *arg);
static const char *or_unknown(const char *reason);

void
tls_begin(void *context, const char *host)
{
	snprintf(server_name, sizeof(server_name), "%s", is_address(host) ? "" : host);
	SSL_CTX_set_info_callback(context, handshake_begins);
	SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION);
	SSL_CTX_set_options(context, SSL_OP_NO_RENEGOTIATION);
	last_session = NULL;
	rejection = X509_V_OK;
	passphrase_wanted = false;
	ERR_clear_error();
}

static bool
is_address(const char *host)
{
	unsigned char address[sizeof(struct in6_addr)];

	return inet_pton(AF_INET, host, address) == 1 || strchr(host, ':') != NULL;
}

/*
 * Sets the name that the handshake tells the server, and keeps the session, which
 * the AMQP library does not give away.  The library has set the name to what it
 * was told to connect to, which is an address; and addresses must not be told
 * (RFC 6066, section 3).
 */
static void
handshake_begins(const SSL *ssl, int where, int value)
{
	const char *name = server_name[0] != '\0' ? server_name : NULL;

	(void) value;
	if ((where & SSL_CB_HANDSHAKE_START) == 0)
		return;
	last_session = (SSL *) ssl;
	SSL_set_tlsext_host_name(last_session, name);
}

void *
tls_session(void)
{
	return last_session;
}

/* The socket does not block, so neither does this. */
ssize_t
tls_read(void *session, void *buffer, size_t size)
{
	int			n;

	ERR_clear_error();
	errno = 0;
	n = SSL_read(session, buffer, size < INT_MAX ? (int) size : INT_MAX);
	if (n > 0)
		return n;
	return explain_failure(session, n) == SSL_ERROR_ZERO_RETURN ? 0 : -1;
}

ssize_t
tls_write(void *session, const void *buffer, size_t size)
{
	int			n;

	ERR_clear_error();
	errno = 0;
	n = SSL_write(session, buffer, size < INT_MAX ? (int) size : INT_MAX);
	if (n > 0)
		return n;
	(void) explain_failure(session, n);
	return -1;
}

/* Sets errno to EAGAIN if a call, which returned n, is only to be repeated later. */
static int
explain_failure(void *session, int n)
{
	int			error = SSL_get_error(session, n);

	if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE)
		errno = EAGAIN;
	else if (errno == EAGAIN)
		errno = 0;
	return error;
}

bool
tls_trust(void *context, const char *ca_file, char *text, size_t text_size)
{
	int			loaded = ca_file != NULL ?
		SSL_CTX_load_verify_locations(context, ca_file, NULL) :
		SSL_CTX_set_default_verify_paths(context);

	if (loaded == 1)
		return true;
	if (ca_file != NULL)
		snprintf(text, text_size, "could not load CA certificate file \"%s\": %s",
				 ca_file, or_unknown(tls_reason()));
	else
		snprintf(text, text_size, "could not load the system's CA certificates: %s",
				 or_unknown(tls_reason()));
	return false;
}

bool
tls_verify(void *context, const char *host)
{
	X509_VERIFY_PARAM *param = SSL_CTX_get0_param(context);

	SSL_CTX_set_verify(context, SSL_VERIFY_PEER, remember_rejection);
	X509_VERIFY_PARAM_set_hostflags(param, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
	return X509_VERIFY_PARAM_set1_ip_asc(param, host) == 1 ||
		X509_VERIFY_PARAM_set1_host(param, host, strlen(host)) == 1;
}

/* The first thing that is wrong is the one to tell. */
static int
remember_rejection(int ok, X509_STORE_CTX *store)
{
	if (!ok && rejection == X509_V_OK)
		rejection = X509_STORE_CTX_get_error(store);
	return ok;
}

bool
tls_identify(void *context, const char *cert_file, const char *key_file,
			 char *text, size_t text_size)
{
	SSL_CTX_set_default_passwd_cb(context, no_passphrase);
	if (SSL_CTX_use_certificate_chain_file(context, cert_file) != 1)
		snprintf(text, text_size, "could not load certificate file \"%s\": %s",
				 cert_file, or_unknown(tls_reason()));
	else if (SSL_CTX_use_PrivateKey_file(context, key_file, SSL_FILETYPE_PEM) != 1)
		snprintf(text, text_size, "could not load private key file \"%s\": %s", key_file,
				 passphrase_wanted ? "it needs a passphrase" : or_unknown(tls_reason()));
	else
		return true;
	return false;
}

/* An empty one, with which decrypting fails. */
static int
no_passphrase(char *buffer, int size, int for_writing, void *arg)
{
	(void) for_writing;
	(void) arg;
	passphrase_wanted = true;
	if (size > 0)
		buffer[0] = '\0';
	return 0;
}

const char *
tls_rejection(void)
{
	switch (rejection)
	{
		case X509_V_OK:
			return NULL;
		case X509_V_ERR_HOSTNAME_MISMATCH:
		case X509_V_ERR_IP_ADDRESS_MISMATCH:
			return "it does not match the host name";
		case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT:
		case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
		case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
		case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
		case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
			return "it is not from a trusted authority";
		default:
			return X509_verify_cert_error_string(rejection);
	}
}

/* The oldest error is the cause of those after it. */
const char *
tls_reason(void)
{
	unsigned long code = ERR_peek_error();
	const char *reason;

	if (code == 0)
		return NULL;
#ifdef ERR_SYSTEM_ERROR
	if (ERR_SYSTEM_ERROR(code))
		return strerror(ERR_GET_REASON(code));
#endif
	reason = ERR_reason_error_string(code);
	return or_unknown(reason);
}

static const char *
or_unknown(const char *reason)
{
	return reason != NULL ? reason : "unknown error";
}
