import Foundation
import Testing

/// `compare` beside `qemu-img`: output and exit code.
@Suite struct CompareCommandTests {
    /// Images of the same contents in several forms, and others that differ.
    private func withImages() throws -> Workplace {
        let place = try Workplace()
        func io(_ format: String, _ name: String, _ commands: String...) throws {
            let words = commands.flatMap { ["-c", $0] }
            let result = try place.run(
                "/usr/bin/env", ["qemu-io", "-f", format] + words + [name])
            #expect(result.status == 0)
        }
        try place.tool("qemu-img", "create", "-q", "a", "6M")
        try io("raw", "a", "write -P 1 0 1M", "write -P 2 3M 70000")
        try place.tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "a", "a.qcow2")
        try place.tool(
            "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "a",
            "c.qcow2")
        try place.tool("cp", "a", "full")
        try io("raw", "full", "write -z 0 0", "write -P 0 1M 2M", "write -P 0 5M 1M")
        try place.tool("cp", "a", "late")
        try io("raw", "late", "write -P 9 5M 513")
        try place.tool("cp", "a", "early")
        try io("raw", "early", "write -P 9 70001 2", "write -P 9 4M 64k")
        try place.tool("cp", "a", "long")
        try place.tool("truncate", "-s", "8M", "long")
        try place.tool("cp", "long", "longer")
        try io("raw", "longer", "write -P 3 7M 4k")
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "empty.qcow2", "6M")
        try place.tool("truncate", "-s", "6M", "empty")
        try place.tool(
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "o.qcow2")
        try io("qcow2", "o.qcow2", "write -z 64k 64k", "write -P 1 64k 64k")
        return place
    }

    private static let pairs: [[String]] = [
        ["a", "a.qcow2"], ["a", "c.qcow2"], ["a.qcow2", "c.qcow2"], ["a", "full"],
        ["full", "a.qcow2"],
        ["a", "late"], ["late", "a.qcow2"], ["a.qcow2", "early"], ["early", "late"], ["a", "long"],
        ["long", "a"], ["a.qcow2", "longer"], ["longer", "a"], ["empty", "empty.qcow2"],
        ["a", "empty.qcow2"], ["o.qcow2", "a"], ["o.qcow2", "early"], ["a", "a"],
        ["a.qcow2", "a.qcow2"],
    ]

    private func expectLike(_ place: Workplace, _ arguments: [String]) throws {
        let own = try place.run(Workplace.merino, ["compare"] + arguments)
        let other = try place.run("/usr/bin/env", ["qemu-img", "compare"] + arguments)
        #expect(own.status == other.status, "\(arguments): \(own.errors)")
        #expect(own.output == other.output, "\(arguments)")
    }

    @Test func resultsAreThoseOfQEMU() throws {
        let place = try withImages()
        for pair in Self.pairs {
            try expectLike(place, pair)
            try expectLike(place, ["-q"] + pair)
        }
    }

    @Test func strictResultsAreThoseOfQEMU() throws {
        let place = try withImages()
        for pair in Self.pairs { try expectLike(place, ["-s"] + pair) }
    }

    @Test func formatsAreTaken() throws {
        let place = try withImages()
        try expectLike(place, ["-f", "raw", "-F", "qcow2", "a", "a.qcow2"])
        try expectLike(place, ["-f", "raw", "-F", "raw", "a", "a.qcow2"])
        try expectLike(
            place,
            ["--image-opts", "driver=raw,file.filename=a", "driver=qcow2,file.filename=c.qcow2"])
        try expectLike(place, ["-U", "-T", "none", "a", "a.qcow2"])
    }

    @Test func errorsHaveTheirExitCodes() throws {
        let place = try withImages()
        for arguments in [
            ["a", "none"], ["none", "a"], ["a"], ["a", "a", "a"], ["-T", "bad", "a", "a"],
        ] {
            try expectLike(place, arguments)
        }
        // A compressed cluster that cannot be expanded.
        let file = try #require(FileHandle(forUpdatingAtPath: "\(place.folder)/c.qcow2"))
        let map = try place.tool("qemu-img", "check", "c.qcow2").output
        #expect(map.contains("compressed clusters"))
        let size = file.seekToEndOfFile()
        for offset in stride(from: 28672, to: Int(size) - 64, by: 64) {
            file.seek(toFileOffset: UInt64(offset))
            file.write(Data(repeating: 0xee, count: 16))
        }
        file.closeFile()
        let broken = try place.merino("compare", "a", "c.qcow2")
        #expect([2, 3, 4].contains(broken.status), "\(broken.output)\(broken.errors)")
        #expect(broken.errors.hasPrefix("merino: "))
    }

    @Test func progressStopsBeforeADifference() throws {
        let place = try withImages()
        for pair in [["a", "early"], ["a", "late"], ["a", "empty.qcow2"]] {
            let result = try place.run(Workplace.merino, ["compare", "-p"] + pair)
            #expect(result.status == 1 && !result.output.contains("(100.00"), "\(result.output)")
        }
    }

    @Test func progressEndsWithTheResult() throws {
        let place = try withImages()
        let result = try place.merino("compare", "-p", "a", "full")
        #expect(result.output.hasPrefix("    (0.00/100%)\r"))
        #expect(result.output.hasSuffix("Images are identical.\n\n"))
    }
}
