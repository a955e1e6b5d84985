import BlockCore
import BlockGraph
import BlockIO
import BlockProtocols
import BlockTesting
import QMP
import Testing

@testable import BlockFormats

/// Open images that keep keys and dirty bitmaps take other options.
@Suite struct QCOW2ReopeningTests {
    static let size = 4 << 20
    static let key: JSONObject = ["encrypt": ["format": "luks", "key-secret": "good"]]

    /// An image that is open as node `image`, with nobody using it.
    struct Image: Sendable {
        let graph: BlockGraph
        let path: String

        private func options(_ more: JSONObject) -> JSONValue {
            var options: JSONObject = [
                "driver": "qcow2", "node-name": "image",
                "file": ["driver": "file", "filename": .string(path)],
            ]
            for (key, value) in more.members { options[key] = value }
            return .object(options)
        }

        func open(_ more: JSONObject) async throws(BlockError) {
            _ = try await graph.open(options(more), monitorOwned: true)
        }

        func reopen(_ more: JSONObject) async throws(BlockError) {
            try await graph.reopen([options(more)])
        }

        /// - Returns: why it was refused, `nil` if it was not.
        func refusal(_ more: JSONObject) async -> BlockError? {
            do throws(BlockError) {
                try await reopen(more)
                return nil
            } catch {
                return error
            }
        }

        func node() throws(BlockError) -> BlockNode { try graph.requireNode(named: "image") }

        func use<T>(
            _ uses: Permission, _ body: (Edge) async throws(BlockError) -> T
        ) async throws(BlockError) -> T {
            let edge = try graph.attach(
                NamedUser("test"), to: try node(), Access(uses: uses, shares: .all))
            let result: Result<T, BlockError>
            do throws(BlockError) {
                result = .success(try await body(edge))
            } catch {
                result = .failure(error)
            }
            try await graph.detach(edge)
            return try result.get()
        }

        func fill(_ range: Range<Int>, _ value: UInt8) async throws(BlockError) {
            try await use([.consistentRead, .write]) { edge throws(BlockError) in
                try await QCOW2SnapshotTests.fill(edge, range, value)
            }
        }

        func contents() async throws(BlockError) -> [UInt8] {
            try await use(.consistentRead) { edge throws(BlockError) in
                try await QCOW2SnapshotTests.everything(edge)
            }
        }
    }

    /// Opens `a.qcow2` with `options`, and closes it after `body`.
    private func with(
        _ folder: QCOW2TestFolder, _ options: JSONObject,
        _ body: @escaping @Sendable (Image) async throws(BlockError) -> Void
    ) async throws {
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        try await thread.run { () async throws(BlockError) in
            let graph = BlockGraph(
                on: thread,
                registry: DriverRegistry(BlockProtocols.drivers + BlockFormats.drivers))
            for (name, text) in QCOW2TestFolder.secrets {
                try graph.addObject(GraphSecret(SecretBytes(Array(text.utf8))), as: name)
            }
            let image = Image(graph: graph, path: folder["a.qcow2"])
            do throws(BlockError) {
                try await image.open(options)
                try await body(image)
            } catch {
                try? await graph.closeAll()
                throw error
            }
            try await graph.closeAll()
        }
    }

    private static func flags(_ folder: QCOW2TestFolder) -> [String: [String]]? {
        // The image is open here.
        try? QCOW2BitmapTests.flagsByQEMU(folder, "a.qcow2", sharing: true)
    }

    // MARK: Dirty bitmaps

    @Test func bitmapsAreStoredBeforeAnImageGoesReadOnlyAndMarkedBeforeItsNextChange() async throws
    {
        let folder = try QCOW2BitmapTests.folderWithBitmap()
        try await with(folder, [:]) { image throws(BlockError) in
            try await image.fill(0..<10, 1)
            #expect(Self.flags(folder) == ["b": ["in-use", "auto"]])
            try await image.reopen(["read-only": true])
            #expect(Self.flags(folder) == ["b": ["auto"]])
            let both = [ByteRange(0, 65536), ByteRange(1 << 20, 65536)]
            let states = await QCOW2BitmapTests.states(try image.node())
            #expect(states.first?.ranges == both)
            #expect(try image.node().dirtyBitmap(named: "b")?.isReadOnly == true)

            try await image.reopen(["l2-cache-size": 65536])
            #expect(Self.flags(folder) == ["b": ["auto"]])
            try await image.fill(3 << 20..<3 << 20 + 10, 1)
            #expect(Self.flags(folder) == ["b": ["in-use", "auto"]])
        }
        try folder.check("a.qcow2")
        #expect(
            try QCOW2BitmapTests.rangesByQEMU(folder, "a.qcow2", "b")
                == [0, 1 << 20, 3 << 20].map { ByteRange($0, 65536) })
    }

    @Test func aBitmapOfAnImageThatWasOnlyReadGoesOnRecording() async throws {
        let folder = try QCOW2BitmapTests.folderWithBitmap()
        try await with(folder, ["read-only": true]) { image throws(BlockError) in
            try await image.reopen([:])
            try await image.fill(3 << 20..<3 << 20 + 10, 1)
        }
        try folder.check("a.qcow2")
        #expect(
            try QCOW2BitmapTests.rangesByQEMU(folder, "a.qcow2", "b")
                == [1 << 20, 3 << 20].map { ByteRange($0, 65536) })
    }

    @Test func aBitmapThatIsMadeAfterReopeningIsKept() async throws {
        let folder = try QCOW2BitmapTests.folderWithBitmap()
        try await with(folder, ["read-only": true]) { image throws(BlockError) in
            try await image.reopen([:])
            let node = try image.node()
            try await node.makeDirtyBitmap(named: "new", persistent: true)
            try await image.fill(0..<10, 1)
            if let old = node.dirtyBitmap(named: "b") { try await node.discardDirtyBitmap(old) }
            try await image.reopen(["read-only": true])
            #expect(Self.flags(folder) == ["new": ["auto"]])
        }
        try folder.check("a.qcow2")
        #expect(
            try QCOW2BitmapTests.rangesByQEMU(folder, "a.qcow2", "new") == [ByteRange(0, 65536)])
    }

    @Test func bitmapsThatSomeProgramMadeUntrueGoWithTheFirstChange() async throws {
        let folder = try QCOW2BitmapTests.folderWithBitmap()
        var bytes = QCOW2Bytes(bytes: try folder.bytes("a.qcow2"))
        // Not valid any more, and a bit that nobody knows.
        bytes.set(88, 1 << 40)
        let before = bytes.bytes
        try folder.write(before, "a.qcow2")
        try await with(folder, ["read-only": true]) { image throws(BlockError) in
            try await image.reopen([:])
            #expect((try? folder.bytes("a.qcow2")) == before)
            #expect(try image.node().dirtyBitmaps.isEmpty)
            try await image.fill(0..<10, 1)
        }
        #expect(QCOW2Bytes(bytes: try folder.bytes("a.qcow2")).number(88) == 0)
    }

    @Test func withADamagedDirectoryAnImageStaysReadOnly() async throws {
        let folder = try QCOW2BitmapTests.folderWithBitmap()
        var bytes = QCOW2Bytes(bytes: try folder.bytes("a.qcow2"))
        let place = try #require(bytes.bitmapDirectory)
        bytes.set(place + 8, 0xffff_ffff_ffff_ffff)
        try folder.write(bytes.bytes, "a.qcow2")
        try await with(folder, ["read-only": true]) { image throws(BlockError) in
            let refusal = await image.refusal([:])
            #expect(refusal?.code == .corrupt, "\(refusal?.description ?? "")")
            #expect(try image.node().isReadOnly)
            _ = try await image.contents()
        }
        #expect(try folder.bytes("a.qcow2") == bytes.bytes)
    }

    // MARK: Data files

    @Test func aDiskWithAShortDataFileBecomesWritable() async throws {
        let folder = try QCOW2TestFolder()
        try await QCOW2DataFileTests.create(folder)
        try folder.run(["truncate", "-s", "1M", "a.data"])
        try await with(folder, ["read-only": true]) { image throws(BlockError) in
            try await image.reopen([:])
            try await image.fill(2_000_000..<2_100_000, 7)
            let contents = try await image.contents()
            #expect(contents[2_000_000..<2_100_000].allSatisfy { $0 == 7 })
        }
    }

    // MARK: Encryption

    @Test func anEncryptedImageKeepsItsKey() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", QCOW2EncryptionTests.options())
        try await with(folder, Self.key) { image throws(BlockError) in
            try await image.fill(0..<100_000, 7)
            for options in [
                ["read-only": true], Self.key, [:],
                ["encrypt": ["format": "luks"], "discard": "unmap"],
            ] as [JSONObject] {
                try await image.reopen(options)
                let contents = try await image.contents()
                #expect(contents[..<100_000].allSatisfy { $0 == 7 }, "\(options)")
                #expect(contents[100_000...].allSatisfy { $0 == 0 }, "\(options)")
            }
            try await image.fill(50_000..<200_000, 8)
        }
        let contents = try await folder.contents("a.qcow2", options: .object(Self.key))
        #expect(contents[..<50_000].allSatisfy { $0 == 7 })
        #expect(contents[50_000..<200_000].allSatisfy { $0 == 8 })
        try folder.checkEncrypted("a.qcow2")
    }

    @Test func aSecretThatIsNamedInReopeningIsTried() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", QCOW2EncryptionTests.options())
        // Opened to be looked at.
        try await with(folder, [:]) { image throws(BlockError) in
            let wrong = await image.refusal(["encrypt": ["key-secret": "other"]])
            #expect(wrong?.code == .permissionDenied, "\(wrong?.description ?? "")")
            let format = await image.refusal(["encrypt": ["format": "aes"]])
            #expect(format?.code == .invalidArgument)
            await #expect(throws: BlockError.self) { try await image.contents() }
            try await image.reopen(Self.key)
            try await image.fill(0..<1000, 1)
            #expect(try await image.contents()[..<1000].allSatisfy { $0 == 1 })
        }
    }

    @Test func aPlainImageTakesNoKeyInReopening() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M"])
        try await with(folder, [:]) { image throws(BlockError) in
            #expect(await image.refusal(Self.key)?.code == .invalidArgument)
        }
    }

    // MARK: Snapshots

    @Test func aSnapshotIsReadOnWhileTheImageIsReopenedAndAmended() async throws {
        let folder = try QCOW2TestFolder()
        try folder.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "4M"])
        try folder.run(["qemu-io", "-c", "write -P 1 0 2M", "a.qcow2"])
        try folder.run(["qemu-img", "snapshot", "-c", "s", "a.qcow2"])
        try await with(folder, [:]) { image throws(BlockError) in
            let node = try image.node()
            let source = try await node.requireSnapshotStore().openSnapshot("1", for: node)
            func check() async throws(BlockError) {
                let vector = try IOVector(allocating: 3 << 20)
                try await source.readSnapshot(0, into: vector)
                #expect(vector.array[..<(2 << 20)].allSatisfy { $0 == 1 })
                #expect(vector.array[(2 << 20)...].allSatisfy { $0 == 0 })
            }
            try await check()
            for options in [["read-only": true], ["l2-cache-entry-size": 65536], [:]]
                as [JSONObject]
            {
                try await image.reopen(options)
                try await check()
            }
            try await image.use([.consistentRead, .write]) { edge throws(BlockError) in
                try await QCOW2AmendTests.amend(edge, ["refcount-bits": 64])
                try await QCOW2SnapshotTests.fill(edge, 0..<4 << 20, 9)
                try await check()
                // Whoever reads it keeps it.
                await #expect(throws: BlockError.self) {
                    try await QCOW2SnapshotTests.delete(edge, "s")
                }
                source.close()
                try await QCOW2SnapshotTests.delete(edge, "s")
            }
        }
        try folder.check("a.qcow2")
    }

    // MARK: Load

    @Test func requestsFollowTheModelWhileAnEncryptedImageWithABitmapIsReopened() async throws {
        for seed in 1...3 as ClosedRange<UInt64> {
            let folder = try QCOW2TestFolder()
            try await folder.create(
                "a.qcow2", QCOW2EncryptionTests.options(more: ["cluster-size": 4096]))
            try await with(folder, Self.key) { image throws(BlockError) in
                let node = try image.node()
                let bitmap = try await node.makeDirtyBitmap(
                    named: "b", granularity: 512, persistent: true)
                let changes = try DirtyBitmap(name: "all", granularity: 512, size: node.size)
                node.addWriteObserver(changes)
                let violations = try await image.use([.consistentRead, .write]) { edge in
                    let run = RandomRequests(edge, ShadowDisk(size: edge.size), seed: seed)
                    let load = image.graph.thread.spawn { await run.run() }
                    for round in 0..<15 {
                        let more: JSONObject =
                            round % 2 == 0 ? ["l2-cache-size": 4096] : ["discard": "unmap"]
                        if let error = await image.refusal(more) { Issue.record(error) }
                        await image.graph.thread.yield()
                    }
                    await load.value
                    await run.verify()
                    return run.violations
                }
                #expect(violations == [], "seed \(seed)")
                var (recorded, expected): ([ByteRange], [ByteRange]) = ([], [])
                bitmap.forEachDirtyRange { recorded.append($0) }
                changes.forEachDirtyRange { expected.append($0) }
                #expect(recorded == expected, "seed \(seed)")
            }
            try folder.checkEncrypted("a.qcow2")
        }
    }
}
