import Foundation
import Testing

/// `measure`, `resize`, `dd` and `bench` beside `qemu-img`.
@Suite struct ToolCommandsTests {
    private func withImages() throws -> Workplace {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "a", "6M")
        try place.tool(
            "qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", "-c", "write -P 2 3M 70000", "a")
        try place.tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "a", "a.qcow2")
        return place
    }

    private func expectLike(
        _ place: Workplace, _ arguments: [String], location: SourceLocation = #_sourceLocation
    ) throws {
        let own = try place.run(Workplace.merino, arguments)
        let other = try place.run("/usr/bin/env", ["qemu-img"] + arguments)
        #expect(
            own.status == other.status, "\(arguments): \(own.errors)", sourceLocation: location)
        #expect(own.output == other.output, "\(arguments)", sourceLocation: location)
    }

    // MARK: Measure

    @Test(
        "an empty disk's needs are those that QEMU finds",
        arguments: ["0", "1", "1000", "1M", "10G", "1T", "64T"])
    func measureEmpty(_ size: String) throws {
        let place = try Workplace()
        for options in [
            "compat=1.1", "cluster_size=64k,refcount_bits=1", "refcount_bits=64", "cluster_size=2M",
            "preallocation=full", "preallocation=metadata", "compat=0.10",
        ] {
            try expectLike(place, ["measure", "--size", size, "-O", "qcow2", "-o", options])
        }
        try expectLike(place, ["measure", "--size", size])
        try expectLike(place, ["measure", "--size", size, "-O", "qcow2", "--output", "json"])
    }

    @Test func aCopysNeedsAreThoseThatQEMUFinds() throws {
        let place = try withImages()
        for image in ["a", "a.qcow2"] {
            // Clusters smaller than the source's are told more exactly: holes in its file count.
            for options in ["compat=1.1", "cluster_size=2M", "compat=0.10"] {
                try expectLike(place, ["measure", "-O", "qcow2", "-o", options, image])
                try expectLike(
                    place, ["measure", "--output=json", "-O", "qcow2", "-o", options, image])
            }
            try expectLike(place, ["measure", image])
        }
    }

    @Test func anEncryptedImagesNeedsAreThoseThatQEMUFinds() throws {
        let place = try Workplace()
        for more in ["", ",encrypt.cipher-alg=aes-128", ",cluster_size=4k", ",preallocation=full"] {
            try expectLike(
                place,
                [
                    "measure", "--object", "secret,id=s,data=x", "--size", "1G", "-O", "qcow2",
                    "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10" + more,
                ])
        }
        try expectLike(
            place, ["measure", "--size", "1G", "-O", "qcow2", "-o", "encrypt.format=luks"])
        try expectLike(place, ["measure", "--size", "1G", "-O", "qcow2", "-o", "data_file=x"])
    }

    @Test(
        "measure refuses", arguments: [[], ["--size", "1M", "a"], ["-O", "foo", "a"], ["none"]])
    func measureRefuses(_ arguments: [String]) throws {
        try expectLike(withImages(), ["measure"] + arguments)
    }

    // MARK: Resize

    private static let resizes: [[String]] = [
        ["a", "7M"], ["a", "+1M"], ["a", "1M"], ["--shrink", "a", "1M"], ["a.qcow2", "20M"],
        ["--shrink", "a.qcow2", "-1M"], ["--shrink", "a.qcow2", "--", "-1M"], ["a.qcow2", "+0"],
        ["a.qcow2", "-1M"], ["-q", "a.qcow2", "8M"], ["a.qcow2", "x"], ["a.qcow2"], ["none", "1M"],
        ["--preallocation=full", "a.qcow2", "8M"], ["--preallocation=metadata", "a.qcow2", "8M"],
        ["--preallocation=falloc", "a", "8M"], ["--preallocation=bad", "a.qcow2", "8M"],
        ["--preallocation=full", "--shrink", "a.qcow2", "1M"], ["--shrink", "a.qcow2", "-100M"],
    ]

    @Test("resize does what QEMU's does", arguments: resizes)
    func resize(_ arguments: [String]) throws {
        let (ours, theirs) = (try withImages(), try withImages())
        let own = try ours.run(Workplace.merino, ["resize"] + arguments)
        let other = try theirs.run("/usr/bin/env", ["qemu-img", "resize"] + arguments)
        #expect(own.status == other.status, "\(own.errors)")
        #expect(own.output == other.output)
        for name in ["a", "a.qcow2"] {
            try ours.tool("cp", "\(theirs.folder)/\(name)", "other")
            let same = try ours.tool("qemu-img", "compare", "-s", name, name)
            #expect(same.status == 0)
            let compare = try ours.tool("qemu-img", "compare", name, "other")
            #expect(compare.output == "Images are identical.\n", "\(compare.output)")
        }
        #expect(try ours.tool("qemu-img", "check", "-q", "a.qcow2").status == 0)
    }

    // MARK: dd

    @Test(
        "dd copies the part that QEMU's does",
        arguments: [
            "bs=1M count=3 skip=1", "bs=1000 count=3 skip=1", "bs=64k skip=200", "bs=64k", "",
            "bs=1000 skip=3", "count=0", "bs=1M count=9", "bs=3M skip=2",
        ])
    func dd(_ operands: String) throws {
        let place = try withImages()
        let words = operands.split(separator: " ").map(String.init) + ["if=a.qcow2"]
        for format in ["raw", "qcow2"] {
            let own = try place.run(
                Workplace.merino, ["dd", "-O", format] + words + ["of=own"])
            let other = try place.run(
                "/usr/bin/env", ["qemu-img", "dd", "-O", format] + words + ["of=other"])
            #expect(own.status == 0 && other.status == 0, "\(own.errors)")
            let same = try place.tool(
                "qemu-img", "compare", "-s", "-f", "raw", "-F", "raw", "own", "own")
            #expect(same.status == 0)
            let compare = try place.tool(
                "qemu-img", "compare", "-f", format, "-F", format, "own", "other")
            #expect(compare.output == "Images are identical.\n", "\(operands): \(compare.output)")
        }
    }

    @Test func ddTakesSizesOfInputAndOutput() throws {
        let place = try withImages()
        #expect(try place.merino("dd", "if=a", "of=b", "isize=1000k", "osize=2M").status == 0)
        #expect(try place.tool("stat", "-c", "%s", "b").output == "2097152\n")
        let bytes = try #require(FileManager.default.contents(atPath: "\(place.folder)/b"))
        #expect(bytes[1_023_999] == 1 && bytes[1_024_000] == 0)
    }

    @Test(
        "dd refuses",
        arguments: [
            ["if=a"], ["of=a"], ["bs=x", "if=a", "of=y"], ["bs=0", "if=a", "of=y"],
            ["foo=0", "if=a", "of=y"], ["foo", "if=a", "of=y"], ["if=none", "of=y"],
        ])
    func ddRefuses(_ operands: [String]) throws {
        let place = try withImages()
        try expectLike(place, ["dd"] + operands)
        #expect(!FileManager.default.fileExists(atPath: "\(place.folder)/y"))
    }

    @Test func ddDoesNotOverwriteItsInput() throws {
        let place = try withImages()
        let result = try place.merino("dd", "-f", "raw", "if=a", "of=a")
        #expect(result.status == 1 && result.errors.contains("'a'"))
        #expect(try place.tool("qemu-img", "compare", "a", "a.qcow2").status == 0)
    }

    // MARK: Bench

    private func withoutTime(_ text: String) -> [Substring] {
        text.split(separator: "\n").filter { !$0.hasPrefix("Run completed in ") }
    }

    @Test(
        "bench says what QEMU's does",
        arguments: [
            ["-c", "100"], ["-c", "0"], ["-q", "-c", "10"], ["-c", "10", "-S", "0", "-s", "64k"],
            ["-c", "100", "-w", "-d", "4", "-S", "8k", "-o", "4k", "--pattern=7"],
            ["-c", "100", "-w", "--flush-interval=10"], ["--flush-interval=10"],
            ["-c", "100", "-w", "-d", "4", "--no-drain", "--flush-interval=10", "-t", "none"],
            ["-c", "10", "-i", "native"], ["-c", "10", "-t", "foo"], ["-c", "-1"],
        ])
    func bench(_ arguments: [String]) throws {
        let place = try withImages()
        let all = ["bench"] + arguments + ["a.qcow2"]
        let own = try place.run(Workplace.merino, all)
        let other = try place.run("/usr/bin/env", ["qemu-img"] + all)
        #expect(own.status == other.status, "\(own.errors)")
        if own.status == 0 {
            #expect(withoutTime(own.output) == withoutTime(other.output))
            #expect(own.output.contains("Run completed in 0."))
        }
        #expect(try place.tool("qemu-img", "check", "-q", "a.qcow2").status == 0)
    }

    @Test func benchWritesThePattern() throws {
        let place = try withImages()
        try place.merino(
            "bench", "-f", "raw", "-w", "-c", "2", "-s", "4k", "-S", "64k", "-o", "4M",
            "--pattern", "9", "a")
        let bytes = try #require(FileManager.default.contents(atPath: "\(place.folder)/a"))
        let start = 4 << 20
        #expect(bytes[start] == 9 && bytes[start + 4095] == 9 && bytes[start + 4096] == 0)
        #expect(bytes[start + 65536] == 9 && bytes[start + 131_072] == 0)
    }
}
