import BlockCore
import BlockGraph
import BlockIO
import QMP

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

// Images at one of their snapshots, and images that forget what is written to them.

extension SnapshotSelector {
    /// Reads how a snapshot is named on a command line: `snapshot.id=…`, `snapshot.name=…`, both, or
    /// an identifier or name alone.
    ///
    /// - Returns: `nil` for the last.
    public init?(commandLine text: String) throws(BlockError) {
        guard text.hasPrefix("snapshot.") else { return nil }
        let options = try OptionReader(try KeyValue.parse(text), of: "the snapshot")
        guard let parts = try options.object("snapshot") else { return nil }
        self.init(identifier: try parts.string("id"), name: try parts.string("name"))
        try parts.finish()
        try options.finish()
    }
}

extension ToolSession {
    /// Opens a snapshot inside an image.
    ///
    /// - Parameters:
    ///   - text: as ``SnapshotSelector/init(commandLine:)`` takes it.
    ///   - node: the image, held as "command"; that hold moves to the snapshot's node.
    /// - Throws: `notFound` when there is no such snapshot.
    public func openSnapshot(
        _ text: String, of node: BlockNode
    ) async throws(BlockError) -> BlockNode {
        defer { node.release("command") }
        let store = try node.requireSnapshotStore()
        let found: InternalSnapshot?
        if let selector = try SnapshotSelector(commandLine: text) {
            found = store.snapshot(selector)
        } else {
            found = store.snapshot(identifierOrName: text)
        }
        guard let found else {
            throw BlockError(
                .notFound, "the image has no snapshot '\(text)'",
                remedy: "'merino snapshot' lists them")
        }
        return try await openAbove(
            node,
            [
                "driver": "snapshot-access", "read-only": true, "file": .string(node.name),
                "snapshot-id": .string(found.identifier),
            ])
    }

    /// Opens an image to be read, below a temporary one that takes the writes.
    ///
    /// - Returns: the temporary image's node, held as "command".
    func openTemporary(_ source: ImageSource) async throws(BlockError) -> BlockNode {
        var below = source
        below.isTemporary = false
        below.isWritable = false
        let overlay = try await openOverlay(
            above: try await open(below), in: Self.temporaryFolder)
        guard source.copiesOnRead else { return overlay }
        defer { overlay.release("command") }
        return try await openAbove(
            overlay, ["driver": "copy-on-read", "file": .string(overlay.name)])
    }

    /// Where temporary images go: `$TMPDIR`, or else `/var/tmp`.
    public static var temporaryFolder: String {
        getenv("TMPDIR").map { String(cString: $0) } ?? "/var/tmp"
    }

    /// Opens a part of a node: from byte `start` on.
    ///
    /// - Parameter node: held as "command"; that hold moves to the new node.
    public func openWindow(
        of node: BlockNode, from start: Int
    ) async throws(BlockError) -> BlockNode {
        defer { node.release("command") }
        return try await openAbove(
            node,
            [
                "driver": "raw", "offset": .integer(start), "file": .string(node.name),
                "read-only": .bool(node.isReadOnly), "discard": "unmap",
            ])
    }

    /// Puts a temporary image above a node, which takes what is written and is gone when it is closed.
    ///
    /// - Parameters:
    ///   - node: held as "command"; that hold moves to the temporary image.
    ///   - folder: where the temporary file is made; it loses its name at once.
    public func openOverlay(
        above node: BlockNode, in folder: String
    ) async throws(BlockError) -> BlockNode {
        defer { node.release("command") }
        let path = "\(folder)/merino-overlay-\(UInt64.random(in: 0 ... .max)).qcow2"
        let file = try await File.open(
            path, FileOptions(writable: true, create: true, exclusive: true), on: thread)
        await file.close()
        defer { try? thread.system.remove(path) }
        let storage: JSONValue = ["driver": "file", "filename": .string(path)]
        let creation = ImageCreation(
            graph,
            options: try OptionReader(
                ["size": .integer(node.size), "file": storage], of: "the temporary image"))
        do throws(BlockError) {
            try await Self.registry.driver(named: "qcow2").create?(creation)
        } catch {
            try? await creation.finish()
            throw error
        }
        try await creation.finish()
        return try await openAbove(
            node,
            [
                "driver": "qcow2", "file": storage, "backing": .string(node.name),
                "discard": "unmap",
                // Nothing of it outlives the process.
                "cache": ["no-flush": true],
            ])
    }

    private func openAbove(
        _ node: BlockNode, _ options: JSONValue
    ) async throws(BlockError) -> BlockNode {
        let above = try await graph.open(options)
        above.hold("command")
        above.release("opening")
        return above
    }
}
