import Foundation
import Testing

/// Other sizes for qcow2 images: what the new part reads as, and which sizes there are.
@Suite struct ResizeCommandTests {
    /// Runs qemu-io on an image; a pattern that is not found fails.
    private func io(_ place: Workplace, _ name: String, _ commands: String...) throws {
        let result = try place.run(
            "/usr/bin/env", ["qemu-io", "-f", "qcow2"] + commands.flatMap { ["-c", $0] } + [name])
        #expect(result.status == 0, "\(result.errors)")
        #expect(!result.output.contains("failed"), "\(commands): \(result.output)")
    }

    private func create(_ place: Workplace, _ arguments: String...) throws {
        let result = try place.run(
            "/usr/bin/env", ["qemu-img", "create", "-q", "-f", "qcow2"] + arguments)
        #expect(result.status == 0, "\(result.errors)")
    }

    @Test(
        "an overlay that grows does not show what its backing image has there",
        arguments: ["compat=1.1", "compat=0.10", "extended_l2=on", "cluster_size=512"])
    func grownOverlaysAreZeroes(options: String) throws {
        let place = try Workplace()
        try create(place, "base.qcow2", "4M")
        try io(place, "base.qcow2", "write -P 1 0 4M")
        // The old end is inside a cluster, which no L2 table maps.
        try create(place, "-b", "base.qcow2", "-F", "qcow2", "-o", options, "a.qcow2", "1049088")
        let result = try place.merino("resize", "a.qcow2", "3M")
        #expect(result.status == 0, "\(result.errors)")
        try io(place, "a.qcow2", "read -P 1 0 1049088", "read -P 0 1049088 2096640")
        #expect(try place.tool("qemu-img", "check", "a.qcow2").status == 0)
    }

    @Test("a data file grows from an end inside an allocated cluster")
    func dataFilesGrowFromWithinACluster() throws {
        let place = try Workplace()
        try create(place, "-o", "data_file=d.raw", "a.qcow2", "1000448")
        try io(place, "a.qcow2", "write -P 1 0 1000448")
        let result = try place.merino("resize", "a.qcow2", "3M")
        #expect(result.status == 0, "\(result.errors)")
        try io(place, "a.qcow2", "read -P 1 0 1000448", "read -P 0 1000448 2145280")
        #expect(try place.tool("qemu-img", "check", "a.qcow2").status == 0)
    }

    @Test(
        "a data file grows with its space reserved, and shrinks with the disk",
        arguments: ["off", "on"], ["off", "metadata", "falloc", "full"])
    func dataFilesFollowTheDisk(raw: String, preallocation: String) throws {
        let place = try Workplace()
        for name in ["ours", "theirs"] {
            try create(
                place, "-o", "data_file=\(name).raw,data_file_raw=\(raw)", "\(name).qcow2", "4M")
            try io(place, "\(name).qcow2", "write -P 1 0 1M")
        }
        let grow = ["resize", "--preallocation=\(preallocation)"]
        let ours = try place.run(Workplace.merino, grow + ["ours.qcow2", "8M"])
        #expect(ours.status == 0, "\(ours.errors)")
        let theirs = try place.run("/usr/bin/env", ["qemu-img"] + grow + ["theirs.qcow2", "8M"])
        #expect(theirs.status == 0, "\(theirs.errors)")
        let maps = try ["ours", "theirs"].map {
            try place.tool("qemu-img", "map", "--output=json", "\($0).qcow2").output
        }
        #expect(maps[0] == maps[1])
        try io(place, "ours.qcow2", "read -P 1 0 1M", "read -P 0 1M 7M")
        #expect(try size(place, "ours.raw") == 8 << 20)
        let shrunk = try place.merino("resize", "--shrink", "ours.qcow2", "2M")
        #expect(shrunk.status == 0, "\(shrunk.errors)")
        #expect(try size(place, "ours.raw") == 2 << 20)
        #expect(try place.tool("qemu-img", "check", "ours.qcow2").status == 0)
    }

    @Test("space that is reserved in a data file longer than its disk reads as zeroes")
    func leftoversOfDataFilesDoNotShow() throws {
        let place = try Workplace()
        try create(place, "-o", "data_file=d.raw", "a.qcow2", "1M")
        let data = try #require(FileHandle(forUpdatingAtPath: "\(place.folder)/d.raw"))
        try data.write(contentsOf: Data(repeating: 7, count: 4 << 20))
        try data.close()
        let result = try place.merino("resize", "--preallocation=metadata", "a.qcow2", "3M")
        #expect(result.status == 0, "\(result.errors)")
        try io(place, "a.qcow2", "read -P 0 0 3M")
    }

    private func size(_ place: Workplace, _ name: String) throws -> Int {
        let attributes = try FileManager.default.attributesOfItem(
            atPath: "\(place.folder)/\(name)")
        return (attributes[.size] as? Int) ?? -1
    }

    @Test("a qcow2 disk gets no size that is not a multiple of 512")
    func sizesAreWholeSectors() throws {
        let place = try Workplace()
        try create(place, "a.qcow2", "1M")
        for arguments in [
            ["resize", "a.qcow2", "2000001"], ["resize", "a.qcow2", "+1"],
            ["resize", "--shrink", "a.qcow2", "1000"], ["amend", "-o", "size=2000001", "a.qcow2"],
            ["io", "-c", "truncate 2000001", "a.qcow2"],
        ] {
            let result = try place.run(Workplace.merino, arguments)
            #expect(result.status == 1, "\(arguments): \(result.output)")
            let errors = result.errors + result.output
            #expect(errors.contains("multiple of 512"), "\(arguments): \(errors)")
        }
        let info = try place.tool("qemu-img", "info", "a.qcow2").output
        #expect(info.contains("1048576 bytes"), "\(info)")
    }

    @Test("an image whose data file is the raw disk gets no backing file")
    func rawDataFilesHaveNothingBelow() throws {
        let place = try Workplace()
        try create(place, "base.qcow2", "4M")
        try create(place, "-o", "data_file=d.raw,data_file_raw=on", "a.qcow2", "4M")
        for arguments in [
            ["rebase", "-u", "-b", "base.qcow2", "-F", "qcow2", "a.qcow2"],
            ["rebase", "-b", "base.qcow2", "-F", "qcow2", "a.qcow2"],
            ["amend", "-o", "backing_file=base.qcow2,backing_fmt=qcow2", "a.qcow2"],
        ] {
            let result = try place.run(Workplace.merino, arguments)
            #expect(result.status == 1, "\(arguments)")
            #expect(result.errors.contains("raw image"), "\(arguments): \(result.errors)")
        }
        let info = try place.tool("qemu-img", "info", "a.qcow2").output
        #expect(!info.contains("backing"), "\(info)")
    }
}
