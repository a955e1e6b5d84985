import Foundation
import Testing

@Suite struct AmendCommandTests {
    private static let objects = [
        "--object", "secret,id=one,data=first", "--object", "secret,id=two,data=second",
    ]

    /// The keys that `--image-opts` opens a disk with.
    private static func luks(_ secret: String) -> [String] {
        ["--image-opts", "driver=luks,file.filename=a.luks,key-secret=\(secret)"]
    }

    private func amend(_ work: Workplace, _ arguments: [String]) throws -> ProgramResult {
        try work.run(Workplace.merino, ["amend"] + arguments)
    }

    private func specific(_ work: Workplace, _ name: String) throws -> [String: Any] {
        let info = try work.tool("qemu-img", "info", "--output=json", name)
        let json = try JSONSerialization.jsonObject(with: Data(info.output.utf8))
        let specific = (json as? [String: Any])?["format-specific"] as? [String: Any]
        return specific?["data"] as? [String: Any] ?? [:]
    }

    @Test func versionsChangeBothWays() throws {
        let work = try Workplace()
        try work.tool("qemu-img", "create", "-q", "-f", "raw", "base.img", "1M")
        try work.tool("qemu-io", "-f", "raw", "-c", "write -P 9 0 1M", "base.img")
        try work.tool(
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", "a.qcow2",
            "4M")
        try work.tool(
            "qemu-io", "-f", "qcow2", "-c", "write -P 5 256k 64k", "-c", "write -z 512k 192k",
            "-c", "write -z 2M 64k", "a.qcow2")
        try work.tool("qemu-img", "convert", "-O", "raw", "a.qcow2", "before.img")
        for (compat, shown) in [("0.10", "0.10"), ("v3", "1.1")] {
            let result = try amend(work, ["-f", "qcow2", "-o", "compat=\(compat)", "a.qcow2"])
            #expect(result.status == 0, "\(result.errors)")
            #expect(try specific(work, "a.qcow2")["compat"] as? String == shown)
            #expect(try work.tool("qemu-img", "check", "-q", "a.qcow2").status == 0)
            let compared = try work.tool(
                "qemu-img", "compare", "-f", "qcow2", "-F", "raw", "a.qcow2", "before.img")
            #expect(compared.status == 0, "\(compat): \(compared.output)")
        }
    }

    @Test func lazyRefcountsBackingAndSizeChange() throws {
        let work = try Workplace()
        try work.tool("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
        try work.tool("qemu-img", "create", "-q", "-f", "raw", "base.img", "1M")
        let result = try amend(
            work,
            [
                "-f", "qcow2", "-o", "lazy_refcounts=on,size=8M", "-o",
                "backing_file=base.img,backing_fmt=raw", "a.qcow2",
            ])
        #expect(result.status == 0, "\(result.errors)")
        let text = try work.tool("qemu-img", "info", "a.qcow2").output
        for line in ["lazy refcounts: true", "backing file: base.img", "virtual size: 8 MiB"] {
            #expect(text.contains(line), "\(text)")
        }
        let removed = try amend(work, ["-f", "qcow2", "-o", "backing_file=", "a.qcow2"])
        #expect(removed.status == 0, "\(removed.errors)")
        #expect(try !work.tool("qemu-img", "info", "a.qcow2").output.contains("backing"))
        #expect(try work.tool("qemu-img", "check", "-q", "a.qcow2").status == 0)
    }

    @Test func keysAreSetAndErased() throws {
        let work = try Workplace()
        let made = try work.run(
            Workplace.merino,
            ["create", "-q", "-f", "luks"] + Self.objects
                + ["-o", "key-secret=one,iter-time=10", "a.luks", "1M"])
        #expect(made.status == 0, "\(made.errors)")
        let set = try amend(
            work,
            Self.objects + Self.luks("one") + ["-o", "state=active,new-secret=two,iter-time=10"])
        #expect(set.status == 0, "\(set.errors)")
        let both = try work.run(
            "/usr/bin/env",
            ["qemu-io", "-r"] + Self.objects + ["-c", "read 0 64k"]
                + Self.luks("two"))
        #expect(both.status == 0, "\(both.errors)")
        let erased = try amend(
            work, Self.objects + Self.luks("two") + ["-o", "state=inactive,old-secret=one"])
        #expect(erased.status == 0, "\(erased.errors)")
        let gone = try work.run(
            "/usr/bin/env",
            ["qemu-io", "-r"] + Self.objects + ["-c", "read 0 64k"]
                + Self.luks("one"))
        #expect(gone.status != 0)
        let last = try amend(
            work, Self.objects + Self.luks("two") + ["-o", "state=inactive,keyslot=1"])
        #expect(last.status == 1)
        #expect(last.errors.contains("last key"), "\(last.errors)")
    }

    @Test func keysOfQCOW2ImagesChangeToo() throws {
        let work = try Workplace()
        _ = try work.run(
            "/usr/bin/env",
            ["qemu-img", "create", "-q", "-f", "qcow2"] + Self.objects
                + ["-o", "encrypt.format=luks,encrypt.key-secret=one,encrypt.iter-time=10"]
                + ["a.qcow2", "1M"])
        let image = "driver=qcow2,file.filename=a.qcow2,encrypt.key-secret="
        let set = try amend(
            work,
            Self.objects + ["--image-opts", image + "one", "-o"]
                + ["encrypt.state=active,encrypt.new-secret=two,encrypt.iter-time=10"])
        #expect(set.status == 0, "\(set.errors)")
        let read = try work.run(
            "/usr/bin/env",
            ["qemu-io"] + Self.objects + ["-c", "read 0 64k", "--image-opts", image + "two"])
        #expect(read.status == 0, "\(read.errors)")
    }

    @Test func whatCannotChangeIsRefusedByName() throws {
        let work = try Workplace()
        try work.tool("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
        for (options, word) in [
            ("cluster_size=4k", "cluster_size"), ("refcount_bits=3", "refcount-bits"),
            ("data_file=x", "data file"), ("data_file_raw=on", "data-file-raw"),
            ("encrypt.state=inactive,encrypt.keyslot=0", "LUKS"), ("compat=4", "version"),
        ] {
            let result = try amend(work, ["-f", "qcow2", "-o", options, "a.qcow2"])
            #expect(result.status == 1)
            #expect(result.errors.contains(word), "\(result.errors)")
        }
    }
}
