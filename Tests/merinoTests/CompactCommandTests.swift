import Foundation
import Testing

/// `compact`: smaller, the same, and nothing lost when it cannot.
@Suite struct CompactCommandTests {
    private func allocated(_ place: Workplace, _ name: String) throws -> Int {
        Int(try place.tool("stat", "-c", "%b", name).output.dropLast()) ?? -1
    }

    private func expectCompacted(
        _ place: Workplace, _ format: String, _ name: String, _ options: String...
    ) throws {
        try place.tool("cp", "--sparse=never", name, "copy.\(name)")
        let before = try allocated(place, name)
        let result = try place.run(
            Workplace.merino, ["compact", "-f", format] + options + [name])
        #expect(result.status == 0, "\(result.errors)")
        #expect(try allocated(place, name) < before)
        #expect(
            try place.tool("qemu-img", "compare", "-f", format, "-F", format, name, "copy.\(name)")
                .status == 0)
        #expect(!FileManager.default.fileExists(atPath: "\(place.folder)/\(name).merino-partial"))
    }

    @Test func storedZeroesAreGoneAndPropertiesStay() throws {
        let place = try Workplace()
        try place.tool(
            "qemu-img", "create", "-q", "-f", "qcow2", "-o",
            "cluster_size=16k,refcount_bits=32,lazy_refcounts=on,compression_type=zstd", "a.qcow2",
            "64M")
        try place.tool(
            "qemu-io", "-f", "qcow2", "-c", "write -P 7 0 20M", "-c", "write -P 0 1M 18M", "a.qcow2"
        )
        try place.tool("chmod", "640", "a.qcow2")
        try expectCompacted(place, "qcow2", "a.qcow2")
        let info = try place.tool("qemu-img", "info", "--output=json", "a.qcow2").output
        for property in [
            "\"cluster-size\": 16384", "\"refcount-bits\": 32", "\"lazy-refcounts\": true",
            "\"compression-type\": \"zstd\"",
        ] { #expect(info.contains(property), "\(info)") }
        #expect(try place.tool("qemu-img", "check", "-q", "a.qcow2").status == 0)
        #expect(try place.tool("stat", "-c", "%a", "a.qcow2").output == "640\n")
    }

    @Test func anOldVersionStaysOne() throws {
        let place = try Workplace()
        try place.tool(
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", "a.qcow2", "8M")
        try place.tool("qemu-io", "-f", "qcow2", "-c", "write -P 0 0 4M", "a.qcow2")
        try expectCompacted(place, "qcow2", "a.qcow2")
        #expect(try place.tool("qemu-img", "info", "a.qcow2").output.contains("compat: 0.10"))
    }

    @Test func anOverlayKeepsItsBackingImageAndItsZeroes() throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "16M")
        try place.tool("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 16M", "base.qcow2")
        try place.tool(
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "a.qcow2")
        try place.tool(
            "qemu-io", "-f", "qcow2", "-c", "write -P 2 0 8M", "-c", "write -P 0 1M 6M", "a.qcow2")
        try expectCompacted(place, "qcow2", "a.qcow2")
        let info = try place.tool("qemu-img", "info", "a.qcow2").output
        #expect(info.contains("backing file: base.qcow2"))
    }

    @Test func compressingMakesItSmaller() throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "16M")
        try place.tool("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 8M", "a.qcow2")
        try expectCompacted(place, "qcow2", "a.qcow2", "-c")
        #expect(try allocated(place, "a.qcow2") * 512 < 1 << 20)
    }

    @Test func rawImagesBecomeSparse() throws {
        let place = try Workplace()
        try place.tool("dd", "if=/dev/zero", "of=a", "bs=1M", "count=8", "status=none")
        try place.tool("qemu-io", "-f", "raw", "-c", "write -P 3 1M 64k", "a")
        try expectCompacted(place, "raw", "a")
    }

    @Test func whatIsCompactStays() throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "16M")
        // Even a new image has tables that are not holes.
        #expect(try place.merino("compact", "-f", "qcow2", "a.qcow2").status == 0)
        let inode = try place.tool("stat", "-c", "%i", "a.qcow2").output
        #expect(try place.merino("compact", "-f", "qcow2", "a.qcow2").status == 0)
        #expect(try place.tool("stat", "-c", "%i", "a.qcow2").output == inode)
    }

    @Test func dirtyBitmapsAreKept() throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "16M")
        try place.tool("qemu-io", "-c", "write 0 12M", "-c", "write -P 0 0 8M", "a.qcow2")
        for options in [["-g", "512", "a.qcow2", "fine"], ["--disable", "a.qcow2", "off"]] {
            #expect(
                try place.run("/usr/bin/env", ["qemu-img", "bitmap", "--add"] + options).status == 0
            )
        }
        try place.tool("qemu-io", "-c", "write 9M 3k", "-c", "write 64k 1k", "a.qcow2")
        try expectCompacted(place, "qcow2", "a.qcow2")
        func told(_ arguments: String...) throws -> String {
            let result = try place.run("/usr/bin/env", arguments)
            #expect(result.status == 0, "\(result.errors)")
            return result.output
        }
        func bits(_ name: String) throws -> String {
            try told(
                "nbdinfo", "--map=qemu:dirty-bitmap:fine", "--", "[", "qemu-nbd", "-r", "-f",
                "qcow2",
                "-B", "fine", name, "]")
        }
        #expect(try bits("a.qcow2") == bits("copy.a.qcow2"))
        func bitmaps(_ name: String) throws -> [Substring] {
            let text = try told("qemu-img", "info", name)
            return text.split(separator: "\n").drop { !$0.contains("bitmaps:") }
                .prefix { !$0.contains("refcount") }
        }
        #expect(try bitmaps("a.qcow2") == bitmaps("copy.a.qcow2"))
        #expect(try place.tool("qemu-img", "check", "-q", "a.qcow2").status == 0)
    }

    @Test func damageLeavesTheImageAsItIs() throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "16M")
        try place.tool("qemu-io", "-c", "write -P 1 0 8M", "-c", "write -c -P 5 9M 64k", "a.qcow2")
        // The compressed cluster is the last thing in the file.
        let size = try Data(contentsOf: URL(fileURLWithPath: "\(place.folder)/a.qcow2")).count
        try place.tool(
            "dd", "if=/dev/urandom", "of=a.qcow2", "bs=1", "count=32", "seek=\(size - 60)",
            "conv=notrunc", "status=none")
        try place.tool("cp", "a.qcow2", "copy.qcow2")
        let result = try place.merino("compact", "-f", "qcow2", "a.qcow2")
        #expect(result.status == 1 && result.errors.contains("damaged"), "\(result.errors)")
        #expect(try place.tool("cmp", "a.qcow2", "copy.qcow2").status == 0)
        #expect(!FileManager.default.fileExists(atPath: "\(place.folder)/a.qcow2.merino-partial"))
    }
}
