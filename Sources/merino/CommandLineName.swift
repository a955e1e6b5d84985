/// Which command line the program was called with: its own, or that of one of QEMU's tools by the
/// name of a link.
struct CommandLineName {
    /// As messages begin.
    let program: String
    /// The arguments of `merino` that mean the same.
    let arguments: [String]

    init(_ all: [String]) {
        let name = all.first?.split(separator: "/").last.map(String.init) ?? "merino"
        let rest = Array(all.dropFirst())
        switch name {
        case "qemu-img":
            program = name
            // Standard options of the tool itself stand before its command.
            arguments = rest.first == "-V" ? ["--version"] : Self.separatingSize(rest)
        case "qemu-io":
            program = name
            arguments = Self.isVersion(rest) ? ["--version"] : ["io"] + rest
        case "qemu-nbd":
            program = name
            arguments = Self.isVersion(rest) ? ["--version"] : ["serve"] + rest
        case "qemu-storage-daemon":
            program = name
            arguments = Self.isVersion(rest) ? ["--version"] : ["daemon"] + rest
        default:
            program = "merino"
            arguments = Self.separatingSize(rest)
        }
    }

    /// A last word like `-1G` is the size that resize takes, not options.
    private static func separatingSize(_ arguments: [String]) -> [String] {
        guard arguments.first == "resize", let last = arguments.last, arguments.count > 2,
            last.hasPrefix("-"), let digit = last.dropFirst().first, digit.isNumber,
            !arguments.contains("--")
        else { return arguments }
        return arguments.dropLast() + ["--", last]
    }

    private static func isVersion(_ arguments: [String]) -> Bool {
        arguments.count == 1 && (arguments[0] == "-V" || arguments[0] == "--version")
    }
}
