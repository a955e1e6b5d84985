// GnuTLS, loaded when TLS is first used.
//
// Linked in the ordinary way, GnuTLS and the seven libraries it needs would be mapped, relocated and
// initialised whenever the program starts: a millisecond and two mebibytes, mostly for nothing. So the
// functions that Merino calls are defined here under their own names and forward to the library, which
// merino_gnutls_load brings in. Types and constants are those of GnuTLS's headers.

#include "CGnuTLS.h"

#include <dlfcn.h>
#include <pthread.h>

#ifdef __APPLE__
#define LIBRARY "libgnutls.30.dylib"
#else
#define LIBRARY "libgnutls.so.30"
#endif

// Result, name, parameters, arguments.
#define FUNCTIONS \
    FUNCTION(gnutls_alert_description_t, gnutls_alert_get, (gnutls_session_t session), (session)) \
    FUNCTION(const char *, gnutls_alert_get_name, (gnutls_alert_description_t alert), (alert)) \
    FUNCTION(int, gnutls_alert_send_appropriate, \
        (gnutls_session_t session, int err), \
        (session, err)) \
    FUNCTION(int, gnutls_anon_allocate_client_credentials, \
        (gnutls_anon_client_credentials_t *sc), \
        (sc)) \
    FUNCTION(int, gnutls_anon_allocate_server_credentials, \
        (gnutls_anon_server_credentials_t *sc), \
        (sc)) \
    FUNCTION(void, gnutls_anon_free_client_credentials, (gnutls_anon_client_credentials_t sc), (sc)) \
    FUNCTION(void, gnutls_anon_free_server_credentials, (gnutls_anon_server_credentials_t sc), (sc)) \
    FUNCTION(int, gnutls_anon_set_server_known_dh_params, \
        (gnutls_anon_server_credentials_t res, gnutls_sec_param_t sec_param), \
        (res, sec_param)) \
    FUNCTION(int, gnutls_bye, \
        (gnutls_session_t session, gnutls_close_request_t how), \
        (session, how)) \
    FUNCTION(int, gnutls_certificate_allocate_credentials, \
        (gnutls_certificate_credentials_t *res), \
        (res)) \
    FUNCTION(void, gnutls_certificate_free_credentials, \
        (gnutls_certificate_credentials_t sc), \
        (sc)) \
    FUNCTION(void, gnutls_certificate_get_trust_list, \
        (gnutls_certificate_credentials_t res, gnutls_x509_trust_list_t *tlist), \
        (res, tlist)) \
    FUNCTION(int, gnutls_certificate_get_x509_crt, \
        (gnutls_certificate_credentials_t res, unsigned index, gnutls_x509_crt_t **crt_list, \
         unsigned *crt_list_size), \
        (res, index, crt_list, crt_list_size)) \
    FUNCTION(const gnutls_datum_t *, gnutls_certificate_get_peers, \
        (gnutls_session_t session, unsigned int *list_size), \
        (session, list_size)) \
    FUNCTION(void, gnutls_certificate_server_set_request, \
        (gnutls_session_t session, gnutls_certificate_request_t req), \
        (session, req)) \
    FUNCTION(void, gnutls_certificate_set_dh_params, \
        (gnutls_certificate_credentials_t res, gnutls_dh_params_t dh_params), \
        (res, dh_params)) \
    FUNCTION(int, gnutls_certificate_set_x509_crl_file, \
        (gnutls_certificate_credentials_t res, const char *crlfile, gnutls_x509_crt_fmt_t type), \
        (res, crlfile, type)) \
    FUNCTION(int, gnutls_certificate_set_x509_key_file2, \
        (gnutls_certificate_credentials_t res, const char *certfile, const char *keyfile, gnutls_x509_crt_fmt_t type, \
         const char *pass, unsigned int flags), \
        (res, certfile, keyfile, type, pass, flags)) \
    FUNCTION(int, gnutls_certificate_set_x509_trust_file, \
        (gnutls_certificate_credentials_t cred, const char *cafile, gnutls_x509_crt_fmt_t type), \
        (cred, cafile, type)) \
    FUNCTION(int, gnutls_certificate_verification_status_print, \
        (unsigned int status, gnutls_certificate_type_t type, gnutls_datum_t *out, \
         unsigned int flags), \
        (status, type, out, flags)) \
    FUNCTION(int, gnutls_cipher_decrypt2, \
        (gnutls_cipher_hd_t handle, const void *ciphertext, size_t ciphertextlen, void *plaintext, \
         size_t plaintextlen), \
        (handle, ciphertext, ciphertextlen, plaintext, plaintextlen)) \
    FUNCTION(void, gnutls_cipher_deinit, (gnutls_cipher_hd_t handle), (handle)) \
    FUNCTION(int, gnutls_cipher_init, \
        (gnutls_cipher_hd_t *handle, gnutls_cipher_algorithm_t cipher, const gnutls_datum_t *key, \
         const gnutls_datum_t *iv), \
        (handle, cipher, key, iv)) \
    FUNCTION(int, gnutls_credentials_set, \
        (gnutls_session_t session, gnutls_credentials_type_t type, void *cred), \
        (session, type, cred)) \
    FUNCTION(void, gnutls_deinit, (gnutls_session_t session), (session)) \
    FUNCTION(void, gnutls_dh_params_deinit, (gnutls_dh_params_t dh_params), (dh_params)) \
    FUNCTION(int, gnutls_dh_params_import_pkcs3, \
        (gnutls_dh_params_t params, const gnutls_datum_t *pkcs3_params, \
         gnutls_x509_crt_fmt_t format), \
        (params, pkcs3_params, format)) \
    FUNCTION(int, gnutls_dh_params_init, (gnutls_dh_params_t *dh_params), (dh_params)) \
    FUNCTION(int, gnutls_error_is_fatal, (int error), (error)) \
    FUNCTION(int, gnutls_handshake, (gnutls_session_t session), (session)) \
    FUNCTION(int, gnutls_hash_fast, \
        (gnutls_digest_algorithm_t algorithm, const void *text, size_t length, void *digest), \
        (algorithm, text, length, digest)) \
    FUNCTION(int, gnutls_init, (gnutls_session_t *session, unsigned int flags), (session, flags)) \
    FUNCTION(void, gnutls_priority_deinit, (gnutls_priority_t priority_cache), (priority_cache)) \
    FUNCTION(int, gnutls_priority_init, \
        (gnutls_priority_t *priority_cache, const char *priorities, const char **err_pos), \
        (priority_cache, priorities, err_pos)) \
    FUNCTION(int, gnutls_priority_set, \
        (gnutls_session_t session, gnutls_priority_t priority), \
        (session, priority)) \
    FUNCTION(int, gnutls_psk_allocate_client_credentials, \
        (gnutls_psk_client_credentials_t *sc), \
        (sc)) \
    FUNCTION(int, gnutls_psk_allocate_server_credentials, \
        (gnutls_psk_server_credentials_t *sc), \
        (sc)) \
    FUNCTION(void, gnutls_psk_free_client_credentials, (gnutls_psk_client_credentials_t sc), (sc)) \
    FUNCTION(void, gnutls_psk_free_server_credentials, (gnutls_psk_server_credentials_t sc), (sc)) \
    FUNCTION(const char *, gnutls_psk_server_get_username, (gnutls_session_t session), (session)) \
    FUNCTION(int, gnutls_psk_set_client_credentials, \
        (gnutls_psk_client_credentials_t res, const char *username, const gnutls_datum_t *key, \
         gnutls_psk_key_flags flags), \
        (res, username, key, flags)) \
    FUNCTION(void, gnutls_psk_set_server_credentials_function, \
        (gnutls_psk_server_credentials_t cred, gnutls_psk_server_credentials_function *func), \
        (cred, func)) \
    FUNCTION(ssize_t, gnutls_record_recv, \
        (gnutls_session_t session, void *data, size_t data_size), \
        (session, data, data_size)) \
    FUNCTION(ssize_t, gnutls_record_send, \
        (gnutls_session_t session, const void *data, size_t data_size), \
        (session, data, data_size)) \
    FUNCTION(int, gnutls_server_name_set, \
        (gnutls_session_t session, gnutls_server_name_type_t type, const void *name, \
         size_t name_length), \
        (session, type, name, name_length)) \
    FUNCTION(void *, gnutls_session_get_ptr, (gnutls_session_t session), (session)) \
    FUNCTION(unsigned int, gnutls_session_get_verify_cert_status, \
        (gnutls_session_t argument), \
        (argument)) \
    FUNCTION(void, gnutls_session_set_ptr, (gnutls_session_t session, void *ptr), (session, ptr)) \
    FUNCTION(void, gnutls_session_set_verify_cert2, \
        (gnutls_session_t session, gnutls_typed_vdata_st *data, unsigned elements, \
         unsigned flags), \
        (session, data, elements, flags)) \
    FUNCTION(const char *, gnutls_strerror, (int error), (error)) \
    FUNCTION(void, gnutls_transport_set_ptr, \
        (gnutls_session_t session, gnutls_transport_ptr_t ptr), \
        (session, ptr)) \
    FUNCTION(void, gnutls_transport_set_pull_function, \
        (gnutls_session_t session, gnutls_pull_func pull_func), \
        (session, pull_func)) \
    FUNCTION(void, gnutls_transport_set_push_function, \
        (gnutls_session_t session, gnutls_push_func push_func), \
        (session, push_func)) \
    FUNCTION(void, gnutls_x509_crt_deinit, (gnutls_x509_crt_t cert), (cert)) \
    FUNCTION(int, gnutls_x509_crt_get_dn, \
        (gnutls_x509_crt_t cert, char *buf, size_t *buf_size), \
        (cert, buf, buf_size)) \
    FUNCTION(int, gnutls_x509_crt_import, \
        (gnutls_x509_crt_t cert, const gnutls_datum_t *data, gnutls_x509_crt_fmt_t format), \
        (cert, data, format)) \
    FUNCTION(int, gnutls_x509_crt_init, (gnutls_x509_crt_t *cert), (cert)) \
    FUNCTION(int, gnutls_x509_trust_list_verify_crt2, \
        (gnutls_x509_trust_list_t list, gnutls_x509_crt_t *cert_list, unsigned int cert_list_size, \
         gnutls_typed_vdata_st *data, unsigned int elements, unsigned int flags, \
         unsigned int *voutput, gnutls_verify_output_function func), \
        (list, cert_list, cert_list_size, data, elements, flags, voutput, func))

#define FUNCTION(result, name, parameters, arguments) static __typeof__(&name) real_##name;
FUNCTIONS
#undef FUNCTION

static const char *failure;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void load(void) {
    void *library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        failure = dlerror();
        if (failure == NULL) failure = LIBRARY " cannot be loaded";
        return;
    }
#define FUNCTION(result, name, parameters, arguments) \
    real_##name = (__typeof__(&name))dlsym(library, #name); \
    if (real_##name == NULL) failure = LIBRARY " has no " #name;
    FUNCTIONS
#undef FUNCTION
}

const char *merino_gnutls_load(void) {
    pthread_once(&once, load);
    return failure;
}

// Hidden, so that nothing inside GnuTLS resolves to these.
#define FUNCTION(result, name, parameters, arguments) \
    __attribute__((visibility("hidden"))) result name parameters { return real_##name arguments; }
FUNCTIONS
#undef FUNCTION
