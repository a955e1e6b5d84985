import BlockTesting
import Foundation
import Testing

/// Images made by either tool, worked on by both, pass the other's check, compare and info: over creation
/// options, operations and random requests that follow from a seed.
@Suite struct ImageMatrixTests {
    /// More on demand: `MERINO_SIMULATION_SEEDS=1000`.
    private static let seeds: Range<UInt64> = {
        let text = ProcessInfo.processInfo.environment["MERINO_SIMULATION_SEEDS"]
        return 0..<(text.flatMap(UInt64.init) ?? 6)
    }()

    /// One image under test, and a raw one that has what it is to read as.
    private final class Trial {
        let place: Workplace
        let seed: UInt64
        var random: SeededRandom
        var size: Int
        var steps: [String] = []
        let image = "disk.qcow2"
        let model = "model.raw"

        init(_ seed: UInt64) throws {
            self.seed = seed
            place = try Workplace()
            random = SeededRandom(seed: seed)
            size = (1 + random.below(24)) * 512 * 1024
        }

        /// Runs a command with one of the two tools.
        func run(_ tool: (ours: String, theirs: String), _ arguments: [String]) throws {
            let isOurs = random.chance(600)
            steps.append((isOurs ? "merino " : "qemu ") + arguments.joined(separator: " "))
            let result =
                isOurs
                ? try place.run(
                    Workplace.merino, (tool.ours.isEmpty ? [] : [tool.ours]) + arguments)
                : try place.run("/usr/bin/env", [tool.theirs] + arguments)
            #expect(result.status == 0, "\(story)\n\(result.output)\(result.errors)")
        }

        var story: String { "seed \(seed): " + steps.joined(separator: "; ") }

        func pick<T>(_ values: [T]) -> T { values[random.below(values.count)] }

        // MARK: Steps

        func create(_ name: String, backing: String? = nil) throws {
            let version2 = random.chance(200)
            let cluster = pick([512, 4096, 65536, 65536, 1 << 20, 2 << 20])
            var options = ["cluster_size=\(cluster)"]
            if version2 {
                options.append("compat=0.10")
            } else {
                options.append("refcount_bits=\(pick([1, 8, 16, 16, 64]))")
                if random.chance(300) { options.append("lazy_refcounts=on") }
                if random.chance(300) { options.append("compression_type=zstd") }
                if cluster >= 65536, random.chance(300) { options.append("extended_l2=on") }
            }
            if backing == nil, random.chance(250) {
                options.append("preallocation=\(pick(["metadata", "falloc", "full"]))")
            }
            var arguments = ["create", "-q", "-f", "qcow2", "-o", options.joined(separator: ",")]
            if let backing {
                arguments += ["-b", backing, "-F", backing == "base.raw" ? "raw" : "qcow2"]
            }
            try run(("", "qemu-img"), arguments + [name, String(size)])
        }

        /// Random requests, to the image by one tool and to the model by another.
        func requests(on name: String, _ format: String, mirrored: Bool = true) throws {
            var words: [String] = []
            for _ in 0..<(1 + random.below(8)) {
                let offset = random.below(size)
                let count = min(size - offset, 1 + random.below(pick([600, 70_000, 700_000])))
                let kind = pick(["write -P \(random.below(256))", "write -z", "write -zu"])
                words += ["-c", "\(kind) \(offset) \(count)"]
            }
            try run(("io", "qemu-io"), ["-f", format] + words + [name])
            guard mirrored else { return }
            let result = try place.run("/usr/bin/env", ["qemu-io", "-f", "raw"] + words + [model])
            #expect(result.status == 0, "\(story): \(result.output)\(result.errors)")
        }

        func begin() throws {
            try place.tool("qemu-img", "create", "-q", "-f", "raw", model, String(size))
            guard random.chance(500) else { return try create(image) }
            if random.chance(500) {
                try place.tool("qemu-img", "create", "-q", "-f", "raw", "base.raw", String(size))
                try requests(on: "base.raw", "raw")
                try create(image, backing: "base.raw")
            } else {
                try create("base.qcow2")
                try requests(on: "base.qcow2", "qcow2")
                try create(image, backing: "base.qcow2")
            }
        }

        func step() throws {
            let hasBacking = try info("qemu-img")["backing-filename"] != nil
            switch random.below(hasBacking ? 7 : 5) {
            case 0, 1:
                try requests(on: image, "qcow2")
            case 2:
                size += (1 + random.below(8)) * 256 * 1024
                try run(("", "qemu-img"), ["resize", "-q", "-f", "qcow2", image, String(size)])
                try place.tool("qemu-img", "resize", "-q", "-f", "raw", model, String(size))
            case 3:
                try convert()
            case 4:
                size = max(512, (size / 2) & ~511)
                try run(
                    ("", "qemu-img"),
                    ["resize", "-q", "--shrink", "-f", "qcow2", image, String(size)])
                try place.tool(
                    "qemu-img", "resize", "-q", "--shrink", "-f", "raw", model, String(size))
            case 5:
                try run(("", "qemu-img"), ["commit", "-q", "-f", "qcow2", image])
            default:
                try run(("", "qemu-img"), ["rebase", "-q", "-f", "qcow2", "-b", "", image])
            }
        }

        private func convert() throws {
            var arguments = ["convert", "-q", "-f", "qcow2", "-O", "qcow2"]
            if random.chance(400) { arguments.append("-c") }
            if random.chance(300) { arguments += ["-S", pick(["0", "512", "64k"])] }
            if random.chance(300) { arguments += ["-m", "\(1 + random.below(16))", "-W"] }
            arguments += ["-o", "cluster_size=\(pick([4096, 65536, 1 << 20]))"]
            try run(("", "qemu-img"), arguments + [image, "next.qcow2"])
            try place.tool("mv", "next.qcow2", image)
        }

        // MARK: Checks

        func info(_ program: String) throws -> [String: Any] {
            let arguments = ["info", "-f", "qcow2", "--output", "json", image]
            let result =
                program == "merino"
                ? try place.run(Workplace.merino, arguments)
                : try place.run("/usr/bin/env", [program] + arguments)
            let value = try JSONSerialization.jsonObject(with: Data(result.output.utf8))
            var object = value as? [String: Any] ?? [:]
            // Takes delayed allocation's time to be the same.
            object["actual-size"] = nil
            return object
        }

        func check() throws {
            for program in [["/usr/bin/env", "qemu-img"], [Workplace.merino]] {
                let damage = try place.run(
                    program[0],
                    Array(program.dropFirst()) + ["check", "-q", "-f", "qcow2", image])
                #expect(damage.status == 0, "\(story)\n\(damage.output)\(damage.errors)")
            }
            let contents = ["compare", "-f", "raw", "-F", "qcow2", model, image]
            for result in [
                try place.run("/usr/bin/env", ["qemu-img"] + contents),
                try place.run(Workplace.merino, contents),
            ] {
                #expect(
                    result.status == 0 && result.output == "Images are identical.\n",
                    "\(story)\n\(result.output)\(result.errors)")
            }
            let (ours, theirs) = (try text(of: info("merino")), try text(of: info("qemu-img")))
            #expect(ours == theirs, "\(story)")
        }

        private func text(of object: [String: Any]) throws -> String {
            let data = try JSONSerialization.data(withJSONObject: object, options: .sortedKeys)
            return String(decoding: data, as: UTF8.self)
        }
    }

    @Test("either tool's images pass the other's check, compare and info", arguments: seeds)
    func images(_ seed: UInt64) throws {
        let trial = try Trial(seed)
        try trial.begin()
        try trial.check()
        for _ in 0..<6 {
            try trial.step()
            try trial.check()
        }
    }
}
