import Foundation
import Testing

/// Under the names of QEMU's tools the same command lines end with the same exit code and print the same:
/// each line of the table is run by both, on the same files.
@Suite struct CompatibleNamesTests {
    /// The files that lines work on; each run gets copies.
    private static func makeFiles() throws -> Workplace {
        let place = try Workplace()
        let script = """
            set -e
            qemu-img create -q -f qcow2 a.qcow2 4M
            qemu-io -f qcow2 -c 'write -P 1 0 256k' -c 'write -P 3 1M 70000' a.qcow2
            qemu-img create -q -f raw r.raw 4M
            qemu-io -f raw -c 'write -P 1 0 64k' r.raw
            qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 o.qcow2
            qemu-io -f qcow2 -c 'write -P 2 64k 64k' o.qcow2
            cp a.qcow2 plain.qcow2
            qemu-img snapshot -c s1 a.qcow2
            qemu-img bitmap --add a.qcow2 b0
            cp a.qcow2 same.qcow2
            head -c 300 /dev/zero | tr '\\0' x > short.raw
            printf 'QFI\\373\\0\\0\\0\\3' > short.qcow2
            printf 'correct horse' > password
            """
        try EncryptedImage.qcow2.write("luks.qcow2", in: place)
        let made = try place.run("/bin/sh", ["-c", script])
        #expect(made.status == 0, "\(made.errors)")
        return place
    }

    @Test(arguments: CompatibleLines.groups.keys.sorted())
    func theSameIsPrintedAndTheExitCodeIsTheSame(group: String) throws {
        let files = try Self.makeFiles()
        for line in CompatibleLines.groups[group] ?? [] {
            let theirs = try Self.run(line, on: files, ours: false)
            let ours = try Self.run(line, on: files, ours: true)
            let errors = "\(line)\nours: \(ours.errors)theirs: \(theirs.errors)"
            #expect(ours.status == theirs.status, "\(errors)")
            #expect(Self.plain(ours.output) == Self.plain(theirs.output), "\(errors)")
            #expect(ours.errors.isEmpty == theirs.errors.isEmpty, "\(errors)")
            if theirs.errors.hasPrefix("qemu-") {
                let name = theirs.errors.prefix { $0 != " " }
                #expect(ours.errors.hasPrefix(name), "\(errors)")
            }
        }
    }

    private static func run(
        _ line: String, on files: Workplace, ours: Bool
    ) throws -> ProgramResult {
        let place = try Workplace()
        var script = "cp -p \(files.folder)/* . && "
        if ours {
            script +=
                "mkdir .names && for name in qemu-img qemu-io qemu-nbd qemu-storage-daemon; do "
                + "ln -s \(Workplace.merino) .names/$name; done && PATH=$PWD/.names:$PATH && "
        }
        return try place.run("/bin/sh", ["-c", script + line])
    }

    /// Without what depends on the time and the file system.
    private static func plain(_ text: String) -> String {
        Workplace.withoutTimes(text).split(separator: "\n", omittingEmptySubsequences: false)
            .filter { line in
                !["disk size:", "\"actual-size\"", "uuid", "iters"].contains { line.contains($0) }
            }.joined(separator: "\n")
    }

    @Test(arguments: ["qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon"])
    func theVersionStandsWhereScriptsLookForIt(tool: String) throws {
        let files = try Workplace()
        try "".write(toFile: files.folder + "/file", atomically: false, encoding: .utf8)
        let line = "\(tool) --version | head -n 1"
        let expected = try Self.run(line, on: files, ours: false).output
        let found = try Self.run(line, on: files, ours: true).output
        // Up to the minor number.
        let words = try #require(expected.prefixMatch(of: /[a-z -]+[0-9]+\.[0-9]+/))
        #expect(found.hasPrefix(words.0))
    }

    @Test func theHelpNamesTheFormats() throws {
        let files = try Workplace()
        try "".write(toFile: files.folder + "/file", atomically: false, encoding: .utf8)
        let help = try Self.run("qemu-img --help", on: files, ours: true).output
        let line = try #require(
            help.split(separator: "\n").first { $0.contains("Supported formats:") })
        #expect(line.contains(" qcow2") && line.contains(" raw"))
    }
}
