import BlockCore
import BlockFormats
import BlockGraph
import BlockIO
import BlockProtocols
import BlockTLS
import BlockTesting
import Glibc
import NBDProtocol
import Testing

@testable import BlockExports

/// Random clients of a server on a simulated machine, against a model of what the disk may hold.
@Suite struct NBDModelTests {
    static let seeds: [UInt64] = (0..<5).map { _ in UInt64.random(in: 0 ... .max) }

    @Test(arguments: seeds)
    func everyReadIsLegal(seed: UInt64) async throws {
        try await ModelRun(seed: seed).run(crashes: false)
    }

    @Test(arguments: seeds)
    func connectionsThatBreakLoseNothing(seed: UInt64) async throws {
        let run = try ModelRun(seed: seed)
        run.simulation.faults = [
            FaultRule(.send, .fail(ECONNRESET), perMille: 8),
            FaultRule(.receive, .fail(ECONNRESET), perMille: 8),
        ]
        try await run.run(crashes: false)
    }

    @Test(arguments: seeds)
    func whatWasFlushedSurvivesACrash(seed: UInt64) async throws {
        try await ModelRun(seed: seed).run(crashes: true)
    }

    @Test(arguments: seeds.prefix(4))
    func everyReadThroughTLSIsLegal(seed: UInt64) async throws {
        try await ModelRun(seed: seed, secure: true).run(crashes: false)
    }
}

/// One machine, one server, several clients.
final class ModelRun: @unchecked Sendable {
    static let size = 24 << 10
    let seed: UInt64
    let simulation: Simulation
    let shadow = ShadowDisk(size: ModelRun.size)
    var random: SeededRandom
    let server: TLSCredentials?
    let client: TLSCredentials?
    var failures: [String] = []

    init(seed: UInt64, secure: Bool = false) throws {
        self.seed = seed
        random = SeededRandom(seed: seed)
        simulation = Simulation(seed: seed)
        simulation.disk.addFile("/disk", size: Self.size)
        guard secure else {
            (server, client) = (nil, nil)
            return
        }
        server = try .x509(directory: TestCertificates.path("x509"), endpoint: .server)
        client = try .x509(directory: TestCertificates.path("x509"), endpoint: .client)
    }

    func run(crashes: Bool) async throws {
        if crashes { simulation.options.crashNanoseconds = 5_000_000 + random.next() % 200_000_000 }
        let outcome = try await simulation.boot { [self] thread throws(BlockError) in
            try await body(thread)
        }
        #expect(failures.isEmpty, "seed \(seed): \(failures)")
        switch outcome {
        case .finished:
            check { shadow.legalValues(at: $0) }
        case .crashed:
            shadow.crash()
            check { shadow.survivingValues(at: $0) }
        }
    }

    private func check(_ legal: (Int) -> ByteSet) {
        let bytes = simulation.disk.bytes(of: "/disk") ?? []
        let wrong = bytes.indices.first { !legal($0).contains(bytes[$0]) }
        #expect(
            bytes.count == Self.size && wrong == nil,
            "seed \(seed): byte \(wrong ?? -1) of the disk is not what it may be")
    }

    private func body(_ thread: IOThread) async throws(BlockError) {
        let graph = BlockGraph(
            on: thread, registry: DriverRegistry(BlockProtocols.drivers + BlockFormats.drivers))
        let node = try await graph.open(
            [
                "driver": "raw", "node-name": "disk", "discard": "unmap",
                "file": ["driver": "file", "filename": "/disk", "locking": "off"],
            ], monitorOwned: true)
        var options = NBDServer.Options()
        options.credentials = server
        let server = NBDServer(on: thread, options)
        try server.add(NBDExport(name: "disk", node: node, writable: true))
        server.listen(on: try Listener(on: .unix(path: "/s"), thread: thread))
        let clients = NBDReplyMode.allCases.map {
            ModelClient(self, thread, $0, random.fork(), client)
        }
        let tasks = clients.map { client in thread.spawn { await client.run(rounds: 16) } }
        for task in tasks { await task.value }
        try await server.stop()
        try await graph.closeAll()
    }
}

/// A client that sends batches of random requests and checks the replies. Confined to its thread.
final class ModelClient: @unchecked Sendable {
    private enum Kind { case read, change, flush }
    private struct Pending {
        let kind: Kind
        let range: ByteRange
        let request: ShadowDisk.Request
        var bytes: [UInt8]
        var failed = false
    }

    private let run: ModelRun
    private let thread: IOThread
    private let mode: NBDReplyMode
    private var random: SeededRandom
    private let credentials: TLSCredentials?
    private var socket: Socket?
    private var channel: (any NBDChannel)?
    private var input: NBDInput?
    private var pending: [UInt64: Pending] = [:]
    private var cookie: UInt64 = 0

    init(
        _ run: ModelRun, _ thread: IOThread, _ mode: NBDReplyMode, _ random: SeededRandom,
        _ credentials: TLSCredentials?
    ) {
        self.run = run
        self.thread = thread
        self.mode = mode
        self.random = random
        self.credentials = credentials
    }

    func run(rounds: Int) async {
        for _ in 0..<rounds {
            do throws(BlockError) {
                if channel == nil { try await connect() }
                try await batch()
            } catch {
                await forget()
            }
        }
        do throws(BlockError) {
            try await send(header(.disconnect, ByteRange(0, 0), []))
        } catch {
            // The connection broke by itself.
        }
        channel?.close()
    }

    /// The connection broke: what was in flight may still happen, for a while.
    private func forget() async {
        channel?.close()
        (channel, input, socket) = (nil, nil, nil)
        await thread.sleep(nanoseconds: 20_000_000_000)
        for entry in pending.values { end(entry, succeeded: false) }
        pending = [:]
    }

    // MARK: Handshake

    private func connect() async throws(BlockError) {
        let socket = try await Socket.connect(to: .unix(path: "/s"), on: thread)
        self.socket = socket
        channel = socket
        input = try NBDInput()
        _ = try await take(18)
        try await send(RawClient.flags)
        if let credentials {
            try await option(RawClient.option(5))
            let secure = try NBDSecureChannel(socket, credentials)
            channel = secure
            try await secure.handshake()
        }
        if mode > .simple { try await option(RawClient.option(mode == .extended ? 11 : 8)) }
        try await option(RawClient.go("disk"))
    }

    private func option(_ bytes: [UInt8]) async throws(BlockError) {
        try await send(bytes)
        while true {
            let header = try await take(20)
            let (type, count) = header.withUnsafeBytes {
                ($0.bigEndian(at: 12, as: UInt32.self), $0.bigEndian(at: 16, as: UInt32.self))
            }
            _ = try await take(Int(count))
            if type == 1 { return }
            guard type < 0x8000_0000 else {
                throw BlockError(.protocolViolation, "an option was refused")
            }
        }
    }

    // MARK: Requests

    private func batch() async throws(BlockError) {
        var bytes: [UInt8] = []
        for _ in 0...random.below(8) { bytes += next() }
        try await send(bytes)
        while !pending.isEmpty { try await reply() }
    }

    /// One more request, as bytes.
    private func next() -> [UInt8] {
        let start = random.below(ModelRun.size)
        let most = random.chance(50) ? ModelRun.size : 3_000
        let range = ByteRange(start, random.below(min(most, ModelRun.size - start)) + 1)
        let isDurable = random.chance(150)
        let flags: NBDCommandFlags = isDurable ? .fua : []
        cookie += 1
        switch random.below(10) {
        case 0...3:
            expect(.read, range, run.shadow.beginRead(range))
            return header(.read, range, [])
        case 4...6:
            let value = UInt8(truncatingIfNeeded: random.next())
            let data = [UInt8](repeating: value, count: range.count)
            expect(
                .change, range,
                run.shadow.beginWrite(range.offset, data, durable: isDurable))
            let payload: NBDCommandFlags = mode == .extended ? .payloadLength : []
            return header(.write, range, flags.union(payload)) + data
        case 7:
            expect(.change, range, run.shadow.beginZeroes(range, durable: isDurable))
            let hole: NBDCommandFlags = random.chance(500) ? .noHole : []
            return header(.writeZeroes, range, flags.union(hole))
        case 8:
            expect(.change, range, run.shadow.beginDiscard(range))
            return header(.trim, range, [])
        default:
            expect(.flush, ByteRange(0, 0), run.shadow.beginFlush())
            return header(.flush, ByteRange(0, 0), [])
        }
    }

    private func expect(_ kind: Kind, _ range: ByteRange, _ request: ShadowDisk.Request) {
        let count = kind == .read ? range.count : 0
        pending[cookie] = Pending(
            kind: kind, range: range, request: request,
            bytes: [UInt8](repeating: 0xee, count: count))
    }

    private func header(
        _ command: NBDCommand, _ range: ByteRange, _ flags: NBDCommandFlags
    ) -> [UInt8] {
        if mode == .extended {
            return RawClient.extendedRequest(
                command.rawValue, UInt64(range.offset), UInt64(range.count), cookie: cookie,
                flags: flags.rawValue)
        }
        return RawClient.request(
            command.rawValue, UInt64(range.offset), UInt32(range.count), cookie: cookie,
            flags: flags.rawValue)
    }

    // MARK: Replies

    private func reply() async throws(BlockError) {
        let magic = try await take(4)
        switch magic {
        case RawClient.bigEndian(NBDMagic.simpleReply):
            let rest = try await take(12)
            let number = rest.withUnsafeBytes { $0.bigEndian(at: 4, as: UInt64.self) }
            guard var entry = pending[number] else { return complain("an unknown cookie") }
            entry.failed = rest[0..<4] != [0, 0, 0, 0]
            if entry.kind == .read, !entry.failed {
                if mode != .simple { complain("a simple reply to a read") }
                entry.bytes = try await take(entry.range.count)
            }
            finish(number, entry)
        case RawClient.bigEndian(NBDMagic.structuredReply) where mode == .structured,
            RawClient.bigEndian(NBDMagic.extendedReply) where mode == .extended:
            try await chunk()
        default:
            complain("a reply of another form: \(magic)")
            throw BlockError(.protocolViolation, "the framing is lost")
        }
    }

    private func chunk() async throws(BlockError) {
        let isExtended = mode == .extended
        let rest = try await take(isExtended ? 28 : 16)
        let (flags, type, number) = rest.withUnsafeBytes {
            (
                $0.bigEndian(at: 0, as: UInt16.self), $0.bigEndian(at: 2, as: UInt16.self),
                $0.bigEndian(at: 4, as: UInt64.self)
            )
        }
        let count = rest.suffix(4).reduce(0) { $0 << 8 | Int($1) }
        let payload = try await take(count)
        guard var entry = pending[number] else { return complain("an unknown cookie") }
        switch NBDChunkType(rawValue: type) {
        case .offsetData, .offsetHole:
            let offset = payload.prefix(8).reduce(0) { $0 << 8 | Int($1) } - entry.range.offset
            let isHole = type == NBDChunkType.offsetHole.rawValue
            let data =
                isHole
                ? [UInt8](repeating: 0, count: payload.suffix(4).reduce(0) { $0 << 8 | Int($1) })
                : Array(payload.dropFirst(8))
            guard offset >= 0, offset + data.count <= entry.bytes.count else {
                return complain("a chunk outside the read")
            }
            entry.bytes.replaceSubrange(offset..<(offset + data.count), with: data)
        case .error, .errorOffset: entry.failed = true
        case .none?: break
        default: complain("a chunk of type \(type)")
        }
        pending[number] = entry
        if flags & 1 != 0 { finish(number, entry) }
    }

    private func finish(_ number: UInt64, _ entry: Pending) {
        pending[number] = nil
        if entry.failed { complain("a request failed: \(entry.kind) \(entry.range)") }
        end(entry, succeeded: !entry.failed)
    }

    private func end(_ entry: Pending, succeeded: Bool) {
        switch entry.kind {
        case .read:
            if succeeded {
                if let wrong = run.shadow.endRead(entry.request, entry.bytes) { complain(wrong) }
            } else {
                run.shadow.abandonRead(entry.request)
            }
        case .change: run.shadow.end(entry.request, succeeded: succeeded)
        case .flush: run.shadow.endFlush(entry.request, succeeded: succeeded)
        }
    }

    private func complain(_ what: String) {
        run.failures.append("\(mode): \(what)")
    }

    // MARK: Bytes

    private func send(_ bytes: [UInt8]) async throws(BlockError) {
        guard let channel else { throw BlockError(.disconnected, "not connected") }
        let result = bytes.withUnsafeBytes { bytes -> Result<IOVector, BlockError> in
            do throws(BlockError) {
                return .success(try IOVector(copying: bytes))
            } catch {
                return .failure(error)
            }
        }
        try await channel.send(try result.get())
    }

    private func take(_ count: Int) async throws(BlockError) -> [UInt8] {
        guard let channel, var input else { throw BlockError(.disconnected, "not connected") }
        let bytes = try await input.take(count, from: channel).array
        self.input = input
        return bytes
    }
}
