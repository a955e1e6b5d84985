import NBDProtocol

/// What `serve --list` tells of another server.
enum ExportListing {
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
