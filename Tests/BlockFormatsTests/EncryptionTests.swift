import BlockCore
import BlockGraph
import BlockIO
import BlockProtocols
import BlockTesting
import QMP
import Testing

@testable import BlockFormats

/// How an encrypted image is made; `iter-time` is short, for tests.
struct EncryptionVariant: Sendable, CustomTestStringConvertible {
    var cipher = "aes-256"
    var mode = "xts"
    var generator = "plain64"
    var hash = "sha256"

    var testDescription: String { "\(cipher)-\(mode)-\(generator), \(hash)" }

    var options: JSONObject {
        [
            "cipher-alg": .string(cipher), "cipher-mode": .string(mode),
            "ivgen-alg": .string(generator), "hash-alg": .string(hash), "iter-time": 10,
            "key-secret": "good",
        ]
    }

    /// As `-o` takes them.
    func text(prefix: String = "") -> String {
        options.members.map { key, value in
            if case .string(let text) = value { return "\(prefix)\(key)=\(text)" }
            return "\(prefix)\(key)=\(value.text())"
        }.joined(separator: ",")
    }

    static let all: [EncryptionVariant] = [
        EncryptionVariant(),
        EncryptionVariant(cipher: "aes-128", hash: "sha1"),
        EncryptionVariant(mode: "cbc", generator: "essiv"),
        EncryptionVariant(cipher: "aes-128", mode: "cbc", generator: "plain", hash: "sha512"),
    ]
}

@Suite struct LUKSTests {
    static let size = 3 << 20
    static let key: JSONValue = ["driver": "luks", "key-secret": "good"]

    static func source(_ name: String, secret: String = "good") -> String {
        "driver=luks,file.filename=\(name),key-secret=\(secret)"
    }

    @Test(arguments: EncryptionVariant.all)
    func disksThatQEMUMakesReadTheSame(variant: EncryptionVariant) async throws {
        let folder = try QCOW2TestFolder()
        let bytes = QCOW2InteropTests.pattern(Self.size, seed: 21)
        try folder.write(bytes, "raw.img")
        try folder.runWithKeys(
            ["qemu-img", "convert", "-f", "raw", "-O", "luks"] + QCOW2TestFolder.objects
                + ["-o", variant.text(), "raw.img", "a.luks"])
        #expect(try await folder.contents("a.luks", options: Self.key) == bytes)
    }

    @Test(arguments: EncryptionVariant.all)
    func disksMadeHereReadTheSameInQEMU(variant: EncryptionVariant) async throws {
        let folder = try QCOW2TestFolder()
        let bytes = QCOW2InteropTests.pattern(Self.size, seed: 22)
        var options = variant.options
        options["size"] = .integer(Self.size)
        try await folder.create("a.luks", driver: "luks", .object(options))
        try await folder.open("a.luks", options: Self.key) { edge throws(BlockError) in
            let vector = try IOVector(allocating: bytes.count)
            bytes.withUnsafeBytes { vector.copy(from: $0) }
            try await edge.write(0, from: vector)
        }
        try folder.run(
            ["qemu-img", "convert"] + QCOW2TestFolder.objects
                + ["--image-opts", "-O", "raw", Self.source("a.luks"), "raw.img"])
        #expect(try folder.bytes("raw.img") == bytes)
        try folder.run(["/usr/sbin/cryptsetup", "luksDump", "a.luks"])
    }

    @Test func informationIsThatOfQEMU() async throws {
        let folder = try QCOW2TestFolder()
        try folder.runWithKeys(
            ["qemu-img", "create", "-q", "-f", "luks"] + QCOW2TestFolder.objects
                + ["-o", EncryptionVariant.all[2].text(), "a.luks", "1M"])
        let theirs = try JSONParser.parse(
            folder.run(["qemu-img", "info", "--output=json", "a.luks"]))
        let ours = try await folder.open("a.luks", options: Self.key) { edge throws(BlockError) in
            try await edge.node.driver.information
        }
        #expect(ours.formatSpecific == theirs["format-specific"])
        #expect(ours.isEncrypted)
    }

    @Test func aWrongPassphraseOpensNothing() async throws {
        let folder = try QCOW2TestFolder()
        var options = EncryptionVariant().options
        options["size"] = .integer(1 << 20)
        try await folder.create("a.luks", driver: "luks", .object(options))
        do {
            _ = try await folder.contents(
                "a.luks", options: ["driver": "luks", "key-secret": "other"])
            Issue.record("opened")
        } catch let error as BlockError {
            #expect(error.code == .permissionDenied)
        }
    }

    @Test func withoutAKeyNothingIsRead() async throws {
        let folder = try QCOW2TestFolder()
        var options = EncryptionVariant().options
        options["size"] = .integer(1 << 20)
        try await folder.create("a.luks", driver: "luks", .object(options))
        do {
            _ = try await folder.contents("a.luks", options: ["driver": "luks"])
            Issue.record("opened")
        } catch let error as BlockError {
            #expect(error.message.contains("without a key"), "\(error)")
        }
    }

    @Test func aHeaderCanStandApart() async throws {
        let folder = try QCOW2TestFolder()
        try folder.write([], "header.luks")
        let header: JSONValue = ["driver": "file", "filename": .string(folder["header.luks"])]
        var options = EncryptionVariant().options
        options["size"] = .integer(Self.size)
        options["header"] = header
        try await folder.create("a.img", driver: "luks", .object(options))
        #expect(try folder.bytes("a.img").count == Self.size)
        let opening: JSONValue = ["driver": "luks", "key-secret": "good", "header": header]
        try await folder.open("a.img", options: opening) { edge throws(BlockError) in
            #expect(edge.size == Self.size)
            let vector = try IOVector(allocating: 8192)
            vector.fill(7)
            try await edge.write(4096, from: vector)
        }
        let contents = try await folder.contents("a.img", options: opening)
        #expect(contents[4096..<12288].allSatisfy { $0 == 7 })
        #expect(try folder.bytes("a.img")[4096..<12288] != contents[4096..<12288])
    }

    @Test func theSectorThatTheFileEndsInIsReadAndWritten() async throws {
        let folder = try QCOW2TestFolder()
        try folder.runWithKeys(
            ["qemu-img", "create", "-q", "-f", "luks"] + QCOW2TestFolder.objects
                + ["-o", EncryptionVariant().text(), "a.luks", "3000"])
        func compareWithQEMU() async throws -> [UInt8] {
            let contents = try await folder.contents("a.luks", options: Self.key)
            try folder.run(
                ["qemu-img", "convert"] + QCOW2TestFolder.objects
                    + ["--image-opts", "-O", "raw", Self.source("a.luks"), "raw.img"])
            #expect(try contents == folder.bytes("raw.img"))
            return contents
        }
        #expect(try folder.bytes("a.luks").count % 512 != 0)
        var expected = try await compareWithQEMU()
        #expect(expected.count == 3072)
        try await folder.open("a.luks", options: Self.key) { edge throws(BlockError) in
            try await QCOW2SnapshotTests.fill(edge, 2560..<3072, 5)
        }
        for index in 2560..<3072 { expected[index] = 5 }
        #expect(try await compareWithQEMU() == expected)
    }

    @Test func requestsOfAllSizesFollowTheModel() async throws {
        let folder = try QCOW2TestFolder()
        var options = EncryptionVariant().options
        options["size"] = .integer(Self.size)
        try await folder.create("a.luks", driver: "luks", .object(options))
        let violations = try await folder.open("a.luks", options: Self.key) {
            edge throws(BlockError) in
            let zeroes = try IOVector(allocating: edge.size)
            zeroes.fill(0)
            try await edge.write(0, from: zeroes)
            var options = RandomRequests.Options()
            options.requestBytesMax = 300_000
            let run = RandomRequests(edge, ShadowDisk(size: edge.size), seed: 5, options)
            await run.run()
            await run.verify()
            return run.violations
        }
        #expect(violations == [])
    }
}

@Suite struct QCOW2EncryptionTests {
    static let size = 3 << 20
    static let key: JSONValue = ["encrypt": ["format": "luks", "key-secret": "good"]]

    static func source(_ name: String) -> String {
        "driver=qcow2,file.filename=\(name),encrypt.key-secret=good"
    }

    static func options(
        _ variant: EncryptionVariant = EncryptionVariant(), more: JSONObject = [:]
    ) -> JSONValue {
        var encrypt = variant.options
        encrypt["format"] = "luks"
        var all: JSONObject = ["size": .integer(size), "encrypt": .object(encrypt)]
        for (key, value) in more.members { all[key] = value }
        return .object(all)
    }

    @Test(arguments: EncryptionVariant.all)
    func imagesThatQEMUMakesReadTheSame(variant: EncryptionVariant) async throws {
        let folder = try QCOW2TestFolder()
        let bytes = QCOW2InteropTests.pattern(Self.size, seed: 23)
        try folder.write(bytes, "raw.img")
        try folder.runWithKeys(
            ["qemu-img", "convert", "-f", "raw", "-O", "qcow2"] + QCOW2TestFolder.objects
                + [
                    "-o", "encrypt.format=luks," + variant.text(prefix: "encrypt."), "raw.img",
                    "a.qcow2",
                ])
        #expect(try await folder.contents("a.qcow2", options: Self.key) == bytes)
        let theirs = try JSONParser.parse(
            folder.run(["qemu-img", "info", "--output=json", "a.qcow2"]))
        let ours = try await folder.open("a.qcow2", options: Self.key) { edge throws(BlockError) in
            try await edge.node.driver.information.formatSpecific
        }
        #expect(ours == theirs["format-specific"])
    }

    @Test(arguments: [512, 65536, 2 << 20], ["off", "metadata"])
    func imagesMadeHereFollowTheModelAndReadTheSameInQEMU(
        clusterSize: Int, preallocation: String
    ) async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create(
            "a.qcow2",
            Self.options(
                more: [
                    "cluster-size": .integer(clusterSize),
                    "preallocation": .string(preallocation),
                ]))
        try folder.run(
            ["qemu-img", "check"] + QCOW2TestFolder.objects + [
                "--image-opts", Self.source("a.qcow2"),
            ])
        let violations = try await folder.open("a.qcow2", options: Self.key) {
            edge throws(BlockError) in
            var options = RandomRequests.Options()
            options.requestBytesMax = 200_000
            let run = RandomRequests(edge, ShadowDisk(size: edge.size), seed: 9, options)
            await run.run()
            await run.verify()
            return run.violations
        }
        #expect(violations == [])
        try folder.run(
            ["qemu-img", "check"] + QCOW2TestFolder.objects + [
                "--image-opts", Self.source("a.qcow2"),
            ])
        try folder.run(
            ["qemu-img", "convert"] + QCOW2TestFolder.objects
                + ["--image-opts", "-O", "raw", Self.source("a.qcow2"), "raw.img"])
        #expect(
            try await folder.contents("a.qcow2", options: Self.key) == folder.bytes("raw.img"))
    }

    @Test func imagesOfTheOldMethodAreReadAndWritten() async throws {
        let folder = try QCOW2TestFolder()
        var bytes = QCOW2InteropTests.pattern(Self.size, seed: 24)
        try folder.write(bytes, "raw.img")
        try folder.run(
            ["qemu-img", "convert", "-f", "raw", "-O", "qcow2"] + QCOW2TestFolder.objects
                + ["-o", "encrypt.format=aes,encrypt.key-secret=good", "raw.img", "a.qcow2"])
        let key: JSONValue = ["encrypt": ["format": "aes", "key-secret": "good"]]
        #expect(try await folder.contents("a.qcow2", options: key) == bytes)
        try await folder.open("a.qcow2", options: key) { edge throws(BlockError) in
            let vector = try IOVector(allocating: 100_000)
            vector.fill(3)
            try await edge.write(300_300, from: vector)
        }
        for index in 300_300..<400_300 { bytes[index] = 3 }
        try folder.run(
            ["qemu-img", "convert"] + QCOW2TestFolder.objects
                + ["--image-opts", "-O", "raw", Self.source("a.qcow2"), "raw.img"])
        #expect(try folder.bytes("raw.img") == bytes)
    }

    @Test func anImageThatAsksForTooMuchWorkOpensWithoutItsKeyOnly() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", Self.options())
        var bytes = try folder.bytes("a.qcow2")
        let header = try #require(Self.luksHeader(in: bytes))
        bytes.replaceSubrange((header + 212)..<(header + 216), with: [0x0f, 0xff, 0xff, 0xff])
        try folder.write(bytes, "a.qcow2")
        do {
            try await folder.open("a.qcow2", options: Self.key) { _ throws(BlockError) in }
            Issue.record("it was opened")
        } catch {
            #expect((error as? BlockError)?.code == .exhausted, "\(error)")
        }
        #expect(try folder.run(["qemu-img", "info", "a.qcow2"]).contains("iters: 268435455"))
    }

    @Test func tryingAPassphraseEndsWhenAllWorkEnds() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", Self.options())
        let path = folder["a.qcow2"]
        let key = Self.key
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        try await thread.run { () async throws(BlockError) in
            let graph = BlockGraph(
                on: thread,
                registry: DriverRegistry(BlockProtocols.drivers + BlockFormats.drivers))
            try QCOW2TestFolder.addSecrets(to: graph)
            graph.endLongWork()
            var options: JSONObject = [
                "driver": "qcow2", "file": ["driver": "file", "filename": .string(path)],
            ]
            options["encrypt"] = key["encrypt"]
            do throws(BlockError) {
                _ = try await graph.open(.object(options))
                Issue.record("it was opened")
            } catch {
                #expect(error.code == .cancelled)
            }
            try await graph.closeAll()
        }
    }

    @Test func aNewKeyDoesNotGoWhereAnotherStructureIs() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", Self.options())
        try await folder.open("a.qcow2", options: Self.key) { edge throws(BlockError) in
            let vector = try IOVector(allocating: Self.size)
            vector.fill(0x5a)
            try await edge.write(0, from: vector)
        }
        var bytes = try folder.bytes("a.qcow2")
        let header = try #require(Self.luksHeader(in: bytes))
        // Slot 1 lies behind the place that the image has for the header, in guest data.
        bytes.replaceSubrange((header + 104)..<(header + 108), with: [0, 1, 0, 0])
        bytes.replaceSubrange((header + 296)..<(header + 300), with: [0, 0, 0x10, 0])
        try folder.write(bytes, "a.qcow2")
        let before = bytes
        try await folder.open("a.qcow2", options: Self.key) { edge throws(BlockError) in
            do throws(BlockError) {
                try await edge.node.graph.amend(
                    edge.node,
                    ImageAmendment(
                        try OptionReader(
                            [
                                "encrypt": [
                                    "format": "luks", "state": "active", "new-secret": "other",
                                    "keyslot": 1, "iter-time": 1,
                                ]
                            ], of: "amendment")))
                Issue.record("the key was set")
            } catch {
                #expect(error.code == .corrupt, "\(error)")
            }
        }
        #expect(try folder.bytes("a.qcow2")[(header + 592)...] == before[(header + 592)...])
    }

    /// Where the image has its LUKS header.
    private static func luksHeader(in bytes: [UInt8]) -> Int? {
        Array(stride(from: 0, to: bytes.count, by: 512)).first {
            bytes[$0..<($0 + 6)].elementsEqual([0x4c, 0x55, 0x4b, 0x53, 0xba, 0xbe])
        }
    }

    @Test func writtenDataIsNotInTheFile() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", Self.options())
        try await folder.open("a.qcow2", options: Self.key) { edge throws(BlockError) in
            let vector = try IOVector(allocating: 65536)
            vector.fill(0x5a)
            try await edge.write(0, from: vector)
        }
        let file = try folder.bytes("a.qcow2")
        let run = [UInt8](repeating: 0x5a, count: 16)
        let found = stride(from: 0, to: file.count - 16, by: 16)
            .first { file[$0..<($0 + 16)] == run[...] }
        #expect(found == nil)
    }

    @Test func compressedDataIsRefused() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", Self.options())
        try await folder.expectNoCompressedData("a.qcow2", options: Self.key)
    }

    @Test func aPlainImageTakesNoKey() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", ["size": .integer(Self.size)])
        await #expect(throws: BlockError.self) {
            try await folder.contents("a.qcow2", options: Self.key)
        }
    }
}
