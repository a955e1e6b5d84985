import BlockCore
import Synchronization

/// What the graphs of a process have in common, on however many threads they are: the names of their nodes,
/// the objects that options refer to, the files that were passed in. From any thread.
final class GraphCommons: Sendable {
    private struct Names {
        /// Where each node is.
        var graphs: [String: Place] = [:]
        var lastAutomatic = 0
    }

    /// A graph outlives its nodes' names.
    struct Place: Sendable {
        unowned let graph: BlockGraph
    }

    private let names = Mutex(Names())
    private let objects = Mutex<[String: any GraphObject]>([:])
    let descriptorSets = DescriptorSets()
    /// Long computations are given up.
    private let ending = Atomic(false)

    var isEnding: Bool { ending.load(ordering: .relaxed) }
    func end() { ending.store(true, ordering: .relaxed) }

    // MARK: Names

    func graph(ofNode name: String) -> BlockGraph? {
        names.withLock { $0.graphs[name]?.graph }
    }

    /// Takes a name that nobody has, for a node of `graph`.
    ///
    /// - Throws: `alreadyExists`, or `exhausted` when there are too many nodes.
    func take(_ name: String, for graph: BlockGraph) throws(BlockError) {
        try names.withLock { names throws(BlockError) in
            guard names.graphs[name] == nil else {
                throw BlockError(.alreadyExists, "there is a node '\(name)' already")
            }
            guard names.graphs.count < Limits.nodeCountMax else {
                throw BlockError(.exhausted, "there are \(Limits.nodeCountMax) nodes already")
            }
            names.graphs[name] = Place(graph: graph)
        }
    }

    func letGo(_ name: String) {
        names.withLock { $0.graphs[name] = nil }
    }

    /// The nodes are in `graph` from now on.
    func move(_ nodes: [BlockNode], to graph: BlockGraph) {
        names.withLock { names in
            for node in nodes { names.graphs[node.name] = Place(graph: graph) }
        }
    }

    /// A name for a node that was given none: `#block001` and so on.
    func automaticName() -> String {
        names.withLock { names in
            while true {
                names.lastAutomatic += 1
                let digits = String(names.lastAutomatic)
                let name =
                    "#block" + String(repeating: "0", count: max(0, 3 - digits.count)) + digits
                if names.graphs[name] == nil { return name }
            }
        }
    }

    // MARK: Objects

    func object(_ identifier: String) -> (any GraphObject)? {
        objects.withLock { $0[identifier] }
    }

    func add(_ object: any GraphObject, as identifier: String) throws(BlockError) {
        try objects.withLock { objects throws(BlockError) in
            guard objects[identifier] == nil else {
                throw BlockError(.alreadyExists, "there is an object '\(identifier)' already")
            }
            objects[identifier] = object
        }
    }

    func remove(_ identifier: String) {
        objects.withLock { $0[identifier] = nil }
    }
}
