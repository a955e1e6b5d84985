import QMP

// What `blockdev-create` takes: arguments are checked against this before a job begins. What only a driver
// can judge, such as whether a cluster size is a power of two, is the job's to refuse.

extension StorageDaemon {
    static let creationDefinitions: [String: SchemaDefinition] = [
        "BlockdevCreateOptions": .object(
            ObjectSchema(
                [.required("driver", .named("BlockdevDriver"))], tag: "driver",
                variants: registry.drivers.map { driver in
                    .init(
                        driver.name,
                        driver.create == nil
                            ? "BlockdevCreateNotSupported" : "BlockdevCreateOptions-\(driver.name)")
                })),
        // The command says that the driver makes no images.
        "BlockdevCreateNotSupported": .object(ObjectSchema([], isCheckedByReceiver: true)),
        "BlockdevQcow2Version": .enumeration(["v2", "v3"]),
        "Qcow2CompressionType": .enumeration(["zlib", "zstd"]),
        "QCryptoCipherAlgorithm": .enumeration(["aes-128", "aes-192", "aes-256"]),
        "QCryptoCipherMode": .enumeration(["ecb", "cbc", "xts"]),
        "QCryptoIVGenAlgorithm": .enumeration(["plain", "plain64", "essiv"]),
        "QCryptoHashAlgorithm": .enumeration(["sha1", "sha224", "sha256", "sha384", "sha512"]),
        "QCryptoBlockCreateOptions": .object(
            ObjectSchema(
                [.required("format", .named("BlockdevQcow2EncryptionFormat"))], tag: "format",
                variants: [
                    .init("luks", "QCryptoBlockCreateOptionsLUKS"),
                    .init("aes", "BlockdevCreateNotSupported"),
                ])),
        "QCryptoBlockCreateOptionsLUKS": .object(ObjectSchema(encryptionOptions)),
    ].merging(
        creationOptions.map { name, options in
            ("BlockdevCreateOptions-\(name)", .object(ObjectSchema(options)))
        }, uniquingKeysWith: { first, _ in first })

    /// What drivers that make images take to make one.
    static let creationOptions: [String: [SchemaMember]] = [
        "file": [
            .required("filename", .string), .required("size", .integer),
            .optional("preallocation", .named("PreallocMode")), .optional("nocow", .boolean),
            .optional("extent-size-hint", .integer),
        ],
        "raw": [
            .required("file", .named("BlockdevRef")), .required("size", .integer),
            .optional("preallocation", .named("PreallocMode")),
        ],
        "luks": [
            .required("file", .named("BlockdevRef")), .optional("header", .named("BlockdevRef")),
            .required("size", .integer), .optional("preallocation", .named("PreallocMode")),
        ] + encryptionOptions,
        "qcow2": [
            .required("file", .named("BlockdevRef")), .required("size", .integer),
            .optional("version", .named("BlockdevQcow2Version")),
            .optional("backing-file", .string), .optional("backing-fmt", .string),
            .optional("encrypt", .named("QCryptoBlockCreateOptions")),
            .optional("cluster-size", .integer),
            .optional("preallocation", .named("PreallocMode")),
            .optional("lazy-refcounts", .boolean), .optional("refcount-bits", .integer),
            .optional("compression-type", .named("Qcow2CompressionType")),
            .optional("extended-l2", .boolean), .optional("data-file", .named("BlockdevRef")),
            .optional("data-file-raw", .boolean),
        ],
    ]

    private static let encryptionOptions: [SchemaMember] = [
        .optional("key-secret", .string),
        .optional("cipher-alg", .named("QCryptoCipherAlgorithm")),
        .optional("cipher-mode", .named("QCryptoCipherMode")),
        .optional("ivgen-alg", .named("QCryptoIVGenAlgorithm")),
        .optional("ivgen-hash-alg", .named("QCryptoHashAlgorithm")),
        .optional("hash-alg", .named("QCryptoHashAlgorithm")), .optional("iter-time", .integer),
    ]
}
