import BlockCore
import QMP

/// A daemon's nodes at one moment, as `query-named-block-nodes` lists them.
struct FleeceNodes {
    private let nodes: [JSONValue]

    init(of executor: any QMPExecutor) async throws(BlockError) {
        guard
            case .array(let nodes) = try await executor.execute(
                "query-named-block-nodes", ["flat": true])
        else { throw BlockError(.protocolViolation, "the daemon lists no nodes") }
        self.nodes = nodes
    }

    private func node(_ name: String) -> JSONValue? {
        nodes.first { $0["node-name"] == .string(name) }
    }

    func has(_ name: String) -> Bool { node(name) != nil }

    /// The file of an image, as the daemon knows it.
    func file(of name: String) -> String? {
        guard case .string(let path)? = node(name)?["file"] else { return nil }
        return path
    }

    func size(of name: String) throws(BlockError) -> Int {
        guard let node = node(name) else {
            let names = nodes.compactMap(Self.name).filter { !$0.hasPrefix("#") }
            throw BlockError(
                .notFound, "the daemon has no node '\(name)'",
                remedy: "it has \(names.joined(separator: ", "))")
        }
        guard case .integer(let size)? = node["image"]?["virtual-size"] else {
            throw BlockError(.protocolViolation, "the daemon does not tell the size of '\(name)'")
        }
        return size
    }

    /// Whether a node is of this driver, and has these children.
    func has(_ name: String, _ driver: String, _ children: [(role: String, node: String)]) -> Bool {
        guard let node = node(name), node["drv"] == .string(driver) else { return false }
        let own = Self.children(of: node)
        return children.allSatisfy { wanted in own.contains { $0 == wanted } }
    }

    /// The node next above this one that is written through, and the last of those above each other: who
    /// freezes the lower one would have to keep the upper ones from writing.
    func writers(
        above name: String, except own: [String]
    ) -> (next: String, top: String)? {
        guard let next = writer(above: name, except: own) else { return nil }
        var top = next
        // A daemon that says that nodes are above each other in a circle is not believed for ever.
        for _ in nodes {
            guard let upper = writer(above: top, except: own) else { break }
            top = upper
        }
        return (next, top)
    }

    private func writer(above name: String, except own: [String]) -> String? {
        let writers = nodes.filter { node in
            node["ro"] == false
                && Self.children(of: node).contains { $0.role != "backing" && $0.node == name }
        }
        return writers.compactMap(Self.name).first { !own.contains($0) }
    }

    private static func name(of node: JSONValue) -> String? {
        guard case .string(let name)? = node["node-name"] else { return nil }
        return name
    }

    private static func children(of node: JSONValue) -> [(role: String, node: String)] {
        guard case .array(let children)? = node["children"] else { return [] }
        return children.compactMap { child in
            guard case .string(let role)? = child["child"],
                case .string(let name)? = child["node-name"]
            else { return nil }
            return (role, name)
        }
    }
}
