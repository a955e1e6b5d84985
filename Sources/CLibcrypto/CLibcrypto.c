// OpenSSL's libcrypto, loaded when encryption is first used.
//
// Few images are encrypted: who has none needs no libcrypto, and pays nothing for it at start. Types
// and constants are those of OpenSSL's headers; the functions are looked up by name.

#include "CLibcrypto.h"

#include <dlfcn.h>
#include <limits.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <stdlib.h>

#ifdef __APPLE__
#define LIBRARY "libcrypto.3.dylib"
#else
#define LIBRARY "libcrypto.so.3"
#endif

#define FUNCTIONS \
    FUNCTION(EVP_CIPHER_CTX_free) \
    FUNCTION(EVP_CIPHER_CTX_get_key_length) \
    FUNCTION(EVP_CIPHER_CTX_new) \
    FUNCTION(EVP_CIPHER_CTX_set_padding) \
    FUNCTION(EVP_CIPHER_fetch) \
    FUNCTION(EVP_CIPHER_free) \
    FUNCTION(EVP_CipherInit_ex2) \
    FUNCTION(EVP_CipherUpdate) \
    FUNCTION(EVP_Digest) \
    FUNCTION(EVP_MD_fetch) \
    FUNCTION(EVP_MD_free) \
    FUNCTION(PKCS5_PBKDF2_HMAC)

#define FUNCTION(name) static __typeof__(&name) real_##name;
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
#define FUNCTION(name) \
    real_##name = (__typeof__(&name))dlsym(library, #name); \
    if (real_##name == NULL) failure = LIBRARY " has no " #name;
    FUNCTIONS
#undef FUNCTION
}

const char *merino_crypto_load(void) {
    pthread_once(&once, load);
    return failure;
}

struct merino_cipher {
    EVP_CIPHER_CTX *context;
};

merino_cipher *merino_cipher_new(
    const char *name, const uint8_t *key, size_t key_size, int encrypts) {
    merino_cipher *cipher = calloc(1, sizeof *cipher);
    EVP_CIPHER *algorithm = real_EVP_CIPHER_fetch(NULL, name, NULL);
    if (cipher == NULL || algorithm == NULL) goto failed;
    cipher->context = real_EVP_CIPHER_CTX_new();
    if (cipher->context == NULL) goto failed;
    // Twice: the length that the cipher wants is known before the key is read.
    if (!real_EVP_CipherInit_ex2(cipher->context, algorithm, NULL, NULL, encrypts, NULL))
        goto failed;
    if ((size_t)real_EVP_CIPHER_CTX_get_key_length(cipher->context) != key_size) goto failed;
    if (!real_EVP_CipherInit_ex2(cipher->context, NULL, key, NULL, encrypts, NULL)) goto failed;
    real_EVP_CIPHER_CTX_set_padding(cipher->context, 0);
    real_EVP_CIPHER_free(algorithm);
    return cipher;
failed:
    if (algorithm != NULL) real_EVP_CIPHER_free(algorithm);
    merino_cipher_free(cipher);
    return NULL;
}

void merino_cipher_free(merino_cipher *cipher) {
    if (cipher == NULL) return;
    if (cipher->context != NULL) real_EVP_CIPHER_CTX_free(cipher->context);
    free(cipher);
}

int merino_cipher_run(
    merino_cipher *cipher, const uint8_t *iv, const uint8_t *input, uint8_t *output, size_t size) {
    int written = 0;
    if (size > INT_MAX) return -1;
    if (!real_EVP_CipherInit_ex2(cipher->context, NULL, NULL, iv, -1, NULL)) return -1;
    if (!real_EVP_CipherUpdate(cipher->context, output, &written, input, (int)size)) return -1;
    return (size_t)written == size ? 0 : -1;
}

int merino_digest(const char *name, const uint8_t *input, size_t size, uint8_t *output) {
    EVP_MD *algorithm = real_EVP_MD_fetch(NULL, name, NULL);
    if (algorithm == NULL) return -1;
    int done = real_EVP_Digest(input, size, output, NULL, algorithm, NULL);
    real_EVP_MD_free(algorithm);
    return done ? 0 : -1;
}

int merino_pbkdf2(
    const char *digest, const uint8_t *password, size_t password_size, const uint8_t *salt,
    size_t salt_size, uint32_t iterations, uint8_t *output, size_t size) {
    if (password_size > INT_MAX || salt_size > INT_MAX || size > INT_MAX) return -1;
    if (iterations == 0 || iterations > INT_MAX) return -1;
    EVP_MD *algorithm = real_EVP_MD_fetch(NULL, digest, NULL);
    if (algorithm == NULL) return -1;
    int done = real_PKCS5_PBKDF2_HMAC(
        (const char *)password, (int)password_size, salt, (int)salt_size, (int)iterations, algorithm,
        (int)size, output);
    real_EVP_MD_free(algorithm);
    return done ? 0 : -1;
}
