import BlockCore
import BlockGraph
import BlockIO

/// Keeps a guest from giving its raw disk another format's header.
///
/// Writes to the beginning go one at a time, so that no two of them make a header together.
/// Confined to the graph's thread.
final class HeaderGuard {
    /// What formats are told by.
    static let byteCount = 4096

    private let registry: DriverRegistry
    private var isBusy = false
    private let turn = WaitQueue()

    init(_ registry: DriverRegistry) {
        self.registry = registry
    }

    /// Writes `vector` at `offset` of the window that begins at `start` of `file`.
    ///
    /// - Throws: `permissionDenied` when the image would look like another format afterwards.
    func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags, to file: Edge, at start: Int
    ) async throws(BlockError) {
        while isBusy { await turn.wait() }
        isBusy = true
        defer {
            isBusy = false
            turn.wakeAll()
        }
        // What will stand there: what does now, and over it what is being written.
        let count = min(Self.byteCount, file.size - start)
        let header = try IOVector(allocating: count)
        if offset > 0 || vector.count < count { try await file.read(start, into: header) }
        let part = min(vector.count, count - offset)
        header.slice(offset, part).copy(from: vector.slice(0, part))
        let format = header.array.withUnsafeBytes { registry.probe($0) }
        guard format == "raw" else {
            throw BlockError(
                .permissionDenied, "the write would give the raw image the header of '\(format)'",
                remedy: "say -f raw if that is meant", systemError: 1)
        }
        try await file.write(start + offset, from: vector, flags)
    }
}
