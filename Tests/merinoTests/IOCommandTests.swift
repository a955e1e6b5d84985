import Foundation
import Testing

/// `io` beside `qemu-io`.
@Suite struct IOCommandTests {
    private static let scripts: [[String]] = [
        ["write 0 64k", "read -P 0xcd 0 64k", "read -P 1 0 4k", "length"],
        ["write -P 5 513 1000", "read -v 510 40", "read -P 5 -s 3 -l 1000 510 1003"],
        ["writev -P 7 4k 1k 2k 512", "readv -v -P 7 4k 16 16", "readv -P 8 4k 1k"],
        ["write -q 0 4k", "read -q 0 4k", "write -z 1k 1k", "read -v 1000 64"],
        ["write -zu 64k 64k", "write -f 0 4k", "write -zf 4k 4k", "discard 0 64k", "flush"],
        ["alloc 0 20M", "alloc 3", "alloc 3 100", "map", "info"],
        ["truncate 11M", "length", "truncate 512k", "length", "map"],
        ["read 20M 4k", "read 10M 1", "write 10M 512", "discard 20M 4k", "readv 20M 4k"],
        ["write -n 0 4k", "write -u 0 4k"],
        ["reopen -r", "read -P 0 0 4k", "write 0 4k", "reopen -w", "write 0 4k"],
        ["close", "read 0 4k", "open a.raw", "open a.raw", "read 0 4k"],
        ["aio_write -P 9 0 64k", "aio_flush", "aio_read -P 9 0 64k", "aio_flush"],
        ["read 0x200 0x10", "write 1k 0", "sleep 1", "quit", "read 0 4k"],
        ["foo"], ["read"], ["read x 1"], ["read 0 y"], ["write -P 300 0 1"], ["write -k 0 1"],
        ["write -c 0 64k", "write -b 0 1k", "read -b 0 1k"],
        ["break write_aio a", "resume a", "remove_break a"],
    ]

    @Test("commands have qemu-io's results and exit code", arguments: scripts)
    func likeQEMU(_ script: [String]) throws {
        let (ours, theirs) = (try Workplace(), try Workplace())
        for place in [ours, theirs] {
            try place.tool("qemu-img", "create", "-q", "a.raw", "10M")
        }
        let arguments = ["-f", "raw"] + script.flatMap { ["-c", $0] } + ["a.raw"]
        let own = try ours.run(Workplace.merino, ["io"] + arguments)
        let other = try theirs.run("/usr/bin/env", ["qemu-io"] + arguments)
        #expect(own.status == other.status, "\(own.errors)")
        let (result, expected) = (Self.lines(own.output), Self.lines(other.output))
        #expect(result == expected)
        let files = [ours, theirs].map {
            FileManager.default.contents(atPath: "\($0.folder)/a.raw")
        }
        #expect(files[0] == files[1])
    }

    /// The result lines: no times, and no words on misuse, which are each program's own.
    private static func lines(_ output: String) -> [String] {
        Workplace.withoutTimes(output).split(separator: "\n").map(String.init).filter { line in
            !["requires -z", "Parsing error", "valid pattern", " -- writes", "write failed"]
                .contains { line.contains($0) }
        }
    }

    @Test func commandsOfStandardInputAreRun() throws {
        let place = try Workplace()
        try place.merino("create", "-q", "a.raw", "1M")
        let result = try place.merino(
            "io", "-f", "raw", "a.raw", input: "write -P 3 0 4k\nread -P 3 0 4k\nquit\nread 0 1\n")
        #expect(result.status == 0)
        #expect(result.output.contains("merino> wrote 4096/4096 bytes at offset 0\n"))
        #expect(result.output.contains("merino> read 4096/4096 bytes at offset 0\n"))
        #expect(!result.output.contains("read 1/1"))
    }

    @Test func readOnlyImageIsNotWritten() throws {
        let place = try Workplace()
        try place.merino("create", "-q", "a.raw", "1M")
        let result = try place.merino(
            "io", "-r", "-f", "raw", "-c", "write 0 4k", "-c", "read -P 0 0 4k", "a.raw")
        #expect(result.status == 1)
        #expect(result.errors.contains("read-only"))
        #expect(result.output.hasPrefix("read 4096/4096 bytes"))
    }

    /// Scripts on `blkdebug:rules:a.raw`.
    private static let debugScripts: [[String]] = [
        ["read 0 4k", "write 0 4k", "read 0 4k", "write -z 0 4k", "read 0 4k"],
        [
            "break write_aio A", "aio_write -P 5 0 4k", "wait_break A", "read 8k 4k", "resume A",
            "aio_flush", "read -P 5 0 4k",
        ],
        ["resume B", "remove_break C", "break foo D", "break write_aio A", "remove_break A"],
        ["break read_aio A", "remove_break A", "read 16k 4k"],
    ]

    @Test("a blkdebug node's rules and breakpoints do as qemu-io's", arguments: debugScripts)
    func debugsLikeQEMU(_ script: [String]) throws {
        let (ours, theirs) = (try Workplace(), try Workplace())
        let rules = """
            [inject-error]
            event = "write_aio"
            iotype = "read"
            errno = "28"
            once = "on"
            state = "1"

            [set-state]
            event = "pwritev_zero"
            new_state = "2"
            """
        for place in [ours, theirs] {
            try place.tool("qemu-img", "create", "-q", "a.raw", "1M")
            try rules.write(
                toFile: "\(place.folder)/rules", atomically: false, encoding: .utf8)
        }
        let arguments = ["-f", "raw"] + script.flatMap { ["-c", $0] } + ["blkdebug:rules:a.raw"]
        let own = try ours.run(Workplace.merino, ["io"] + arguments)
        let other = try theirs.run("/usr/bin/env", ["qemu-io"] + arguments)
        #expect(own.status == other.status, "\(own.errors)")
        #expect(Self.lines(own.output) == Self.lines(other.output))
    }

    @Test func differencesAreFoundByBlkverify() throws {
        let place = try Workplace()
        try place.merino("create", "-q", "a.raw", "1M")
        try place.merino("create", "-q", "-f", "qcow2", "b.qcow2", "1M")
        let name = "blkverify:a.raw:b.qcow2"
        let good = try place.merino(
            "io", "-f", "raw", "-c", "write -P 5 0 64k", "-c", "read -P 5 0 64k", name)
        #expect(good.status == 0, "\(good.errors)")
        try place.merino("io", "-f", "raw", "-c", "write -P 6 1000 1", "a.raw")
        let bad = try place.merino("io", "-f", "raw", "-c", "read 0 64k", name)
        #expect(bad.status == 1 && bad.errors.contains("byte 1000 is 5"), "\(bad.errors)")
    }

    /// Writes and zeroes leave the same log; flushes are each program's own.
    @Test(arguments: [512, 4096]) func writesAreLoggedLikeQEMUs(sectorSize: Int) throws {
        let (ours, theirs) = (try Workplace(), try Workplace())
        let image =
            "driver=blklogwrites,file.driver=file,file.filename=a.raw,log.driver=file,"
            + "log.filename=log,log-sector-size=\(sectorSize)"
        let script = ["write -P 1 0 1k", "write -z 4k 8k", "discard 0 8k", "write -P 9 100 10"]
        let arguments = ["--image-opts", image] + script.flatMap { ["-c", $0] }
        var logs: [[[UInt8]]] = []
        for (place, program) in [
            (ours, [Workplace.merino, "io"]), (theirs, ["/usr/bin/env", "qemu-io"]),
        ] {
            try place.tool("qemu-img", "create", "-q", "a.raw", "1M")
            try place.tool("truncate", "-s", "0", "log")
            let result = try place.run(program[0], [program[1]] + arguments)
            #expect(result.status == 0, "\(result.errors)")
            let data = FileManager.default.contents(atPath: "\(place.folder)/log") ?? Data()
            logs.append(Self.entries([UInt8](data), sectorSize))
        }
        #expect(logs[0].count == 4)
        // Not shown: they are long.
        let areEqual = logs[0] == logs[1]
        #expect(areEqual)
    }

    /// The entries of a log with their data, but for flushes.
    private static func entries(_ log: [UInt8], _ sectorSize: Int) -> [[UInt8]] {
        func word(_ offset: Int) -> Int {
            guard offset + 8 <= log.count else { return 0 }
            return (0..<8).reduce(0) { $0 | Int(log[offset + $1]) << ($1 * 8) }
        }
        var result: [[UInt8]] = []
        var offset = sectorSize
        for _ in 0..<word(16) {
            let flags = word(offset + 16)
            let length = sectorSize + (flags & 4 == 0 ? word(offset + 8) * sectorSize : 0)
            guard offset + length <= log.count else { break }
            if flags & 1 == 0 { result.append(Array(log[offset..<(offset + length)])) }
            offset += length
        }
        return result
    }

    @Test(arguments: ["zone_report 0 1", "zrs 0 1"])
    func whatIsNotThereIsRefusedByName(_ command: String) throws {
        let place = try Workplace()
        try place.merino("create", "-q", "a.raw", "1M")
        let result = try place.merino("io", "-f", "raw", "-c", command, "a.raw")
        #expect(result.status == 1)
        #expect(result.output == "" && result.errors.hasPrefix("merino: "))
    }

    @Test(arguments: [("sigraise 10", SIGUSR1), ("abort", SIGABRT)])
    func theProgramEndsBySignal(_ command: String, _ signal: Int32) throws {
        let place = try Workplace()
        try place.merino("create", "-q", "a.raw", "1M")
        let result = try place.merino(
            "io", "-f", "raw", "-c", "length", "-c", command, "-c", "length", "a.raw")
        // As a shell tells of it, or the program that ran it.
        #expect([signal, 128 + signal].contains(result.status))
        #expect(result.output == "1 MiB\n")
    }

    @Test func writeTakesAFilesBytes() throws {
        let place = try Workplace()
        try place.merino("create", "-q", "a.raw", "1M")
        try "abc".write(toFile: "\(place.folder)/p", atomically: false, encoding: .utf8)
        let result = try place.merino("io", "-f", "raw", "-c", "write -s p 1 8", "a.raw")
        #expect(result.status == 0, "\(result.errors)")
        let bytes = FileManager.default.contents(atPath: "\(place.folder)/a.raw")?.prefix(10)
        #expect(bytes.map(Array.init) == Array("\0abcabcab\0".utf8))
    }

    @Test("a rule of blkdebug on read_aio reaches the first read of an image")
    func rulesReachTheFirstRead() throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "b.qcow2", "4M")
        try place.tool("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 256k", "b.qcow2")
        try "[inject-error]\nevent = \"read_aio\"\nerrno = \"5\"\n".write(
            toFile: "\(place.folder)/rules", atomically: false, encoding: .utf8)
        let arguments = ["-f", "qcow2", "-c", "read 0 64k", "blkdebug:rules:b.qcow2"]
        let own = try place.run(Workplace.merino, ["io"] + arguments)
        let other = try place.run("/usr/bin/env", ["qemu-io"] + arguments)
        #expect(own.status == other.status && own.status == 1)
        #expect(own.output.contains("Input/output error"), "\(own.output)")
    }

    @Test(arguments: [
        ("write -bz 0 512", "", 1), ("write -b 100 100", "", 1), ("read -b 0 100", "", 1),
        ("read -b 0 512", "read failed: Operation not supported\n", 1),
        ("write -b 0 512", "write failed: Operation not supported\n", 1),
        ("read 8M 4k", "read failed: Input/output error\n", 1),
        ("aio_read 8M 4k", "readv failed: Input/output error\n", 0),
        ("aio_write 8M 4k", "aio_write failed: Input/output error\n", 0),
    ]) func whatIsRefusedSaysSo(command: String, output: String, code: Int32) throws {
        let place = try Workplace()
        try place.tool("truncate", "-s", "1M", "a.raw")
        let result = try place.merino("io", "-f", "raw", "-c", command, "-c", "aio_flush", "a.raw")
        #expect(result.output == output)
        #expect(!result.errors.isEmpty)
        #expect(result.status == code, "\(result.errors)")
    }

    @Test(arguments: [
        "read -l 1 0 10", "read -s 1 0 10", "read 0 1 2", "write 0 1 2", "discard 0 1 2",
    ])
    func underTheOthersNameMisuseIsToldAmongTheResults(command: String) throws {
        let place = try Workplace()
        try place.tool("truncate", "-s", "1M", "a.raw")
        try place.tool("ln", "-s", Workplace.merino, "qemu-io")
        let result = try place.run(
            "\(place.folder)/qemu-io", ["-f", "raw", "-c", command, "a.raw"])
        #expect(result.status == 1)
        #expect(!result.output.isEmpty && result.errors.isEmpty, "\(result.errors)")
    }

    @Test("a part of a cluster of saved state is written, and the rest of it stays, shared or not")
    func theRestOfAClusterOfStateStays() throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
        try place.merino("io", "-f", "qcow2", "-c", "write -b -P 1 0 192k", "a.qcow2")
        for isShared in [false, true] {
            if isShared { try place.tool("qemu-img", "snapshot", "-c", "s", "a.qcow2") }
            try place.merino("io", "-f", "qcow2", "-c", "write -b -P 2 512 80k", "a.qcow2")
            for program in [Workplace.merino + " io", "qemu-io"] {
                let result = try place.tool(
                    "sh", "-c",
                    "\(program) -f qcow2 -c 'read -b -P 1 0 512' -c 'read -b -P 2 512 80k' "
                        + "-c 'read -b -P 1 82432 114176' a.qcow2")
                #expect(result.status == 0, "\(result.errors)")
                #expect(!result.output.contains("failed"), "\(program): \(result.output)")
            }
        }
        #expect(try place.tool("qemu-img", "check", "a.qcow2").status == 0)
    }

    @Test("saved state that was never written is zeroes, and no part of a longer backing image")
    func stateThatWasNeverWrittenIsZeroes() throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "base", "4M")
        try place.tool("qemu-io", "-f", "raw", "-c", "write -P 9 0 4M", "base")
        // State begins at 2 MiB: that is what one table of such clusters maps.
        try place.tool(
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "-o",
            "cluster_size=4k", "a.qcow2", "1M")
        let result = try place.merino(
            "io", "-f", "qcow2", "-c", "read -b -P 0 0 8k", "-c", "write -b -P 1 512 512", "-c",
            "read -b -P 0 0 512", "-c", "read -b -P 1 512 512", "-c", "read -b -P 0 1k 7k", "-c",
            "read -P 9 0 1M", "a.qcow2")
        #expect(result.status == 0, "\(result.errors)")
        #expect(!result.output.contains("failed"), "\(result.output)")
    }
}
