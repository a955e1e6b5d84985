import BlockTesting
import Foundation
import Testing

/// `check` beside `qemu-img check`.
@Suite struct CheckCommandTests {
    enum State: String, CaseIterable {
        case clean, leaky, corrupt, compressed, snapshots, bitmaps, empty, extended, version2,
            dataFile
    }

    private func make(_ state: State, _ place: Workplace) throws {
        let options: String? =
            switch state {
            case .extended: "extended_l2=on"
            case .version2: "compat=0.10"
            case .dataFile: "data_file=a.data"
            default: nil
            }
        if state == .compressed {
            try place.tool("qemu-img", "create", "-q", "a.raw", "3M")
            try place.tool("qemu-io", "-f", "raw", "-c", "write -P 3 0 2M", "a.raw")
            try place.tool("qemu-img", "convert", "-c", "-O", "qcow2", "a.raw", "a.qcow2")
        } else {
            _ = try place.run(
                "/usr/bin/env",
                ["qemu-img", "create", "-q", "-f", "qcow2"] + (options.map { ["-o", $0] } ?? [])
                    + ["a.qcow2", "10M"])
        }
        if state == .empty { return }
        try place.tool("qemu-io", "-c", "write 0 1M", "-c", "write 1024k 100k", "a.qcow2")
        if state == .snapshots {
            try place.tool("qemu-img", "snapshot", "-c", "one", "a.qcow2")
            try place.tool("qemu-io", "-c", "write 64k 130k", "a.qcow2")
        }
        if state == .bitmaps { try place.tool("qemu-img", "bitmap", "--add", "a.qcow2", "b") }
        if state == .leaky || state == .corrupt {
            let file = try #require(FileHandle(forUpdatingAtPath: "\(place.folder)/a.qcow2"))
            // The count of a cluster past the last one; that of one in use.
            try file.seek(toOffset: 0x20000 + (state == .leaky ? 60 : 12))
            try file.write(contentsOf: Data([0, 2]))
            try file.truncate(atOffset: 64 << 16)
            try file.close()
        }
    }

    @Test(arguments: State.allCases, ["human", "json"])
    func checkSaysWhatQemuImgSays(_ state: State, _ output: String) throws {
        let place = try Workplace()
        try make(state, place)
        let own = try place.merino("check", "--output", output, "a.qcow2")
        let other = try place.tool("qemu-img", "check", "--output", output, "a.qcow2")
        #expect(own.output == other.output, "\(own.errors)")
        #expect(own.status == other.status)
        #expect(own.status == (state == .leaky ? 3 : state == .corrupt ? 2 : 0))
    }

    @Test(arguments: [State.leaky, .corrupt], ["leaks", "all"])
    func repairSaysWhatQemuImgSays(_ state: State, _ repair: String) throws {
        for output in ["human", "json"] {
            let (ours, theirs) = (try Workplace(), try Workplace())
            try make(state, ours)
            try make(state, theirs)
            let own = try ours.merino("check", "-r", repair, "--output", output, "a.qcow2")
            let other = try theirs.tool(
                "qemu-img", "check", "-r", repair, "--output", output, "a.qcow2")
            #expect(own.output == other.output, "\(own.errors)")
            #expect(own.status == other.status)
        }
    }

    /// What can go wrong at several places at once.
    private enum Fault: CaseIterable {
        case refcount, refcountZero, copied, copiedTable, twice, dropped, unaligned, reserved
        case droppedTable, metadata, truncated
    }

    /// Big-endian words of an image of 4 KiB clusters.
    private struct Words {
        var bytes: [UInt8]

        func word(_ offset: Int, _ count: Int = 8) -> UInt64 {
            bytes[offset..<(offset + count)].reduce(0) { $0 << 8 | UInt64($1) }
        }

        mutating func put(_ value: UInt64, at offset: Int, _ count: Int = 8) {
            for index in 0..<count {
                bytes[offset + index] =
                    UInt8(truncatingIfNeeded: value >> UInt64(8 * (count - 1 - index)))
            }
        }

        mutating func make(_ fault: Fault, _ random: inout SeededRandom) {
            let clusters = bytes.count / 4096
            let (l1, l1Count) = (Int(word(40)), Int(word(36, 4)))
            let block = Int(word(Int(word(48))))
            let slot = l1 + 8 * random.below(l1Count)
            let table = Int(word(slot) & 0xff_ffff_ffff_fe00)
            let refcount = block + 2 * (1 + random.below(clusters - 1))
            let used = (0..<512).filter { table != 0 && word(table + 8 * $0) > 1 }
            func entry(_ random: inout SeededRandom) -> Int? {
                used.isEmpty ? nil : table + 8 * used[random.below(used.count)]
            }
            switch fault {
            case .refcount: put(UInt64(1 + random.below(3)), at: refcount, 2)
            case .refcountZero: put(0, at: refcount, 2)
            case .copiedTable: if table != 0 { put(word(slot) ^ 1 << 63, at: slot) }
            case .droppedTable: put(0, at: slot)
            case .truncated: bytes.removeLast(4096 * (1 + random.below(3)))
            default:
                guard let place = entry(&random), let other = entry(&random) else { return }
                switch fault {
                case .copied: put(word(place) ^ 1 << 63, at: place)
                case .twice: put(word(other), at: place)
                case .dropped: put(0, at: place)
                case .unaligned: put(word(place) | 0x200, at: place)
                case .reserved: put(word(place) | 1 << 57, at: place)
                default:
                    put(1 << 63 | [4096, UInt64(l1), UInt64(block)][random.below(3)], at: place)
                }
            }
        }
    }

    /// Without those whose entries reach past the end of the file: docs/commands/check.md tells the
    /// difference.
    private static let faultSeeds = (UInt64(0)..<40).filter { ![3, 21].contains($0) }

    @Test(arguments: faultSeeds)
    func imagesWithSeveralFaultsAreCountedAsByQemuImg(seed: UInt64) throws {
        let place = try Workplace()
        try place.tool(
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", "a.qcow2", "8M")
        try place.tool(
            "qemu-io", "-f", "qcow2", "-c", "write 0 256k", "-c", "write 600k 100k", "-c",
            "write -z 1M 64k", "-c", "write 3M 50k", "-c", "write 5M 30k", "a.qcow2")
        var random = SeededRandom(seed: seed)
        let url = URL(fileURLWithPath: place.folder + "/a.qcow2")
        var image = Words(bytes: [UInt8](try Data(contentsOf: url)))
        let faults = (0..<(2 + random.below(4))).map { _ in
            Fault.allCases[random.below(Fault.allCases.count)]
        }
        for fault in faults { image.make(fault, &random) }
        try Data(image.bytes).write(to: url)
        let own = try place.merino("check", "-f", "qcow2", "--output", "json", "a.qcow2")
        let other = try place.tool(
            "qemu-img", "check", "-f", "qcow2", "--output", "json", "a.qcow2")
        #expect(own.output == other.output, "seed \(seed), \(faults): \(own.errors)\(other.errors)")
        #expect(own.status == other.status, "seed \(seed), \(faults)")
    }

    @Test func repairingLeaksSetsFlagsRightThatAreWrongAlone() throws {
        for program in [["qemu-img"], [Workplace.merino]] {
            let place = try Workplace()
            try make(.leaky, place)
            let url = URL(fileURLWithPath: place.folder + "/a.qcow2")
            var image = Words(bytes: [UInt8](try Data(contentsOf: url)))
            let slot = Int(image.word(40))
            image.put(image.word(slot) ^ 1 << 63, at: slot)
            try Data(image.bytes).write(to: url)
            let result = try place.run(
                "/usr/bin/env",
                program + ["check", "-r", "leaks", "--output", "json", "-f", "qcow2", "a.qcow2"])
            #expect(result.status == 0, "\(program)")
            #expect(result.output.contains("\"corruptions-fixed\": 1"), "\(result.output)")
        }
    }

    @Test func quietSaysNothingAndStillRepairs() throws {
        let place = try Workplace()
        try make(.leaky, place)
        let result = try place.merino("check", "-q", "-r", "all", "a.qcow2")
        #expect(result.status == 0 && result.output.isEmpty)
        #expect(try place.tool("qemu-img", "check", "a.qcow2").status == 0)
    }

    @Test func formatsWithNothingToCheckEndWith63() throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "a.raw", "1M")
        let result = try place.merino("check", "a.raw")
        #expect(result.status == 63 && result.output.isEmpty)
        #expect(result.errors.hasPrefix("merino: "))
    }

    /// Over the header, and past the end of the file.
    @Test(arguments: [UInt64(0), 1 << 32])
    func snapshotsThatCannotBeReadAreDroppedByARepairOfErrorsAloneThatSaysSo(table: UInt64) throws {
        let place = try Workplace()
        try make(.snapshots, place)
        try place.tool("qemu-img", "convert", "-O", "raw", "a.qcow2", "want")
        let path = "\(place.folder)/a.qcow2"
        let file = try #require(FileHandle(forUpdatingAtPath: path))
        try file.seek(toOffset: 64)
        try file.write(contentsOf: withUnsafeBytes(of: table.bigEndian) { Data($0) })
        try file.close()
        let damaged = try Data(contentsOf: URL(fileURLWithPath: path))

        for arguments in [[], ["-r", "leaks"]] {
            let result = try place.run(Workplace.merino, ["check"] + arguments + ["a.qcow2"])
            #expect(result.status == 2)
            #expect(result.errors.contains(": 1 snapshot cannot be read"), "\(result.errors)")
            #expect(!result.errors.contains("Repairing"), "\(result.errors)")
            // What the snapshot has is still there, for whoever puts the header right.
            #expect(try Data(contentsOf: URL(fileURLWithPath: path)) == damaged)
        }
        let result = try place.merino("check", "-r", "all", "a.qcow2")
        #expect(result.status == 0)
        #expect(result.errors.contains(": 1 snapshot dropped"), "\(result.errors)")
        #expect(try place.tool("qemu-img", "check", "a.qcow2").status == 0)
        #expect(try place.tool("qemu-img", "compare", "a.qcow2", "want").status == 0)
    }

    enum SnapshotDamage: CaseIterable { case emptyTable, tablePastEnd, entryPastEnd, tooShort }

    /// Neither a repair of leaks nor opening an image that was not closed cleanly gives it back.
    @Test(arguments: SnapshotDamage.allCases, [false, true])
    func whatASnapshotHasThatCannotBeReadStays(damage: SnapshotDamage, isOpening: Bool) throws {
        let place = try Workplace()
        let made = try place.tool(
            "sh", "-ec",
            """
            qemu-img create -q -f qcow2 a.qcow2 1M
            qemu-io -f qcow2 -c 'write -P 1 0 192k' a.qcow2
            qemu-img snapshot -c s a.qcow2
            qemu-io -f qcow2 -c 'write -P 2 0 192k' a.qcow2
            qemu-img convert -l s -O raw a.qcow2 want
            """)
        #expect(made.status == 0, "\(made.errors)")
        let path = "\(place.folder)/a.qcow2"
        let sound = try Data(contentsOf: URL(fileURLWithPath: path))
        func number(at offset: Int) -> Int {
            sound[offset..<(offset + 8)].reduce(0) { $0 << 8 | Int($1) }
        }
        func write(_ bytes: Data, at offset: Int) throws {
            let file = try #require(FileHandle(forUpdatingAtPath: path))
            try file.seek(toOffset: UInt64(offset))
            try file.write(contentsOf: bytes)
            try file.close()
        }
        let table = number(at: 64)
        let wrong = withUnsafeBytes(of: UInt64(1 << 40).bigEndian) { Data($0) }
        let (offset, bytes): (Int, Data) =
            switch damage {
            case .emptyTable: (64, withUnsafeBytes(of: UInt64(sound.count).bigEndian) { Data($0) })
            case .tablePastEnd: (table, wrong)
            case .entryPastEnd: (number(at: table), wrong)
            case .tooShort: (table + 8, Data(count: 4))
            }
        // A cluster of zeroes.
        try write(Data(count: 65536), at: sound.count)
        try write(bytes, at: offset)
        if isOpening {
            try write(Data([sound[79] | 1]), at: 79)
            let result = try place.merino(
                "io", "-f", "qcow2", "-c", "write -P 3 512k 512", "a.qcow2")
            #expect(
                result.status == 1 && result.errors.contains("check -r all"), "\(result.errors)")
        } else {
            _ = try place.merino("check", "-r", "leaks", "a.qcow2")
        }
        // Whoever puts it right has the snapshot again.
        try write(sound[offset..<(offset + bytes.count)], at: offset)
        try write(sound[79..<80], at: 79)
        let check = try place.tool("qemu-img", "check", "a.qcow2")
        #expect(check.status == 0, "\(check.output)\(check.errors)")
        try place.tool("qemu-img", "convert", "-l", "s", "-O", "raw", "a.qcow2", "found")
        #expect(try place.tool("cmp", "want", "found").status == 0)
    }

    @Test func whatCannotBeOpenedEndsWith1() throws {
        let place = try Workplace()
        #expect(try place.merino("check", "none").status == 1)
        #expect(try place.merino("check", "-r", "some", "none").status == 1)
        try make(.clean, place)
        #expect(try place.merino("check", "-U", "-r", "all", "a.qcow2").status == 1)
    }
}
