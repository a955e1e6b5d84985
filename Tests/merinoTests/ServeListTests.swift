import Foundation
import Testing

/// `serve --list` and the devices of the kernel, beside `qemu-nbd`'s.
@Suite struct ServeListTests {
    /// Runs a server while `body` runs.
    private func serving(
        _ place: Workplace, _ program: String, _ arguments: [String], body: () throws -> Void
    ) throws {
        // QEMU's server keeps what it inherits open when it forks, and signals held back: so it inherits
        // nothing.
        let script = """
            import os, signal, sys
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            os.closerange(3, 1024)
            os.execv(sys.argv[1], sys.argv[1:])
            """
        let result = try place.run(
            "/usr/bin/python3",
            ["-c", script, program] + arguments
                + ["--fork", "--pid-file", "\(place.folder)/pid", "-t"])
        try #require(result.status == 0, "\(result.errors)")
        let text = try String(contentsOfFile: "\(place.folder)/pid", encoding: .utf8)
        let process = try #require(Int32(text.trimmingCharacters(in: .whitespacesAndNewlines)))
        defer {
            kill(process, SIGTERM)
            for _ in 0..<500 where kill(process, 0) == 0 { usleep(10_000) }
        }
        try body()
    }

    private func withImages() throws -> Workplace {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "-f", "raw", "a.raw", "1M")
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "b.qcow2", "2M")
        return place
    }

    @Test(arguments: [
        ["-f", "raw", "-x", "disk", "-D", "a disk", "a.raw"],
        ["-f", "qcow2", "-A", "-r", "-e", "3", "b.qcow2"],
    ])
    func listShowsWhatQemusListShows(options: [String]) throws {
        for server in ["/usr/bin/qemu-nbd", Workplace.merino] {
            let place = try withImages()
            let socket = "\(place.folder)/s"
            let command = server == Workplace.merino ? ["serve"] : []
            try serving(place, server, command + ["-k", socket] + options) {
                let ours = try place.merino("serve", "--list", "-k", socket)
                let theirs = try place.tool("qemu-nbd", "--list", "-k", socket)
                #expect(ours.status == 0, "\(ours.errors)")
                #expect(ours.output == theirs.output)
                #expect(ours.output.contains("exports available: 1"))
            }
        }
    }

    @Test func listOverTLSChecksTheServersName() throws {
        let place = try withImages()
        let make = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
            .deletingLastPathComponent().appendingPathComponent("Support/make-certificates").path
        try #require(try place.run("/bin/sh", [make, "\(place.folder)/tls"]).status == 0)
        let object = "tls-creds-x509,id=t,dir=\(place.folder)/tls/x509,endpoint="
        let socket = "\(place.folder)/s"
        try serving(
            place, Workplace.merino,
            [
                "serve", "-k", socket, "-f", "raw", "--object", object + "server", "--tls-creds",
                "t", "a.raw",
            ]
        ) {
            func list(_ more: String...) throws -> ProgramResult {
                try place.run(Workplace.merino, ["serve", "-L", "-k", socket] + more)
            }
            let plain = try list()
            #expect(plain.status == 1 && plain.errors.contains("TLS"), "\(plain.errors)")
            let client = ["--object", object + "client", "--tls-creds", "t"]
            let nameless = try list(client[0], client[1], client[2], client[3])
            #expect(nameless.status == 1)
            #expect(nameless.errors.contains("--tls-hostname"), "\(nameless.errors)")
            let named = try list(
                client[0], client[1], client[2], client[3], "--tls-hostname", "localhost")
            #expect(named.output.contains("exports available: 1"), "\(named.errors)")
            let other = try list(
                client[0], client[1], client[2], client[3], "--tls-hostname", "elsewhere.example")
            #expect(other.status == 1 && other.errors.contains("certificate"), "\(other.errors)")
        }
    }

    @Test(arguments: [
        (["--list", "-k", "/none/s"], "/none/s"), (["--list", "a.raw"], "file name"),
        (["--list", "-k", "s", "-x", "e"], "--list"),
        (["-c", "/dev/nbd-none", "-v", "-f", "raw", "a.raw"], "modprobe nbd"),
        (["-d", "/dev/nbd-none"], "modprobe nbd"), (["-c", "/dev/nbd0", "-L"], "exclude"),
        (["-P", "1", "-f", "raw", "a.raw"], "--offset"), ([], "file"),
    ])
    func whatCannotBeDoneIsRefused(options: [String], part: String) throws {
        let place = try withImages()
        let result = try place.run(Workplace.merino, ["serve"] + options)
        #expect(result.status == 1)
        #expect(result.errors.contains(part), "\(result.errors)")
    }

    @Test func traceEventsTellOfTheRequestsOfClients() throws {
        let place = try withImages()
        let socket = "\(place.folder)/s"
        let trace = "\(place.folder)/trace"
        try "# of clients\n\nnbd_*\n".write(
            toFile: "\(place.folder)/events", atomically: false, encoding: .utf8)
        try serving(
            place, Workplace.merino,
            [
                "serve", "-k", socket, "-f", "qcow2", "-T", "qcow2_allocate,file=\(trace)", "-T",
                "events=\(place.folder)/events", "b.qcow2",
            ]
        ) {
            try place.tool(
                "qemu-io", "-f", "raw", "-c", "write 64k 4k", "nbd+unix:///?socket=\(socket)")
        }
        let text = try String(contentsOfFile: trace, encoding: .utf8)
        let line = try #require(text.split(separator: "\n").first { $0.contains("write") })
        #expect(line.contains(":nbd_request node "))
        #expect(line.contains("command write offset 65536 bytes 4096"))
        #expect(line.contains("@"))
        #expect(text.contains(":qcow2_allocate "))
        #expect(!text.contains("edge_request"))
        let names = try place.merino("serve", "-T", "help", "x")
        #expect(names.output.contains("edge_request\n") && names.status == 0)
        let wrong = try place.merino("serve", "-T", "nbd_requests", "-f", "raw", "a.raw")
        #expect(wrong.status == 1 && wrong.errors.contains("nbd_request"), "\(wrong.errors)")
        // By the other name it goes on, to the image that is not there.
        let warned = try place.tool(
            "bash", "-c", "exec -a qemu-nbd \"$0\" -T nbd_requests -f raw nosuch", Workplace.merino)
        #expect(warned.errors.contains("warning: ") && warned.errors.contains("'nosuch'"))
    }
}
