import BlockCore
import BlockGraph
import QMP

/// A block graph to be drawn: nodes, who uses them, and how they hang together.
///
/// Made of a graph in this process or of what a daemon says of its own; drawn as text, as DOT (the
/// language of Graphviz) or as SVG, in the other files of this folder.
public struct GraphPicture: Sendable, Equatable {
    public struct Box: Sendable, Equatable {
        public var title: String
        /// Driver, size, file: a line each.
        public var details: [String]
        /// An export or another user, not a node.
        public var isUser: Bool

        public init(title: String, details: [String] = [], isUser: Bool = false) {
            self.title = title
            self.details = details
            self.isUser = isUser
        }
    }

    public struct Line: Sendable, Equatable {
        /// Indices of boxes.
        public var parent: Int
        public var child: Int
        /// What the parent calls the child.
        public var name: String

        public init(parent: Int, child: Int, name: String) {
            self.parent = parent
            self.child = child
            self.name = name
        }
    }

    public var boxes: [Box]
    /// In the order of each parent's children.
    public var lines: [Line]

    public init(boxes: [Box], lines: [Line]) {
        self.boxes = boxes
        self.lines = lines
    }

    /// Boxes that nobody uses, users first: where a drawing begins.
    var tops: [Int] {
        let used = Set(lines.map(\.child))
        let free = boxes.indices.filter { !used.contains($0) }
        return free.filter { boxes[$0].isUser } + free.filter { !boxes[$0].isUser }
    }

    func lines(below box: Int) -> [Line] { lines.filter { $0.parent == box } }
}

extension GraphPicture {
    /// The nodes of a graph in this process. On the graph's thread.
    public init(of graph: BlockGraph) {
        let nodes = graph.nodes.filter(\.isReady)
        boxes = nodes.map { node in
            Box(
                title: node.name,
                details: Self.details(
                    driver: node.description.name, size: node.size, isReadOnly: node.isReadOnly,
                    file: node.children.isEmpty ? node.driver.filename : ""))
        }
        lines = []
        for (index, node) in nodes.enumerated() {
            for edge in node.children {
                guard let child = nodes.firstIndex(where: { $0 === edge.node }) else { continue }
                lines.append(Line(parent: index, child: child, name: edge.name))
            }
        }
    }

    /// The graph of a daemon.
    ///
    /// - Parameters:
    ///   - graph: what `x-debug-query-block-graph` returned.
    ///   - nodes: what `query-named-block-nodes` returned, with `flat`.
    /// - Throws: `protocolViolation` when either is not what the command returns.
    public init(graph: JSONValue, nodes: JSONValue) throws(BlockError) {
        guard case .array(let described) = nodes, case .array(let vertices)? = graph["nodes"],
            case .array(let edges)? = graph["edges"]
        else { throw BlockError(.protocolViolation, "the daemon describes no graph") }
        boxes = []
        lines = []
        var indices: [Int: Int] = [:]
        for vertex in vertices {
            guard case .integer(let identifier)? = vertex["id"],
                case .string(let name)? = vertex["name"], case .string(let type)? = vertex["type"]
            else { throw BlockError(.protocolViolation, "the daemon's graph has no proper nodes") }
            indices[identifier] = boxes.count
            let isNode = type == "block-driver"
            let facts = isNode ? described.first { $0["node-name"] == .string(name) } : nil
            boxes.append(
                Box(
                    title: isNode ? name : "\(type == "block-backend" ? "export" : "job") \(name)",
                    details: facts.map { Self.details($0) } ?? [], isUser: !isNode))
        }
        for edge in edges {
            guard case .integer(let parent)? = edge["parent"],
                case .integer(let child)? = edge["child"], case .string(let name)? = edge["name"],
                let from = indices[parent], let to = indices[child]
            else { throw BlockError(.protocolViolation, "the daemon's graph has no proper edges") }
            lines.append(Line(parent: from, child: to, name: name))
        }
    }

    private static func details(_ node: JSONValue) -> [String] {
        var driver = "", file = ""
        var size = 0
        if case .string(let name)? = node["drv"] { driver = name }
        if case .integer(let bytes)? = node["image"]?["virtual-size"] { size = bytes }
        if case .array(let children)? = node["children"], children.isEmpty,
            case .string(let name)? = node["file"]
        {
            file = name
        }
        return details(
            driver: driver, size: size, isReadOnly: node["ro"] == .bool(true), file: file)
    }

    private static func details(
        driver: String, size: Int, isReadOnly: Bool, file: String
    ) -> [String] {
        [driver, SizeText.format(size) + (isReadOnly ? ", read-only" : ""), file]
            .filter { !$0.isEmpty }
    }
}
