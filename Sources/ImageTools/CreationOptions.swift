import BlockCore
import QMP

/// What `create -o` takes for a format: the names of command lines, and how drivers name the same.
public struct CreationOption: Sendable {
    public enum Kind: Sendable { case text, size, switching, number }

    /// As users write it: `cluster_size`.
    public let name: String
    public let kind: Kind
    /// What the summary line says when it is not given; `nil`: it says nothing then.
    public let standard: String?
    public let help: String

    init(_ name: String, _ kind: Kind, _ help: String, standard: String? = nil) {
        self.name = name
        self.kind = kind
        self.help = help
        self.standard = standard
    }

    /// The file below takes it, not the format.
    var isOfFile: Bool { name == "nocow" || name == "extent_size_hint" }

    /// As drivers name it: `cluster-size`.
    var driverName: String {
        name == "compat" ? "version" : String(name.map { $0 == "_" ? "-" : $0 })
    }

    /// The value in its plainest form: sizes in bytes, switches `on` or `off`.
    func normalized(_ value: String) throws(BlockError) -> String {
        switch kind {
        case .text:
            return value
        case .size:
            if let size = SizeText.parse(value) { return String(size) }
            throw invalid(value, "give a size, as in 64k or 10G")
        case .switching:
            switch value {
            case "on", "yes", "true", "y": return "on"
            case "off", "no", "false", "n": return "off"
            default: throw invalid(value, "use on or off")
            }
        case .number:
            if let number = Int(value), number >= 0 { return String(number) }
            throw invalid(value, "give a number")
        }
    }

    private func invalid(_ value: String, _ remedy: String) -> BlockError {
        BlockError(
            .invalidArgument, "option '\(name)' does not accept '\(value)'", remedy: remedy)
    }

    /// The normalized value as the driver takes it.
    func driverValue(_ value: String) -> JSONValue {
        guard name == "compat" else { return .string(value) }
        switch value {
        case "0.10", "v2": return "v2"
        case "1.1", "v3": return "v3"
        default: return .string(value)
        }
    }
}

extension CreationOption {
    /// The options of a format, in the order of the summary line; `nil` for formats without any.
    static func options(of format: String) -> [CreationOption] {
        switch format {
        case "qcow2": qcow2 + file
        case "luks": luks + file
        default: [size, file[0], preallocation, file[1]]
        }
    }

    private static let size = CreationOption("size", .size, "Virtual disk size")
    private static let preallocation = CreationOption(
        "preallocation", .text, "How space is reserved: off, falloc, full")

    /// Ciphers and keys: LUKS's own, or qcow2's in a group of their own.
    private static func encryption(_ group: String) -> [CreationOption] {
        [
            CreationOption(group + "key-secret", .text, "The secret that holds the passphrase"),
            CreationOption(group + "cipher-alg", .text, "Encryption: aes-128 or aes-256"),
            CreationOption(group + "cipher-mode", .text, "Its mode: xts or cbc"),
            CreationOption(
                group + "ivgen-alg", .text, "Vectors of sectors: plain64, plain or essiv"),
            CreationOption(group + "ivgen-hash-alg", .text, "The hash of essiv"),
            CreationOption(group + "hash-alg", .text, "The hash that makes keys of passphrases"),
            CreationOption(
                group + "iter-time", .number, "Milliseconds that trying a passphrase takes"),
        ]
    }

    private static let luks = [size, preallocation] + encryption("")

    private static let file = [
        CreationOption("nocow", .switching, "Without copy-on-write in the file system (btrfs)"),
        CreationOption("extent_size_hint", .size, "A hint to the file system; 0 for none"),
    ]

    private static let qcow2 =
        [
            CreationOption("encryption", .switching, "Encrypt with the old AES format"),
            CreationOption("encrypt.format", .text, "Encrypt: luks"),
        ] + encryption("encrypt.") + [
            CreationOption(
                "cluster_size", .size, "Cluster size, a power of two from 512 to 2M",
                standard: "65536"),
            CreationOption("extended_l2", .switching, "Extended L2 tables", standard: "off"),
            CreationOption(
                "preallocation", .text, "How space is reserved: off, metadata, falloc, full"),
            CreationOption(
                "compression_type", .text, "How clusters are compressed: zlib or zstd",
                standard: "zlib"),
            size,
            CreationOption("compat", .text, "Version of the format: 0.10 (2) or 1.1 (3)"),
            CreationOption("backing_file", .text, "Name of the backing image"),
            CreationOption("backing_fmt", .text, "Format of the backing image"),
            CreationOption("data_file", .text, "Name of an external data file"),
            CreationOption("data_file_raw", .switching, "The data file stays valid as a raw image"),
            CreationOption(
                "lazy_refcounts", .switching, "Postpone refcount updates", standard: "off"),
            CreationOption(
                "refcount_bits", .number, "Width of a reference count: 1 to 64", standard: "16"),
        ]
}

extension CreationOption {
    /// One line each, by name.
    static func helpLines(_ options: [CreationOption]) -> String {
        var text = ""
        for option in options.sorted(by: { $0.name < $1.name }) {
            let kind =
                switch option.kind {
                case .text: "<str>"
                case .size: "<size>"
                case .switching: "<bool (on/off)>"
                case .number: "<num>"
                }
            let left = "  \(option.name)=\(kind)"
            let gap = String(repeating: " ", count: max(0, 24 - left.count))
            text += "\(left)\(gap) - \(option.help)\n"
        }
        return text
    }

    /// What can be changed of images of a format; nothing of most.
    static func amendable(of format: String) -> [CreationOption] {
        switch format {
        case "luks": return keys(prefix: "")
        case "qcow2":
            let names = [
                "size", "compat", "backing_file", "backing_fmt", "lazy_refcounts", "refcount_bits",
                "data_file", "data_file_raw",
            ]
            return qcow2.filter { names.contains($0.name) } + keys(prefix: "encrypt.")
        default: return []
        }
    }

    private static func keys(prefix: String) -> [CreationOption] {
        [
            CreationOption("\(prefix)state", .text, "active: set a key; inactive: erase keys"),
            CreationOption("\(prefix)new-secret", .text, "The secret to set"),
            CreationOption("\(prefix)old-secret", .text, "A secret that opens slots now"),
            CreationOption("\(prefix)keyslot", .number, "This key slot, 0 to 7"),
            CreationOption(
                "\(prefix)iter-time", .number, "Milliseconds that trying a passphrase takes"),
        ]
    }
}
