import Foundation
import Testing

/// `serve` beside `qemu-nbd`, seen with libnbd's and QEMU's clients.
@Suite struct ServeCommandTests {
    /// Serves in the background while `body` runs; ends the server by its number.
    private func serving(
        _ place: Workplace, _ arguments: String..., body: () throws -> Void
    ) throws {
        let result = try place.run(
            Workplace.merino, ["serve", "--fork", "--pid-file", "pid", "-t"] + arguments)
        try #require(result.status == 0, "\(result.errors)")
        let text = try String(contentsOfFile: "\(place.folder)/pid", encoding: .utf8)
        let process = try #require(Int32(text.trimmingCharacters(in: .newlines)))
        defer {
            kill(process, SIGTERM)
            // It takes its file away last before it stops.
            for _ in 0..<500 where FileManager.default.fileExists(atPath: "\(place.folder)/pid") {
                usleep(10_000)
            }
        }
        try body()
    }

    private func withImage() throws -> Workplace {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "a.raw", "2M")
        try place.tool("qemu-io", "-f", "raw", "-c", "write -P 7 1M 64k", "a.raw")
        return place
    }

    private func uri(_ place: Workplace, _ name: String = "") -> String {
        "nbd+unix:///\(name)?socket=\(place.folder)/s"
    }

    @Test func forkReturnsWhenClientsCanCome() throws {
        let place = try withImage()
        try serving(place, "-k", "s", "-f", "raw", "-x", "disk", "a.raw") {
            let size = try place.tool("nbdinfo", "--size", uri(place, "disk"))
            #expect(size.output == "2097152\n", "\(size.errors)")
        }
        #expect(!FileManager.default.fileExists(atPath: "\(place.folder)/s"))
    }

    /// As services are started that are to read and write nothing: what is opened does not take their numbers.
    @Test func forkWithoutStandardStreams() throws {
        let place = try withImage()
        let script = """
            serve() { "$0" serve --fork --pid-file pid -t -f raw -k "$@" a.raw; }
            serve s <&- >&- || exit
            serve other 2> refused
            echo $?
            nbdinfo --size "$1"
            process=$(cat pid)
            kill "$process"
            while kill -0 "$process" 2> /dev/null; do sleep 0.01; done
            """
        let result = try place.tool(
            "timeout", "30", "sh", "-c", script, Workplace.merino, uri(place))
        #expect(result.output == "1\n2097152\n", "\(result.errors)")
    }

    @Test func forkFailsWhereTheImageCannotBeOpened() throws {
        let place = try Workplace()
        let result = try place.merino("serve", "--fork", "-k", "s", "-f", "raw", "none.raw")
        #expect(result.status == 1)
        #expect(result.errors.contains("none.raw"))
    }

    @Test func offsetServesTheRestOfTheImage() throws {
        let place = try withImage()
        try serving(place, "-k", "s", "-f", "raw", "--offset=1M", "a.raw") {
            let result = try place.tool(
                "qemu-io", "-f", "raw", "-c", "read -P 7 0 64k", "-c", "length", uri(place))
            #expect(result.status == 0)
            #expect(result.output.hasSuffix("1 MiB\n"))
        }
    }

    @Test func imageOptionsNameTheImage() throws {
        let place = try withImage()
        try serving(
            place, "-r", "-k", "s", "--image-opts", "driver=raw,offset=1M,file.filename=a.raw"
        ) {
            let size = try place.tool("nbdinfo", "--size", uri(place))
            #expect(size.output == "1048576\n", "\(size.errors)")
        }
    }

    @Test func guestCannotGiveAProbedRawDiskAHeader() throws {
        let place = try withImage()
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "header", "1M")
        let header = "write -s header 0 512"
        let warned = try place.merino("io", "-c", header, "-c", "write -P 1 0 512", "a.raw")
        // Only while a format is there that the header is known by.
        let isKnown = try place.merino("info", "header").output.contains("qcow2")
        guard isKnown else { return }
        #expect(warned.status == 1)
        #expect(warned.errors.contains("WARNING") && warned.errors.contains("-f raw"))
        #expect(try place.merino("info", "a.raw").output.contains("file format: raw"))
        let meant = try place.merino("io", "-f", "raw", "-c", header, "a.raw")
        #expect(meant.status == 0 && meant.errors == "")
    }

    @Test func clientsShowTheKeyTheServerKnows() throws {
        let place = try withImage()
        let key = String(repeating: "a1", count: 16)
        try "alice:\(key)\n".write(
            toFile: "\(place.folder)/keys.psk", atomically: false, encoding: .utf8)
        try serving(
            place, "-k", "s", "-f", "raw", "--tls-creds", "t", "--object",
            "tls-creds-psk,id=t,endpoint=server,dir=\(place.folder)", "a.raw"
        ) {
            let secret = try place.tool(
                "nbdinfo", "--size",
                "nbds+unix://alice@/?socket=\(place.folder)/s&tls-psk-file="
                    + "\(place.folder)/keys.psk")
            #expect(secret.output == "2097152\n", "\(secret.errors)")
            #expect(try place.tool("nbdinfo", "--size", uri(place)).status != 0)
        }
    }

    /// A Python program that opens the socket `s`; `serve` becomes the server that inherits it. The number in
    /// LISTEN_PID is its own.
    private static let inheriting = """
        import os, socket, sys
        s = socket.socket(socket.AF_UNIX)
        s.bind("s")
        s.listen()
        os.dup2(s.fileno(), 3)
        os.set_inheritable(3, True)

        def serve(*options):
            os.environ["LISTEN_PID"] = str(os.getpid())
            os.environ["LISTEN_FDS"] = "1"
            os.execv(sys.argv[1], ["merino", "serve", *options, "-f", "raw", "a.raw"])

        """

    @Test func inheritedSocketIsServed() throws {
        let place = try withImage()
        let script =
            Self.inheriting + """
                if os.fork() == 0:
                    os.execvp("nbdinfo", ["nbdinfo", "--size", sys.argv[2]])
                serve()
                """
        let result = try place.tool("python3", "-c", script, Workplace.merino, uri(place))
        #expect(result.output == "2097152\n", "\(result.errors)")
        #expect(result.status == 0, "\(result.errors)")
    }

    /// A server whose notices nobody reads goes on, and ends when it is told to.
    @Test func noticesThatNobodyReadsHoldNobodyUp() throws {
        let place = try withImage()
        let script = """
            import os, signal, socket, subprocess, sys, time
            reading, writing = os.pipe()
            os.set_blocking(writing, False)
            try:
                while True: os.write(writing, b"x" * 4096)
            except BlockingIOError: pass
            os.set_blocking(writing, True)
            server = subprocess.Popen(
                [sys.argv[1], "serve", "-t", "-v", "-k", "s", "-f", "raw", "a.raw"], stderr=writing)
            for _ in range(6000):
                try:
                    with socket.socket(socket.AF_UNIX) as probe: probe.connect("s")
                    break
                except OSError: time.sleep(0.01)
            for _ in range(3):
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect("s")
                    client.sendall(b"GET / HTTP/1.1" + bytes(8))
                    while client.recv(4096): pass
            try:
                size = ["nbdinfo", "--size", sys.argv[2]]
                print(subprocess.run(size, timeout=20, capture_output=True, text=True).stdout, end="")
                server.send_signal(signal.SIGTERM)
                server.wait(20)
                print("ended")
            finally: server.kill()
            """
        let result = try place.tool("python3", "-c", script, Workplace.merino, uri(place))
        #expect(result.output == "2097152\nended\n", "\(result.errors)")
    }

    @Test func inheritedSocketsAreNotServedFromTheBackground() throws {
        let place = try withImage()
        let script = Self.inheriting + "serve('--fork')"
        let result = try place.tool("python3", "-c", script, Workplace.merino)
        #expect(result.status == 1)
        #expect(result.errors.contains("LISTEN_FDS"), "\(result.errors)")
    }

    @Test(arguments: ["'-c', '/dev/nbd-none'", "'-c', '/dev/nbd-none', '-v'"])
    func inheritedSocketsAreNoUseToADevice(options: String) throws {
        let place = try withImage()
        let script = Self.inheriting + "serve(\(options))"
        let result = try place.tool("python3", "-c", script, Workplace.merino)
        #expect(result.status == 1)
        #expect(result.errors.contains("--connect"), "\(result.errors)")
    }

    @Test func aSecondServerLeavesTheFirstOnesPidFileAlone() throws {
        let place = try withImage()
        try serving(place, "-r", "-k", "s", "-f", "raw", "a.raw") {
            let path = "\(place.folder)/pid"
            let before = try String(contentsOfFile: path, encoding: .utf8)
            let second = try place.merino(
                "serve", "--pid-file", "pid", "-r", "-k", "s2", "-f", "raw", "a.raw")
            #expect(second.status == 1)
            #expect(second.errors.contains("'pid'"), "\(second.errors)")
            #expect(try String(contentsOfFile: path, encoding: .utf8) == before)
        }
    }

    @Test func aSecretStaysOutOfMessages() throws {
        let place = try withImage()
        for option in ["bogus=1", "format=none", "keyid=k,iv=AAAA"] {
            let result = try place.merino(
                "serve", "--object", "secret,id=s,data=TopSecretPassword," + option, "-f", "raw",
                "--tls-creds", "t", "a.raw")
            #expect(result.status == 1)
            #expect(!result.errors.contains("TopSecret"), "\(result.errors)")
            #expect(result.errors.contains("id=s"), "\(result.errors)")
        }
    }

    @Test(arguments: [["-k", "s"], ["-b", "127.0.0.1", "-p", "0"]])
    func theURIThatIsPrintedWorks(options: [String]) throws {
        let place = try withImage()
        let script = """
            "$0" serve --fork --print-uri --pid-file pid -r -t -f raw "$@" a.raw > uri || exit
            (cd / && nbdinfo --size "$(cat "$OLDPWD/uri")")
            kill "$(cat pid)"
            while test -e pid; do sleep 0.02; done
            """
        let result = try place.run("/bin/bash", ["-c", script, Workplace.merino] + options)
        #expect(result.output == "2097152\n", "\(result.errors)")
    }

    @Test func theImageAndItsSecretMayBeOpenDescriptors() throws {
        let place = try withImage()
        try EncryptedImage.qcow2.write("disk.qcow2", in: place)
        // Both servers leave what they were given, and the folder.
        let script = """
            merino=$0
            serve() { "$merino" serve --fork --pid-file pid -t -k s "$@" || exit; }
            finish() {
                nbdinfo --size "$uri"
                readlink "/proc/$(cat pid)/cwd"
                ls -l "/proc/$(cat pid)/fd" | grep -c marker
                kill "$(cat pid)"
                while test -e pid; do sleep 0.02; done
                test ! -e s || echo "the socket is there"
            }
            uri=$1
            exec 8> marker
            serve -f raw /dev/fd/9 9<> a.raw
            finish
            serve -r --object secret,id=s,file=<(printf 'correct horse') \
                --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=disk.qcow2
            finish
            """
        let result = try place.tool("bash", "-c", script, Workplace.merino, uri(place))
        #expect(result.output == "2097152\n/\n0\n1048576\n/\n0\n", "\(result.errors)")
    }

    @Test(arguments: [
        (["--offset=17M"], ["17825792", "'a.raw'", "2097152"]),
        (["-B", "backup"], ["'a.raw'", "'backup'"]), (["--tls-creds", "t"], ["--object", "id=t"]),
    ])
    func whatIsMissingIsNamed(options: [String], parts: [String]) throws {
        let place = try withImage()
        let result = try place.run(
            Workplace.merino, ["serve", "-k", "s", "-f", "raw"] + options + ["a.raw"])
        #expect(result.status == 1)
        for part in parts { #expect(result.errors.contains(part), "\(result.errors)") }
    }

    @Test func clientsThatAreTurnedAwayAreToldOf() throws {
        let place = try withImage()
        let key = String(repeating: "a1", count: 16)
        try "alice:\(key)\n".write(
            toFile: "\(place.folder)/keys.psk", atomically: false, encoding: .utf8)
        // A user whom the server's keys do not name. The server ends by itself or by the signal.
        let script = """
            mkdir other
            printf 'bob:%032d\\n' 7 > other/keys.psk
            "$0" serve -t -k s --pid-file pid -f raw --tls-creds t \
                --object "tls-creds-psk,id=t,endpoint=server,dir=$PWD" a.raw 2> errors &
            while kill -0 $! && ! test -s pid; do sleep 0.02; done 2>/dev/null
            nbdinfo --size "nbds+unix://bob@/?socket=$PWD/s&tls-psk-file=$PWD/other/keys.psk"
            for i in $(seq 500); do test -s errors && break; sleep 0.02; done
            kill $!
            wait $!
            cat errors
            """
        let result = try place.tool("bash", "-c", script, Workplace.merino)
        #expect(result.output.contains("client"), "\(result.output)\(result.errors)")
    }

    @Test func aSecretIsReadOnce() throws {
        let place = try Workplace()
        try EncryptedImage.qcow2.write("disk.qcow2", in: place)
        // It ends when its client has left, or at once where the pipe is empty at a second reading.
        let script = """
            printf 'correct horse' | "$0" serve -r -k s --pid-file pid \
                --object secret,id=s,file=/dev/stdin \
                --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=disk.qcow2 &
            while kill -0 $! && ! test -s pid; do sleep 0.02; done 2>/dev/null
            nbdinfo --size "$1"
            wait $!
            """
        let result = try place.tool("bash", "-c", script, Workplace.merino, uri(place))
        #expect(result.status == 0 && !result.output.isEmpty, "\(result.errors)")
    }

    @Test func anImageTakesAThrottleGroupFromTheCommandLine() throws {
        let place = try withImage()
        try serving(
            place, "-k", "s", "--object", "throttle-group,id=g", "--image-opts",
            "driver=throttle,throttle-group=g,file.driver=raw,file.file.filename=a.raw"
        ) {
            let size = try place.tool("nbdinfo", "--size", uri(place))
            #expect(size.output == "2097152\n", "\(size.errors)")
        }
    }

    @Test(
        "what is not there is refused by name",
        arguments: [
            ["--list"], ["--connect", "/dev/nbd0"],
            ["--tls-creds", "t"], ["--object", "throttle-groups,id=x"], ["--cache", "foo"],
            ["--tls-authz", "t"], ["-c", "x", "-k", "s"], ["--shared", "-1"],
        ])
    func refuses(_ options: [String]) throws {
        let place = try withImage()
        let result = try place.run(Workplace.merino, ["serve", "-f", "raw"] + options + ["a.raw"])
        #expect(result.status == 1)
        #expect(result.errors.contains(options[0]) || result.errors.contains(options.last ?? ""))
    }
}
