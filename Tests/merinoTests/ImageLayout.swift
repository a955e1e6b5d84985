/// One combination of the options that qcow2 images are made with.
struct ImageLayout {
    enum Encryption: CaseIterable { case none, luks, aes }
    enum DataFile: CaseIterable { case none, plain, raw }

    let clusterSize: Int
    let refcountBits: Int
    let isVersion2: Bool
    let isLazy: Bool
    let isExtended: Bool
    let isZstd: Bool
    let preallocation: String
    let dataFile: DataFile
    let encryption: Encryption
    let hasBacking: Bool

    private static let clusterSizes = [512, 4096, 65536, 2 << 20]
    private static let refcounts = [16, 1, 8, 64]
    private static let preallocations = ["off", "metadata", "falloc", "full"]

    /// How many numbers there are; some give the same combination, where options exclude each other.
    static let count =
        clusterSizes.count * refcounts.count * preallocations.count * DataFile.allCases.count
        * Encryption.allCases.count * 32

    init(number: Int) {
        var rest = number
        func take<T>(_ values: [T]) -> T {
            defer { rest /= values.count }
            return values[rest % values.count]
        }
        clusterSize = take(Self.clusterSizes)
        let encryption = take(Encryption.allCases)
        let dataFile = take(DataFile.allCases)
        let hasBacking = take([false, true])
        let preallocation = take(Self.preallocations)
        let isVersion2 = take([false, true])
        let refcountBits = take(Self.refcounts)
        let (isLazy, isExtended, isZstd) = (
            take([false, true]), take([false, true]), take([false, true])
        )
        // What the format has no room for, and what makes no sense together, is left out.
        self.encryption = encryption
        self.isVersion2 = isVersion2
        self.dataFile = isVersion2 || encryption != .none ? .none : dataFile
        self.hasBacking = hasBacking && self.dataFile != .raw
        self.preallocation =
            self.hasBacking || encryption != .none || self.dataFile != .none ? "off" : preallocation
        self.refcountBits = isVersion2 ? 16 : refcountBits
        self.isLazy = !isVersion2 && isLazy
        self.isExtended = !isVersion2 && isExtended && clusterSize >= 16384
        self.isZstd = !isVersion2 && isZstd
    }

    /// As `create -o` takes them, but for backing and data file.
    var options: String {
        var options = ["cluster_size=\(clusterSize)", "preallocation=\(preallocation)"]
        options.append(isVersion2 ? "compat=0.10" : "refcount_bits=\(refcountBits)")
        if isLazy { options.append("lazy_refcounts=on") }
        if isExtended { options.append("extended_l2=on") }
        if isZstd { options.append("compression_type=zstd") }
        switch encryption {
        case .none: break
        case .luks:
            options += [
                "encrypt.format=luks", "encrypt.key-secret=key", "encrypt.iter-time=10",
            ]
        case .aes: options += ["encrypt.format=aes", "encrypt.key-secret=key"]
        }
        return options.joined(separator: ",")
    }
}
