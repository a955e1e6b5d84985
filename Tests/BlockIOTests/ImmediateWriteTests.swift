import BlockCore
import Testing

@testable import BlockIO

#if canImport(Glibc)
import Glibc
#endif

/// An engine's answers to writes that are tried at once, in a row; everything else never completes.
private final class AnsweringEngine: IOEngine, @unchecked Sendable {
    private let engine: any IOEngine
    var answers: [Int?] = []
    /// Whether each attempt was allowed to wait.
    private(set) var attempts: [Bool] = []

    init(_ engine: any IOEngine) { self.engine = engine }

    var name: String { engine.name }
    var system: any IOSystem { engine.system }
    var now: UInt64 { engine.now }
    var offloadsWork: Bool { engine.offloadsWork }
    func submit(_ operation: IOOperation, _ token: IOToken) { engine.submit(operation, token) }
    func cancelAll(on handle: IOHandle) { engine.cancelAll(on: handle) }
    func poll(deadline: UInt64?, complete: (IOToken, Int) -> Void) {
        engine.poll(deadline: deadline, complete: complete)
    }
    func wake() { engine.wake() }

    func writeNow(
        _ handle: IOHandle, _ vector: IOVector, offset: Int, mayWait: Bool
    ) -> Int? {
        attempts.append(mayWait)
        return answers.isEmpty ? nil : answers.removeFirst()
    }
}

/// Whether a buffered write is made on the thread that everything else runs on.
@Suite struct ImmediateWriteTests {
    /// What becomes of writes of 512 bytes at once, when the system answers so.
    private static func outcomes(
        _ answers: [Int?], atOnce: Bool = true
    ) throws -> (written: [Bool], attempts: [Bool]) {
        let path = "/tmp/merino-immediate-\(UInt64.random(in: 0 ... .max))"
        let thread = try IOThread(name: "test") { () throws(BlockError) in
            AnsweringEngine(try ThreadsEngine())
        }
        defer { thread.stop() }
        return try thread.runBlocking {
            () async throws(BlockError) -> (written: [Bool], attempts: [Bool]) in
            guard let engine = thread.engine as? AnsweringEngine else { return ([], []) }
            let file = try await File.open(
                path, FileOptions(writable: true, create: true), on: thread)
            file.writesAtOnce = atOnce
            engine.answers = answers
            let vector = try IOVector(allocating: 512)
            let written = answers.map { _ in file.writeNow(vector, at: 0) }
            await file.close()
            try thread.system.remove(path)
            return (written, engine.attempts)
        }
    }

    @Test func aFileThatCanTellIsAskedEachTime() throws {
        let result = try Self.outcomes([512, nil, 512])
        #expect(result.written == [true, false, true])
        #expect(result.attempts == [false, false, false])
    }

    @Test(arguments: [EOPNOTSUPP, EINVAL])
    func aLocalFileThatCannotTellIsWrittenAllTheSame(failure: Int32) throws {
        let result = try Self.outcomes([-Int(failure), 512, 512])
        #expect(result.written == [true, true, false])
        #expect(result.attempts == [false, true, true, true])
    }

    @Test func nothingIsWrittenAtOnceForCallersWithADeadline() throws {
        let result = try Self.outcomes([512, 512], atOnce: false)
        #expect(result.written == [false, false])
        #expect(result.attempts == [])
    }

    #if os(Linux)
    /// Whatever is not known to be this machine's own storage counts as another's.
    @Test func onlyFilesOfLocalFileSystemsAreWrittenAtOnce() throws {
        let system = HostSystem()
        for (path, expected) in [
            ("/dev/shm", ImmediateWrites.unlessBlocked), ("/proc/self", .never), ("/sys", .never),
        ] {
            let handle = IOHandle(open(path, O_RDONLY | O_CLOEXEC))
            defer { close(handle.rawValue) }
            #expect(system.immediateWrites(of: handle) == expected, "\(path)")
        }
    }
    #endif
}
