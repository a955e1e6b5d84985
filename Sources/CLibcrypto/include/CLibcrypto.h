#pragma once
#include <stddef.h>
#include <stdint.h>

// What Merino uses of OpenSSL's libcrypto, which is loaded when encryption is first used.

/// Loads the library, once in the process; before any other function here is called.
///
/// @return NULL, or why it cannot be loaded: a text that lives as long as the process.
const char *merino_crypto_load(void);

/// A block cipher in one mode with one key, for one direction and one thread at a time.
typedef struct merino_cipher merino_cipher;

/// @param name libcrypto's, as "AES-256-XTS"; the key has the length that it wants.
/// @return NULL when there is no such cipher, the key is refused, or there is no memory.
merino_cipher *merino_cipher_new(
    const char *name, const uint8_t *key, size_t key_size, int encrypts);
void merino_cipher_free(merino_cipher *cipher);

/// Transforms `size` bytes, whole cipher blocks; `input` may be `output`.
///
/// @param iv 16 bytes; not read by modes without one.
/// @return 0, or -1.
int merino_cipher_run(
    merino_cipher *cipher, const uint8_t *iv, const uint8_t *input, uint8_t *output, size_t size);

/// @param name libcrypto's, as "SHA256".
/// @param output as many bytes as the digest has, 64 at most.
/// @return 0, or -1.
int merino_digest(const char *name, const uint8_t *input, size_t size, uint8_t *output);

/// One block of a PBKDF2 key on its way (RFC 8018 §5.2), with HMAC. For one thread at a time.
typedef struct merino_pbkdf2 merino_pbkdf2;

/// @param block its number in the key, from 1 on.
/// @return a block after its first round; NULL when there is no such digest, or no memory.
merino_pbkdf2 *merino_pbkdf2_new(
    const char *digest, const uint8_t *password, size_t password_size, const uint8_t *salt,
    size_t salt_size, uint32_t block);
void merino_pbkdf2_free(merino_pbkdf2 *state);

/// Carries out more rounds.
///
/// @return 0, or -1.
int merino_pbkdf2_run(merino_pbkdf2 *state, uint32_t rounds);

/// The block after the rounds so far: `size` bytes, as many as the digest has at most.
void merino_pbkdf2_key(const merino_pbkdf2 *state, uint8_t *output, size_t size);
