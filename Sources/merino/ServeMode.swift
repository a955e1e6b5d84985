import ArgumentParser
import NBDProtocol

/// What `serve` does instead of waiting for clients.
struct ServeMode: ParsableArguments {
    @Flag(name: [.customShort("L"), .long], help: "Tell what another server exports, and end.")
    var list = false
    @Option(
        name: .customLong("tls-hostname"),
        help: "With --list: the name that the server's certificate must have.")
    var tlsHostname: String?
    @Option(
        name: [.customShort("c", allowingJoined: true), .long],
        help: "Connect this device, /dev/nbdN, to the image (Linux).")
    var connect: String?
    @Option(
        name: [.customShort("d", allowingJoined: true), .long],
        help: "Disconnect this device, and end.")
    var disconnect: String?

    func validate(hasFile: Bool) throws {
        let others = [list, connect != nil, disconnect != nil].filter { $0 }.count
        guard others <= 1 else {
            throw ValidationError("--list, --connect and --disconnect exclude each other")
        }
        if list || disconnect != nil {
            guard !hasFile else {
                throw ValidationError(
                    "\(list ? "--list" : "--disconnect") is incompatible with a file name")
            }
        } else if !hasFile {
            throw ValidationError("Missing expected argument '<file>'")
        }
    }

    // MARK: List

    private static let flagNames: [(NBDTransmissionFlags, String)] = [
        (.readOnly, "readonly"), (.sendFlush, "flush"), (.sendFUA, "fua"),
        (.rotational, "rotational"), (.sendTrim, "trim"), (.sendWriteZeroes, "zeroes"),
        (.sendDF, "df"), (.canMultiConn, "multi"), (.sendResize, "resize"),
        (.sendCache, "cache"), (.sendFastZero, "fast-zero"),
        (.blockStatusPayload, "block-status-payload"),
    ]

    /// The exports as `qemu-nbd --list` shows them.
    static func describe(_ exports: [NBDRemoteExport]) -> String {
        var lines = ["exports available: \(exports.count)"]
        for export in exports {
            lines.append(" export: '\(export.name)'")
            if !export.description.isEmpty { lines.append("  description: \(export.description)") }
            if let details = export.details {
                lines.append("  size:  \(details.size)")
                let names = flagNames.filter { details.flags.contains($0.0) }.map { " \($0.1)" }
                lines.append(
                    "  flags: 0x\(String(details.flags.rawValue, radix: 16)) (\(names.joined()) )")
            }
            if let sizes = export.details?.blockSizes {
                lines.append("  min block: \(sizes.minimum)")
                lines.append("  opt block: \(sizes.preferred)")
                lines.append("  max block: \(sizes.maximum)")
            }
            if !export.contexts.isEmpty {
                lines.append("  available meta contexts: \(export.contexts.count)")
                lines += export.contexts.map { "   \($0)" }
            }
        }
        return lines.joined(separator: "\n") + "\n"
    }
}
