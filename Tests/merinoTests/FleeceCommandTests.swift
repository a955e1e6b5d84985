import Foundation
import Testing

/// `fleece` from outside: the view that it freezes, and what it leaves behind.
@Suite struct FleeceCommandTests {
    /// What the scripts below share: a daemon, a client of its QMP, and a look at what lies around.
    private static let prelude = """
        import json, os, signal, socket, subprocess, sys, time
        merino = sys.argv[1]
        def output(*arguments):
            return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
        def fails(*arguments):
            result = subprocess.run(arguments, capture_output=True, text=True)
            assert result.returncode == 1, (result.returncode, result.stdout, result.stderr)
            return result.stderr
        def begin(*arguments, lines):
            process = subprocess.Popen([merino, "fleece", *arguments],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            return process, [process.stdout.readline().strip() for _ in range(lines)]
        class Daemon:
            def __init__(self):
                self.process = subprocess.Popen([merino, "daemon", "--pidfile", "pid",
                    "--blockdev", "driver=file,filename=disk,node-name=disk,discard=unmap",
                    "--nbd-server", "addr.type=unix,addr.path=nbd",
                    "--export", "nbd,id=disk,node-name=disk,writable=on",
                    "--chardev", "socket,id=q,path=qmp,server=on,wait=off", "--monitor", "q"])
                for _ in range(3000):
                    if os.path.exists("qmp") and os.path.exists("nbd"): break
                    time.sleep(0.02)
                self.socket = socket.socket(socket.AF_UNIX)
                self.socket.connect("qmp")
                self.stream = self.socket.makefile("rw")
                self.stream.readline()
                self.ask("qmp_capabilities")
            def ask(self, command, **arguments):
                self.stream.write(json.dumps({"execute": command, "arguments": arguments}))
                self.stream.flush()
                while True:
                    answer = json.loads(self.stream.readline())
                    if "event" not in answer: return answer["return"]
            def nodes(self):
                return sorted(node["node-name"] for node in self.ask("query-named-block-nodes", flat=True))
            def end(self):
                self.ask("quit")
                assert self.process.wait(60) == 0
        def write(pattern, uri):
            output("qemu-io", "-f", "raw", "-c", f"write -P {pattern} 0 256k", uri)
        def has(pattern, uri):
            return "failed" not in output("qemu-io", "-r", "-f", "raw", "-c", f"read -P {pattern} 0 256k", uri)
        """

    private func python(_ script: String) throws {
        let place = try Workplace()
        try place.tool("truncate", "-s", "1M", "disk")
        try place.tool("qemu-io", "-f", "raw", "-c", "write -P 7 0 256k", "disk")
        let result = try place.tool("python3", "-c", Self.prelude + "\n" + script, Workplace.merino)
        #expect(result.status == 0, "\(result.errors)\(result.output)")
    }

    @Test(arguments: ["raw", "qcow2"])
    func anImageIsServedAndFrozenUntilItIsInterrupted(temporaryFormat: String) throws {
        try python(
            """
            process, lines = begin("disk", "--nbd-socket", "nbd", "--temp", "temp",
                "--temp-format", "\(temporaryFormat)", lines=4)
            live = lines[0].removeprefix("live: ")
            frozen = lines[2].removeprefix("uri: ")
            assert live != frozen, lines
            assert os.stat("temp").st_mode & 0o777 == 0o600
            write(9, live)
            assert has(7, frozen) and has(9, live)
            process.send_signal(signal.SIGINT)
            rest = process.stdout.read()
            assert process.wait(60) == 0
            assert "copied: 256 KiB" in rest, rest
            assert rest.endswith("ended: live; the temporary image is removed\\n"), rest
            assert sorted(name for name in os.listdir(".") if name[0] != ".") == ["disk"], os.listdir(".")
            assert has(9, "disk")
            """)
    }

    @Test func aViewOfADaemonsDiskIsHeldUntilItIsStopped() throws {
        try python(
            """
            daemon = Daemon()
            before = daemon.nodes()
            text = output(merino, "fleece", "disk", "--qmp", "qmp", "--temp", "temp", "--detach")
            frozen = text.splitlines()[1].removeprefix("uri: ")
            write(9, "nbd+unix:///disk?socket=nbd")
            assert has(7, frozen)
            assert "held already" in fails(merino, "fleece", "disk", "--qmp", "qmp", "--temp", "temp2")
            assert not os.path.exists("temp2")
            assert has(7, frozen)
            output(merino, "fleece", "disk", "--qmp", "qmp", "--stop")
            assert daemon.nodes() == before
            assert not os.path.exists("temp")
            assert has(9, "nbd+unix:///disk?socket=nbd")
            assert "no frozen view" in fails(merino, "fleece", "disk", "--qmp", "qmp", "--stop")
            daemon.end()
            """)
    }

    /// Somebody's file stays as it is, and nothing that was begun stays.
    @Test func whatIsRefusedLeavesNothingBehind() throws {
        try python(
            """
            daemon = Daemon()
            before = daemon.nodes()
            daemon.ask("nbd-server-stop")
            def refused(*arguments):
                return fails(merino, "fleece", *arguments, "--qmp", "qmp", "--nbd-socket", "other")
            open("mine", "w").write("kept")
            assert "mine' is there already" in refused("disk", "--temp", "mine")
            assert open("mine").read() == "kept"
            os.symlink("mine", "link")
            assert "link' is there already" in refused("disk", "--temp", "link")
            assert "it has disk" in refused("dsik", "--temp", "temp")
            assert "cannot create" in refused("disk", "--temp", "none/temp")
            assert "vhdx" in refused("disk", "--temp", "temp", "--temp-format", "vhdx")
            assert not os.path.exists("temp") and not os.path.exists("other")
            assert daemon.ask("x-query-nbd-server") is None
            assert daemon.nodes() == before
            daemon.end()
            """)
    }

    /// The daemon's folder has a file of that name: it is somebody else's.
    @Test func aRelativeTemporaryImageIsInTheFolderOfTheCommand() throws {
        try python(
            """
            daemon = Daemon()
            os.mkdir("else")
            open("temp", "w").write("kept")
            def run(*arguments):
                return subprocess.run([os.path.abspath(merino), "fleece", "disk", "--qmp", "../qmp",
                    *arguments], cwd="else", check=True, capture_output=True, text=True).stdout
            text = run("--temp", "temp", "--detach")
            assert open("temp").read() == "kept"
            assert os.path.exists("else/temp")
            write(9, "nbd+unix:///disk?socket=nbd")
            assert has(7, text.splitlines()[1].removeprefix("uri: "))
            run("--stop")
            assert open("temp").read() == "kept"
            assert not os.path.exists("else/temp")
            daemon.end()
            """)
    }

    @Test func aSignalEndsTheWaitForADaemonThatDoesNotGreet() throws {
        try python(
            """
            silent = socket.socket(socket.AF_UNIX)
            silent.bind("silent")
            silent.listen()
            for number, status in [(signal.SIGINT, 130), (signal.SIGTERM, 143)]:
                process, _ = begin("disk", "--qmp", "silent", "--temp", "temp", lines=0)
                connection, _ = silent.accept()
                process.send_signal(number)
                assert process.wait(60) == status, process.returncode
                connection.close()
            assert not os.path.exists("temp")
            """)
    }

    /// It may go on later: what it holds is not taken from under it.
    @Test func signalsEndTheWaitForADaemonThatStoppedAndTheViewStays() throws {
        try python(
            """
            daemon = Daemon()
            before = daemon.nodes()
            process, lines = begin("disk", "--qmp", "qmp", "--temp", "temp", lines=3)
            daemon.process.send_signal(signal.SIGSTOP)
            os.waitpid(daemon.process.pid, os.WUNTRACED)
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 1, process.returncode
            errors = process.stderr.read()
            assert "does not answer" in errors and "'disk' may still be held" in errors, errors
            assert os.path.exists("temp")
            daemon.process.send_signal(signal.SIGCONT)
            assert has(7, lines[1].removeprefix("uri: "))
            output(merino, "fleece", "disk", "--qmp", "qmp", "--stop")
            assert daemon.nodes() == before
            assert not os.path.exists("temp")
            daemon.end()
            """)
    }

    @Test func aViewWhoseDaemonDiedLeavesNothingBehind() throws {
        try python(
            """
            daemon = Daemon()
            process, lines = begin("disk", "--qmp", "qmp", "--temp", "temp", lines=3)
            daemon.process.kill()
            daemon.process.wait()
            assert process.wait(60) == 1
            errors = process.stderr.read()
            assert "the daemon at unix:qmp" in errors, errors
            assert "the frozen view of 'disk' ended with it" in errors, errors
            assert not os.path.exists("temp")
            """)
    }

    @Test func aServerThatADetachedViewStartedStaysAndThatIsTold() throws {
        try python(
            """
            daemon = Daemon()
            daemon.ask("nbd-server-stop")
            text = output(merino, "fleece", "disk", "--qmp", "qmp", "--temp", "temp", "--detach",
                "--nbd-socket", "other")
            assert "nbd-server-stop stops it" in text, text
            output(merino, "fleece", "disk", "--qmp", "qmp", "--stop")
            assert daemon.ask("x-query-nbd-server") is not None
            text = output(merino, "fleece", "disk", "--qmp", "qmp", "--temp", "temp", "--detach",
                "--nbd-socket", "third")
            assert "nbd-server-stop" not in text, text
            output(merino, "fleece", "disk", "--qmp", "qmp", "--stop")
            daemon.end()
            """)
    }
}
