import BlockTesting
import Foundation
import Testing

/// Damaged images through the commands: none crashes, hangs or takes more memory than it may, and what a
/// repair calls clean is clean for `qemu-img check` too.
///
/// `scripts/fuzz` goes through more seeds.
@Suite struct HostileImageFuzzTests {
    private static let seeds: Range<UInt64> = {
        let text = ProcessInfo.processInfo.environment["MERINO_SIMULATION_SEEDS"]
        return 0..<(text.flatMap(UInt64.init) ?? 24)
    }()

    /// Where the header's fields are, and their bytes: the qcow2 specification, "Header".
    private static let headerFields = [
        (0, 4), (4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8),
        (56, 4), (60, 4), (64, 8), (72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 8),
        (112, 4), (116, 4), (120, 8),
    ]
    /// The same of LUKS version 1, its "phdr" and the first key slot.
    private static let luksFields = [
        (0, 4), (6, 2), (8, 4), (40, 4), (72, 4), (104, 4), (108, 4), (164, 4), (208, 4), (212, 4),
        (248, 4), (252, 4), (256, 4),
    ]

    private static let commands = [
        ["info"], ["inspect"], ["snapshot", "-l"], ["check"], ["map", "--output=json"],
        ["measure", "-O", "qcow2"], ["check", "-r", "leaks"], ["check", "-r", "all"],
    ]

    /// Makes `disk.qcow2`, with a snapshot, a bitmap, zero and compressed clusters, and `disk.luks`.
    private static func makeImages(_ place: Workplace) throws {
        let script = """
            set -e
            qemu-img create -q -f raw model.raw 6M
            qemu-io -f raw -c 'write -P 1 0 256k' -c 'write -P 2 600k 100k' \\
            -c 'write -P 3 3500k 8k' model.raw
            qemu-img convert -c -O qcow2 -o cluster_size=4096 model.raw disk.qcow2
            qemu-io -f qcow2 -c 'write -P 4 1M 200k' -c 'write -z 2M 64k' disk.qcow2
            qemu-img snapshot -c s1 disk.qcow2
            qemu-io -f qcow2 -c 'write -P 5 1M 30k' disk.qcow2
            qemu-img bitmap --add -g 4k disk.qcow2 b0
            """
        try EncryptedImage.luks.write("disk.luks", in: place)
        let made = try place.run("/bin/sh", ["-c", script])
        #expect(made.status == 0, "\(made.errors)")
    }

    @Test(arguments: seeds)
    func commandsEndWithAnErrorAtWorst(seed: UInt64) throws {
        let place = try Workplace()
        try Self.makeImages(place)
        var random = SeededRandom(seed: seed)
        let isLUKS = random.chance(150)
        let format = isLUKS ? "luks" : "qcow2"
        let path = place.folder + "/disk." + format
        var bytes = [UInt8](try Data(contentsOf: URL(fileURLWithPath: path)))
        let story =
            "seed \(seed), \(format): "
            + Self.damage(&bytes, isLUKS ? Self.luksFields : Self.headerFields, &random)
        for command in Self.commands {
            try Data(bytes).write(to: URL(fileURLWithPath: path))
            let takesFormat = !["inspect", "snapshot"].contains(command[0])
            let words = command + (takesFormat ? ["-f", format] : []) + ["disk." + format]
            let result = try Self.runConfined(words, place)
            // A signal's number, or `timeout`'s 124, is more than any exit code of a command.
            #expect(
                [0, 1, 2, 3, 63].contains(result.status),
                "\(story), \(words): \(result.status) \(result.errors.suffix(500))")
            guard command == ["check", "-r", "all"], result.status == 0 else { continue }
            let other = try place.tool("qemu-img", "check", "-f", format, "disk." + format)
            #expect(other.status == 0, "\(story): \(other.output)\(other.errors)")
        }
    }

    /// With memory for a few hundred megabytes and half a minute of processor time.
    private static func runConfined(
        _ words: [String], _ place: Workplace
    ) throws -> ProgramResult {
        try place.run(
            "/bin/sh",
            ["-c", "ulimit -v 2000000 -t 30; exec \"$@\"", "sh", Workplace.merino] + words)
    }

    private static func damage(
        _ bytes: inout [UInt8], _ fields: [(offset: Int, count: Int)],
        _ random: inout SeededRandom
    ) -> String {
        switch random.below(3) {
        case 0:
            let field = fields[random.below(fields.count)]
            let most = field.count == 8 ? UInt64.max : (1 << UInt64(8 * field.count)) - 1
            let values: [UInt64] = [
                0, 1, 2, most, most - 1, most >> 1, most >> 1 + 1, UInt64(bytes.count),
                UInt64(bytes.count - 1), 4097, 1 << 28,
            ]
            let value = values[random.below(values.count)] & most
            for index in 0..<field.count {
                bytes[field.offset + index] =
                    UInt8(truncatingIfNeeded: value >> UInt64(8 * (field.count - 1 - index)))
            }
            return "field at \(field.offset) is \(value)"
        case 1:
            return flip(&bytes, in: 0..<min(bytes.count, 8 * 4096), 1 + random.below(6), &random)
        default:
            return flip(&bytes, in: 0..<bytes.count, 1 + random.below(40), &random)
        }
    }

    private static func flip(
        _ bytes: inout [UInt8], in range: Range<Int>, _ count: Int, _ random: inout SeededRandom
    ) -> String {
        var places: [Int] = []
        for _ in 0..<count {
            let place = range.lowerBound + random.below(range.count)
            bytes[place] ^= 1 << UInt8(random.below(8))
            places.append(place)
        }
        return "bits flipped in bytes \(places)"
    }
}
