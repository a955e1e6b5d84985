import Foundation
import Testing

/// The daemon as a process: its streams, its service manager, its limits.
@Suite struct DaemonCommandTests {
    @Test func aMonitorAnswersOnTheStandardStreams() throws {
        let place = try Workplace()
        let input = """
            {"execute": "qmp_capabilities"}
            {"execute": "query-version", "id": 1}
            {"execute": "quit"}

            """
        let result = try place.merino(
            "daemon", "--chardev", "stdio,id=m,signal=off", "--monitor", "m", input: input)
        #expect(result.status == 0, "\(result.errors)")
        let lines = result.output.split(whereSeparator: \.isNewline)
        #expect(lines.count == 4)
        #expect(lines.first?.contains("\"QMP\"") == true)
        #expect(lines.dropFirst(2).first?.contains("\"id\": 1") == true)
    }

    /// Runs `script`, which has `merino` and the folder as arguments.
    private func python(_ script: String, in place: Workplace) throws {
        let result = try place.tool("python3", "-c", script, Workplace.merino, place.folder)
        #expect(result.status == 0, "\(result.errors)\(result.output)")
    }

    private static let talk = """
        {"execute": "qmp_capabilities"}
        {"execute": "query-version", "id": 1}
        {"execute": "quit"}

        """

    @Test func aMonitorAnswersInAFileAndTakesCommandsFromAnother() throws {
        let place = try Workplace()
        try Self.talk.write(toFile: "\(place.folder)/commands", atomically: false, encoding: .utf8)
        let result = try place.merino(
            "daemon", "--chardev", "file,id=m,path=replies,input-path=commands", "--monitor", "m")
        #expect(result.status == 0, "\(result.errors)")
        let replies = try String(contentsOfFile: "\(place.folder)/replies", encoding: .utf8)
        #expect(replies.contains("\"QMP\"") && replies.contains("\"id\": 1"), "\(replies)")
    }

    @Test("a monitor answers on", arguments: ["pipe", "pty", "udp"])
    func characterDevice(_ kind: String) throws {
        let place = try Workplace()
        try Self.talk.write(toFile: "\(place.folder)/talk", atomically: false, encoding: .utf8)
        let script = """
            import os, socket, subprocess, sys
            kind = "\(kind)"
            *talk, last = open("talk", "rb").read().splitlines(True)
            options = kind + ",id=m"
            if kind == "pipe":
                os.mkfifo("p.in")
                os.mkfifo("p.out")
                options += ",path=p"
                ends = [os.open("p.in", os.O_RDWR), os.open("p.out", os.O_RDWR)]
            if kind == "udp":
                client, other = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
                for end in client, other:
                    end.bind(("127.0.0.1", 0))
                port = other.getsockname()[1]
                other.close()
                options += ",host=127.0.0.1,port=%d,localaddr=127.0.0.1,localport=%d" % (
                    client.getsockname()[1], port)
                ends = [client.fileno(), client.fileno()]
            daemon = subprocess.Popen(
                [sys.argv[1], "daemon", "--chardev", options, "--monitor", "m"],
                stdout=subprocess.PIPE)
            if kind == "pty":
                line = daemon.stdout.readline().decode()
                assert line.startswith("char device redirected to ") and "(label m)" in line, line
                terminal = os.open(line.split()[4], os.O_RDWR | os.O_NOCTTY)
                ends = [terminal, terminal]
            found = os.read(ends[1], 65536)
            if kind == "udp":
                client.connect(("127.0.0.1", port))
            os.write(ends[0], b"".join(talk))
            while b'"id": 1' not in found:
                found += os.read(ends[1], 65536)
            assert b'"QMP"' in found, found
            # What a terminal has not handed out yet is gone with the one who wrote it.
            os.write(ends[0], last)
            assert daemon.wait(60) == 0
            """
        try python(script, in: place)
    }

    @Test func aDeviceThatMakesNoSenseIsRefusedByItsName() throws {
        let place = try Workplace()
        for kind in ["mux", "parallel", "nosuch"] {
            let result = try place.merino("daemon", "--chardev", "\(kind),id=m")
            #expect(result.status == 1 && result.errors.contains(kind), "\(result.errors)")
        }
    }

    @Test func objectsAndDevicesAreListedOnDemand() throws {
        let place = try Workplace()
        for (option, text, line) in [
            ("--object", "help", "  secret"), ("--object", "secret,help", "  data=<string>"),
            ("--chardev", "help", "  socket"),
        ] {
            let result = try place.merino("daemon", option, text)
            #expect(result.status == 0 && result.errors.isEmpty, "\(result.errors)")
            #expect(result.output.split(separator: "\n").contains { $0 == line }, "\(text)")
        }
    }

    @Test func cipherSuitesAreCheckedAndNeedAPriority() throws {
        let place = try Workplace()
        for (options, word) in [("", "priority"), (",priority=NOSUCH", "NOSUCH")] {
            let result = try place.merino("daemon", "--object", "tls-cipher-suites,id=c\(options)")
            #expect(result.status == 1 && result.errors.contains(word), "\(result.errors)")
        }
        let result = try place.merino(
            "daemon", "--object", "tls-cipher-suites,id=c,priority=NORMAL", "--chardev",
            "stdio,id=m,signal=off", "--monitor", "m", input: Self.talk)
        #expect(result.status == 0, "\(result.errors)")
    }

    @Test func aSignalEndsTheTryingOfAPassphrase() throws {
        let place = try Workplace()
        let made = try place.run(
            "/usr/bin/env",
            [
                "qemu-img", "create", "-q", "--object", "secret,id=s,data=x", "-f", "luks", "-o",
                "key-secret=s,iter-time=10", "disk", "1M",
            ])
        #expect(made.status == 0, "\(made.errors)")
        // Some minutes of work.
        try place.tool(
            "sh", "-c",
            "printf '\\007\\000\\000\\000' | dd of=disk bs=1 seek=212 conv=notrunc status=none")
        let key = ["--object", "secret,id=s,data=x"]
        let disk = "driver=luks,file.driver=file,file.filename=disk,key-secret=s"
        for arguments in [
            ["daemon"] + key + ["--blockdev", "node-name=d,\(disk)"],
            ["serve", "-k", "\(place.folder)/socket"] + key + ["--image-opts", disk],
        ] {
            let result = try place.run(
                "/usr/bin/timeout",
                ["--preserve-status", "-k", "40", "-s", "TERM", "2", Workplace.merino] + arguments)
            #expect(result.status != 137, "\(arguments)")
        }
    }

    @Test(arguments: [false, true])
    func theServiceManagerHearsWhenTheDaemonIsReadyAndWhenItStops(daemonizes: Bool) throws {
        let place = try Workplace()
        let script = """
            import os, signal, socket, subprocess, sys
            manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            manager.bind("notify")
            manager.settimeout(60)
            environment = dict(os.environ, NOTIFY_SOCKET=sys.argv[2] + "/notify")
            arguments = [sys.argv[1], "daemon", "--pidfile", sys.argv[2] + "/pid"]
            if "\(daemonizes)" == "true":
                arguments.append("--daemonize")
            process = subprocess.Popen(arguments, env=environment)
            ready = dict(line.split("=") for line in manager.recv(4096).decode().split("\\n"))
            assert ready["READY"] == "1", ready
            number = int(open("pid").read())
            assert int(ready["MAINPID"]) == number, ready
            if "\(daemonizes)" == "true":
                assert process.wait(60) == 0
            os.kill(number, signal.SIGTERM)
            assert manager.recv(4096) == b"STOPPING=1"
            if "\(daemonizes)" == "false":
                assert process.wait(60) == 0
            """
        try python(script, in: place)
    }

    @Test func inheritedSocketsAreKnownByTheirNames() throws {
        let place = try Workplace()
        try place.tool("truncate", "-s", "1M", "disk")
        let script = """
            import json, os, socket, subprocess, sys
            def listener(path):
                made = socket.socket(socket.AF_UNIX)
                made.bind(path)
                made.listen()
                return made
            sockets = [listener("nbd.socket"), listener("qmp.socket")]
            child = os.fork()
            if child == 0:
                # Out of the way of 3 and 4 first.
                high = [os.dup2(made.fileno(), 20 + place) for place, made in enumerate(sockets)]
                for place, number in enumerate(high):
                    os.dup2(number, 3 + place)
                    os.set_inheritable(3 + place, True)
                os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2",
                    LISTEN_FDNAMES="nbd:qmp")
                os.execv(sys.argv[1], ["merino", "daemon",
                    "--chardev", "socket,id=q,fd=qmp,server=on,wait=off", "--monitor", "q",
                    "--blockdev", "file,node-name=f,filename=disk",
                    "--nbd-server", "addr.type=fd,addr.str=nbd",
                    "--export", "nbd,id=e,node-name=f"])
            for made in sockets:
                made.close()
            subprocess.run(["nbdinfo", "--size", "nbd+unix:///f?socket=nbd.socket"], check=True)
            qmp = socket.socket(socket.AF_UNIX)
            qmp.connect("qmp.socket")
            qmp.sendall(b'{"execute": "qmp_capabilities"} {"execute": "quit"}')
            while qmp.recv(4096):
                pass
            assert os.waitpid(child, 0)[1] == 0
            """
        try python(script, in: place)
    }

    /// Clients that take all descriptors keep others waiting, not away for ever.
    @Test func aServerThatIsOutOfDescriptorsTakesClientsAgainLater() throws {
        let place = try Workplace()
        try place.tool("truncate", "-s", "1M", "disk")
        let script = """
            import os, resource, signal, socket, subprocess, sys, time
            def limit():
                resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
            server = subprocess.Popen([sys.argv[1], "serve", "-t", "-e", "0", "-f", "raw",
                "-k", "s", "disk"], preexec_fn=limit)
            # The file is there before the server listens.
            for _ in range(6000):
                try:
                    with socket.socket(socket.AF_UNIX) as probe:
                        probe.connect("s")
                    break
                except OSError:
                    time.sleep(0.01)
            clients = []
            for _ in range(60):
                client = socket.socket(socket.AF_UNIX)
                client.settimeout(60)
                client.connect("s")
                clients.append(client)
            # All descriptors are taken: of the last clients some are not greeted.
            assert clients[0].recv(18), "the first client is served"
            clients[-1].settimeout(0.5)
            try:
                assert not clients[-1].recv(18), "the limit was not reached"
            except socket.timeout:
                pass
            for client in clients[:-1]:
                client.close()
            # The one that waited is served now, and so is another one.
            clients[-1].settimeout(60)
            assert clients[-1].recv(18)
            subprocess.run(["nbdinfo", "--size", "nbd+unix:///?socket=s"], check=True)
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
            """
        try python(script, in: place)
    }
}
