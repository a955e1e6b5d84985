import BlockCore
import BlockIO
import QMP

/// One QMP client. Confined to its thread.
///
/// Three tasks: one receives bytes, one runs commands in their order, one sends. Bounded: bytes are
/// received only while the session has room and replies leave, and commands wait while replies have
/// not left, those out of band too. A client that lets events pile up is cut off.
final class MonitorConnection: @unchecked Sendable {
    /// Replies that have not left, in bytes: above, no further command is run.
    static let replyBytesMax = 1 << 20
    /// With events: above, the client is cut off.
    static let outputBytesMax = 16 << 20

    private let channel: any MonitorChannel
    private let thread: IOThread
    private let daemon: StorageDaemon
    private var session: QMPSession
    private var output: [UInt8] = []
    /// Of the output, what has been handed over and has not left yet.
    private var sendingBytes = 0
    private var isSending = false
    private var isInputOver = false
    private var isBroken = false
    private var isEnding = false
    private var outOfBandCount = 0
    /// Commands out of band that run at a time.
    private static let outOfBandCountMax = 16

    private var unsentBytes: Int { output.count + sendingBytes }
    private var takesReplies: Bool { unsentBytes <= Self.replyBytesMax }

    private let room = WakeUp()
    private let work = WakeUp()
    private let progress = WakeUp()

    init(_ channel: any MonitorChannel, daemon: StorageDaemon, isPretty: Bool) {
        self.channel = channel
        self.daemon = daemon
        thread = daemon.thread
        session = QMPSession(StorageDaemon.schema, isPretty: isPretty)
    }

    /// Serves the client until it leaves, or ``end()``.
    func run() async {
        send(session.greeting)
        thread.spawn { [self] in
            await receive()
            isInputOver = true
            work.wake()
        }
        await runCommands()
        while isSending || outOfBandCount > 0 { await progress.wait() }
        channel.shutdown()
        while !isInputOver { await work.wait() }
        channel.close()
    }

    /// Takes no further command; those that run end, and what is to be sent leaves.
    func end() {
        session.drop()
        isEnding = true
        work.wake()
        room.wake()
    }

    /// Breaks the connection: for a client that does not take what it is sent.
    func abort() {
        isBroken = true
        output = []
        channel.shutdown()
        work.wake()
        room.wake()
        progress.wake()
    }

    // MARK: Input

    private func receive() async {
        do throws(BlockError) {
            let buffer = try IOVector(allocating: 16 << 10)
            while !isEnding, !isBroken {
                guard session.wantsBytes, takesReplies else {
                    await room.wait()
                    runOutOfBand()
                    continue
                }
                let count = try await channel.receive(buffer)
                if count == 0 || isEnding { break }
                session.receive(buffer.slice(0, count).array)
                runOutOfBand()
                work.wake()
            }
            session.receiveEnd()
        } catch {
            // The client is gone: nobody waits for replies.
            abort()
        }
    }

    private func runCommands() async {
        while !isBroken {
            if !takesReplies {
                await progress.wait()
                continue
            }
            guard let step = session.next() else {
                if isInputOver || isEnding { return }
                await work.wait()
                continue
            }
            room.wake()
            await carryOut(step)
            runOutOfBand()
        }
    }

    private func runOutOfBand() {
        while takesReplies, outOfBandCount < Self.outOfBandCountMax,
            let step = session.nextOutOfBand()
        {
            outOfBandCount += 1
            thread.spawn { [self] in
                await carryOut(step)
                outOfBandCount -= 1
                progress.wake()
                room.wake()
            }
        }
    }

    private func carryOut(_ step: QMPSession.Step) async {
        switch step {
        case .send(let bytes): send(bytes)
        case .run(let request):
            let result: Result<JSONValue, BlockError>
            do throws(BlockError) {
                result = .success(try await daemon.execute(request, from: channel.descriptors))
            } catch {
                result = .failure(error)
            }
            send(session.reply(to: request, result))
        }
    }

    // MARK: Output

    func sendEvent(_ name: String, _ data: JSONValue, microseconds: Int) {
        guard let bytes = session.event(name, data, microseconds: microseconds) else { return }
        guard unsentBytes + bytes.count <= Self.outputBytesMax else { return abort() }
        send(bytes)
    }

    private func send(_ bytes: [UInt8]) {
        guard !isBroken else { return }
        output += bytes
        guard !isSending else { return }
        isSending = true
        thread.spawn { [self] in
            await sendOutput()
            isSending = false
            progress.wake()
            work.wake()
        }
    }

    private func sendOutput() async {
        while !output.isEmpty {
            do throws(BlockError) {
                let memory = try IOVector(allocating: output.count)
                output.withUnsafeBytes { memory.copy(from: $0) }
                sendingBytes = output.count
                output = []
                try await channel.send(memory)
                sendingBytes = 0
            } catch {
                sendingBytes = 0
                return abort()
            }
            progress.wake()
            room.wake()
        }
    }
}
