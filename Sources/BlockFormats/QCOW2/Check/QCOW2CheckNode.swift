import BlockCore
import BlockGraph
import BlockIO

/// A qcow2 image that is open to be checked or repaired, in whatever state it is. It has no data.
final class QCOW2CheckNode: BlockDriver, @unchecked Sendable {
    private let node: BlockNode
    private let file: Edge
    private let dataFileIsGiven: Bool

    static func open(_ opening: NodeOpening) async throws(BlockError) -> QCOW2CheckNode {
        let node = opening.node
        let file = try await opening.requiredChild("file", roles: .image)
        let header = try await QCOW2Check.readHeader(file)
        node.size = header.size
        // Whatever the command line says of the image as a disk has no meaning here.
        _ = try opening.options.value("backing")
        let dataFile = try opening.options.value("data-file")
        _ = try opening.options.value("encrypt")
        _ = try QCOW2Options(reading: opening.options, header, discards: false)
        return QCOW2CheckNode(node, file, dataFileIsGiven: dataFile != nil)
    }

    private init(_ node: BlockNode, _ file: Edge, dataFileIsGiven: Bool) {
        self.node = node
        self.file = file
        self.dataFileIsGiven = dataFileIsGiven
    }

    func check(
        _ repair: CheckRepair, _ notice: @escaping CheckNotice
    ) async throws(BlockError) -> CheckReport {
        // Read again: an earlier repair may have changed it.
        let header = try await QCOW2Check.readHeader(file)
        let check = QCOW2Check(
            file, header, thread: node.thread, repair: repair, notice: notice)
        check.dataFileIsGiven = dataFileIsGiven
        return try await check.run()
    }

    var filename: String { file.node.driver.filename }

    var information: NodeInformation {
        get async throws(BlockError) {
            let header = try await QCOW2Check.readHeader(file)
            var result = NodeInformation()
            result.clusterSize = header.geometry.clusterSize
            result.isDirty = header.incompatible.contains(.dirty)
            result.isCorrupt = header.incompatible.contains(.corrupt)
            if !header.backingName.isEmpty {
                result.backingName = String(decoding: header.backingName, as: UTF8.self)
                result.backingFormat = header.backingFormat
            }
            let dataFile = header.extensions.first {
                $0.type == QCOW2.HeaderExtension.externalDataName
            }
            if let dataFile, header.incompatible.contains(.externalData) {
                let name = String(decoding: dataFile.data, as: UTF8.self)
                result.formatSpecific = ["type": "qcow2", "data": ["data-file": .string(name)]]
            }
            return result
        }
    }

    // MARK: No data

    private var hasNoData: BlockError {
        BlockError(.unsupported, "the image is open for a check only", node: node.name)
    }

    func read(_ offset: Int, into vector: IOVector, _ flags: ReadFlags) async throws(BlockError) {
        throw hasNoData
    }

    func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        throw hasNoData
    }

    func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        throw hasNoData
    }

    func discard(_ range: ByteRange) async throws(BlockError) { throw hasNoData }

    func flush() async throws(BlockError) { try await file.flush() }

    func blockStatus(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList
    ) async throws(BlockError) {
        throw hasNoData
    }

    func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {
        throw hasNoData
    }
}

extension QCOW2Check {
    /// 1 is AES, 2 is LUKS.
    private static let encryptionMethodMax: UInt32 = 2

    /// Makes the counts of an image right that was not closed cleanly, before it is written again. They
    /// are all that is late in one: nothing is dropped.
    ///
    /// - Throws: `corrupt` when more is wrong, or a part of it cannot be read: then nothing was changed.
    static func mendCounts(
        _ file: Edge, _ header: QCOW2.Header, on thread: IOThread
    ) async throws(BlockError) {
        let check = QCOW2Check(
            file, header, thread: thread, repair: .all, isOpening: true
        ) { _ in }
        // It is open.
        check.dataFileIsGiven = true
        let report = try await check.run()
        guard report.isClean, !check.lacksSnapshots else {
            let what =
                report.checkErrors > 0
                ? "parts of it cannot be read"
                : report.corruptions > 0
                    ? "its tables have errors" : "not all of its snapshots can be read"
            throw BlockError(
                .corrupt, "the image was not closed cleanly, and \(what)",
                remedy: "repair it with 'check -r all', or open it with read-only=on")
        }
    }

    /// The header of the image in `file`, of any state that a check can begin with.
    static func readHeader(_ file: Edge) async throws(BlockError) -> QCOW2.Header {
        var start = try IOVector(allocating: min(4096, file.size))
        try await file.read(0, into: start)
        let bits = try QCOW2.Header.clusterBits(of: UnsafeRawBufferPointer(bytes(of: start)))
        let count = min(1 << bits, file.size)
        if count > start.count {
            start = try IOVector(allocating: count)
            try await file.read(0, into: start)
        }
        let header = try QCOW2.Header(
            parsing: UnsafeRawBufferPointer(rebasing: bytes(of: start)[..<count]),
            fileSize: file.size, forCheck: true)
        guard header.encryptionMethod <= encryptionMethodMax else {
            throw BlockError(
                .unsupported, "encryption method \(header.encryptionMethod) is not known")
        }
        return header
    }

    private static func bytes(of vector: IOVector) -> UnsafeMutableRawBufferPointer {
        vector.single?.bytes ?? UnsafeMutableRawBufferPointer(start: nil, count: 0)
    }
}
