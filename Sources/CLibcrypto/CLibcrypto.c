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
    FUNCTION(EVP_DigestFinal_ex) \
    FUNCTION(EVP_DigestInit_ex2) \
    FUNCTION(EVP_DigestUpdate) \
    FUNCTION(EVP_MD_CTX_copy_ex) \
    FUNCTION(EVP_MD_CTX_free) \
    FUNCTION(EVP_MD_CTX_new) \
    FUNCTION(EVP_MD_fetch) \
    FUNCTION(EVP_MD_free) \
    FUNCTION(EVP_MD_get_block_size) \
    FUNCTION(EVP_MD_get_size) \
    FUNCTION(OPENSSL_cleanse)

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

// U1 = HMAC(password, salt || block), Un+1 = HMAC(password, Un); the key is all U, XORed.
struct merino_pbkdf2 {
    // Begun with the password: HMAC's two digests.
    EVP_MD_CTX *inner;
    EVP_MD_CTX *outer;
    EVP_MD_CTX *work;
    size_t size;
    uint8_t last[EVP_MAX_MD_SIZE];
    uint8_t key[EVP_MAX_MD_SIZE];
};

// Puts the HMAC of two pieces into `state->last`, which may be the first of them.
static int hmac(
    merino_pbkdf2 *state, const uint8_t *first, size_t first_size, const uint8_t *second,
    size_t second_size) {
    return real_EVP_MD_CTX_copy_ex(state->work, state->inner)
        && real_EVP_DigestUpdate(state->work, first, first_size)
        && (second_size == 0 || real_EVP_DigestUpdate(state->work, second, second_size))
        && real_EVP_DigestFinal_ex(state->work, state->last, NULL)
        && real_EVP_MD_CTX_copy_ex(state->work, state->outer)
        && real_EVP_DigestUpdate(state->work, state->last, state->size)
        && real_EVP_DigestFinal_ex(state->work, state->last, NULL);
}

static int begin(
    EVP_MD_CTX *context, EVP_MD *algorithm, const uint8_t *key, size_t size, uint8_t padding) {
    uint8_t pad[EVP_MAX_MD_SIZE * 4];
    for (size_t index = 0; index < size; index++) pad[index] = key[index] ^ padding;
    int done = real_EVP_DigestInit_ex2(context, algorithm, NULL)
        && real_EVP_DigestUpdate(context, pad, size);
    real_OPENSSL_cleanse(pad, sizeof pad);
    return done;
}

merino_pbkdf2 *merino_pbkdf2_new(
    const char *digest, const uint8_t *password, size_t password_size, const uint8_t *salt,
    size_t salt_size, uint32_t block) {
    const uint8_t number[4] = {block >> 24, block >> 16, block >> 8, block};
    uint8_t key[EVP_MAX_MD_SIZE * 4] = {0};
    merino_pbkdf2 *state = calloc(1, sizeof *state);
    EVP_MD *algorithm = real_EVP_MD_fetch(NULL, digest, NULL);
    int done = 0;
    if (state == NULL || algorithm == NULL) goto end;
    state->inner = real_EVP_MD_CTX_new();
    state->outer = real_EVP_MD_CTX_new();
    state->work = real_EVP_MD_CTX_new();
    state->size = (size_t)real_EVP_MD_get_size(algorithm);
    size_t key_size = (size_t)real_EVP_MD_get_block_size(algorithm);
    if (state->inner == NULL || state->outer == NULL || state->work == NULL) goto end;
    if (key_size > sizeof key || state->size > sizeof state->last) goto end;
    // A password longer than the digest's block is hashed first (RFC 2104 §2).
    if (password_size > key_size) {
        if (!real_EVP_Digest(password, password_size, key, NULL, algorithm, NULL)) goto end;
    } else {
        for (size_t index = 0; index < password_size; index++) key[index] = password[index];
    }
    done = begin(state->inner, algorithm, key, key_size, 0x36)
        && begin(state->outer, algorithm, key, key_size, 0x5c)
        && hmac(state, salt, salt_size, number, sizeof number);
    for (size_t index = 0; index < state->size; index++) state->key[index] = state->last[index];
end:
    real_OPENSSL_cleanse(key, sizeof key);
    if (algorithm != NULL) real_EVP_MD_free(algorithm);
    if (done) return state;
    merino_pbkdf2_free(state);
    return NULL;
}

void merino_pbkdf2_free(merino_pbkdf2 *state) {
    if (state == NULL) return;
    if (state->inner != NULL) real_EVP_MD_CTX_free(state->inner);
    if (state->outer != NULL) real_EVP_MD_CTX_free(state->outer);
    if (state->work != NULL) real_EVP_MD_CTX_free(state->work);
    real_OPENSSL_cleanse(state, sizeof *state);
    free(state);
}

int merino_pbkdf2_run(merino_pbkdf2 *state, uint32_t rounds) {
    for (uint32_t round = 0; round < rounds; round++) {
        if (!hmac(state, state->last, state->size, NULL, 0)) return -1;
        for (size_t index = 0; index < state->size; index++) state->key[index] ^= state->last[index];
    }
    return 0;
}

void merino_pbkdf2_key(const merino_pbkdf2 *state, uint8_t *output, size_t size) {
    for (size_t index = 0; index < size && index < state->size; index++)
        output[index] = state->key[index];
}
