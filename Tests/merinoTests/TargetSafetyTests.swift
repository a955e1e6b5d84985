import Foundation
import Testing

/// Whatever is wrong with a command line is found before its target is touched: what stood there stays.
@Suite struct TargetSafetyTests {
    /// The words of a command, and in its target's place `TARGET`.
    private static let lines: [String] = {
        let secret = "--object secret,id=s,data=x"
        let bad = [
            "-f qcow2 -o encrypt.format=luks",
            "-f qcow2 -o encrypt.format=luks,encrypt.key-secret=none",
            "-f qcow2 \(secret) -o encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=rot13",
            "-f qcow2 \(secret) -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=x",
            "-f qcow2 \(secret) -o encrypt.format=none,encrypt.key-secret=s",
            "-f qcow2 -o data_file_raw=on",
            "-f qcow2 -o data_file=d,compat=0.10",
            "-f qcow2 -o cluster_size=3000",
            "-f qcow2 -o compat=0.10,refcount_bits=1",
            "-f qcow2 -o preallocation=much",
            "-f qcow2 -o color=blue",
            "-f qcow2 -b nothing -F qcow2",
            "-f luks",
            "-f luks -o key-secret=none",
            "-f luks \(secret) -o key-secret=s,cipher-mode=ecb",
            "-f raw -o preallocation=metadata",
            "-f nothing",
        ]
        let secretFile = "--object secret,id=s,file=nothing"
        return bad.map { "create \($0) TARGET 1M" }
            + bad.filter { !$0.contains("-b ") }.map { line in
                "convert \(line.replacing("-f ", with: "-O ")) source.raw TARGET"
            }
            + [
                "create -f qcow2 \(secretFile) -o encrypt.format=luks,encrypt.key-secret=s TARGET 1M",
                "create -f qcow2 TARGET 99999P",
                "convert -O qcow2 nothing.raw TARGET",
                "convert -f qcow2 -O qcow2 source.raw TARGET",
                "convert -O qcow2 -l none base.qcow2 TARGET",
                "convert -O qcow2 -c -m 99 source.raw TARGET",
                "convert -O raw -c source.raw TARGET",
                "convert -O luks -c \(secret) -o key-secret=s source.raw TARGET",
                "convert -O luks --bitmaps \(secret) -o key-secret=s base.qcow2 TARGET",
                "convert -O qcow2 --bitmaps source.raw TARGET",
                "convert -O qcow2 -t fast source.raw TARGET",
                "convert -O qcow2 -S 5 source.raw TARGET",
                "convert -O qcow2 -B nothing -F qcow2 source.raw TARGET",
                "convert -n -O qcow2 source.raw TARGET",
                "convert -n -O raw nothing.raw TARGET",
                "dd -O luks if=source.raw of=TARGET",
                "dd -O nothing if=source.raw of=TARGET",
                "dd if=nothing.raw of=TARGET",
                "dd bs=x if=source.raw of=TARGET",
            ]
    }()

    private static func makeFiles(_ place: Workplace) throws {
        try place.tool("qemu-img", "create", "-q", "-f", "raw", "source.raw", "1M")
        try place.tool("qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", "source.raw")
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "1M")
        try Data(repeating: 0x5a, count: 70_000).write(
            to: URL(fileURLWithPath: place.folder + "/target"))
    }

    private static func contents(_ place: Workplace, _ name: String) throws -> Data {
        try Data(contentsOf: URL(fileURLWithPath: place.folder + "/" + name))
    }

    /// Two names keep the file from being replaced: it is written in place.
    @Test(arguments: [false, true])
    func whatStoodThereStays(hasTwoNames: Bool) throws {
        let place = try Workplace()
        try Self.makeFiles(place)
        if hasTwoNames { try place.tool("ln", "target", "second") }
        let before = try Self.contents(place, "target")
        for line in Self.lines {
            let words = line.replacing("TARGET", with: "target").split(separator: " ")
            let result = try place.run(Workplace.merino, words.map(String.init))
            #expect(result.status != 0, "\(line)")
            #expect(!result.errors.isEmpty, "\(line)")
            #expect(try Self.contents(place, "target") == before, "\(line): \(result.errors)")
        }
        let left = try FileManager.default.contentsOfDirectory(atPath: place.folder)
        #expect(!left.contains { $0.contains("partial") }, "\(left)")
    }

    @Test(arguments: [
        "rebase -b nothing -F qcow2", "rebase -b base.qcow2", "rebase -b base.qcow2 -F nothing",
        "rebase -u -b base.qcow2 -F nothing", "rebase -b target -F qcow2", "rebase -T fast -b ''",
        "amend -o compat=0.10,lazy_refcounts=on", "amend -o size=2M,encrypt.new-secret=none",
        "amend -o color=blue", "amend -o lazy_refcounts=on,compat=9",
        "commit -b nothing", "commit -t fast", "commit -r x",
        "resize --preallocation=much", "bitmap --add --clear",
    ])
    func anImageThatIsToBeChangedStays(line: String) throws {
        let place = try Workplace()
        try Self.makeFiles(place)
        try place.tool(
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "target")
        try place.tool("qemu-io", "-f", "qcow2", "-c", "write -P 3 0 64k", "target")
        let before = try (Self.contents(place, "target"), Self.contents(place, "base.qcow2"))
        var words = line.split(separator: " ").map { $0 == "''" ? "" : String($0) } + ["target"]
        if line.hasPrefix("resize") { words.append("2M") }
        let result = try place.run(Workplace.merino, words)
        #expect(result.status != 0, "\(result.output)")
        #expect(try Self.contents(place, "target") == before.0)
        #expect(try Self.contents(place, "base.qcow2") == before.1)
    }
}
