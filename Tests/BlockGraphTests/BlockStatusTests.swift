import BlockCore
import BlockIO
import BlockTesting
import QMP
import Testing

@testable import BlockGraph

/// A layer that says what its option `runs` says: words of a letter and a number of blocks of 512 bytes,
/// `d` for data, `z` for zeroes, `u` for what it does not have, `x` for what it fails to tell.
private final class ScriptedLayer: IdleDriver, @unchecked Sendable {
    static let block = 512
    private let node: BlockNode
    private let runs: [(letter: Character, range: ByteRange)]
    private(set) var questions = 0

    init(_ node: BlockNode, _ words: String, alignment: Int) throws(BlockError) {
        self.node = node
        var runs: [(letter: Character, range: ByteRange)] = []
        var offset = 0
        for word in words.split(separator: " ") {
            guard let letter = word.first, let count = Int(word.dropFirst()) else {
                throw BlockError(.invalidArgument, "not a run: \(word)")
            }
            runs.append((letter, ByteRange(offset, count * Self.block)))
            offset += count * Self.block
        }
        self.runs = runs
        node.size = offset
        node.limits.requestAlignment = alignment
    }

    func blockStatus(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList
    ) async throws(BlockError) {
        questions += 1
        for run in runs {
            guard let part = run.range.intersection(range) else { continue }
            let place = BlockStatus.Mapping(node: node, offset: part.offset)
            let status: BlockStatus
            switch run.letter {
            case "d": status = BlockStatus(.data, count: part.count, mapping: place)
            case "z": status = BlockStatus(.zero, count: part.count)
            case "u": status = BlockStatus([], count: part.count)
            default: throw BlockError(.inputOutput, "a bad table at \(part.offset)")
            }
            guard answer.append(status) else { return }
        }
    }

    static let description = DriverDescription(
        name: "scripted", kind: .format,
        open: { opening throws(BlockError) in
            _ = try await opening.child("backing", roles: .cow)
            return try ScriptedLayer(
                opening.node, try opening.options.string("runs") ?? "",
                alignment: try opening.options.int("align") ?? 1)
        })
}

/// Forwards everything, as filters do.
private final class PlainFilter: FilterDriver, @unchecked Sendable {
    let child: Edge
    init(_ node: BlockNode, _ child: Edge) {
        self.child = child
        node.size = child.size
        node.limits = child.node.limits
    }
    func write(_ offset: Int, from vector: IOVector, _ flags: WriteFlags) async throws(BlockError) {
    }
    func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {}
    func discard(_ range: ByteRange) async throws(BlockError) {}
    func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {}

    static let description = DriverDescription(
        name: "filter", kind: .filter,
        open: { opening throws(BlockError) in
            let child = try await opening.requiredChild("file", roles: [.filtered, .primary])
            return PlainFilter(opening.node, child)
        })
}

@Suite struct BlockStatusTests {
    /// As words: the letter, what layer it comes from where that is not the top (`-` for none), and the
    /// number of blocks, or of bytes with a `b`.
    private static func words(_ answer: BlockStatusList) -> String {
        answer.runs.map { run in
            let letter = run.flags.contains(.data) ? "d" : run.flags.contains(.zero) ? "z" : "u"
            let depth = run.depth.map { $0 == 0 ? "" : "@\($0):" } ?? "-"
            let isWhole = run.count % ScriptedLayer.block == 0
            return letter + depth
                + (isWhole ? "\(run.count / ScriptedLayer.block)" : "\(run.count)b")
        }.joined(separator: " ")
    }

    /// The layers' runs, top first.
    private static func options(_ layers: [String], align: Int = 1) -> JSONValue {
        var below: JSONValue?
        for runs in layers.reversed() {
            var options: JSONObject = [
                "driver": "scripted", "runs": .string(runs), "align": .integer(align),
            ]
            if let below { options["backing"] = below }
            below = .object(options)
        }
        return below ?? .null
    }

    private static func ask<T: Sendable>(
        _ options: JSONValue,
        _ body: @escaping @Sendable (Edge) async throws(BlockError) -> T
    ) async throws -> T {
        try await withGraph(of: [ScriptedLayer.description, PlainFilter.description]) {
            graph throws(BlockError) in
            let node = try await graph.open(options)
            defer { node.release("opening") }
            let edge = try graph.attach(NamedUser("test"), to: node, .read)
            let result = try await body(edge)
            try await graph.detach(edge)
            try await graph.closeAll()
            return result
        }
    }

    /// The whole chain's status from `offset` on, in answers of at most `limit` runs.
    private static func chain(
        _ layers: [String], limit: Int, from offset: Int = 0, to end: Int? = nil, align: Int = 1
    ) async throws -> [String] {
        try await ask(options(layers, align: align)) { edge throws(BlockError) in
            let answer = BlockStatusList(limit: limit)
            var answers: [String] = []
            var offset = offset
            let end = end ?? edge.size
            while offset < end {
                try await edge.chainStatus(ByteRange(from: offset, to: end), into: answer)
                answers.append(words(answer))
                offset += answer.byteCount
            }
            return answers
        }
    }

    @Test(
        "an answer ends where its limit does, and the next goes on from there",
        arguments: [
            (1, ["d1", "z2", "d3", "z1", "d1"]), (2, ["d1 z2", "d3 z1", "d1"]),
            (4, ["d1 z2 d3 z1", "d1"]), (5, ["d1 z2 d3 z1 d1"]), (100, ["d1 z2 d3 z1 d1"]),
        ])
    func limits(_ limit: Int, _ expected: [String]) async throws {
        #expect(try await Self.chain(["d1 z2 d3 z1 d1"], limit: limit) == expected)
    }

    @Test(
        "what a layer does not have comes from the one below, run by run",
        arguments: [
            (["u8"], 9, "z-8"),
            (["d2 u4 d2", "d8"], 9, "d2 d@1:4 d2"),
            (["d2 u4 d2", "z3 d5"], 9, "d2 z@1:1 d@1:3 d2"),
            (["u8", "u2 d2 u4", "d3 u2 z3"], 9, "d@2:2 d@1:2 z-1 z@2:3"),
            (["u2 d1 u2 d1", "d1 z5"], 3, "d@1:1 z@1:1 d1"),
        ])
    func layers(_ layers: [String], _ limit: Int, _ expected: String) async throws {
        #expect(try await Self.chain(layers, limit: limit).first == expected)
    }

    @Test(
        "past the end of a shorter backing image there are zeroes, of that layer",
        arguments: [
            (["u8", "d4"], "d@1:4 z@1:4"), (["d1 u6 d1", "d4"], "d1 d@1:3 z@1:3 d1"),
            (["d5 u3", "d4"], "d5 z@1:3"), (["u8", "u8", "u2 d1"], "z-2 d@2:1 z@2:5"),
            (["u4", "d8"], "d@1:4"),
        ])
    func shorterBacking(_ layers: [String], _ expected: String) async throws {
        #expect(try await Self.chain(layers, limit: 9) == [expected])
    }

    @Test func longAnswersOfSeveralLayersAreWhatSingleRunsTell() async throws {
        let layers = ["u3 d2 z4 u9 d1 u1 z2", "d1 u7 z2 d3 u9", "z2 d20"]
        func joined(_ limit: Int) async throws -> [String] {
            var runs: [String] = []
            for run in try await Self.chain(layers, limit: limit).joined(separator: " ")
                .split(separator: " ")
            {
                runs.append(String(run))
            }
            return runs
        }
        let whole = try await joined(100)
        for limit in 1...6 {
            #expect(try await joined(limit) == whole, "limit \(limit)")
        }
    }

    @Test(
        "an error ends the answer before it, and is met by who asks from there",
        arguments: [
            (["d1 z1 x1 d1"], 2), (["d1 u2 d1", "d2 x2"], 2), (["u4", "z1 d1 x2"], 2),
        ])
    func errors(_ layers: [String], _ blocks: Int) async throws {
        let (known, code) = try await Self.ask(Self.options(layers)) { edge throws(BlockError) in
            let answer = BlockStatusList(limit: 9)
            try await edge.chainStatus(ByteRange(0, edge.size), into: answer)
            let known = answer.byteCount
            var code: BlockError.Code?
            do throws(BlockError) {
                try await edge.chainStatus(ByteRange(from: known, to: edge.size), into: answer)
            } catch { code = error.code }
            #expect(answer.isEmpty)
            return (known, code)
        }
        #expect(known == blocks * ScriptedLayer.block)
        #expect(code == .inputOutput)
    }

    @Test(
        "bytes that are not aligned are told of from the first to the last",
        arguments: [
            (100, 3000, "d412b z2 d1 z952b"), (512, 1024, "z1"), (600, 601, "z1b"),
            (1535, 1537, "z1b d1b"), (0, 4096, "d1 z2 d1 z4"),
        ])
    func unaligned(_ start: Int, _ end: Int, _ expected: String) async throws {
        let answers = try await Self.chain(
            ["d1 z2 d1 z4"], limit: 9, from: start, to: end, align: 512)
        #expect(answers == [expected])
    }

    @Test func whereAnUnalignedRunIsStoredMovesWithItsBeginning() async throws {
        let places = try await Self.ask(Self.options(["d4 z4"], align: 1024)) {
            edge throws(BlockError) in
            let answer = BlockStatusList(limit: 9)
            try await edge.blockStatus(ByteRange(700, 1500), into: answer)
            return answer.runs.map { [$0.count, $0.mapping?.offset ?? -1] }
        }
        #expect(places == [[1348, 700], [152, -1]])
    }

    @Test func theEndOfTheNodeIsMarkedAndNoOther() async throws {
        let marks = try await Self.ask(Self.options(["u4 d1", "d2"])) { edge throws(BlockError) in
            let answer = BlockStatusList(limit: 9)
            try await edge.chainStatus(ByteRange(0, edge.size), into: answer)
            var marks = answer.runs.map { $0.flags.contains(.endOfNode) }
            try await edge.chainStatus(ByteRange(0, edge.size - 1), into: answer)
            marks += answer.runs.map { $0.flags.contains(.endOfNode) }
            return marks
        }
        #expect(marks == [false, false, true, false, false, false])
    }

    @Test func filtersHandOnTheWholeAnswer() async throws {
        let options: JSONValue = [
            "driver": "filter",
            "file": ["driver": "filter", "file": Self.options(["d1 z1 u2", "d4"])],
        ]
        let (own, chain) = try await Self.ask(options) { edge throws(BlockError) in
            let answer = BlockStatusList(limit: 9)
            try await edge.blockStatus(ByteRange(0, edge.size), into: answer)
            let own = Self.words(answer)
            try await edge.chainStatus(ByteRange(0, edge.size), into: answer)
            return (own, Self.words(answer))
        }
        #expect(own == "d1 z1 u2")
        #expect(chain == "d1 z1 d@1:2")
    }

    @Test func aLongAnswerTakesOneQuestion() async throws {
        let runs = (0..<400).map { $0 % 2 == 0 ? "d1" : "z1" }.joined(separator: " ")
        let (questions, count) = try await Self.ask(Self.options([runs])) {
            edge throws(BlockError) in
            let answer = BlockStatusList(limit: 400)
            try await edge.chainStatus(ByteRange(0, edge.size), into: answer)
            return ((edge.node.driver as? ScriptedLayer)?.questions, answer.runs.count)
        }
        #expect(questions == 1)
        #expect(count == 400)
    }
}

@Suite struct BlockStatusListTests {
    @Test func runsThatGoOnAreOneRunEvenWhenThereIsNoRoom() async throws {
        let list = BlockStatusList(limit: 2)
        #expect(list.append(BlockStatus(.zero, count: 5)))
        #expect(list.append(BlockStatus(.zero, count: 5)))
        #expect(list.append(BlockStatus(.data, count: 1)))
        #expect(list.append(BlockStatus(.data, count: 2)))
        #expect(!list.append(BlockStatus(.zero, count: 1)))
        #expect(!list.append(BlockStatus(.data, count: 1, depth: 1)))
        #expect(list.runs.map(\.count) == [10, 3])
        #expect(list.byteCount == 13)
    }
}
