import Foundation
import Testing

/// Long options may be abbreviated under the names of QEMU's tools, as there, and under these alone.
@Suite struct AbbreviationTests {
    /// Runs one of the tools, or Merino by its name.
    private func run(
        _ place: Workplace, _ tool: String, _ arguments: [String], ours: Bool
    ) throws -> ProgramResult {
        guard ours else { return try place.run("/usr/bin/env", [tool] + arguments) }
        let link = "\(place.folder)/\(tool)"
        if !FileManager.default.fileExists(atPath: link) {
            try FileManager.default.createSymbolicLink(
                atPath: link, withDestinationPath: Workplace.merino)
        }
        return try place.run(link, arguments)
    }

    /// What can follow the name of each tool, and the options that there are.
    private static let options: [(tool: String, words: String, options: String)] = [
        ("qemu-img", "amend", "help object image-opts force"),
        ("qemu-img", "bench", "flush-interval pattern image-opts force-share no-drain"),
        (
            "qemu-img", "bitmap",
            "add remove clear enable disable merge granularity source-file source-format"
        ),
        ("qemu-img", "check", "format repair output object image-opts force-share"),
        ("qemu-img", "commit", "object image-opts"),
        ("qemu-img", "compare", "object image-opts force-share"),
        (
            "qemu-img", "convert",
            "target-image-opts salvage target-is-zero bitmaps skip-broken-bitmaps force-share"
        ),
        ("qemu-img", "create", "help object"),
        ("qemu-img", "info", "format output backing-chain object image-opts force-share"),
        ("qemu-img", "map", "format output object force-share start-offset max-length"),
        ("qemu-img", "measure", "image-opts object output size"),
        ("qemu-img", "rebase", "object image-opts force-share"),
        ("qemu-img", "resize", "object image-opts preallocation shrink"),
        ("qemu-img", "snapshot", "object image-opts force-share"),
        (
            "qemu-io", "",
            "cmd format read-only snapshot nocache copy-on-read misalign discard cache aio object"
        ),
        (
            "qemu-nbd", "",
            "bind port socket offset read-only allocation-depth bitmap snapshot load-snapshot nocache "
                + "cache aio discard detect-zeroes shared format persistent verbose object export-name "
                + "description tls-creds tls-authz image-opts pid-file"
        ),
        (
            "qemu-storage-daemon", "",
            "blockdev chardev export monitor nbd-server object pidfile"
        ),
    ]

    @Test("what is ambiguous there is ambiguous here", arguments: options.indices)
    func ambiguous(_ index: Int) throws {
        let place = try Workplace()
        let (tool, words, options) = Self.options[index]
        var seen: Set<Substring> = []
        for option in options.split(separator: " ") {
            for count in 1...3 where seen.insert(option.prefix(count)).inserted {
                let command = words.isEmpty ? [] : [words]
                let line = command + ["--\(option.prefix(count))"]
                let theirs = try run(place, tool, line + ["/nosuch", "/nosuch"], ours: false)
                let ours = try run(place, tool, line + ["/nosuch", "/nosuch"], ours: true)
                // The image tool says of some that they are not known.
                let isAmbiguous =
                    theirs.errors.contains("ambiguous")
                    || theirs.errors.contains("unrecognized option")
                #expect(
                    ours.errors.contains("is ambiguous") == isAmbiguous,
                    "\(tool) \(line): \(theirs.errors)\(ours.errors)")
                guard let list = theirs.errors.range(of: "possibilities: ") else { continue }
                let possible = theirs.errors[list.upperBound...].prefix { $0 != "\n" }
                    .split(separator: " ").map { $0.dropFirst().dropLast() }.sorted()
                #expect(
                    ours.errors.contains("may mean \(possible.joined(separator: ", "))\n"),
                    "\(line): \(theirs.errors)\(ours.errors)")
            }
        }
    }

    @Test(
        "a line means the same",
        arguments: [
            "qemu-img info --outp=json a.qcow2", "qemu-img info --outp json --back a.qcow2",
            "qemu-img info --form raw a.qcow2",
            "qemu-img map --outp=json --start 64k --max=64k a.qcow2",
            "qemu-img check --outp json --form qcow2 a.qcow2",
            "qemu-img measure --si 1G --out json",
            "qemu-img info --image driver=qcow2,file.filename=a.qcow2",
            "qemu-img resize --shr a.qcow2 1M",
            "qemu-img create -o --size=1 -f qcow2 b.qcow2 1M", "qemu-img info -- --outp=json",
            "qemu-io --re --cm 'read -P 3 0 64k' a.qcow2 | grep -c 'read 65536'",
            "qemu-io --cmd --c a.qcow2",
            "qemu-img bitmap --gran 64k --ad a.qcow2 b && qemu-img info a.qcow2",
        ])
    func lines(_ line: String) throws {
        let results = try [false, true].map { ours in
            let place = try Workplace()
            let setup = """
                qemu-img create -q -f qcow2 a.qcow2 4M && qemu-io -c 'write -P 3 0 1M' a.qcow2 >/dev/null
                """
            #expect(try place.run("/bin/sh", ["-c", setup]).status == 0)
            let names = """
                mkdir .n && ln -s \(Workplace.merino) .n/qemu-img && ln -s \(Workplace.merino) .n/qemu-io
                PATH=$PWD/.n:$PATH
                """
            return try place.run("/bin/sh", ["-c", (ours ? names + "\n" : "") + line])
        }
        #expect(results[0].status == results[1].status, "\(line): \(results)")
        func plain(_ text: String) -> String {
            text.split(separator: "\n").filter {
                !$0.contains("disk size") && !$0.contains("actual-size")
            }
            .joined(separator: "\n")
        }
        #expect(plain(results[0].output) == plain(results[1].output))
    }

    @Test func ourOwnNameTakesWholeOptions() throws {
        let place = try Workplace()
        let result = try place.merino("info", "--outp=json", "/nosuch")
        #expect(result.status == 1 && result.errors.contains("--outp"))
    }
}
