import BlockCore
import BlockGraph
import Foundation
import QMP
import Testing

@testable import BlockFormats

/// Internal snapshots on real files, beside qemu-img.
@Suite struct QCOW2SnapshotTests {
    static let date = SnapshotDate(seconds: 1_700_000_000, nanoseconds: 5000)

    static func create(_ edge: Edge, _ name: String) async throws(BlockError) {
        _ = try await edge.node.graph.createSnapshot(name, of: edge.node, at: date)
    }

    static func identifier(_ edge: Edge, _ name: String) throws(BlockError) -> String {
        guard let found = try edge.node.requireSnapshotStore().snapshot(.init(name: name)) else {
            throw BlockError(.notFound, "no snapshot '\(name)'")
        }
        return found.identifier
    }

    static func apply(_ edge: Edge, _ name: String) async throws(BlockError) {
        try await edge.node.graph.applySnapshot(try Self.identifier(edge, name), of: edge.node)
    }

    static func delete(_ edge: Edge, _ name: String) async throws(BlockError) {
        try await edge.node.graph.deleteSnapshot(try Self.identifier(edge, name), of: edge.node)
    }

    static func fill(
        _ edge: Edge, _ range: Range<Int>, _ value: UInt8
    ) async throws(BlockError) {
        let vector = try IOVector(allocating: range.count)
        vector.fill(value)
        try await edge.write(range.lowerBound, from: vector)
    }

    static func everything(_ edge: Edge) async throws(BlockError) -> [UInt8] {
        let vector = try IOVector(allocating: edge.size)
        try await edge.read(0, into: vector)
        return vector.array
    }

    /// A snapshot's disk as Merino reads it.
    static func contents(_ edge: Edge, ofSnapshot name: String) async throws(BlockError) -> [UInt8]
    {
        let store = try edge.node.requireSnapshotStore()
        let source = try await store.openSnapshot(try Self.identifier(edge, name), for: edge.node)
        defer { source.close() }
        let vector = try IOVector(allocating: source.snapshotSize)
        try await source.readSnapshot(0, into: vector)
        return vector.array
    }

    // MARK: One tool or the other

    struct Case: Sendable, CustomTestStringConvertible {
        var options: JSONValue
        var testDescription: String { options.text() }
    }

    static let cases: [Case] = [
        Case(options: ["size": 3_000_320, "cluster-size": 65536]),
        Case(options: ["size": 3_000_320, "cluster-size": 512]),
        Case(options: ["size": 3_000_320, "cluster-size": 4096, "lazy-refcounts": true]),
        Case(options: ["size": 3_000_320, "cluster-size": 4096, "refcount-bits": 4]),
        Case(options: ["size": 3_000_320, "cluster-size": 4096, "refcount-bits": 64]),
        Case(options: ["size": 3_000_320, "cluster-size": 2_097_152]),
        Case(options: ["size": 3_000_320, "cluster-size": 65536, "version": "v2"]),
        Case(options: ["size": 3_000_320, "cluster-size": 65536, "extended-l2": true]),
        Case(
            options: [
                "size": 3_000_320, "cluster-size": 65536, "backing-file": "base.img",
                "backing-fmt": "raw",
            ]),
    ]

    /// What the disk and each snapshot hold.
    struct Model: Sendable {
        var disk: [UInt8]
        var snapshots: [(name: String, disk: [UInt8])] = []
    }

    /// Random writes, snapshots, reverts and deletions, each by one of the two tools.
    @Test(arguments: cases) func bothToolsWorkOnTheSameSnapshots(image: Case) async throws {
        for seed in 1...2 {
            let folder = try QCOW2TestFolder()
            var random = QCOW2TestRandom(seed: seed)
            var model = Model(disk: [UInt8](repeating: 0, count: 3_000_320))
            if image.options["backing-file"] != nil {
                let base = QCOW2InteropTests.pattern(2 << 20, seed: seed)
                try folder.write(base, "base.img")
                model.disk.replaceSubrange(0..<base.count, with: base)
            }
            try await folder.create("a.qcow2", image.options)
            for step in 0..<14 {
                try await Self.step(step, folder, &model, &random)
                try folder.check("a.qcow2")
            }
            try await Self.compare(folder, model, "seed \(seed)")
        }
    }

    private static func step(
        _ step: Int, _ folder: QCOW2TestFolder, _ model: inout Model,
        _ random: inout QCOW2TestRandom
    ) async throws {
        let usesPeer = random.next(below: 2) == 0
        let kind = random.next(below: 8)
        let pick = model.snapshots.isEmpty ? 0 : random.next(below: model.snapshots.count)
        switch kind {
        case 0...2 where model.snapshots.count < 6:
            let name = "s\(step)"
            if usesPeer {
                try folder.run(["qemu-img", "snapshot", "-c", name, "a.qcow2"])
            } else {
                try await folder.open("a.qcow2") { edge throws(BlockError) in
                    try await Self.create(edge, name)
                }
            }
            model.snapshots.append((name, model.disk))
        case 3 where !model.snapshots.isEmpty:
            let name = model.snapshots[pick].name
            if usesPeer {
                try folder.run(["qemu-img", "snapshot", "-a", name, "a.qcow2"])
            } else {
                try await folder.open("a.qcow2") { edge throws(BlockError) in
                    try await Self.apply(edge, name)
                }
            }
            model.disk = model.snapshots[pick].disk
        case 4 where !model.snapshots.isEmpty:
            let name = model.snapshots.remove(at: pick).name
            if usesPeer {
                try folder.run(["qemu-img", "snapshot", "-d", name, "a.qcow2"])
            } else {
                try await folder.open("a.qcow2") { edge throws(BlockError) in
                    try await Self.delete(edge, name)
                }
            }
        default:
            let start = model.disk
            let seed = random.next(below: 1 << 30)
            let (disk, wrong) = try await folder.open("a.qcow2") { edge throws(BlockError) in
                let load = QCOW2Load(edge, seed: seed, model: start)
                try await load.run(steps: 40)
                return (load.model, load.wrong)
            }
            #expect(wrong == [])
            model.disk = disk
        }
    }

    private static func compare(
        _ folder: QCOW2TestFolder, _ model: Model, _ comment: Comment
    ) async throws {
        #expect(try await folder.contents("a.qcow2") == model.disk, comment)
        let names = model.snapshots.map(\.name)
        let disks = try await folder.open("a.qcow2", writable: false) { edge throws(BlockError) in
            var disks: [[UInt8]] = []
            for name in names { disks.append(try await Self.contents(edge, ofSnapshot: name)) }
            return disks
        }
        for (snapshot, disk) in zip(model.snapshots, disks) {
            #expect(disk == snapshot.disk, comment)
            try folder.run([
                "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l",
                "snapshot.name=\(snapshot.name)", "a.qcow2", "out.img",
            ])
            let peers = try folder.bytes("out.img")
            #expect(peers == snapshot.disk, comment)
        }
    }

    // MARK: Rules

    @Test func requestsGoOnAroundSnapshots() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", ["size": .integer(2 << 20), "cluster-size": 4096])
        let (models, disks, end, wrong) = try await folder.open("a.qcow2") {
            edge throws(BlockError) in
            var models: [[UInt8]] = []
            let load = QCOW2Load(edge, seed: 5, model: [UInt8](repeating: 0, count: 2 << 20))
            for index in 0..<4 {
                try await load.run(steps: 100)
                models.append(load.model)
                try await Self.create(edge, "s\(index)")
            }
            try await load.run(steps: 100)
            try await Self.delete(edge, "s2")
            try await load.run(steps: 100)
            var disks: [[UInt8]] = []
            for name in ["s0", "s1", "s3"] {
                disks.append(try await Self.contents(edge, ofSnapshot: name))
            }
            return (models, disks, load.model, load.wrong)
        }
        #expect(wrong == [])
        #expect(disks[0] == models[0])
        #expect(disks[1] == models[1])
        #expect(disks[2] == models[3])
        try folder.check("a.qcow2")
        #expect(try await folder.contents("a.qcow2") == end)
    }

    @Test func aSnapshotHasItsOwnSize() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", ["size": .integer(1 << 20)])
        let sizes = try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await Self.fill(edge, 0..<1 << 20, 1)
            try await Self.create(edge, "small")
            try await edge.resize(to: 5 << 20)
            try await Self.fill(edge, 4 << 20..<5 << 20, 2)
            try await Self.create(edge, "large")
            try await edge.resize(to: 512 << 10)
            var sizes = [
                try await Self.contents(edge, ofSnapshot: "small").count,
                try await Self.contents(edge, ofSnapshot: "large").count,
            ]
            try await Self.apply(edge, "large")
            sizes.append(edge.size)
            let large = try await Self.everything(edge)
            try await Self.apply(edge, "small")
            sizes.append(edge.size)
            sizes.append(large.filter { $0 == 2 }.count)
            return sizes
        }
        #expect(sizes == [1 << 20, 5 << 20, 5 << 20, 1 << 20, 1 << 20])
        try folder.check("a.qcow2")
        try folder.run(["qemu-img", "snapshot", "-a", "large", "a.qcow2"])
        #expect(try await folder.contents("a.qcow2").count == 5 << 20)
    }

    @Test func imagesOfVersion2WithSnapshotsKeepTheirSize() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", ["size": .integer(1 << 20), "version": "v2"])
        let error = try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await Self.create(edge, "s")
            do throws(BlockError) {
                try await edge.resize(to: 2 << 20)
                return BlockError?.none
            } catch { return error }
        }
        #expect(error?.code == .unsupported)
    }

    @Test func countsThatAreTooNarrowRefuseASnapshotAndStayRight() async throws {
        let folder = try QCOW2TestFolder()
        for bits in [1, 2] {
            try await folder.create(
                "a.qcow2",
                ["size": .integer(1 << 20), "cluster-size": 512, "refcount-bits": .integer(bits)])
            let codes = try await folder.open("a.qcow2") { edge throws(BlockError) in
                try await Self.fill(edge, 0..<300_000, 1)
                var codes: [BlockError.Code] = []
                for index in 0..<4 {
                    do throws(BlockError) {
                        try await Self.create(edge, "s\(index)")
                    } catch { codes.append(error.code) }
                }
                try await Self.fill(edge, 0..<10_000, 2)
                return codes
            }
            #expect(codes == [BlockError.Code](repeating: .exhausted, count: bits == 1 ? 4 : 2))
            try folder.check("a.qcow2")
        }
    }

    @Test func whatIsReadIsNeitherDeletedNorApplied() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", ["size": .integer(1 << 20)])
        let messages = try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await Self.create(edge, "s")
            let source = try await edge.node.requireSnapshotStore().openSnapshot(
                try Self.identifier(edge, "s"), for: edge.node)
            var messages: [String] = []
            for isDeletion in [true, false] {
                do throws(BlockError) {
                    if isDeletion {
                        try await Self.delete(edge, "s")
                    } else {
                        try await Self.apply(edge, "s")
                    }
                } catch { messages.append(error.message) }
            }
            source.close()
            try await Self.apply(edge, "s")
            try await Self.delete(edge, "s")
            return messages
        }
        #expect(messages.count == 2)
        #expect(messages.allSatisfy { $0.contains("node 'image'") })
        try folder.check("a.qcow2")
    }

    @Test func deletingTheLastUserGivesTheSpaceBack() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", ["size": .integer(16 << 20)])
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await Self.fill(edge, 0..<8 << 20, 1)
            try await Self.create(edge, "s")
            try await edge.discard(ByteRange(0, 8 << 20))
            try await Self.delete(edge, "s")
        }
        var status = stat()
        stat(folder["a.qcow2"], &status)
        #expect(Int(status.st_blocks) * 512 < 1 << 20)
        try folder.check("a.qcow2")
    }

    // MARK: The state of a virtual machine

    /// An image of 1 MiB whose L1 table reaches to 2 MiB, with a "state" of 100 KB past the disk.
    static func imageWithState(_ folder: QCOW2TestFolder) async throws {
        try await folder.create("a.qcow2", ["size": .integer(2 << 20), "cluster-size": 512])
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await Self.fill(edge, 0..<1 << 20, 1)
            try await Self.fill(edge, 1 << 20..<1 << 20 + 100_000, 77)
        }
        var bytes = try folder.bytes("a.qcow2")
        bytes.withUnsafeMutableBytes { $0.storeBigEndian(UInt64(1 << 20), at: 24) }
        try folder.write(bytes, "a.qcow2")
    }

    @Test func theStateOfAMachineIsKeptAndNeverShowsInTheDisk() async throws {
        let folder = try QCOW2TestFolder()
        try await Self.imageWithState(folder)
        let (state, grown) = try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await Self.create(edge, "vm")
            try await Self.fill(edge, 0..<1 << 20, 2)
            try await edge.resize(to: 2 << 20)
            let grown = Array(try await Self.everything(edge)[(1 << 20)...])
            try await edge.resize(to: 1 << 20)
            try await Self.apply(edge, "vm")
            // What lies past the disk in the table that is live again.
            let state = try IOVector(allocating: 100_000)
            if let driver = edge.node.driver as? QCOW2Driver {
                try await driver.readRuns(1 << 20, into: state, of: driver)
            }
            return (state.array, grown)
        }
        #expect(state == [UInt8](repeating: 77, count: 100_000))
        #expect(grown.allSatisfy { $0 == 0 })
        try folder.check("a.qcow2")
    }

    // MARK: The table

    @Test func extraDataOfOthersIsKept() throws {
        let geometry = QCOW2.Geometry(clusterBits: 16, refcountOrder: 4)
        var snapshot = QCOW2.Snapshot()
        snapshot.l1Offset = 65536
        snapshot.l1EntryCount = 3
        snapshot.identifier = Array("7".utf8)
        snapshot.name = Array("näme".utf8)
        for length in [0, 5, 8, 16, 24, 40, 1024] {
            snapshot.extra = (0..<length).map { $0 < 16 ? 0 : UInt8(truncatingIfNeeded: $0) }
            let bytes = try QCOW2.Snapshot.serialiseTable([snapshot, snapshot])
            let parsed = try bytes.withUnsafeBytes { bytes throws(BlockError) in
                try QCOW2.Snapshot.parseTable(bytes, count: 2, geometry: geometry)
            }
            #expect(parsed == .entries([snapshot, snapshot], byteCount: bytes.count))
            var stated = snapshot
            stated.stateDiskSize(4711)
            #expect(stated.diskSize == (length >= 16 ? snapshot.diskSize : 4711))
            #expect(stated.vmStateSize == snapshot.vmStateSize)
        }
    }

    @Test func damagedTablesAreRefused() {
        let geometry = QCOW2.Geometry(clusterBits: 16, refcountOrder: 4)
        for seed in 1...3000 {
            var random = QCOW2TestRandom(seed: seed)
            let bytes = (0..<random.next(below: 300)).map { _ -> UInt8 in
                let value = random.next(below: 1024)
                return value < 256 ? UInt8(value) : 0
            }
            // Any answer but a trap.
            _ = bytes.withUnsafeBytes { bytes in
                try? QCOW2.Snapshot.parseTable(bytes, count: 1 + seed % 3, geometry: geometry)
            }
        }
    }

    /// Any answer but a trap, whatever is asked of a damaged image.
    @Test func damagedImagesWithSnapshotsNeverTrap() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("good.qcow2", ["size": 200_192, "cluster-size": 512])
        try await folder.open("good.qcow2") { edge throws(BlockError) in
            for index in 0..<3 {
                try await Self.fill(edge, index * 20_000..<90_000, UInt8(index + 1))
                try await Self.create(edge, "s\(index)")
            }
        }
        let good = try folder.bytes("good.qcow2")
        let header = try QCOW2HeaderTests.parse(good)
        for seed in 1...120 {
            var random = QCOW2TestRandom(seed: seed)
            var bytes = good
            let places = [0, header.snapshotsOffset, header.l1Offset, header.refcountTableOffset]
            for _ in 0...random.next(below: 6) {
                // Mostly where tables are.
                let start = random.next(below: 3) == 0 ? 0 : places[random.next(below: 4)]
                let room = start == 0 ? bytes.count : min(512, bytes.count - start)
                let place = start + random.next(below: room)
                bytes[place] = [0, 0xff, UInt8(random.next(below: 256))][random.next(below: 3)]
            }
            try folder.write(bytes, "bad.qcow2")
            try? await folder.open("bad.qcow2") { edge throws(BlockError) in
                guard edge.size < 1 << 30 else { return }
                let store = try edge.node.requireSnapshotStore()
                for snapshot in store.internalSnapshots where snapshot.diskSize < 1 << 30 {
                    let source = try? await store.openSnapshot(snapshot.identifier, for: edge.node)
                    guard let source else { continue }
                    defer { source.close() }
                    let vector = try IOVector(allocating: min(source.snapshotSize, 200_000))
                    try? await source.readSnapshot(0, into: vector)
                }
                try? await Self.create(edge, "new")
                try? await Self.apply(edge, "s1")
                try? await Self.delete(edge, "s0")
                try? await Self.fill(edge, 0..<min(edge.size, 100_000), 9)
                try? await edge.resize(to: 300_032)
                try? await Self.apply(edge, "s2")
            }
        }
    }

    @Test func aTableThatIsCutShortIsRefusedByName() async throws {
        let folder = try QCOW2TestFolder()
        try await folder.create("a.qcow2", ["size": .integer(1 << 20)])
        try await folder.open("a.qcow2") { edge throws(BlockError) in
            try await Self.create(edge, "s")
        }
        var bytes = try folder.bytes("a.qcow2")
        bytes.withUnsafeMutableBytes { $0.storeBigEndian(UInt32(60_000), at: 60) }
        try folder.write(bytes, "a.qcow2")
        await #expect(throws: BlockError.self) {
            try await folder.open("a.qcow2", writable: false) { _ throws(BlockError) in }
        }
    }
}
