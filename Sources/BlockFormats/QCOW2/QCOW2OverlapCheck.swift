import BlockCore
import QMP

/// The structures that a write is checked against before it is made (`overlap-check`).
///
/// What is checked is in memory already: a check costs no reads. Only `inactive-l2` reads the
/// snapshots' L1 tables, once, when the image is opened.
struct QCOW2OverlapCheck: OptionSet, Sendable {
    let rawValue: UInt16

    static let mainHeader = QCOW2OverlapCheck(rawValue: 1)
    static let activeL1 = QCOW2OverlapCheck(rawValue: 2)
    static let activeL2 = QCOW2OverlapCheck(rawValue: 4)
    static let refcountTable = QCOW2OverlapCheck(rawValue: 8)
    static let refcountBlock = QCOW2OverlapCheck(rawValue: 16)
    static let snapshotTable = QCOW2OverlapCheck(rawValue: 32)
    static let inactiveL1 = QCOW2OverlapCheck(rawValue: 64)
    static let inactiveL2 = QCOW2OverlapCheck(rawValue: 128)
    static let bitmapDirectory = QCOW2OverlapCheck(rawValue: 256)
    /// Looked after with all others.
    static let encryptionHeader = QCOW2OverlapCheck(rawValue: 512)

    static let none: QCOW2OverlapCheck = []
    /// What takes the same time whatever the image.
    static let constant: QCOW2OverlapCheck = [
        .mainHeader, .activeL1, .refcountTable, .snapshotTable, .bitmapDirectory,
    ]
    /// And what is in memory.
    static let cached: QCOW2OverlapCheck = [.constant, .activeL2, .refcountBlock, .inactiveL1]
    static let all: QCOW2OverlapCheck = [.cached, .inactiveL2]

    /// Single structures, by the names of their options.
    static let each: [(name: String, check: QCOW2OverlapCheck)] = [
        ("main-header", .mainHeader), ("active-l1", .activeL1), ("active-l2", .activeL2),
        ("refcount-table", .refcountTable), ("refcount-block", .refcountBlock),
        ("snapshot-table", .snapshotTable), ("inactive-l1", .inactiveL1),
        ("inactive-l2", .inactiveL2), ("bitmap-directory", .bitmapDirectory),
    ]

    enum Template: String, Sendable, CaseIterable {
        case none, constant, cached, all

        var check: QCOW2OverlapCheck {
            switch self {
            case .none: .none
            case .constant: .constant
            case .cached: .cached
            case .all: .all
            }
        }
    }

    /// Reads `overlap-check`: a template by name, or an object with a template and single structures
    /// on or off.
    static func read(_ options: OptionReader) throws(BlockError) -> QCOW2OverlapCheck {
        guard case .object? = try options.value("overlap-check"),
            let object = try options.object("overlap-check")
        else {
            return try options.enumeration("overlap-check", as: Template.self)?.check ?? .cached
        }
        var chosen = try object.enumeration("template", as: Template.self)?.check ?? .cached
        for (name, check) in each {
            switch try object.bool(name) {
            case true?: chosen.insert(check)
            case false?: chosen.remove(check)
            case nil: break
            }
        }
        try object.finish()
        return chosen
    }
}

extension QCOW2Image {
    /// The structure that a write to `[host, host + count)` would destroy.
    ///
    /// - Parameter own: the kind of structure that is written itself.
    @inline(__always)
    func overlap(
        _ host: Int, _ count: Int, ignoring own: QCOW2OverlapCheck = .none
    ) -> String? {
        let checked = overlapCheck.subtracting(own)
        if checked.isEmpty { return nil }
        if checked.contains(.mainHeader), host < geometry.clusterSize { return "header" }
        let range = ByteRange(host, count)
        if checked.contains(.activeL1),
            range.overlaps(ByteRange(header.l1Offset, l1.count << 3))
        {
            return "L1 table"
        }
        let bytes = header.refcountTableClusters << geometry.clusterBits
        if checked.contains(.refcountTable),
            range.overlaps(ByteRange(header.refcountTableOffset, bytes))
        {
            return "refcount table"
        }
        if !own.contains(.encryptionHeader), let place = header.encryptionPlace,
            range.overlaps(place)
        {
            return "encryption header"
        }
        return overlapOfTables(host, count, checked)
    }

    @inline(__always)
    private func overlapOfTables(
        _ host: Int, _ count: Int, _ checked: QCOW2OverlapCheck
    ) -> String? {
        let last = (host + count - 1) >> geometry.clusterBits
        var cluster = host >> geometry.clusterBits
        while cluster <= last {
            if checked.contains(.activeL2), tableClusters.contains(cluster) { return "L2 table" }
            if checked.contains(.refcountBlock), refcountClusters.contains(cluster) {
                return "refcount block"
            }
            if checked.contains(.bitmapDirectory), !bitmapClusters.isEmpty,
                bitmapClusters.contains(cluster)
            {
                return "table of a dirty bitmap"
            }
            cluster += 1
        }
        if !checked.isDisjoint(with: .snapshots), overlapsSnapshotTable(host..<(host + count)) {
            return "table of a snapshot"
        }
        return nil
    }

    /// Refuses to write over the image's own structures, and marks the image corrupt.
    ///
    /// - Parameters:
    ///   - own: the kind of structure that is written itself.
    ///   - what: what is written, for the message.
    @inline(__always)
    func checkOverlap(
        _ host: Int, _ count: Int, ignoring own: QCOW2OverlapCheck = .none, _ what: String = "data"
    ) async throws(BlockError) {
        if let name = overlap(host, count, ignoring: own) {
            throw await corruption(
                "a write of \(what) at \(host) in the file would overwrite the \(name)",
                at: ByteRange(host, count))
        }
    }
}

extension QCOW2OverlapCheck {
    /// What is known of snapshots, all in one set.
    static let snapshots: QCOW2OverlapCheck = [.snapshotTable, .inactiveL1, .inactiveL2]
}
