import Foundation
import Testing

/// `create`, `info` and `map` beside `qemu-img`.
@Suite struct ImageCommandsTests {
    private static let rawVariants: [[String]] = [
        ["a.raw", "10M"], ["a.raw", "1000"], ["-f", "raw", "a.raw", "1.5G"], ["a.raw", "0"],
        ["-fraw", "-o", "size=3k", "a.raw"],
        ["-o", "preallocation=falloc", "-o", "size=1M", "a.raw"],
        ["-q", "a.raw", "64k"],
    ]

    @Test("create of a raw image says and makes what qemu-img's does", arguments: rawVariants)
    func createLikeQEMU(_ arguments: [String]) throws {
        let (ours, theirs) = (try Workplace(), try Workplace())
        let own = try ours.run(Workplace.merino, ["create"] + arguments)
        let other = try theirs.run("/usr/bin/env", ["qemu-img", "create"] + arguments)
        #expect(own.status == 0, "\(own.errors)")
        #expect(own.output == other.output)
        let sizes = try [ours, theirs].map { place in
            try FileManager.default.attributesOfItem(atPath: "\(place.folder)/a.raw")[.size] as? Int
        }
        #expect(sizes[0] == sizes[1])
    }

    @Test(
        "create refuses what it cannot make, with exit code 1 and a reason",
        arguments: [
            (["x", "1x"], "'1x'"), (["x"], "size"), (["-f", "foo", "x", "1M"], "'foo'"),
            (["-o", "foo=1", "x", "1M"], "'foo'"), (["-o", "size", "x"], "'size'"),
            (["-b", "a", "-F", "raw", "x"], "backing"), (["none/x", "1M"], "none/x"),
            (["x", "9E"], "9E"), ([], "<file>"), (["x", "1M", "y"], "'y'"),
        ])
    func createRefuses(_ arguments: [String], _ words: String) throws {
        let place = try Workplace()
        let result = try place.run(Workplace.merino, ["create"] + arguments)
        #expect(result.status == 1)
        #expect(result.errors.hasPrefix("merino: ") && result.errors.contains(words))
        #expect(try FileManager.default.contentsOfDirectory(atPath: place.folder) == [])
    }

    private func withData(_ place: Workplace) throws {
        try place.tool("qemu-img", "create", "-q", "a.raw", "10M")
        try place.tool(
            "qemu-io", "-f", "raw", "-c", "write 1M 64k", "-c", "write 5000k 4k", "a.raw")
    }

    @Test("info tells of a raw image what qemu-img does", arguments: ["human", "json"])
    func infoLikeQEMU(_ output: String) throws {
        let place = try Workplace()
        try withData(place)
        let own = try place.merino("info", "--output", output, "a.raw")
        let other = try place.tool("qemu-img", "info", "--output", output, "a.raw")
        #expect(own.status == 0, "\(own.errors)")
        #expect(own.output == other.output)
    }

    @Test func infoTakesOptionsAndJSONNames() throws {
        let place = try Workplace()
        try withData(place)
        let plain = try place.merino("info", "a.raw").output
        for name in [
            ["--image-opts", "driver=raw,file.driver=file,file.filename=a.raw"],
            ["--image-opts", "file.filename=a.raw"],
            [#"json:{"driver":"raw","file":{"driver":"file","filename":"a.raw"}}"#],
            ["file:a.raw"], ["-f", "raw", "-U", "a.raw"],
        ] {
            let result = try place.run(Workplace.merino, ["info"] + name)
            #expect(result.output == plain, "\(name): \(result.errors)")
        }
    }

    @Test func aFormatBesideANameThatSaysAnotherIsRefused() throws {
        let place = try Workplace()
        for name in ["a.qcow2", "b.qcow2"] {
            try place.tool("qemu-img", "create", "-q", "-f", "qcow2", name, "1M")
        }
        let before = try place.tool("md5sum", "a.qcow2").output
        let name = #"json:{"driver":"qcow2","file.filename":"a.qcow2"}"#
        for words in [
            ["info", "-f", "raw", name], ["convert", "-f", "raw", "-O", "raw", name, "out"],
            // What makes a raw image by default.
            ["convert", "-n", "b.qcow2", name],
            ["create", "-f", "qcow2", "-b", name, "-F", "raw", "out"],
        ] {
            let result = try place.run(Workplace.merino, words)
            #expect(result.status == 1, "\(words): \(result.output)")
            #expect(result.errors.contains("given as raw"), "\(result.errors)")
        }
        #expect(try place.tool("md5sum", "a.qcow2").output == before)
        let same = try place.merino("info", "-f", "qcow2", name)
        #expect(same.status == 0 && same.output.contains("format: qcow2"), "\(same.errors)")
    }

    @Test("-f file is the file itself, as it is for qemu-img")
    func storageIsAFormat() throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
        try place.tool("truncate", "-s", "1M", "a.qcow2")
        for words in [
            ["info", "-f", "file", "a.qcow2"], ["map", "-f", "file", "a.qcow2"],
            ["create", "-f", "file", "made", "1M"],
            ["convert", "-f", "file", "-O", "file", "a.qcow2", "copy"],
        ] {
            let other = try place.run("/usr/bin/env", ["qemu-img"] + words)
            // What is looked at below is our own.
            let target = ["create": "made", "convert": "copy"][words[0]]
            if let target { try place.tool("rm", target) }
            let own = try place.run(Workplace.merino, words)
            #expect(own.status == 0, "\(words): \(own.errors)")
            #expect(own.output == other.output)
        }
        #expect(try place.tool("cmp", "a.qcow2", "copy").status == 0)
        #expect(try place.tool("stat", "-c", "%s", "made").output == "1048576\n")
        let io = try place.merino("io", "-f", "file", "-c", "write 0 4k", "made")
        #expect(io.status == 0, "\(io.errors)")
        let absent = try place.merino("create", "-f", "host_device", "made", "1M")
        #expect(absent.status == 1 && absent.errors.contains("not a block device"))
    }

    /// docs/drivers/raw.md: nodes to the byte, copies and what is told of images in whole sectors.
    @Test func aFileThatEndsWithinASector() throws {
        let place = try Workplace()
        try place.tool("truncate", "-s", "1000", "a.raw")
        let io = try place.merino(
            "io", "-f", "raw", "-c", "length", "-c", "write -P 7 999 1", "a.raw")
        #expect(io.status == 0 && io.output.hasPrefix("1000 bytes\n"), "\(io.output)\(io.errors)")
        let past = try place.merino("io", "-f", "raw", "-c", "write 999 2", "a.raw")
        #expect(past.status == 1, "\(past.output)")
        let info = try place.merino("info", "-f", "raw", "a.raw")
        #expect(info.output.contains("(1024 bytes)"), "\(info.output)")
        let copy = try place.merino("convert", "-f", "raw", "-O", "raw", "a.raw", "b.raw")
        #expect(copy.status == 0, "\(copy.errors)")
        let sizes = try place.tool("stat", "-c", "%s", "a.raw", "b.raw")
        #expect(sizes.output == "1000\n1024\n")
    }

    @Test(
        "map shows a raw image's extents as qemu-img does",
        arguments: [
            [], ["--output", "json"], ["--output=json", "-s", "1M", "-l", "2M"],
            ["-s", "1100k", "--max-length=32k"],
        ])
    func mapLikeQEMU(_ options: [String]) throws {
        let place = try Workplace()
        try withData(place)
        let arguments = ["map", "-f", "raw"] + options + ["a.raw"]
        let own = try place.run(Workplace.merino, arguments)
        let other = try place.run("/usr/bin/env", ["qemu-img"] + arguments)
        #expect(own.status == 0, "\(own.errors)")
        #expect(own.output == other.output)
    }

    @Test("a missing image ends the command with its name", arguments: ["info", "map"])
    func missingImage(_ command: String) throws {
        let result = try Workplace().merino(command, "none.img")
        #expect(result.status == 1)
        #expect(result.output == "")
        #expect(result.errors.contains("none.img"))
    }

    @Test func linkNamedQEMUImgTakesItsCommandLine() throws {
        let place = try Workplace()
        try withData(place)
        try FileManager.default.createSymbolicLink(
            atPath: "\(place.folder)/qemu-img", withDestinationPath: Workplace.merino)
        let result = try place.run("\(place.folder)/qemu-img", ["info", "a.raw"])
        #expect(result.output == (try place.merino("info", "a.raw").output))
        let failure = try place.run("\(place.folder)/qemu-img", ["info", "none"])
        #expect(failure.status == 1 && failure.errors.hasPrefix("qemu-img: "))
    }
}
