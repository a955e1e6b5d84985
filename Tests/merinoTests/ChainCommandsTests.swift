import Foundation
import Testing

/// `commit` and `rebase` beside `qemu-img`.
@Suite struct ChainCommandsTests {
    /// base.qcow2 ← mid.qcow2 ← top.qcow2, what the top one reads as in `want`, and other images.
    private func withChain(_ options: String = "compat=1.1") throws -> Workplace {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "8M")
        try place.tool("qemu-io", "-c", "write -P 1 0 2M", "base.qcow2")
        try place.tool(
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "-o",
            options, "mid.qcow2")
        try place.tool("qemu-io", "-c", "write -P 2 1M 2M", "mid.qcow2")
        try place.tool(
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "-o",
            options, "top.qcow2", "10M")
        try place.tool(
            "qemu-io", "-c", "write -P 3 9M 64k", "-c", "write -z 64k 64k", "-c",
            "write -P 4 3000000 5000", "top.qcow2")
        try place.tool("qemu-img", "convert", "-O", "raw", "top.qcow2", "want")
        try place.tool("qemu-img", "create", "-q", "other", "9M")
        try place.tool(
            "qemu-io", "-f", "raw", "-c", "write -P 1 0 3M", "-c", "write -P 7 7M 100k", "other")
        try place.tool("qemu-img", "create", "-q", "short", "1M")
        try place.tool("qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", "short")
        return place
    }

    private func expectSame(
        _ place: Workplace, _ names: String..., location: SourceLocation = #_sourceLocation
    ) throws {
        for name in names {
            let result = try place.tool("qemu-img", "compare", "-f", "raw", "want", name)
            #expect(
                result.status == 0, "\(name): \(result.output)\(result.errors)",
                sourceLocation: location)
            let check = try place.tool("qemu-img", "check", "-q", name)
            #expect(check.status == 0, "\(name)", sourceLocation: location)
        }
    }

    private func map(_ place: Workplace, _ name: String) throws -> String {
        try place.tool("qemu-img", "map", "--output=json", name).output
    }

    // MARK: Loops

    @Test(arguments: [
        "info --backing-chain", "map", "io -c length", "io -r -c length", "measure -O raw",
    ])
    func aChainThatComesBackToAnImageIsToldAsALoop(command: String) throws {
        let place = try Workplace()
        for (name, backing) in [("x", "own"), ("first", "./second"), ("second", "first")] {
            try place.tool(
                "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b", backing, name,
                "1M")
        }
        try place.tool("mv", "x", "own")
        let words = command.split(separator: " ").map(String.init)
        let own = try place.run(Workplace.merino, words + ["own"])
        #expect(own.status == 1)
        #expect(own.errors.contains("'own' names itself"), "\(own.errors)")
        let loop = try place.run(Workplace.merino, words + ["first"])
        #expect(loop.status == 1)
        #expect(loop.errors.contains("is a loop: "), "\(loop.errors)")
        #expect(loop.errors.contains("second' names '"), "\(loop.errors)")
    }

    @Test(arguments: ["info --backing-chain", "map", "io -r -c length"])
    func aNameThatSaysThatThereIsNoMoreBelowEndsTheChain(command: String) throws {
        let place = try Workplace()
        let name = #"{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"own"}}"#
        try place.tool(
            "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b", "json:" + name,
            "own", "1M")
        let words = command.split(separator: " ").map(String.init)
        let own = try place.run(Workplace.merino, words + ["own"])
        #expect(own.status == 0, "\(own.errors)")
    }

    @Test func infoFollowsTheBackingImageThatANameDescribes() throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "below", "1M")
        let file = #""file":{"driver":"file","filename":"#
        let backing = #"{"driver":"qcow2",\#(file)"below"}}"#
        let name = #"{"driver":"qcow2",\#(file)"own"},"backing":\#(backing)}"#
        try place.tool(
            "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b", "json:" + name,
            "own", "1M")
        let result = try place.merino("info", "--backing-chain", "own")
        #expect(result.status == 0, "\(result.errors)")
        let images = result.output.split(separator: "\n").filter { $0.hasPrefix("image: ") }
        #expect(images.count == 3 && images.last == "image: below", "\(result.output)")
    }

    // MARK: Commit

    @Test("commit leaves base and image alike", arguments: ["compat=1.1", "compat=0.10"])
    func commit(_ options: String) throws {
        let place = try withChain(options)
        let result = try place.merino("commit", "top.qcow2")
        #expect(result.status == 0 && result.output == "Image committed.\n", "\(result.errors)")
        try expectSame(place, "mid.qcow2", "top.qcow2")
        // The image was emptied.
        #expect(try !map(place, "top.qcow2").contains("\"depth\": 0"))
    }

    @Test func commitWithoutEmptying() throws {
        let place = try withChain()
        let result = try place.merino("commit", "-d", "-q", "top.qcow2")
        #expect(result.status == 0 && result.output == "", "\(result.errors)")
        try expectSame(place, "mid.qcow2", "top.qcow2")
        #expect(try map(place, "top.qcow2").contains("\"depth\": 0"))
    }

    @Test func commitFurtherDown() throws {
        let place = try withChain()
        let result = try place.merino("commit", "-b", "base.qcow2", "top.qcow2")
        #expect(result.status == 0, "\(result.errors)")
        try expectSame(place, "base.qcow2", "top.qcow2")
    }

    @Test func commitToARawImageMakesItLonger() throws {
        let place = try withChain()
        try place.tool(
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", "short", "-F", "raw", "o.qcow2", "4M")
        try place.tool("qemu-io", "-c", "write -P 8 3M 64k", "o.qcow2")
        try place.tool("qemu-img", "convert", "o.qcow2", "want")
        #expect(try place.merino("commit", "-t", "none", "o.qcow2").status == 0)
        let same = try place.tool("qemu-img", "compare", "-f", "raw", "-F", "raw", "want", "short")
        #expect(same.output == "Images are identical.\n")
    }

    @Test(
        "commit refuses what it cannot do",
        arguments: [
            ["base.qcow2"], ["-b", "nothere", "top.qcow2"], ["-t", "foo", "top.qcow2"], [],
        ])
    func commitRefuses(_ arguments: [String]) throws {
        let place = try withChain()
        let own = try place.run(Workplace.merino, ["commit"] + arguments)
        #expect(own.status == 1 && own.errors.hasPrefix("merino: ") && own.output == "")
        try expectSame(place, "top.qcow2")
    }

    // MARK: Rebase

    private static let backings: [[String]] = [
        ["-b", "base.qcow2", "-F", "qcow2"], ["-b", "other", "-F", "raw"],
        ["-b", "short", "-F", "raw"], ["-b", ""], ["-b", "mid.qcow2", "-F", "qcow2"],
        ["-t", "none", "-T", "none", "-p", "-b", "base.qcow2", "-F", "qcow2"],
    ]

    @Test("rebase keeps the contents", arguments: backings, ["compat=1.1", "compat=0.10"])
    func rebase(_ arguments: [String], _ options: String) throws {
        let place = try withChain(options)
        let own = try place.run(Workplace.merino, ["rebase"] + arguments + ["top.qcow2"])
        #expect(own.status == 0, "\(own.errors)")
        try expectSame(place, "top.qcow2")
        let info = try place.tool("qemu-img", "info", "--output=json", "top.qcow2").output
        let name = arguments[(arguments.firstIndex(of: "-b") ?? 0) + 1]
        #expect(info.contains("\"backing-filename\": \"\(name)\"") == !name.isEmpty)
        // From there to another one that shows what the first did not.
        let again = try place.merino("rebase", "-b", "other", "-F", "raw", "top.qcow2")
        #expect(again.status == 0, "\(again.errors)")
        try expectSame(place, "top.qcow2")
    }

    @Test func whatIsTheSameInBothIsNotCopied() throws {
        let place = try withChain()
        let (own, other) = ("own.qcow2", "qemu.qcow2")
        for name in [own, other] { try place.tool("cp", "top.qcow2", name) }
        try place.merino("rebase", "-b", "base.qcow2", "-F", "qcow2", own)
        try place.tool("qemu-img", "rebase", "-b", "base.qcow2", "-F", "qcow2", other)
        func ownBytes(_ name: String) throws -> Int {
            let list = try JSONSerialization.jsonObject(with: Data(try map(place, name).utf8))
            return (list as? [[String: Any]] ?? []).filter { $0["depth"] as? Int == 0 }
                .compactMap { $0["length"] as? Int }.reduce(0, +)
        }
        #expect(try ownBytes(own) <= ownBytes(other))
        // Where mid.qcow2 has the only data there is.
        #expect(try ownBytes(own) >= 2 << 20)
    }

    @Test func unsafeRebaseChangesTheNameAlone() throws {
        let place = try withChain()
        let result = try place.merino(
            "rebase", "-u", "-b", "gone.qcow2", "-F", "qcow2", "top.qcow2")
        #expect(result.status == 0, "\(result.errors)")
        #expect(try place.tool("qemu-img", "map", "top.qcow2").errors.contains("gone.qcow2"))
        #expect(
            try place.merino("rebase", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2").status == 1)
        #expect(
            try place.merino("rebase", "-u", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2").status
                == 0)
        try expectSame(place, "top.qcow2")
        #expect(try place.merino("rebase", "-u", "-b", "", "top.qcow2").status == 0)
        #expect(!(try place.tool("qemu-img", "info", "top.qcow2").output.contains("backing")))
    }

    @Test(
        "rebase refuses what it cannot do",
        arguments: [
            ["top.qcow2"], ["-b", "mid.qcow2", "top.qcow2"],
            ["-u", "-b", "mid.qcow2", "top.qcow2"], ["-b", "gone", "-F", "raw", "top.qcow2"],
            ["-b", "mid.qcow2", "-F", "qcow2", "-f", "raw", "other"],
            ["-b", "top.qcow2", "-F", "qcow2", "top.qcow2"],
        ])
    func rebaseRefuses(_ arguments: [String]) throws {
        let place = try withChain()
        let own = try place.run(Workplace.merino, ["rebase"] + arguments)
        #expect(own.status == 1 && own.errors.hasPrefix("merino: ") && own.output == "")
        try expectSame(place, "top.qcow2")
    }

    @Test("rebase onto the same file in another format keeps the contents")
    func rebaseOntoTheFileInAnotherFormat() throws {
        let place = try withChain()
        let result = try place.merino("rebase", "-b", "mid.qcow2", "-F", "raw", "top.qcow2")
        #expect(result.status == 0, "\(result.errors)")
        try expectSame(place, "top.qcow2")
    }
}
