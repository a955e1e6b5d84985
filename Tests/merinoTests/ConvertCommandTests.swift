import Foundation
import Testing

/// `convert` beside `qemu-img`.
@Suite struct ConvertCommandTests {
    /// A chain of three images: base.qcow2 ← mid.qcow2 ← top.qcow2, the top one larger.
    private func withChain() throws -> Workplace {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "8M")
        try place.tool("qemu-io", "-c", "write -P 1 0 2M", "base.qcow2")
        try place.tool(
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2",
            "mid.qcow2")
        try place.tool("qemu-io", "-c", "write -P 2 1M 2M", "mid.qcow2")
        try place.tool(
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2",
            "top.qcow2", "10M")
        try place.tool(
            "qemu-io", "-c", "write -P 3 9M 64k", "-c", "write -z 64k 64k", "-c",
            "write -P 4 3000000 5000", "top.qcow2")
        return place
    }

    private func exists(_ place: Workplace, _ name: String) -> Bool {
        FileManager.default.fileExists(atPath: "\(place.folder)/\(name)")
    }

    private func expectSame(
        _ place: Workplace, _ first: String, _ second: String,
        _ location: SourceLocation = #_sourceLocation
    ) throws {
        let result = try place.tool("qemu-img", "compare", first, second)
        #expect(
            result.status == 0, "\(result.output)\(result.errors)", sourceLocation: location)
    }

    private static let variants: [[String]] = [
        [], ["-O", "raw"], ["-O", "qcow2"], ["-m", "1"], ["-m", "16", "-W"], ["-S", "0"],
        ["-O", "qcow2", "-S", "64k"], ["-S", "512"], ["-t", "none"], ["-T", "none"],
        ["-O", "qcow2", "-t", "writethrough"], ["-O", "qcow2", "-o", "cluster_size=4k"],
        ["-O", "qcow2", "-o", "compat=0.10"], ["-O", "qcow2", "-o", "preallocation=metadata"],
        ["-O", "qcow2", "-o", "cluster_size=2M,refcount_bits=64"],
        ["-O", "qcow2", "-B", "mid.qcow2", "-F", "qcow2"],
        ["-O", "qcow2", "-o", "backing_file=mid.qcow2,backing_fmt=qcow2"],
        ["-O", "raw", "-o", "preallocation=full"], ["-C"], ["--salvage"],
        ["-f", "qcow2", "-r", "100M", "-p"],
    ]

    @Test("the target has the source's contents", arguments: variants)
    func contents(_ options: [String]) throws {
        let place = try withChain()
        let result = try place.run(
            Workplace.merino, ["convert"] + options + ["top.qcow2", "out"])
        #expect(result.status == 0, "\(result.errors)")
        try expectSame(place, "top.qcow2", "out")
        #expect(!exists(place, "out.merino-partial"))
        if options.contains("qcow2"), options.contains("-O") {
            let check = try place.tool("qemu-img", "check", "-q", "-f", "qcow2", "out")
            #expect(check.status == 0, "\(check.output)\(check.errors)")
        }
    }

    @Test func onlyTheTopLayerGoesAboveABackingImage() throws {
        let place = try withChain()
        try place.merino(
            "convert", "-O", "qcow2", "-B", "mid.qcow2", "-F", "qcow2", "top.qcow2", "out")
        let map = try place.tool("qemu-img", "map", "--output=json", "out").output
        #expect(map.contains(#""start": 1048576, "length": 1900544, "depth": 1"#), "\(map)")
    }

    @Test func sourcesAreJoined() throws {
        let place = try withChain()
        for program in ["merino", "qemu"] {
            let arguments = ["convert", "base.qcow2", "top.qcow2", "\(program).raw"]
            let result = try place.run(
                program == "merino" ? Workplace.merino : "/usr/bin/env",
                (program == "merino" ? [] : ["qemu-img"]) + arguments)
            #expect(result.status == 0, "\(result.errors)")
        }
        try expectSame(place, "merino.raw", "qemu.raw")
    }

    @Test func anImageOfOddLengthIsFilledUpToASector() throws {
        let place = try Workplace()
        try Data(repeating: 7, count: 1000).write(to: URL(fileURLWithPath: "\(place.folder)/a"))
        let result = try place.merino("convert", "-f", "raw", "a", "b")
        #expect(result.status == 0, "\(result.errors)")
        let bytes = FileManager.default.contents(atPath: "\(place.folder)/b")
        #expect(bytes == Data(repeating: 7, count: 1000) + Data(repeating: 0, count: 24))
    }

    @Test("zeroes of an existing target's old data come through", arguments: ["raw", "qcow2"])
    func existingTarget(_ format: String) throws {
        let place = try withChain()
        try place.tool("qemu-img", "create", "-q", "-f", format, "out", "12M")
        try place.tool("qemu-io", "-f", format, "-c", "write -P 9 0 12M", "out")
        let result = try place.merino("convert", "-n", "-O", format, "top.qcow2", "out")
        #expect(result.status == 0, "\(result.errors)")
        // What lies past the source's end stays.
        try place.tool("qemu-io", "-f", format, "-c", "write -z 10M 2M", "out")
        try expectSame(place, "top.qcow2", "out")
    }

    @Test func zeroesHideABackingFileThatIsLeftOut() throws {
        let place = try withChain()
        try place.tool(
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2",
            "target.qcow2", "10M")
        try place.tool("qemu-io", "-c", "write -z 1M 1M", "top.qcow2")
        try place.merino(
            "convert", "-n", "-O", "qcow2", "top.qcow2",
            #"json:{"driver":"qcow2","backing":null,"file.filename":"target.qcow2"}"#)
        try expectSame(place, "top.qcow2", "target.qcow2")
    }

    @Test func holesAreNotStored() throws {
        let place = try Workplace()
        try place.tool("truncate", "-s", "1T", "a")
        try place.tool("qemu-io", "-f", "raw", "-c", "write -P 1 500G 1M", "a")
        try place.tool("qemu-io", "-f", "raw", "-c", "write -z 600G 4M", "a")
        for format in ["raw", "qcow2"] {
            let result = try place.merino("convert", "-f", "raw", "-O", format, "a", "b")
            #expect(result.status == 0, "\(result.errors)")
            try expectSame(place, "a", "b")
            let blocks = try place.tool("stat", "-c", "%b", "b").output
            #expect((Int(blocks.dropLast()) ?? .max) * 512 < 3 << 20, "\(format): \(blocks)")
        }
    }

    @Test func fullAllocationIsFull() throws {
        let place = try Workplace()
        try place.tool("truncate", "-s", "4M", "a")
        try place.merino("convert", "-f", "raw", "-S", "0", "a", "b")
        let blocks = try place.tool("stat", "-c", "%b", "b").output
        #expect((Int(blocks.dropLast()) ?? 0) * 512 >= 4 << 20, "\(blocks)")
    }

    // MARK: Interruptions and failures

    @Test(
        "what an interruption leaves never has the target's name",
        arguments: [("TERM", false), ("INT", false), ("KILL", true)])
    func interruption(_ signal: String, _ leavesPartial: Bool) throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "a", "64M")
        try place.tool("qemu-io", "-f", "raw", "-c", "write -P 1 0 64M", "a")
        let arguments = ["-f", "raw", "-O", "qcow2", "-r", "1M", "a", "b"]
        let result = try place.run(
            "/usr/bin/timeout", ["-s", signal, "1", Workplace.merino, "convert"] + arguments)
        #expect(result.status != 0)
        #expect(!exists(place, "b"))
        #expect(exists(place, "b.merino-partial") == leavesPartial)
        // What is left stands in nobody's way.
        let again = try place.merino("convert", "-f", "raw", "-O", "qcow2", "a", "b")
        #expect(again.status == 0, "\(again.errors)")
        try expectSame(place, "a", "b")
        #expect(!exists(place, "b.merino-partial"))
    }

    @Test func anInterruptedConversionKeepsTheOldTarget() throws {
        let place = try withChain()
        try place.tool("qemu-img", "create", "-q", "a", "64M")
        try place.tool("qemu-io", "-f", "raw", "-c", "write -P 1 0 64M", "a")
        try place.merino("convert", "-O", "qcow2", "top.qcow2", "b")
        _ = try place.run(
            "/usr/bin/timeout",
            ["-s", "TERM", "1", Workplace.merino, "convert", "-f", "raw", "-r", "1M", "a", "b"])
        try expectSame(place, "top.qcow2", "b")
        #expect(!exists(place, "b.merino-partial"))
    }

    @Test func aSignalPrintsProgress() throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "a", "64M")
        try place.tool("qemu-io", "-f", "raw", "-c", "write -P 1 0 64M", "a")
        let script =
            "\"$0\" convert -f raw -r 8M a b & sleep 1; kill -USR1 $!; sleep 1; kill $!; wait $!"
        let result = try place.run("/bin/bash", ["-c", script, Workplace.merino])
        #expect(result.errors.contains("/100%)"), "\(result.errors)")
        #expect(!exists(place, "b.merino-partial"))
    }

    @Test func programsReadProgressFromADescriptor() throws {
        let place = try withChain()
        let script = "\"$0\" convert --progress-fd 5 top.qcow2 b 5>progress"
        let result = try place.run("/bin/bash", ["-c", script, Workplace.merino])
        #expect(result.status == 0 && result.output == "", "\(result.errors)")
        let lines = try String(contentsOfFile: "\(place.folder)/progress", encoding: .utf8)
            .split(separator: "\n")
        let last = try #require(lines.last)
        let value = try JSONSerialization.jsonObject(with: Data(last.utf8)) as? [String: Double]
        #expect(value?["percent"] == 100 && value?["total"] == 10 * 1_048_576)
    }

    @Test func progressHasTheFormThatScriptsKnow() throws {
        let place = try withChain()
        let result = try place.merino("convert", "-p", "top.qcow2", "b")
        #expect(result.output.hasPrefix("    (0.00/100%)\r"))
        #expect(result.output.hasSuffix("    (100.00/100%)\r\n"))
        #expect(try place.merino("convert", "-p", "-q", "top.qcow2", "b").output == "")
    }

    /// c.qcow2, of which the first cluster cannot be expanded.
    private func withDamagedImage() throws -> Workplace {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "a", "1M")
        try place.tool("qemu-io", "-f", "raw", "-c", "write -P 5 0 1M", "a")
        try place.tool("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "a", "c.qcow2")
        let file = try #require(FileHandle(forUpdatingAtPath: "\(place.folder)/c.qcow2"))
        // The clusters of 64 KiB are stored one after the other, from the sixth of the file on.
        file.seek(toFileOffset: 0x50000)
        file.write(Data(repeating: 0xff, count: 64))
        file.closeFile()
        return place
    }

    @Test func damagedDataIsSalvaged() throws {
        let place = try withDamagedImage()
        let failed = try place.merino("convert", "c.qcow2", "out")
        #expect(failed.status == 1 && !exists(place, "out"))
        let salvaged = try place.merino("convert", "--salvage", "c.qcow2", "out")
        #expect(salvaged.status == 0)
        #expect(salvaged.errors.contains("error while reading offset 0"), "\(salvaged.errors)")
        let bytes = try #require(FileManager.default.contents(atPath: "\(place.folder)/out"))
        #expect(bytes[0] == 0 && bytes[1_000_000] == 5)
        #expect(try place.merino("convert", "--salvage", "-q", "c.qcow2", "out").errors == "")
    }

    @Test func aFailedConversionLeavesNoFile() throws {
        let place = try withChain()
        let result = try place.merino(
            "convert", "-O", "qcow2", "-o", "cluster_size=3", "top.qcow2", "b")
        #expect(result.status == 1)
        #expect(!exists(place, "b") && !exists(place, "b.merino-partial"))
    }

    @Test("a source is not overwritten", arguments: ["top.qcow2", "mid.qcow2", "base.qcow2"])
    func sourceAsTarget(_ target: String) throws {
        let place = try withChain()
        let result = try place.merino("convert", "-O", "qcow2", "top.qcow2", target)
        #expect(result.status == 1 && result.errors.contains(target))
        #expect(!exists(place, "\(target).merino-partial"))
        let check = try place.tool("qemu-img", "check", "-q", target)
        #expect(check.status == 0)
    }

    @Test func theTargetKeepsItsModeAndALinkStaysOne() throws {
        let place = try withChain()
        try place.tool("qemu-img", "create", "-q", "real", "1M")
        try place.tool("chmod", "600", "real")
        try FileManager.default.createSymbolicLink(
            atPath: "\(place.folder)/link", withDestinationPath: "real")
        #expect(try place.merino("convert", "top.qcow2", "link").status == 0)
        #expect(try place.tool("stat", "-c", "%a", "real").output == "600\n")
        #expect(try place.tool("stat", "-c", "%F", "link").output == "symbolic link\n")
        try expectSame(place, "top.qcow2", "real")
    }

    @Test func aTargetWithSeveralNamesIsWrittenInPlace() throws {
        let place = try withChain()
        try place.tool("qemu-img", "create", "-q", "one", "1M")
        try place.tool("ln", "one", "two")
        #expect(try place.merino("convert", "top.qcow2", "one").status == 0)
        try expectSame(place, "top.qcow2", "two")
    }

    @Test(
        "a target in place stays as it is when the work fails before its first change",
        arguments: [
            ["-O", "qcow2", "-o", "nosuch=1"], ["-O", "qcow2", "-o", "cluster_size=3"],
            ["-O", "qcow2", "-B", "none", "-F", "raw"], ["-o", "preallocation=metadata"],
            ["-c"], ["-U", "-f", "raw", "one"],
        ])
    func untouchedInPlace(_ options: [String]) throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "source", "1M")
        try place.tool("qemu-img", "create", "-q", "one", "1M")
        try place.tool("qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", "one")
        try place.tool("cp", "one", "copy")
        try place.tool("ln", "one", "two")
        var arguments = ["convert"] + options
        if options.last != "one" { arguments += ["-f", "raw", "source"] }
        let result = try place.run(Workplace.merino, arguments + ["two"])
        #expect(result.status == 1 && result.errors != "")
        #expect(try place.tool("cmp", "one", "copy").status == 0)
    }

    @Test func aTargetInPlaceIsCutWhenTheWorkFailsLater() throws {
        let place = try withDamagedImage()
        try place.tool("qemu-img", "create", "-q", "one", "1M")
        try place.tool("ln", "one", "two")
        #expect(try place.merino("convert", "c.qcow2", "one").status == 1)
        #expect(try place.tool("stat", "-c", "%s", "two").output == "0\n")
    }

    @Test func aDeviceIsATarget() throws {
        let place = try withChain()
        try place.tool("truncate", "-s", "12M", "disk")
        let found = try place.tool("losetup", "-f", "--show", "disk")
        // Not everybody may make devices.
        guard found.status == 0 else { return }
        let device = String(found.output.dropLast())
        defer { _ = try? place.tool("losetup", "-d", device) }
        for format in ["raw", "qcow2"] {
            let result = try place.merino("convert", "-O", format, "top.qcow2", device)
            #expect(result.status == 0, "\(format): \(result.errors)")
            let same = try place.tool("qemu-img", "compare", "-F", format, "top.qcow2", device)
            #expect(same.status == 0, "\(format): \(same.output)\(same.errors)")
        }
    }

    // MARK: Names that are taken

    @Test func aSourceOfThePartialNameStays() throws {
        let place = try withChain()
        try place.tool("mv", "top.qcow2", "x.merino-partial")
        let result = try place.merino("convert", "-O", "qcow2", "x.merino-partial", "x")
        #expect(result.status == 0, "\(result.errors)")
        try expectSame(place, "x.merino-partial", "x")
        #expect(!exists(place, "x.merino-partial.2"))
    }

    @Test(
        "a file of the partial name that is no leftover stays",
        arguments: ["ln victim x.merino-partial", "ln -s victim x.merino-partial"])
    func notALeftover(_ command: String) throws {
        let place = try withChain()
        try place.tool("cp", "base.qcow2", "victim")
        _ = try place.run("/usr/bin/env", command.split(separator: " ").map(String.init))
        let result = try place.merino("convert", "top.qcow2", "x")
        #expect(result.status == 0, "\(result.errors)")
        try expectSame(place, "top.qcow2", "x")
        #expect(try place.tool("cmp", "base.qcow2", "victim").status == 0)
        #expect(exists(place, "x.merino-partial"))
    }

    @Test func anImageInUseOfThePartialNameStays() throws {
        let place = try withChain()
        try place.tool("cp", "base.qcow2", "x.merino-partial")
        // Both are open at the same time: the exerciser holds its image while it sleeps.
        let script = """
            qemu-io -f qcow2 -c 'sleep 2000' x.merino-partial >io & sleep 1
            "$0" convert top.qcow2 x; status=$?; wait; exit $status
            """
        let result = try place.run("/bin/bash", ["-c", script, Workplace.merino])
        #expect(result.status == 0, "\(result.errors)")
        #expect(try place.tool("cmp", "base.qcow2", "x.merino-partial").status == 0)
    }

    @Test func aBackingImageIsLookedForBesideTheNameThatWasGiven() throws {
        let place = try withChain()
        try place.tool("mkdir", "links", "files")
        try place.tool("cp", "mid.qcow2", "base.qcow2", "links")
        try place.tool("qemu-img", "create", "-q", "files/real", "1M")
        try place.tool("ln", "-s", "../files/real", "links/name")
        let result = try place.merino(
            "convert", "-O", "qcow2", "-B", "mid.qcow2", "-F", "qcow2", "top.qcow2", "links/name")
        #expect(result.status == 0, "\(result.errors)")
        #expect(!exists(place, "files/real.merino-partial"))
        try place.tool("cp", "files/real", "links/same")
        try expectSame(place, "top.qcow2", "links/same")
    }

    // MARK: Sizes and bitmaps

    @Test("the target is as long as the source", arguments: ["raw", "qcow2"])
    func sizeHasNoEffect(_ format: String) throws {
        let place = try withChain()
        for size in ["1M", "20M"] {
            let result = try place.merino(
                "convert", "-O", format, "-o", "size=\(size)", "base.qcow2", "x")
            #expect(result.status == 0 && result.errors.contains("size has no effect"))
            let info = try place.tool("qemu-img", "info", "--output=json", "x").output
            #expect(info.contains("\"virtual-size\": 8388608"), "\(info)")
        }
    }

    @Test func theLastShortClusterIsCompressedPastThePageCache() throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "a", "1000k")
        try place.tool("qemu-io", "-f", "raw", "-c", "write -P 3 0 1000k", "a")
        try place.tool("truncate", "-s", "+512", "a")
        try place.tool("qemu-io", "-f", "raw", "-c", "write -P 4 1000k 512", "a")
        let result = try place.merino(
            "convert", "-c", "-t", "none", "-f", "raw", "-O", "qcow2", "a", "b")
        #expect(result.status == 0, "\(result.errors)")
        try expectSame(place, "a", "b")
    }

    @Test func bitmapsGoWithTheData() throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "a", "8M")
        try place.tool("qemu-img", "bitmap", "--add", "-g", "4k", "a", "fine")
        try place.tool("qemu-img", "bitmap", "--add", "a", "off")
        try place.tool("qemu-io", "-c", "write -P 1 1M 100k", "a")
        try place.tool("qemu-img", "bitmap", "--disable", "a", "off")
        try place.tool("qemu-io", "-c", "write -P 1 4M 100k", "a")
        let result = try place.merino("convert", "--bitmaps", "-O", "qcow2", "a", "b")
        #expect(result.status == 0, "\(result.errors)")
        let other = try place.tool("qemu-img", "convert", "--bitmaps", "-O", "qcow2", "a", "c")
        #expect(other.status == 0)
        func told(_ name: String) throws -> String {
            var text = try place.tool("qemu-img", "info", name).output
            if let start = text.range(of: "bitmaps:") { text = String(text[start.upperBound...]) }
            for bitmap in ["fine", "off"] {
                text += try place.tool(
                    "nbdinfo", "--map=qemu:dirty-bitmap:\(bitmap)", "--", "[", "qemu-nbd", "-r",
                    "-f", "qcow2", "-B", bitmap, name, "]"
                ).output
            }
            return text
        }
        let text = try told("b")
        #expect(text.contains("dirty") && text.contains("granularity: 4096"))
        #expect(try told("c") == text)
    }

    @Test func inconsistentBitmapsAreAnErrorOrLeftOut() throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "a", "8M")
        try place.tool("qemu-img", "bitmap", "--add", "a", "good")
        try place.tool("qemu-img", "bitmap", "--add", "a", "bad")
        // Whoever wrote it did not close it: both bitmaps stay in use.
        _ = try place.run(
            "/bin/bash",
            [
                "-c",
                "qemu-io -c 'write 0 64k' -c 'sigraise 9' a >io; qemu-img bitmap --remove a good",
            ])
        try place.tool("qemu-img", "bitmap", "--add", "a", "good")
        let refused = try place.merino("convert", "--bitmaps", "-O", "qcow2", "a", "b")
        #expect(refused.status == 1 && refused.errors.contains("'bad' is inconsistent"))
        #expect(!exists(place, "b"))
        let skipped = try place.merino(
            "convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", "a", "b")
        #expect(skipped.status == 0 && skipped.errors.contains("'bad'"), "\(skipped.errors)")
        let info = try place.tool("qemu-img", "info", "b").output
        #expect(info.contains("name: good") && !info.contains("name: bad"))
        #expect(try place.merino("convert", "--bitmaps", "a", "c").status == 1)
    }

    @Test(
        "options that exclude each other are refused like qemu-img's",
        arguments: [
            ["base.qcow2"], [], ["-n", "-o", "size=3", "base.qcow2", "x"],
            ["-C", "-S", "4k", "base.qcow2", "x"], ["-C", "--salvage", "base.qcow2", "x"],
            ["--target-is-zero", "base.qcow2", "x"], ["-m", "0", "base.qcow2", "x"],
            ["--target-image-opts", "base.qcow2", "driver=raw,file.filename=x"],
            ["-m", "17", "base.qcow2", "x"], ["-r", "x", "base.qcow2", "x"],
            ["-S", "513", "base.qcow2", "x"], ["-S", "32M", "base.qcow2", "x"],
            ["-t", "foo", "base.qcow2", "x"], ["-T", "foo", "base.qcow2", "x"],
            ["--skip-broken-bitmaps", "base.qcow2", "x"], ["-O", "foo", "base.qcow2", "x"],
            ["-O", "qcow2", "-B", "base.qcow2", "mid.qcow2", "x"],
            ["-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", "mid.qcow2", "base.qcow2", "x"],
            ["-n", "base.qcow2", "nothere"], ["-O", "qcow2", "-o", "foo=1", "base.qcow2", "x"],
            ["-f", "qcow2", "--image-opts", "driver=qcow2,file.filename=base.qcow2", "x"],
            ["-n", "top.qcow2", "base.qcow2"], ["-c", "base.qcow2", "x"],
        ])
    func refuses(_ options: [String]) throws {
        let place = try withChain()
        let own = try place.run(Workplace.merino, ["convert"] + options)
        let other = try place.run("/usr/bin/env", ["qemu-img", "convert"] + options)
        #expect(own.status == other.status && own.status == 1)
        #expect(own.errors.hasPrefix("merino: ") && own.output == "")
        #expect(!exists(place, "x.merino-partial"))
    }

    @Test func optionsAreListed() throws {
        let result = try Workplace().merino("convert", "-O", "qcow2", "-o", "help")
        #expect(result.status == 0 && result.output.contains("cluster_size=<size>"))
    }
}
