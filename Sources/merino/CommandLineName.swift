import BlockCore

/// Which command line the program was called with: its own, or that of one of QEMU's tools by the
/// name of a link.
struct CommandLineName {
    /// Of QEMU's tools, whose options and output the names stand for.
    private static let compatibleVersion = "7.2.0"
    private static let ownVersion = "merino 0.1.0"

    /// As messages begin.
    let program: String
    /// The arguments of `merino` that mean the same.
    let arguments: [String]
    /// What stands before the command for the image tool as a whole: `-T PATTERN`, `--trace PATTERN`.
    let traces: [String]
    /// What `--version` prints.
    let version: String
    /// What is wrong with the arguments already.
    let failure: BlockError?

    init(_ all: [String]) {
        let name = all.first?.split(separator: "/").last.map(String.init) ?? "merino"
        var rest = Array(all.dropFirst())
        var failure: BlockError?
        do throws(BlockError) {
            rest = try ToolOptions.withWholeNames(rest, of: name)
        } catch {
            failure = error
        }
        self.failure = failure
        var traces: [String] = []
        switch name {
        case "qemu-img":
            program = name
            let command = Self.takingTraces(rest, &traces)
            // Standard options of the tool itself stand before its command.
            arguments = command.first == "-V" ? ["--version"] : Self.separatingSize(command)
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
            arguments = Self.separatingSize(Self.takingTraces(rest, &traces))
        }
        self.traces = traces
        // Scripts read the number after these words.
        version =
            switch program {
            case "merino": Self.ownVersion
            case "qemu-nbd": "qemu-nbd \(Self.compatibleVersion) (\(Self.ownVersion))"
            default: "\(program) version \(Self.compatibleVersion) (\(Self.ownVersion))"
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

    /// Takes the options on trace events from before the command.
    private static func takingTraces(
        _ arguments: [String], _ traces: inout [String]
    ) -> [String] {
        var rest = arguments[...]
        while let word = rest.first {
            if word == "-T" || word == "--trace" {
                guard let text = rest.dropFirst().first else { break }
                traces.append(text)
                rest = rest.dropFirst(2)
            } else if word.hasPrefix("--trace=") {
                traces.append(String(word.dropFirst(8)))
                rest = rest.dropFirst()
            } else if word.hasPrefix("-T") {
                traces.append(String(word.dropFirst(2)))
                rest = rest.dropFirst()
            } else {
                break
            }
        }
        return Array(rest)
    }
}
