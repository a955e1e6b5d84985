import BlockCore
import BlockGraph
import Testing

/// Images whose names of backing files come back to a file that is open above them.
@Suite struct BackingLoopTests {
    /// Makes an image that names `backing`, which is not looked at.
    private static func create(_ name: String, over backing: String, in folder: QCOW2TestFolder)
        throws
    {
        try folder.run([
            "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b", backing, name,
            "1M",
        ])
    }

    private static func expectLoop(
        _ name: String, _ words: String, in folder: QCOW2TestFolder,
        location: SourceLocation = #_sourceLocation
    ) async throws {
        do {
            _ = try await folder.contents(name)
            Issue.record("opened", sourceLocation: location)
        } catch let error as BlockError {
            #expect(error.message.contains(words), "\(error)", sourceLocation: location)
        }
    }

    @Test(
        "an image that names itself behind other nodes is told as a loop",
        arguments: [
            #"{"driver":"raw","file":FILE}"#,
            #"{"driver":"raw","offset":0,"size":65536,"file":FILE}"#,
            #"{"driver":"raw","file":{"driver":"raw","file":FILE}}"#,
        ])
    func ownName(_ nodes: String) async throws {
        let folder = try QCOW2TestFolder()
        let file = #"{"driver":"file","filename":"\#(folder["a.qcow2"])"}"#
        let below = nodes.split(separator: "FILE").joined(separator: file)
        try Self.create("a.qcow2", over: #"json:{"driver":"qcow2","file":\#(below)}"#, in: folder)
        try await Self.expectLoop("a.qcow2", "names itself as its backing file", in: folder)
    }

    @Test func anImageInsideAnotherThatNamesItselfIsToldAsALoop() async throws {
        let folder = try QCOW2TestFolder()
        let name =
            #"json:{"driver":"qcow2","file":{"driver":"qcow2","file":{"driver":"file","#
            + #""filename":"\#(folder["outer.qcow2"])"}}}"#
        try Self.create("inner.qcow2", over: name, in: folder)
        try folder.run([
            "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "inner.qcow2", "outer.qcow2",
        ])
        try Self.create("top.qcow2", over: name, in: folder)
        try await Self.expectLoop("top.qcow2", "names itself as its backing file", in: folder)
    }

    @Test func anImageIsItsOwnBackingImageWithoutOneOfItsOwn() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M"])
        try folder.run(["qemu-io", "-f", "qcow2", "-c", "write -P 5 64k 64k", "a.qcow2"])
        let name =
            #"json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":""#
            + folder["a.qcow2"] + #""}}"#
        try folder.run([
            "qemu-img", "rebase", "-q", "-u", "-F", "qcow2", "-b", name, "a.qcow2",
        ])
        let contents = try await folder.contents("a.qcow2")
        #expect(contents[65_535] == 0 && contents[65_536] == 5 && contents[131_072] == 0)
    }

    /// Two images in one file, 1 MiB apart: the upper one, at its start, names the other by its place.
    private static func makeTwoInOne(
        in folder: QCOW2TestFolder, lower: (_ both: String) throws -> Void
    ) throws {
        let file = #"{"driver":"file","filename":"\#(folder["both"])"}"#
        try create(
            "upper",
            over:
                #"json:{"driver":"qcow2","file":{"driver":"raw","offset":1048576,"file":\#(file)}}"#,
            in: folder)
        try lower(#"json:{"driver":"qcow2","file":\#(file)}"#)
        var bytes = try folder.bytes("upper")
        bytes += [UInt8](repeating: 0, count: (1 << 20) - bytes.count)
        try folder.write(bytes + folder.bytes("lower"), "both")
    }

    @Test func anotherPlaceOfTheFileIsAnotherImage() async throws {
        let folder = try QCOW2TestFolder()
        try Self.makeTwoInOne(in: folder) { _ in
            try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "lower", "1M"])
            try folder.run(["qemu-io", "-f", "qcow2", "-c", "write -P 6 0 64k", "lower"])
        }
        let contents = try await folder.contents("both")
        #expect(contents[0] == 6 && contents[65_535] == 6 && contents[65_536] == 0)
    }

    @Test func aLoopOverTwoPlacesOfAFileIsToldAsOne() async throws {
        let folder = try QCOW2TestFolder()
        try Self.makeTwoInOne(in: folder) { both in
            try Self.create("lower", over: both, in: folder)
        }
        try await Self.expectLoop("both", "is a loop: ", in: folder)
    }
}
