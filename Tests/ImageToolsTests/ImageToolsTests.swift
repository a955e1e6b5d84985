import BlockCore
import Testing

@testable import ImageTools

@Suite struct ExerciserReportTests {
    @Test(
        "bytes are given with three decimals, or none",
        arguments: [
            (0.0, "0 bytes"), (64, "64 bytes"), (1023, "1023 bytes"), (1024, "1 KiB"),
            (10_420_224, "9.938 MiB"), (1_073_741_824, "1 GiB"), (1.5, "1.500 bytes"),
            (8e18, "6.939 EiB"),
        ])
    func bytes(_ value: Double, _ text: String) {
        #expect(ExerciserReport.bytes(value) == text)
    }

    @Test(
        "numbers are rounded to their decimals",
        arguments: [
            (0.0005, 3, "0.001"), (1.25, 1, "1.2"), (12, 4, "12.0000"), (0.04, 2, "0.04"),
            (-1.5, 1, "-1.5"), (.infinity, 2, "inf"), (1e300, 2, "inf"), (7.6, 0, "8"),
        ])
    func fixed(_ value: Double, _ places: Int, _ text: String) {
        #expect(ExerciserReport.fixed(value, places) == text)
    }

    @Test func longTimesHaveHoursAndMinutes() {
        let text = ExerciserReport.operation(
            "read", offset: 5, count: 1024, nanoseconds: 3_723_450_000_000, forPrograms: false)
        #expect(text.hasPrefix("read 1024/1024 bytes at offset 5\n1 KiB, 1 ops; 1:02:03.45 ("))
    }
}

@Suite struct ExerciserArgumentsTests {
    @Test func flagsStandTogetherAndApart() throws {
        let arguments = try ExerciserArguments(
            ["-zfP3", "0", "-q", "4k"], known: "zfqP:", command: "write")
        #expect(arguments.has("z") && arguments.has("f") && arguments.has("q"))
        #expect(try arguments.pattern() == 3)
        #expect(arguments.rest == ["0", "4k"])
    }

    @Test("bad arguments are refused", arguments: [["-x"], ["-P"], ["-P", "256"], ["-P", "y"]])
    func refuses(_ words: [String]) {
        #expect(throws: BlockError.self) {
            _ = try ExerciserArguments(words, known: "zP:", command: "write").pattern()
        }
    }
}

@Suite struct ImageNameTests {
    @Test(
        "a backing image's name is relative to the image that has it",
        arguments: [
            ("base.raw", "a.qcow2", "base.raw"), ("base.raw", "dir/a.qcow2", "dir/base.raw"),
            ("../base", "/x/y/a", "/x/y/../base"), ("/base", "dir/a", "/base"),
            ("nbd://host/x", "dir/a", "nbd://host/x"), ("json:{}", "dir/a", "json:{}"),
            ("d/with:colon", "dir/a", "dir/d/with:colon"),
        ])
    func resolves(_ name: String, _ image: String, _ path: String) {
        #expect(ImageName.resolve(name, besides: image) == path)
    }
}

@Suite struct CreationOptionsTests {
    private static func read(_ text: String) throws -> [String] {
        try CreationOption.read(text, CreationOption.options(of: "qcow2"), "qcow2")
            .map { "\($0.option.name)=\($0.value)" }
    }

    @Test func twoCommasStandForOne() throws {
        #expect(
            try Self.read("backing_file=a,,b,size=1M") == ["backing_file=a,b", "size=1M"])
    }

    @Test func switchesNeedNoValue() throws {
        #expect(
            try Self.read("lazy_refcounts,noextended_l2,nocow")
                == ["lazy_refcounts=on", "extended_l2=off", "nocow=on"])
    }

    @Test(arguments: ["", ",size=1M", "size=1M,", "color=blue", "nosuch"])
    func whatIsNoListOfOptionsIsRefused(text: String) {
        #expect(throws: BlockError.self) { try Self.read(text) }
    }

    @Test func driversGetTheirOwnNames() throws {
        let options = CreationOption.options(of: "qcow2")
        let compat = try #require(options.first { $0.name == "compat" })
        #expect(compat.driverName == "version")
        #expect(compat.driverValue("0.10") == "v2")
        let cluster = try #require(options.first { $0.name == "cluster_size" })
        #expect(cluster.driverName == "cluster-size")
        #expect(try cluster.normalized("4k") == "4096")
    }
}
