#if os(Linux)
import BlockCore
import Testing

@testable import BlockIO

/// Who has a lock on a byte of a file, by what the system shows.
@Suite struct LockHolderTests {
    @Test func onlyAnOpeningThatHasTheLockIsItsHolder() throws {
        let path = "/tmp/merino-holder-\(UInt64.random(in: 0 ... .max))"
        let system = HostSystem()
        let first = try system.open(path, FileOptions(writable: true, create: true))
        let second = try system.open(path, FileOptions(writable: true))
        defer {
            system.close(first)
            system.close(second)
            try? system.remove(path)
        }
        #expect(try system.lock(first, ByteRange(201, 1), .shared))
        #expect(system.holders(ofLock: 201, besides: second) == [.thisProcess])
        #expect(system.holders(ofLock: 201, besides: first) == [])
        #expect(system.holders(ofLock: 203, besides: second) == [])
    }

    @Test(arguments: [
        ("", false),
        ("pos:\t0\nlock:\t1: OFDLCK ADVISORY  READ -1 fe:00:16285870 201 201\n", true),
        ("lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:201 100 200\n", false),
        ("lock:\t1: POSIX  ADVISORY  WRITE 7 fe:00:9 0 EOF\n", true),
        ("lock:\t1: POSIX  ADVISORY  WRITE 7 fe:00:9 202 EOF\n", false),
        ("mnt_id: 201 201\nlock:\nlock: 201\nlock: a b\nlock: 1 b\n", false),
    ]) func aListOfLocksIsRead(text: String, isHeld: Bool) {
        #expect(ProcessFiles.lists(text, lockOn: 201) == isHeld)
    }
}
#endif
