import BlockCore
import BlockGraph
import BlockIO

/// What every driver must do with every request, at the edges of what may be asked.
///
/// Each check returns what was wrong; an empty list is a pass. Call them on the graph's thread, with an
/// edge that may read and write a node of at least ``sizeMin`` bytes. What the node held is lost.
public enum DriverConformance {
    public static let sizeMin = 256 << 10

    /// All checks, then `requests` random ones.
    public static func check(
        _ edge: Edge, seed: UInt64, requests: Int = 300
    ) async -> [String] {
        var violations = await checkEdges(edge)
        violations += await checkStatus(edge)
        violations += await checkRandom(edge, seed: seed, requests: requests)
        return violations
    }

    /// Random requests, many at once, and everything read at the end.
    public static func checkRandom(
        _ edge: Edge, seed: UInt64, requests: Int
    ) async -> [String] {
        do throws(BlockError) {
            let data = try IOVector(allocating: edge.size)
            try await edge.read(0, into: data)
            var options = RandomRequests.Options()
            options.count = requests
            let run = RandomRequests(edge, ShadowDisk(bytes: data.array), seed: seed, options)
            await run.run()
            await run.verify()
            return run.violations.map { "\($0) (seed \(seed))" }
        } catch {
            return ["reading everything failed: \(error)"]
        }
    }

    /// Nothing, one byte, unaligned, the last byte, past the end: for every kind of request.
    public static func checkEdges(_ edge: Edge) async -> [String] {
        let checks = Checks(edge)
        let size = edge.size
        guard size >= sizeMin else { return ["the node is smaller than \(sizeMin) bytes"] }
        await checks.refusals()
        await checks.prepare()
        let ranges = [
            ByteRange(0, 1), ByteRange(size - 1, 1), ByteRange(511, 2), ByteRange(4095, 3),
            ByteRange(65_530, 20), ByteRange(512, 512), ByteRange(8192, 4096),
            ByteRange(1, 70_001), ByteRange(size - 5000, 5000), ByteRange(0, 65_536),
            ByteRange(0, size), ByteRange(0, 0), ByteRange(size, 0),
        ]
        for (index, range) in ranges.enumerated() {
            await checks.write(range, UInt8(index + 1), [])
            await checks.write(range, UInt8(index + 101), .fua)
            await checks.zeroes(range, [])
            await checks.write(range, UInt8(index + 51), [])
            await checks.zeroes(range, .mayUnmap)
            await checks.write(range, UInt8(index + 151), [])
            await checks.discard(range)
        }
        await checks.succeeds("flush") { edge throws(BlockError) in try await edge.flush() }
        await checks.compare("everything", ByteRange(0, size))
        return checks.violations
    }

    /// Block status covers the node without gaps, and what it calls zero reads as zeroes.
    public static func checkStatus(_ edge: Edge) async -> [String] {
        let checks = Checks(edge)
        await checks.prepare()
        await checks.write(ByteRange(70_000, 5000), 9, [])
        await checks.zeroes(ByteRange(131_072, 65_536), .mayUnmap)
        var offset = 0
        while offset < edge.size {
            let range = ByteRange(from: offset, to: edge.size)
            guard let status = await checks.status(range) else { return checks.violations }
            offset += status.count
            if status.flags.contains(.endOfNode) != (offset == edge.size) {
                checks.violations.append("the end of the node is not told at \(offset)")
            }
        }
        for range in [ByteRange(0, 1), ByteRange(edge.size - 1, 1), ByteRange(70_001, 13)] {
            _ = await checks.status(range)
        }
        await checks.statusInLists()
        return checks.violations
    }
}

/// A node, and what it should hold.
private final class Checks {
    let edge: Edge
    var violations: [String] = []
    private var expected: [UInt8] = []

    init(_ edge: Edge) {
        self.edge = edge
    }

    func succeeds(_ name: String, _ body: (Edge) async throws(BlockError) -> Void) async {
        do throws(BlockError) {
            try await body(edge)
        } catch {
            violations.append("\(name) failed: \(error)")
        }
    }

    private func fails(
        _ name: String, with code: BlockError.Code,
        _ body: (Edge) async throws(BlockError) -> Void
    ) async {
        do throws(BlockError) {
            try await body(edge)
            violations.append("\(name) was not refused")
        } catch {
            if error.code != code {
                violations.append("\(name) failed with \(error.code): \(error)")
            }
        }
    }

    /// Requests past the end are refused, whatever they are.
    func refusals() async {
        let size = edge.size
        for (offset, count) in [(size, 1), (size - 1, 2), (size + 1, 0), (Int.max - 4, 4), (-1, 1)]
        {
            let name = "\(count) bytes at \(offset)"
            await fails("reading \(name)", with: .outOfRange) { edge throws(BlockError) in
                try await edge.read(offset, into: try IOVector(allocating: count))
            }
            await fails("writing \(name)", with: .outOfRange) { edge throws(BlockError) in
                try await edge.write(offset, from: try IOVector(allocating: count))
            }
            guard let range = ByteRange(checking: offset, count: count) else { continue }
            await fails("zeroing \(name)", with: .outOfRange) { edge throws(BlockError) in
                try await edge.writeZeroes(range)
            }
            await fails("discarding \(name)", with: .outOfRange) { edge throws(BlockError) in
                try await edge.discard(range)
            }
            await fails("status of \(name)", with: .outOfRange) { edge throws(BlockError) in
                _ = try await edge.blockStatus(range)
            }
        }
        await fails("status of nothing", with: .invalidArgument) { edge throws(BlockError) in
            _ = try await edge.blockStatus(ByteRange(0, 0))
        }
    }

    /// Fills the node with a pattern.
    func prepare() async {
        expected = (0..<edge.size).map { UInt8(truncatingIfNeeded: $0 / 512 * 7 + 1) }
        let bytes = expected
        await succeeds("writing everything") { edge throws(BlockError) in
            let data = try IOVector(allocating: bytes.count)
            bytes.withUnsafeBytes { data.copy(from: $0) }
            try await edge.write(0, from: data)
        }
    }

    private func expect(_ range: ByteRange, _ value: UInt8) {
        expected.replaceSubrange(
            range.offset..<range.end, with: repeatElement(value, count: range.count))
    }

    func write(_ range: ByteRange, _ value: UInt8, _ flags: WriteFlags) async {
        await succeeds("writing \(range)") { edge throws(BlockError) in
            let data = try IOVector(allocating: range.count)
            data.fill(value)
            try await edge.write(range.offset, from: data, flags)
        }
        expect(range, value)
        await compare("after a write of \(range)", around(range))
    }

    func zeroes(_ range: ByteRange, _ flags: WriteFlags) async {
        await succeeds("zeroing \(range)") { edge throws(BlockError) in
            try await edge.writeZeroes(range, flags)
        }
        expect(range, 0)
        await compare("after zeroing \(range)", around(range))
    }

    /// Afterwards bytes are as before or zero, and stay what they are.
    func discard(_ range: ByteRange) async {
        await succeeds("discarding \(range)") { edge throws(BlockError) in
            try await edge.discard(range)
        }
        guard let found = await read(range) else { return }
        for (index, byte) in found.enumerated() {
            let offset = range.offset + index
            if byte != 0, byte != expected[offset] {
                violations.append("after discarding \(range) byte \(offset) is \(byte)")
                return
            }
            expected[offset] = byte
        }
        await compare("after discarding \(range)", around(range))
    }

    /// The range and some bytes on both sides.
    private func around(_ range: ByteRange) -> ByteRange {
        ByteRange(from: max(0, range.offset - 1000), to: min(edge.size, range.end + 1000))
    }

    private func read(_ range: ByteRange) async -> [UInt8]? {
        do throws(BlockError) {
            let data = try IOVector(allocating: range.count)
            data.fill(0xa5)
            try await edge.read(range.offset, into: data)
            return data.array
        } catch {
            violations.append("reading \(range) failed: \(error)")
            return nil
        }
    }

    func compare(_ when: String, _ range: ByteRange) async {
        guard let found = await read(range) else { return }
        guard found[...] != expected[range.offset..<range.end] else { return }
        let index = found.indices.first { found[$0] != expected[range.offset + $0] } ?? 0
        violations.append(
            "\(when): byte \(range.offset + index) is \(found[index]), "
                + "not \(expected[range.offset + index])")
    }

    /// Answers of any length say the same of every sector as runs one by one.
    func statusInLists() async {
        var told: [[ExtentFlags]] = []
        for limit in [1, 3, 64] {
            let answer = BlockStatusList(limit: limit)
            var flags: [ExtentFlags] = []
            var offset = 0
            while offset < edge.size {
                let range = ByteRange(from: offset, to: edge.size)
                await succeeds("status of \(range)") { edge throws(BlockError) in
                    try await edge.blockStatus(range, into: answer)
                }
                guard !answer.isEmpty, answer.byteCount <= range.count, answer.runs.count <= limit
                else {
                    violations.append(
                        "status of \(range): \(answer.runs.count) runs of \(answer.byteCount) bytes"
                    )
                    return
                }
                for run in answer.runs {
                    flags += [ExtentFlags](
                        repeating: run.flags.subtracting(.endOfNode), count: run.count / 512)
                    offset += run.count
                }
            }
            told.append(flags)
        }
        if told.contains(where: { $0 != told[0] }) {
            violations.append("long answers about status differ from short ones")
        }
    }

    func status(_ range: ByteRange) async -> BlockStatus? {
        do throws(BlockError) {
            let status = try await edge.blockStatus(range)
            guard status.count > 0, status.count <= range.count else {
                violations.append("status of \(range) is about \(status.count) bytes")
                return nil
            }
            let covered = range.offset..<(range.offset + status.count)
            if status.flags.contains(.zero), let byte = covered.first(where: { expected[$0] != 0 })
            {
                violations.append("status of \(range) calls byte \(byte) zero")
            }
            return status
        } catch {
            violations.append("status of \(range) failed: \(error)")
            return nil
        }
    }
}
