#pragma once
#include <gnutls/crypto.h>
#include <gnutls/gnutls.h>
#include <gnutls/crypto.h>
#include <gnutls/x509.h>

/// Loads GnuTLS, once in the process; before any other of its functions is called.
///
/// @return NULL, or why it cannot be loaded: a text that lives as long as the process.
const char *merino_gnutls_load(void);
