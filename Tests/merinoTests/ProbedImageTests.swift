import Foundation
import Testing

/// An image whose format was not given, and that looks raw, never becomes another format's by what a guest
/// wrote: the next command would follow the names that the guest put into it.
@Suite struct ProbedImageTests {
    /// `header`: the first sector of an image that names a file of the host. `base.raw`, and above it
    /// `top.qcow2`, with that sector as its first, and without the format of what is below.
    private static func makeFiles() throws -> Workplace {
        let place = try Workplace()
        try place.tool(
            "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw",
            "evil.qcow2", "4M")
        try place.tool("head", "-c", "4M", "/dev/zero")
        try place.tool("truncate", "-s", "4M", "base.raw")
        try place.tool(
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2")
        let evil = try bytes(place, "evil.qcow2")
        try Data(evil.prefix(512)).write(to: URL(fileURLWithPath: place.folder + "/header"))
        var top = try bytes(place, "top.qcow2")
        // The header extension that tells the backing format becomes one that nobody knows.
        let magic = Data([0xe2, 0x79, 0x2a, 0xca])
        let found = try #require(top.range(of: magic))
        top.replaceSubrange(found, with: [0x12, 0x34, 0x56, 0x78])
        try top.write(to: URL(fileURLWithPath: place.folder + "/top.qcow2"))
        try place.tool(
            "qemu-io", "-f", "qcow2", "-c", "write -s header 0 512", "-c", "write -P 7 1M 64k",
            "top.qcow2")
        return place
    }

    private static func bytes(_ place: Workplace, _ name: String) throws -> Data {
        try Data(contentsOf: URL(fileURLWithPath: place.folder + "/" + name))
    }

    @Test(arguments: [
        ["commit", "top.qcow2"], ["commit", "-f", "qcow2", "top.qcow2"],
        ["commit", "-d", "top.qcow2"], ["commit", "-b", "base.raw", "top.qcow2"],
        ["commit", "--image-opts", "driver=qcow2,file.filename=top.qcow2"],
        [
            "commit", "--image-opts",
            "driver=qcow2,file.filename=top.qcow2,backing.file.filename=base.raw",
        ],
    ]) func commitRefusesTheHeaderOfAnotherFormat(words: [String]) throws {
        let place = try Self.makeFiles()
        let result = try place.run(Workplace.merino, words)
        #expect(result.status != 0, "\(result.output)")
        #expect(result.errors.contains("header of 'qcow2'"), "\(result.errors)")
        #expect(try Self.bytes(place, "base.raw").prefix(4) == Data(count: 4))
    }

    @Test func commitIntoWhatTheUserCallsRaw() throws {
        let place = try Self.makeFiles()
        let options =
            "driver=qcow2,file.filename=top.qcow2,backing.driver=raw,backing.file.filename=base.raw"
        let result = try place.merino("commit", "--image-opts", options)
        #expect(result.status == 0, "\(result.errors)")
        #expect(try Self.bytes(place, "base.raw").prefix(3) == Data("QFI".utf8))
    }

    @Test(arguments: [
        ["write -s header 0 512"], ["reopen", "write -s header 0 512"],
        ["reopen -r", "reopen -w", "write -s header 0 512"],
    ]) func theExerciserRefusesItAlsoWhenOpenedAgain(commands: [String]) throws {
        let place = try Self.makeFiles()
        let words = ["io"] + commands.flatMap { ["-c", $0] } + ["base.raw"]
        let result = try place.run(Workplace.merino, words)
        #expect(result.status == 1, "\(result.output)")
        #expect(try Self.bytes(place, "base.raw").prefix(4) == Data(count: 4))
    }

    /// Formats that qemu-img makes images of and that there is no driver for.
    private static let foreign = ["vmdk", "vdi", "vhdx", "vpc", "qed", "qcow", "parallels"]

    @Test(arguments: foreign) func imagesOfOtherFormatsAreNotTakenAsRaw(format: String) throws {
        let place = try Workplace()
        let name = "a.\(format)"
        try place.tool("qemu-img", "create", "-q", "-f", format, name, "4M")
        let before = try Self.bytes(place, name)
        for words in [
            ["info", name], ["convert", "-O", "raw", name, "out.raw"],
            ["io", "-c", "write 0 64k", name], ["resize", name, "8M"],
            ["info", #"json:{"file":{"driver":"file","filename":"\#(name)"}}"#],
            ["info", "--image-opts", "file.filename=\(name)"],
        ] {
            let result = try place.run(Workplace.merino, words)
            #expect(result.status == 1, "\(words): \(result.output)")
            #expect(result.errors.contains("'\(name)' looks like \(format)"), "\(result.errors)")
        }
        #expect(try Self.bytes(place, name) == before)
        #expect(!FileManager.default.fileExists(atPath: place.folder + "/out.raw"))
        let raw = try place.merino("info", "-f", "raw", name)
        #expect(raw.status == 0 && raw.output.contains("file format: raw"), "\(raw.errors)")
    }

    @Test func backingImagesOfOtherFormatsAreNotTakenAsRaw() throws {
        let place = try Self.makeFiles()
        try place.tool("qemu-img", "create", "-q", "-f", "vdi", "base.raw", "4M")
        let result = try place.merino("convert", "-O", "raw", "top.qcow2", "out.raw")
        #expect(result.status == 1)
        #expect(result.errors.contains("looks like vdi"), "\(result.errors)")
    }

    /// As `qemu-img` has it: a mark in the middle or at the end, or half of one, makes no other format.
    @Test func rawDisksThatOnlyResembleOtherFormatsAreRaw() throws {
        let place = try Workplace()
        let count = 1 << 20
        for (offset, bytes) in [
            (count - 512, Data("conectix".utf8)), (count - 512, Data("koly".utf8)),
            (512, Data("vhdxfile".utf8)), (0, Data("WithoutFreeSpace".utf8)),
            (0, Data("Bochs Virtual HD Image".utf8)), (0, Data("# Disk DescriptorFile\n".utf8)),
            // LUKS version 2, whose driver knows version 1.
            (0, Data([0x4c, 0x55, 0x4b, 0x53, 0xba, 0xbe, 0, 2])),
            (0, Data([0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 0])),
        ] {
            var disk = Data(count: count)
            disk.replaceSubrange(offset..<offset + bytes.count, with: bytes)
            try disk.write(to: URL(fileURLWithPath: place.folder + "/disk"))
            for program in [Workplace.merino, "/usr/bin/qemu-img"] {
                let result = try place.run(program, ["info", "disk"])
                #expect(result.status == 0, "\(Array(bytes)): \(result.errors)")
                #expect(result.output.contains("file format: raw"), "\(Array(bytes))")
            }
        }
    }

    @Test(arguments: [UInt8(4), 255]) func newerVersionsOfQCOW2AreRefused(version: UInt8) throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
        var image = try Self.bytes(place, "a.qcow2")
        image[7] = version
        try image.write(to: URL(fileURLWithPath: place.folder + "/a.qcow2"))
        for words in [
            ["info", "a.qcow2"], ["io", "-c", "write 64k 64k", "a.qcow2"],
            ["resize", "a.qcow2", "2M"], ["check", "-r", "all", "a.qcow2"],
        ] {
            let result = try place.run(Workplace.merino, words)
            #expect(result.status != 0, "\(words): \(result.output)")
            #expect(result.errors.contains("qcow2 version \(version)"), "\(result.errors)")
        }
        #expect(try Self.bytes(place, "a.qcow2") == image)
    }

    @Test func theExerciserMakesNoImageOfAnotherFormat() throws {
        let place = try Self.makeFiles()
        try Data("KDMV".utf8).write(to: URL(fileURLWithPath: place.folder + "/mark"))
        let result = try place.merino("io", "-c", "write -s mark 0 512", "base.raw")
        #expect(result.status == 1)
        #expect(result.errors.contains("header of 'vmdk'"), "\(result.errors)")
        #expect(try Self.bytes(place, "base.raw").prefix(4) == Data(count: 4))
    }
}
