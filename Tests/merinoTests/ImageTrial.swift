import BlockTesting
import Foundation
import Testing

/// One image under test, and a raw one that has what it is to read as.
///
/// Invariants: the image named `disk.qcow2` reads as `model.raw`; its snapshot NAME as `NAME.raw`.
final class ImageTrial {
    let place: Workplace
    let seed: UInt64
    var random: SeededRandom
    var layout: ImageLayout
    var size: Int
    var steps: [String] = []
    var snapshots: [(name: String, size: Int)] = []
    var bitmapCount = 0
    private var bitmaps: Set<String> = []
    private let image = "disk.qcow2"
    private let model = "model.raw"

    init(_ seed: UInt64, number: Int?) throws {
        self.seed = seed
        place = try Workplace()
        var random = SeededRandom(seed: seed)
        let chosen = random.below(ImageLayout.count)
        layout = ImageLayout(number: number ?? chosen)
        size = (1 + random.below(24)) * 512 * 1024
        self.random = random
    }

    // MARK: Running

    /// Runs a command of the image tool, or of the exerciser, with one of the two programs.
    func run(_ arguments: [String], exerciser: Bool = false, ours: Bool? = nil) throws {
        let isOurs = ours ?? random.chance(600)
        steps.append((isOurs ? "merino " : "qemu ") + arguments.joined(separator: " "))
        let result = try call(arguments, exerciser: exerciser, ours: isOurs)
        #expect(result.status == 0, "\(story)\n\(result.output)\(result.errors)")
    }

    private func call(
        _ arguments: [String], exerciser: Bool = false, ours: Bool
    ) throws -> ProgramResult {
        ours
            ? try place.run(Workplace.merino, (exerciser ? ["io"] : []) + arguments)
            : try place.run(
                "/usr/bin/env", [exerciser ? "qemu-io" : "qemu-img"] + arguments)
    }

    var story: String { "seed \(seed), \(layout): " + steps.joined(separator: "; ") }

    func pick<T>(_ values: [T]) -> T { values[random.below(values.count)] }

    private static let key = ["--object", "secret,id=key,data=correct horse"]

    /// How a command names the image: its format, or options with the key.
    private var opening: (options: [String], name: String) {
        if layout.encryption == .none { return (["-f", "qcow2"], image) }
        return (
            Self.key + ["--image-opts"],
            "driver=qcow2,file.filename=\(image),encrypt.key-secret=key"
        )
    }

    // MARK: Creation

    func begin() throws {
        try place.tool("qemu-img", "create", "-q", "-f", "raw", model, String(size))
        guard layout.hasBacking else { return try create() }
        if random.chance(500) {
            try place.tool("qemu-img", "create", "-q", "-f", "raw", "base.raw", String(size))
            try write(to: ["-f", "raw"], "base.raw")
            try create(["-b", "base.raw", "-F", "raw"])
        } else {
            try run(["create", "-q", "-f", "qcow2", "base.qcow2", String(size)])
            try write(to: ["-f", "qcow2"], "base.qcow2")
            try create(["-b", "base.qcow2", "-F", "qcow2"])
        }
    }

    private func create(_ backing: [String] = []) throws {
        var options = layout.options
        switch layout.dataFile {
        case .none: break
        case .plain: options += ",data_file=disk.data"
        case .raw: options += ",data_file=disk.data,data_file_raw=on"
        }
        let key = layout.encryption == .none ? [] : Self.key
        // Merino reads the old encryption and does not make it.
        try run(
            ["create", "-q", "-f", "qcow2", "-o", options] + key + backing + [image, String(size)],
            ours: layout.encryption == .aes ? false : nil)
    }

    /// Random requests, to an image by one tool and to the model by QEMU's.
    private func write(to opening: [String], _ name: String) throws {
        var words: [String] = []
        for _ in 0..<(1 + random.below(8)) {
            let offset = random.below(size)
            let count = min(size - offset, 1 + random.below(pick([600, 70_000, 700_000])))
            let kind = pick(["write -P \(random.below(256))", "write -z", "write -zu"])
            words += ["-c", "\(kind) \(offset) \(count)"]
        }
        try run(opening + words + [name], exerciser: true)
        let result = try place.run("/usr/bin/env", ["qemu-io", "-f", "raw"] + words + [model])
        #expect(result.status == 0, "\(story): \(result.output)\(result.errors)")
    }

    // MARK: Steps

    func step() throws {
        let hasBacking = try info(ours: false)["backing-filename"] != nil
        switch random.below(13) {
        case 0, 1, 2: try write(to: opening.options, opening.name)
        case 3: try resize()
        case 4: try convert()
        case 5: try takeSnapshot()
        case 6: try applySnapshot()
        case 7: try deleteSnapshot()
        case 8: try changeBitmaps()
        case 9: try amend()
        case 10: try repair()
        case 11: try compact()
        default: try leaveBacking(hasBacking)
        }
    }

    /// What else hangs on the size stays away: formats and tools differ in what they allow then.
    private var mayResize: Bool { snapshots.isEmpty && bitmaps.isEmpty }

    private func resize() throws {
        guard mayResize, layout.dataFile != .raw else { return }
        let grows = random.chance(500)
        size = grows ? size + (1 + random.below(8)) * 256 * 1024 : max(512, (size / 2) & ~511)
        let shrink = grows ? [] : ["--shrink"]
        try run(["resize", "-q"] + shrink + opening.options + [opening.name, String(size)])
        _ = try place.run(
            "/usr/bin/env",
            ["qemu-img", "resize", "-q", "-f", "raw"] + shrink + [model, String(size)])
    }

    private func convert() throws {
        var arguments = ["convert", "-q"] + opening.options + ["-O", "qcow2"]
        if random.chance(400) { arguments.append("-c") }
        if random.chance(300) { arguments += ["-S", pick(["0", "512", "64k"])] }
        if random.chance(300) { arguments += ["-m", "\(1 + random.below(16))", "-W"] }
        arguments += ["-o", "cluster_size=\(pick([4096, 65536, 1 << 20]))"]
        try run(arguments + [opening.name, "next.qcow2"])
        try place.tool("mv", "next.qcow2", image)
        layout = ImageLayout(number: 2)
        (snapshots, bitmaps) = ([], [])
    }

    private func takeSnapshot() throws {
        guard layout.dataFile == .none, layout.refcountBits > 1, snapshots.count < 3 else { return }
        let name = "s\(steps.count)"
        try snapshot("-c", name)
        try place.tool("cp", model, "\(name).raw")
        snapshots.append((name, size))
    }

    private func snapshot(_ action: String, _ name: String) throws {
        // The snapshot command takes no format.
        let options = layout.encryption == .none ? [] : opening.options
        try run(["snapshot", "-q"] + options + [action, name, opening.name])
    }

    private func applySnapshot() throws {
        guard bitmaps.isEmpty, let chosen = snapshots.last else { return }
        try snapshot("-a", chosen.name)
        size = chosen.size
        try place.tool("cp", "\(chosen.name).raw", model)
    }

    private func deleteSnapshot() throws {
        guard !snapshots.isEmpty else { return }
        try snapshot("-d", snapshots.remove(at: random.below(snapshots.count)).name)
    }

    private func changeBitmaps() throws {
        guard !layout.isVersion2 else { return }
        let options = opening.options
        if let name = bitmaps.first, random.chance(500) {
            let action = pick(["--remove", "--clear", "--disable", "--enable"])
            try run(["bitmap", action] + options + [opening.name, name])
            if action == "--remove" { bitmaps.remove(name) }
        } else {
            bitmapCount += 1
            let name = "b\(bitmapCount)"
            try run(
                ["bitmap", "--add", "-g", pick(["512", "64k", "1M"])] + options
                    + [opening.name, name])
            bitmaps.insert(name)
        }
    }

    private func amend() throws {
        guard !layout.isVersion2 else { return }
        let option = "lazy_refcounts=\(pick(["on", "off"]))"
        try run(["amend", "-q", "-o", option] + opening.options + [opening.name])
    }

    private func repair() throws {
        // QEMU's repair of this version forgets snapshots.
        try run(
            ["check", "-q", "-r", pick(["leaks", "all"])] + opening.options + [opening.name],
            ours: snapshots.isEmpty ? nil : true)
    }

    private func compact() throws {
        let compress = random.chance(300) ? ["-c"] : []
        try run(["compact", "-q"] + compress + opening.options + [opening.name], ours: true)
    }

    private func leaveBacking(_ hasBacking: Bool) throws {
        guard hasBacking, mayResize else { return }
        if random.chance(500) {
            try run(["commit", "-q"] + opening.options + [opening.name])
        } else {
            try run(["rebase", "-q"] + opening.options + ["-b", "", opening.name])
        }
    }

    // MARK: Checks

    private func info(ours: Bool) throws -> [String: Any] {
        let arguments = ["info"] + opening.options + ["--output", "json", opening.name]
        let result = try call(arguments, ours: ours)
        let value = try JSONSerialization.jsonObject(with: Data(result.output.utf8))
        var object = value as? [String: Any] ?? [:]
        // Takes delayed allocation's time to be the same.
        object["actual-size"] = nil
        // What was opened with options is called by them, or by its file.
        if layout.encryption != .none { object["filename"] = nil }
        return object
    }

    func check() throws {
        for ours in [false, true] {
            let arguments = ["check", "--output", "json"] + opening.options + [opening.name]
            let damage = try call(arguments, ours: ours)
            #expect(damage.status == 0, "\(story)\n\(damage.output)\(damage.errors)")
            try compare(model, [], ours: ours)
        }
        // Snapshots are looked at by one of the two.
        for snapshot in snapshots {
            try compare("\(snapshot.name).raw", [snapshot.name], ours: random.chance(500))
        }
        let (ours, theirs) = (try text(of: info(ours: true)), try text(of: info(ours: false)))
        #expect(ours == theirs, "\(story)")
        try checkMaps()
    }

    /// Compares the image, or a snapshot of it by way of a copy, with a raw one.
    private func compare(_ raw: String, _ snapshot: [String], ours: Bool) throws {
        var words = ["compare"]
        if snapshot.isEmpty {
            words += layout.encryption == .none ? [] : Self.key
            let image =
                layout.encryption == .none
                ? "driver=qcow2,file.filename=\(image)" : opening.name
            words += ["--image-opts", "driver=raw,file.filename=\(raw)", image]
        } else {
            let copy = try call(
                ["convert", "-q", "-l"] + snapshot + opening.options
                    + ["-O", "raw", opening.name, "copy.raw"], ours: ours)
            #expect(copy.status == 0, "\(story)\n\(copy.errors)")
            words += ["-f", "raw", "-F", "raw", raw, "copy.raw"]
        }
        let result = try call(words, ours: ours)
        #expect(
            result.status == 0 && result.output == "Images are identical.\n",
            "\(story)\n\(result.output)\(result.errors)")
    }

    private func checkMaps() throws {
        let arguments = ["map", "--output", "json"] + opening.options + [opening.name]
        let theirs = try call(arguments, ours: false).output
        let ours = try call(arguments, ours: true).output
        #expect(ours == theirs, "\(story)")
    }

    private func text(of object: [String: Any]) throws -> String {
        let data = try JSONSerialization.data(withJSONObject: object, options: .sortedKeys)
        return String(decoding: data, as: UTF8.self)
    }
}
