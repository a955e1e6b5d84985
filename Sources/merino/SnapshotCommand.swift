import ArgumentParser
import BlockCore
import BlockGraph
import ImageTools

/// `merino snapshot`: the snapshots inside an image, with the options of `qemu-img snapshot`.
struct SnapshotCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "snapshot", _superCommandName: "merino",
        abstract: "List, make, apply and delete the snapshots inside an image.",
        discussion: """
            -a takes an identifier, or else a name; -d a name. Of several snapshots with one name \
            the first is taken.
            """)

    @Argument(help: "The image.") var file: String
    @OptionGroup var image: ImageArguments
    @Flag(name: [.customShort("l"), .long], help: "List them: what is done when nothing is asked.")
    var list: Int
    // Names may begin with '-'.
    @Option(
        name: [.customShort("c", allowingJoined: true), .long],
        parsing: .unconditionalSingleValue,
        help: "Keep the disk as it is now under this name.")
    var create: [String] = []
    @Option(
        name: [.customShort("a", allowingJoined: true), .long],
        parsing: .unconditionalSingleValue,
        help: "Make the disk what it was.")
    var apply: [String] = []
    @Option(
        name: [.customShort("d", allowingJoined: true), .long],
        parsing: .unconditionalSingleValue,
        help: "Delete the snapshot of this name.")
    var delete: [String] = []
    @Flag(name: [.customShort("q"), .long], help: "Say nothing but what is asked for.")
    var quiet = false

    func validate() throws {
        guard list + create.count + apply.count + delete.count <= 1 else {
            throw ValidationError("one of -l, -a, -c and -d is given, and once")
        }
    }

    private enum Task: Sendable {
        case list
        case create(String)
        case apply(String)
        case delete(String)
    }

    private var task: Task {
        if let name = create.first { return .create(name) }
        if let name = apply.first { return .apply(name) }
        if let name = delete.first { return .delete(name) }
        return .list
    }

    func run() throws {
        try Failure.rethrow { () throws(BlockError) in
            var source = try image.source(file)
            let task = task
            if case .list = task {} else { source.isWritable = true }
            // Snapshots are of this image alone.
            source.withoutBacking = true
            let opened = source
            try ToolSession.run { session throws(BlockError) in
                let node = try await session.open(opened)
                defer { node.release("command") }
                try await Self.carryOut(task, on: node)
            }
        }
    }

    private static func carryOut(_ task: Task, on node: BlockNode) async throws(BlockError) {
        switch task {
        case .list:
            StandardOutput.print(
                SnapshotList.text(node.driver.snapshotStore?.internalSnapshots ?? []))
        case .create(let name):
            _ = try await node.graph.createSnapshot(name, of: node, at: .now)
        case .apply(let text):
            let store = try node.requireSnapshotStore()
            let found = try require(store.snapshot(identifierOrName: text), text)
            try await node.graph.applySnapshot(found.identifier, of: node)
        case .delete(let name):
            let store = try node.requireSnapshotStore()
            let found = try require(store.snapshot(SnapshotSelector(name: name)), name)
            try await node.graph.deleteSnapshot(found.identifier, of: node)
        }
    }

    private static func require(
        _ snapshot: InternalSnapshot?, _ text: String
    ) throws(BlockError) -> InternalSnapshot {
        guard let snapshot else {
            throw BlockError(
                .notFound, "the image has no snapshot '\(text)'", remedy: "list them with -l")
        }
        return snapshot
    }
}
