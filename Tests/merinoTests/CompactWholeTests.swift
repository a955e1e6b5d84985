import Foundation
import Testing

/// `compact` of images that hold more than a disk's data: it is all there afterwards.
@Suite struct CompactWholeTests {
    private static let key = ["--object", "secret,id=key,data=correct horse"]

    private func allocated(_ place: Workplace, _ name: String) throws -> Int {
        Int(try place.tool("stat", "-c", "%b", name).output.dropLast()) ?? -1
    }

    @discardableResult
    private func tool(_ place: Workplace, _ arguments: [String]) throws -> String {
        let result = try place.run("/usr/bin/env", arguments)
        #expect(result.status == 0, "\(arguments): \(result.errors)\(result.output)")
        return result.output
    }

    private func compact(_ place: Workplace, _ arguments: [String]) throws {
        let result = try place.run(Workplace.merino, ["compact"] + arguments)
        #expect(result.status == 0, "\(result.errors)")
    }

    /// The image's `disk` as a snapshot has it.
    private func contents(_ place: Workplace, _ snapshot: String, of name: String) throws -> Data {
        try tool(place, ["qemu-img", "convert", "-l", "snapshot.name=\(snapshot)", name, "out"])
        return try Data(contentsOf: URL(fileURLWithPath: "\(place.folder)/out"))
    }

    @Test(
        "snapshots keep their data, share it, and keep all that is said of them",
        arguments: [
            "cluster_size=64k", "cluster_size=4k,compat=0.10", "extended_l2=on,cluster_size=64k",
            "cluster_size=512,refcount_bits=8", "compression_type=zstd,cluster_size=2M",
        ], [[], ["-c"]])
    func snapshots(_ options: String, _ compress: [String]) throws {
        let place = try Workplace()
        try tool(
            place, ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "16M"])
        func write(_ commands: String...) throws {
            try tool(place, ["qemu-io"] + commands.flatMap { ["-c", $0] } + ["a.qcow2"])
        }
        try write("write -P 1 0 8M", "write -c -P 9 12M 2M")
        try tool(place, ["qemu-img", "snapshot", "-c", "one", "a.qcow2"])
        try write("write -P 2 1M 1M", "write -P 0 3M 2M", "write -z 6M 1M")
        try tool(place, ["qemu-img", "snapshot", "-c", "two", "a.qcow2"])
        try tool(place, ["qemu-img", "snapshot", "-d", "one", "a.qcow2"])
        try write("write -P 3 1M 100k", "discard 4M 1M", "write -P 4 15M 3k")
        try tool(place, ["cp", "--sparse=never", "a.qcow2", "copy.qcow2"])
        let list = try tool(place, ["qemu-img", "snapshot", "-l", "a.qcow2"])
        let before = try allocated(place, "a.qcow2")
        try compact(place, compress + ["-f", "qcow2", "a.qcow2"])
        #expect(try allocated(place, "a.qcow2") < before)
        try tool(place, ["qemu-img", "check", "-q", "a.qcow2"])
        try tool(place, ["qemu-img", "compare", "-q", "a.qcow2", "copy.qcow2"])
        #expect(try tool(place, ["qemu-img", "snapshot", "-l", "a.qcow2"]) == list)
        #expect(
            try contents(place, "two", of: "a.qcow2") == contents(place, "two", of: "copy.qcow2"))
        // The counts are right: what was shared can be given up.
        try tool(place, ["qemu-img", "snapshot", "-a", "two", "a.qcow2"])
        try tool(place, ["qemu-img", "snapshot", "-d", "two", "a.qcow2"])
        try tool(place, ["qemu-img", "check", "-q", "a.qcow2"])
    }

    @Test func aMachinesStateAndExtraDataStay() throws {
        let place = try Workplace()
        let url = URL(fileURLWithPath: "\(place.folder)/a.qcow2")
        try tool(
            place,
            ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "a.qcow2", "4M"])
        try tool(
            place, ["qemu-io", "-c", "write -P 7 0 2M", "-c", "write -P 8 3M 512k", "a.qcow2"])
        try tool(place, ["qemu-img", "snapshot", "-c", "one", "a.qcow2"])
        try tool(place, ["qemu-io", "-c", "discard 0 4M", "-c", "write -P 0 0 1M", "a.qcow2"])
        // The disk of the snapshot ends at 2 MiB; what is behind is a machine's state.
        try setSizes(url, diskSize: 2 << 20, stateSize: 1 << 20, clock: 123_456_789)
        let list = try tool(place, ["qemu-img", "snapshot", "-l", "a.qcow2"])
        #expect(list.contains("1 MiB"))
        try compact(place, ["-f", "qcow2", "a.qcow2"])
        #expect(try tool(place, ["qemu-img", "snapshot", "-l", "a.qcow2"]) == list)
        try setSizes(url, diskSize: 4 << 20, stateSize: 0, clock: 0)
        let data = try contents(place, "one", of: "a.qcow2")
        #expect(data[0..<(2 << 20)].allSatisfy { $0 == 7 })
        #expect(data[(3 << 20)..<(7 << 19)].allSatisfy { $0 == 8 })
    }

    /// Changes what the first snapshot of an image says of sizes.
    private func setSizes(_ url: URL, diskSize: UInt64, stateSize: UInt64, clock: UInt64) throws {
        var bytes = [UInt8](try Data(contentsOf: url))
        let table = bytes[64..<72].reduce(0) { $0 << 8 | Int($1) }
        for (offset, value) in [(24, clock), (40, stateSize), (48, diskSize)] {
            withUnsafeBytes(of: value.bigEndian) {
                bytes.replaceSubrange((table + offset)..<(table + offset + 8), with: $0)
            }
        }
        try Data(bytes).write(to: url)
    }

    @Test("encrypted images keep their keys and their data", arguments: ["luks", "aes"])
    func encryption(_ method: String) throws {
        let place = try Workplace()
        let more = method == "luks" ? ",encrypt.iter-time=10" : ""
        try tool(
            place,
            ["qemu-img", "create", "-q"] + Self.key
                + [
                    "-f", "qcow2", "-o",
                    "encrypt.format=\(method),encrypt.key-secret=key\(more)", "a.qcow2", "16M",
                ])
        func name(_ file: String) -> String {
            "driver=qcow2,file.filename=\(file),encrypt.key-secret=key"
        }
        let options = Self.key + ["--image-opts"]
        try tool(
            place,
            ["qemu-io"] + options
                + ["-c", "write -P 7 0 8M", "-c", "write -P 0 2M 4M", name("a.qcow2")])
        try tool(place, ["qemu-img", "snapshot"] + options + ["-c", "one", name("a.qcow2")])
        try tool(place, ["qemu-io"] + options + ["-c", "write -P 5 1M 1M", name("a.qcow2")])
        try tool(place, ["cp", "a.qcow2", "copy.qcow2"])
        let before = try allocated(place, "a.qcow2")
        try compact(place, options + [name("a.qcow2")])
        #expect(try allocated(place, "a.qcow2") < before)
        try tool(place, ["qemu-img", "check", "-q"] + options + [name("a.qcow2")])
        try tool(
            place, ["qemu-img", "compare", "-q"] + options + [name("a.qcow2"), name("copy.qcow2")])
        try tool(place, ["qemu-img", "snapshot"] + options + ["-a", "one", name("a.qcow2")])
        try tool(place, ["qemu-img", "snapshot"] + options + ["-a", "one", name("copy.qcow2")])
        try tool(
            place, ["qemu-img", "compare", "-q"] + options + [name("a.qcow2"), name("copy.qcow2")])
        func slots(_ file: String) throws -> Substring {
            let info = try tool(place, ["qemu-img", "info", file])
            return info[(info.range(of: "encrypt:")?.lowerBound ?? info.endIndex)...]
        }
        #expect(try slots("a.qcow2") == slots("copy.qcow2"))
    }

    @Test func aKeyIsNeededWhereThePlaceEntersTheCipher() throws {
        let place = try Workplace()
        for (method, more) in [("luks", ",encrypt.iter-time=10"), ("aes", "")] {
            let options = "encrypt.format=\(method),encrypt.key-secret=key\(more)"
            try tool(
                place,
                ["qemu-img", "create", "-q"] + Self.key
                    + ["-f", "qcow2", "-o", options, method, "4M"])
        }
        let result = try place.merino("compact", "-f", "qcow2", "luks")
        #expect(result.status == 1 && result.errors.contains("key-secret"), "\(result.errors)")
        #expect(!FileManager.default.fileExists(atPath: "\(place.folder)/luks.merino-partial"))
        try compact(place, ["-f", "qcow2", "aes"])
    }

    @Test("data in a file of its own stays there", arguments: ["off", "on"])
    func dataFile(_ isRaw: String) throws {
        let place = try Workplace()
        try tool(
            place,
            [
                "qemu-img", "create", "-q", "-f", "qcow2", "-o",
                "data_file=data,data_file_raw=\(isRaw),cluster_size=4k", "a.qcow2", "64M",
            ])
        try tool(
            place,
            [
                "qemu-io", "-c", "write -P 7 0 40M", "-c", "write -z 1M 1M", "-c", "discard 4M 36M",
                "a.qcow2",
            ])
        let map = try tool(place, ["qemu-img", "map", "--output=json", "a.qcow2"])
        try tool(place, ["cp", "data", "copy"])
        try compact(place, ["-f", "qcow2", "a.qcow2"])
        #expect(try tool(place, ["qemu-img", "map", "--output=json", "a.qcow2"]) == map)
        try tool(place, ["cmp", "data", "copy"])
        try tool(place, ["qemu-img", "check", "-q", "a.qcow2"])
    }

    @Test func inconsistentBitmapsStayWhatTheyAre() throws {
        let place = try Workplace()
        try tool(place, ["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "16M"])
        try tool(place, ["qemu-io", "-c", "write 0 8M", "a.qcow2"])
        try tool(place, ["qemu-img", "bitmap", "--add", "a.qcow2", "b"])
        // Killed while it was recorded into.
        _ = try place.run(
            "/usr/bin/env", ["qemu-io", "-c", "write -P 0 0 8M", "-c", "abort", "a.qcow2"])
        let info = try tool(place, ["qemu-img", "info", "a.qcow2"])
        #expect(info.contains("in-use"))
        try tool(place, ["qemu-img", "check", "-q", "-r", "leaks", "a.qcow2"])
        try compact(place, ["-f", "qcow2", "a.qcow2"])
        #expect(try tool(place, ["qemu-img", "info", "a.qcow2"]).contains("in-use"))
        try tool(place, ["qemu-img", "check", "-q", "a.qcow2"])
    }
}
