import BlockCore
import BlockIO
import QMP

/// A frozen view of one disk, from its set-up to its end, by QMP commands.
///
///     before:  export ──► disk
///     during:  export ──► copy-before-write ──► disk         frozen export ──► snapshot-access
///                               └──► temporary image                                 │
///                               ▲────────────────────────────────────────────────────┘
///
/// Names follow from the disk's, so that another process can take down what one that died left.
public struct FleeceSession: Sendable {
    /// The node that is frozen.
    public let disk: String
    /// The name of the frozen export.
    public let exportName: String
    /// The temporary image's file.
    public let temporaryPath: String
    /// Who is asked for it.
    public let executor: any QMPExecutor

    var filterName: String { "fleece-\(tag)-filter" }
    private var accessName: String { "fleece-\(tag)-frozen" }
    private var temporaryName: String { "fleece-\(tag)-temp" }
    /// The file's, while the image in it is made.
    private var newName: String { "fleece-\(tag)-new" }
    private var exportIdentifier: String { "fleece-\(tag)" }
    private var viewNames: [String] { [filterName, accessName, temporaryName, newName] }
    /// Node names are short: a long name is cut, and told apart by a checksum (FNV-1a).
    private var tag: String {
        let plain = disk.allSatisfy {
            $0.isASCII && ($0.isLetter || $0.isNumber || "-._".contains($0))
        }
        if plain, disk.count <= 16 { return disk }
        var sum: UInt32 = 0x811c_9dc5
        for byte in disk.utf8 { sum = (sum ^ UInt32(byte)) &* 0x0100_0193 }
        let digits = String(sum, radix: 16)
        let head = disk.filter { $0.isASCII && ($0.isLetter || $0.isNumber) }.prefix(7)
        return "\(head)-" + String(repeating: "0", count: 8 - digits.count) + digits
    }

    /// How the view is frozen.
    public struct Options: Sendable {
        /// `break-snapshot`: when the temporary image fails, the guest goes on and the view is lost.
        public var breaksSnapshot = true
        /// Seconds that a guest's write waits for a copy at most; 0 for no limit.
        public var timeoutSeconds = 0
        public var temporaryFormat = "raw"
        /// Whose the temporary image becomes; `nil` for whoever makes it.
        public var owner: Owner?

        public init() {}
    }

    /// A user and a group of the system.
    public struct Owner: Sendable {
        public var user: UInt32
        public var group: UInt32

        public init(user: UInt32, group: UInt32) {
            self.user = user
            self.group = group
        }
    }

    /// - Parameter temporaryPath: of a file that is not there yet; absolute, for the daemon has a working
    ///   directory of its own.
    public init(
        of disk: String, exportName: String?, temporaryPath: String, executor: any QMPExecutor
    ) {
        self.disk = disk
        self.exportName = exportName ?? "\(disk)-frozen"
        self.temporaryPath = temporaryPath
        self.executor = executor
    }

    // MARK: Begin

    /// What a session has set up.
    private enum Step {
        case node(String)
        /// Exports of the disk were put above the filter.
        case exportsMoved
        case export
    }

    /// Freezes the disk and exports the frozen view.
    ///
    /// - Throws: with everything taken down again that was set up. What was there before, or what another
    ///   session set up meanwhile, stays.
    public func begin(_ options: Options) async throws(BlockError) {
        let nodes = try await FleeceNodes(of: executor)
        let size = try nodes.size(of: disk)
        try requireFree(nodes)
        guard temporaryPath.hasPrefix("/") else {
            throw BlockError(
                .invalidArgument, "the temporary image's path is not absolute: '\(temporaryPath)'")
        }
        let file = try FleeceFile(making: temporaryPath, for: options.owner)
        var steps: [Step] = []
        do throws(BlockError) {
            try await makeTemporary(in: file, size, options, &steps)
            try await freeze(options, &steps)
        } catch {
            // What a daemon was told that did not answer may have been done all the same.
            let isLost = error.code == .disconnected || error.code == .timedOut
            guard await undo(steps), !isLost else {
                throw BlockError(
                    error.code, error.message,
                    remedy:
                        "what was set up may still be there, with '\(temporaryPath)': --stop ends it"
                )
            }
            file.remove()
            // Where another session was faster, that is what the user wants to know.
            if let nodes = try? await FleeceNodes(of: executor) { try requireFree(nodes) }
            throw error
        }
    }

    private func freeze(_ options: Options, _ steps: inout [Step]) async throws(BlockError) {
        let exports = try await exports(of: disk)
        var actions: [JSONValue] = [["type": "blockdev-add", "data": filter(options)]]
        actions += moves(of: exports, to: filterName)
        do throws(BlockError) {
            // The moment: all of it, or nothing.
            _ = try await executor.execute("transaction", ["actions": .array(actions)])
            steps += [.node(filterName), .exportsMoved]
            _ = try await executor.execute(
                "blockdev-add",
                [
                    "driver": "snapshot-access", "node-name": .string(accessName),
                    "file": .string(filterName), "discard": "unmap",
                ])
        } catch {
            throw await told(error)
        }
        steps.append(.node(accessName))
        _ = try await executor.execute(
            "block-export-add",
            [
                "type": "nbd", "id": .string(exportIdentifier),
                "node-name": .string(accessName), "name": .string(exportName),
                "description": .string("frozen view of \(disk)"),
            ])
        steps.append(.export)
    }

    /// Why the disk cannot be frozen, and what can where a node above it writes.
    private func told(_ error: BlockError) async -> BlockError {
        guard let nodes = try? await FleeceNodes(of: executor),
            let (next, top) = nodes.writers(above: disk, except: viewNames)
        else { return error }
        return BlockError(
            error.code, "'\(disk)' is used by node '\(next)': \(error.message)",
            remedy: "freeze '\(top)' instead")
    }

    /// - Throws: when something has a name that the view's nodes get.
    private func requireFree(_ nodes: FleeceNodes) throws(BlockError) {
        guard let taken = viewNames.first(where: nodes.has) else { return }
        if isHeld(in: nodes) {
            throw BlockError(
                .alreadyExists, "a frozen view of '\(disk)' is held already",
                remedy: "end it with --stop, or with Ctrl-C where it was begun")
        }
        throw BlockError(
            .alreadyExists, "there is a node '\(taken)' already",
            remedy: "if no view of '\(disk)' is being set up right now, blockdev-del removes it")
    }

    /// Takes back what was set up, the last first.
    ///
    /// - Returns: whether all of it could be.
    private func undo(_ steps: [Step]) async -> Bool {
        var isWhole = true
        for step in steps.reversed() {
            do throws(BlockError) {
                switch step {
                case .node(let name):
                    _ = try await executor.execute("blockdev-del", ["node-name": .string(name)])
                case .exportsMoved: try await moveExportsBack()
                case .export:
                    _ = try await executor.execute(
                        "block-export-del", ["id": .string(exportIdentifier), "mode": "hard"])
                }
            } catch { isWhole = false }
        }
        return isWhole
    }

    private func filter(_ options: Options) -> JSONValue {
        [
            "driver": "copy-before-write", "node-name": .string(filterName),
            "file": .string(disk), "target": .string(temporaryName), "discard": "unmap",
            "on-cbw-error": options.breaksSnapshot ? "break-snapshot" : "break-guest-write",
            "cbw-timeout": .integer(options.timeoutSeconds),
        ]
    }

    private func makeTemporary(
        in file: FleeceFile, _ size: Int, _ options: Options, _ steps: inout [Step]
    ) async throws(BlockError) {
        try await checkDaemonSees(file, &steps)
        let isRaw = options.temporaryFormat == "raw"
        try file.setSize(isRaw ? size : 0)
        if !isRaw {
            _ = try await executor.execute("blockdev-add", newNode(readOnly: false))
            steps.append(.node(newName))
            try await create([
                "driver": .string(options.temporaryFormat), "file": .string(newName),
                "size": .integer(size),
            ])
            _ = try await executor.execute("blockdev-del", ["node-name": .string(newName)])
            steps.removeLast()
        }
        let storage: JSONValue = ["driver": "file", "filename": .string(temporaryPath)]
        // What the temporary image holds ends with the process: nothing of it needs to be flushed.
        _ = try await executor.execute(
            "blockdev-add",
            [
                "driver": .string(options.temporaryFormat), "node-name": .string(temporaryName),
                "file": storage, "discard": "unmap", "cache": ["no-flush": true],
            ])
        steps.append(.node(temporaryName))
    }

    /// The daemon may see other folders than this process does. It is asked for the size of the file, which
    /// is made one that no other has by chance, before anything is written through it.
    private func checkDaemonSees(
        _ file: FleeceFile, _ steps: inout [Step]
    ) async throws(BlockError) {
        let mark = Int.random(in: 1..<1 << 21) * 512
        try file.setSize(mark)
        _ = try await executor.execute("blockdev-add", newNode(readOnly: true))
        steps.append(.node(newName))
        let seen = try await FleeceNodes(of: executor).size(of: newName)
        _ = try await executor.execute("blockdev-del", ["node-name": .string(newName)])
        steps.removeLast()
        guard seen == mark else {
            throw BlockError(
                .permissionDenied,
                "the daemon sees another file at '\(temporaryPath)' than the one that was made there",
                remedy: "name a temporary image in a folder that is the same for both")
        }
    }

    private func newNode(readOnly: Bool) -> JSONValue {
        [
            "driver": "file", "node-name": .string(newName), "filename": .string(temporaryPath),
            "read-only": .bool(readOnly),
        ]
    }

    private func create(_ options: JSONValue) async throws(BlockError) {
        let job = "fleece-create-\(tag)"
        _ = try await executor.execute(
            "blockdev-create", ["job-id": .string(job), "options": options])
        while true {
            guard case .array(let jobs) = try await executor.execute("query-jobs", [:]),
                let state = jobs.first(where: { $0["id"] == .string(job) })
            else { throw BlockError(.notFound, "the job that creates the temporary image is gone") }
            if state["status"] == "concluded" {
                _ = try await executor.execute("job-dismiss", ["id": .string(job)])
                if case .string(let reason)? = state["error"] {
                    throw BlockError(
                        .inputOutput, "cannot create the temporary image: \(reason)")
                }
                return
            }
            await executor.thread.sleep(nanoseconds: 5_000_000)
        }
    }

    /// The identifiers of the exports through which clients reach a node.
    private func exports(of node: String) async throws(BlockError) -> [String] {
        guard case .array(let exports) = try await executor.execute("query-block-exports", [:])
        else {
            return []
        }
        return exports.compactMap { export in
            guard export["node-name"] == .string(node),
                case .string(let identifier)? = export["id"]
            else { return nil }
            return identifier
        }
    }

    // MARK: Progress

    public struct Progress: Sendable {
        /// Bytes that were copied before guests changed them.
        public var copiedBytes = 0
        /// Why the view is lost, once it is.
        public var breakage: String?
    }

    public func progress() async throws(BlockError) -> Progress {
        var result = Progress()
        guard
            case .array(let nodes) = try await executor.execute(
                "query-blockstats", ["query-nodes": true]),
            let filter = nodes.first(where: { $0["node-name"] == .string(filterName) })
        else { throw BlockError(.notFound, "the frozen view of '\(disk)' is gone") }
        if case .integer(let bytes)? = filter["driver-specific"]?["copied-bytes"] {
            result.copiedBytes = bytes
        }
        if case .string(let reason)? = filter["driver-specific"]?["broken"] {
            result.breakage = reason
        }
        return result
    }

    // MARK: End

    /// Takes everything down again: export, nodes. What is not there is passed over.
    ///
    /// - Throws: the first failure; the rest is taken down all the same. `busy`, with nothing done, when the
    ///   filter's name is that of somebody else's node.
    public func end() async throws(BlockError) {
        var failure: BlockError?
        func attempt(_ command: String, _ arguments: JSONValue) async {
            do throws(BlockError) {
                _ = try await executor.execute(command, arguments)
            } catch { failure = failure ?? error }
        }
        let nodes = try await FleeceNodes(of: executor)
        let isHeld = try isActive(in: nodes)
        if isHeld {
            if nodes.has(accessName, "snapshot-access", [(role: "file", node: filterName)]) {
                if try await exports(of: accessName).contains(exportIdentifier) {
                    await attempt(
                        "block-export-del", ["id": .string(exportIdentifier), "mode": "hard"])
                }
                await attempt("blockdev-del", ["node-name": .string(accessName)])
            }
            do throws(BlockError) { try await moveExportsBack() } catch {
                failure = failure ?? error
            }
            await attempt("blockdev-del", ["node-name": .string(filterName)])
        }
        // Without the filter, the file alone tells whose the node is.
        if isHeld || nodes.file(of: temporaryName) == temporaryPath {
            await attempt("blockdev-del", ["node-name": .string(temporaryName)])
        }
        if let failure { throw failure }
    }

    private func moveExportsBack() async throws(BlockError) {
        let exports = try await exports(of: filterName)
        guard !exports.isEmpty else { return }
        _ = try await executor.execute(
            "transaction", ["actions": .array(moves(of: exports, to: disk))])
    }

    /// The actions that put `node` below exports.
    private func moves(of exports: [String], to node: String) -> [JSONValue] {
        exports.map { identifier in
            [
                "type": "blockdev-replace",
                "data": [
                    "parent-type": "export", "export-id": .string(identifier),
                    "new-child": .string(node),
                ],
            ]
        }
    }

    /// Whether the filter is there, above this disk and the view's temporary image.
    private func isHeld(in nodes: FleeceNodes) -> Bool {
        nodes.has(
            filterName, "copy-before-write",
            [(role: "file", node: disk), (role: "target", node: temporaryName)])
    }

    /// Whether a view of the disk is held.
    ///
    /// - Throws: `busy` when the filter's name is that of somebody else's node.
    public func isActive() async throws(BlockError) -> Bool {
        try isActive(in: try await FleeceNodes(of: executor))
    }

    private func isActive(in nodes: FleeceNodes) throws(BlockError) -> Bool {
        guard nodes.has(filterName) else { return false }
        guard isHeld(in: nodes) else {
            throw BlockError(
                .busy,
                "node '\(filterName)' is not of a frozen view of '\(disk)'; nothing was changed")
        }
        return true
    }

    /// Nodes with names of the view although none is held: one is being set up, or one ended half way.
    public func leftNodes() async throws(BlockError) -> [String] {
        let nodes = try await FleeceNodes(of: executor)
        return viewNames.filter(nodes.has)
    }

    /// The file of the temporary image, as the daemon knows it.
    public func knownTemporaryPath() async throws(BlockError) -> String? {
        try await FleeceNodes(of: executor).file(of: temporaryName)
    }
}
