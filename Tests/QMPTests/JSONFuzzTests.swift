import BlockCore
import BlockTesting
import QMP
import Testing

/// Whatever comes, there is a value or an error, and never a trap.
@Suite struct JSONFuzzTests {
    private static let documents = [
        #"{"execute": "blockdev-add", "arguments": {"driver": "raw", "file": {"x": [1, -2.5e3]}}}"#,
        #"{'a': "\ud83d\ude00\n", "b": [true, false, null, {"c": 18446744073709551615}]}"#,
        "[[[[]]], {}, \"é\"]",
    ]

    @Test(arguments: 0..<8)
    func mutatedDocumentsAreReadOrRefused(seed: UInt64) {
        var random = SeededRandom(seed: seed)
        for round in 0..<2_000 {
            let bytes = mutated(&random)
            guard let value = try? JSONParser.parse(bytes) else { continue }
            // What was read says the same when it is written and read again.
            let again = try? JSONParser.parse(value.text())
            #expect(again == value, "seed \(seed), round \(round): \(bytes)")
        }
    }

    @Test(arguments: 0..<4)
    func anySplitOfAStreamGivesTheSameDocuments(seed: UInt64) {
        var random = SeededRandom(seed: seed)
        for round in 0..<500 {
            var stream: [UInt8] = []
            for _ in 0..<random.between(1...4) { stream += mutated(&random) + [0x0a] }
            var framer = JSONFramer()
            var results: [String] = []
            for byte in stream {
                switch framer.take(byte) {
                case nil: continue
                case .success(let value): results.append(value.text())
                case .failure: results.append("error")
                }
            }
            // Afterwards a client that starts afresh is understood.
            var last: JSONValue?
            for byte in [0xff] + Array("\n{\"a\": 1}".utf8) {
                if case .success(let value)? = framer.take(byte) { last = value }
            }
            #expect(last == ["a": 1], "seed \(seed), round \(round): \(stream) gave \(results)")
        }
    }

    @Test(arguments: 0..<4)
    func optionTextIsReadOrRefused(seed: UInt64) {
        var random = SeededRandom(seed: seed)
        let pieces = ["a", "b", ".", ".", "0", "1", "=", "=", ",", ",", "{", "é", " ", "-"]
        for _ in 0..<5_000 {
            let text = (0..<random.between(0...12))
                .map { _ in pieces[random.below(pieces.count)] }.joined()
            _ = try? KeyValue.parse(text, impliedKey: "k", allowsFlags: random.chance(500))
        }
    }

    @Test(arguments: 0..<4)
    func aSessionAnswersWhateverComes(seed: UInt64) {
        var random = SeededRandom(seed: seed)
        var session = QMPSession(SessionTests.schema)
        var answers = 0
        for _ in 0..<500 {
            if session.wantsBytes { session.receive(mutated(&random)) }
            while let step = session.next() {
                if case .send(let bytes) = step, !bytes.isEmpty { answers += 1 }
            }
        }
        #expect(answers > 0, "seed \(seed)")
    }

    private func mutated(_ random: inout SeededRandom) -> [UInt8] {
        var bytes = Array(Self.documents[random.below(Self.documents.count)].utf8)
        for _ in 0..<random.between(0...4) where !bytes.isEmpty {
            let place = random.below(bytes.count)
            switch random.below(4) {
            case 0: bytes[place] = UInt8(truncatingIfNeeded: random.next())
            case 1: bytes.remove(at: place)
            case 2: bytes.insert(Array("{}[]\",:\\'0".utf8)[random.below(10)], at: place)
            default: bytes.removeSubrange(place..<min(bytes.count, place + random.below(20)))
            }
        }
        return bytes
    }
}
