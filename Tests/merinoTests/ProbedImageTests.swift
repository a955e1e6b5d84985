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
}
