import BlockCore
import BlockFormats
import BlockGraph
import BlockIO
import BlockProtocols
import BlockTesting
import Foundation
import QMP
import Testing

/// A private folder with images, and the peers' tools to make and judge them.
final class QCOW2TestFolder: Sendable {
    private let folder: TemporaryFolder
    var path: String { folder.path }

    init() throws { folder = try TemporaryFolder() }

    deinit { folder.remove() }

    subscript(name: String) -> String { folder[name] }

    struct ToolFailure: Error, CustomStringConvertible {
        var description: String
    }

    /// Runs a tool in the folder.
    /// - Returns: what it wrote to standard output.
    @discardableResult
    func run(_ arguments: [String], status expected: Int32 = 0) throws -> String {
        let result = try ChildProgram.run(arguments, in: path, errors: .joined)
        guard result.status == expected else {
            throw ToolFailure(
                description: "\(arguments.joined(separator: " ")): "
                    + "status \(result.status): \(result.output)")
        }
        return result.output
    }

    /// ``run(_:status:)`` for what makes keys: on a busy machine QEMU gives up measuring now and then.
    func runWithKeys(_ arguments: [String]) throws {
        for _ in 0..<20 {
            do {
                try run(arguments)
                return
            } catch let failure as ToolFailure where failure.description.contains("CPU usage") {
                continue
            }
        }
        try run(arguments)
    }

    /// Passes when `qemu-img check` finds neither errors nor leaks.
    func check(_ name: String) throws {
        try run(["qemu-img", "check", "-f", "qcow2", name])
    }

    /// ``check(_:)`` of an image that is encrypted for the secret `good`.
    func checkEncrypted(_ name: String) throws {
        try run(
            ["qemu-img", "check"] + Self.objects
                + ["--image-opts", "driver=qcow2,file.filename=\(name),encrypt.key-secret=good"])
    }

    func bytes(_ name: String) throws -> [UInt8] {
        [UInt8](try Data(contentsOf: URL(fileURLWithPath: self[name])))
    }

    func write(_ bytes: [UInt8], _ name: String) throws {
        try Data(bytes).write(to: URL(fileURLWithPath: self[name]))
    }

    /// Opens an image and closes it after `body`.
    ///
    /// - Parameter resizes: the user of a writable image may change its size.
    func open<T: Sendable>(
        _ name: String, writable: Bool = true, resizes: Bool = true, options: JSONValue = [:],
        _ body: @escaping @Sendable (Edge) async throws(BlockError) -> T
    ) async throws -> T {
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        let path = self[name]
        return try await thread.run { () async throws(BlockError) -> T in
            let graph = BlockGraph(
                on: thread,
                registry: DriverRegistry(BlockProtocols.drivers + BlockFormats.drivers))
            try Self.addSecrets(to: graph)
            var all: JSONObject = [
                "driver": "qcow2", "node-name": "image", "read-only": .bool(!writable),
                "discard": "unmap", "file": ["driver": "file", "filename": .string(path)],
            ]
            if case .object(let more) = options {
                for (key, value) in more.members { all[key] = value }
            }
            let node = try await graph.open(.object(all), monitorOwned: true)
            var uses: Permission = writable ? [.consistentRead, .write] : .consistentRead
            if writable, resizes { uses.insert(.resize) }
            let edge = try graph.attach(
                NamedUser("test"), to: node, Access(uses: uses, shares: .all))
            do throws(BlockError) {
                let result = try await body(edge)
                try await graph.detach(edge)
                try await graph.closeAll()
                return result
            } catch {
                // The lock goes with the last use.
                try? await graph.detach(edge)
                try? await graph.closeAll()
                throw error
            }
        }
    }

    /// Passphrases that images can be opened and made with.
    static let secrets = ["good": "correct horse", "other": "battery", "third": "staple"]

    static func addSecrets(to graph: BlockGraph) throws(BlockError) {
        for (name, text) in secrets {
            try graph.addObject(GraphSecret(SecretBytes(Array(text.utf8))), as: name)
        }
    }

    /// The secrets as options of QEMU's tools.
    static let objects = secrets.sorted { $0.key < $1.key }
        .flatMap { ["--object", "secret,id=\($0.key),data=\($0.value)"] }

    /// Makes an image as `blockdev-create` does.
    func create(_ name: String, driver: String = "qcow2", _ options: JSONValue) async throws {
        try write([], name)
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        let path = self[name]
        try await thread.run { () async throws(BlockError) in
            let graph = BlockGraph(
                on: thread,
                registry: DriverRegistry(BlockProtocols.drivers + BlockFormats.drivers))
            try Self.addSecrets(to: graph)
            guard case .object(var all) = options else { return }
            all["file"] = ["driver": "file", "filename": .string(path)]
            let creation = ImageCreation(
                graph, options: try OptionReader(.object(all), of: "creation"))
            guard let create = try graph.registry.driver(named: driver).create else { return }
            do throws(BlockError) {
                try await create(creation)
            } catch {
                try? await creation.finish()
                throw error
            }
            try await creation.finish()
            try await graph.closeAll()
        }
    }

    /// Passes when the image takes no compressed data.
    func expectNoCompressedData(_ name: String, options: JSONValue = [:]) async throws {
        try await open(name, options: options) { edge throws(BlockError) in
            let vector = try IOVector(allocating: 65536)
            vector.fill(1)
            do throws(BlockError) {
                try await edge.write(0, from: vector, .compressed)
                Issue.record("taken")
            } catch {
                #expect(error.code == .unsupported)
            }
        }
    }

    /// All of the image as Merino reads it.
    func contents(_ name: String, options: JSONValue = [:]) async throws -> [UInt8] {
        try await open(name, writable: false, options: options) { edge throws(BlockError) in
            let vector = try IOVector(allocating: edge.size)
            try await edge.read(0, into: vector)
            return vector.array
        }
    }
}

/// Numbers from a seed.
struct QCOW2TestRandom {
    private var state: UInt64
    init(seed: Int) { state = UInt64(truncatingIfNeeded: seed) &* 0x9E37_79B9_7F4A_7C15 | 1 }

    mutating func next(below bound: Int) -> Int {
        state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
        return Int(state >> 33) % bound
    }
}
