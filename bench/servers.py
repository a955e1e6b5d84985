"""The servers that are compared: how each is started on an image, and what it costs while it runs."""

import os
import shutil
import signal
import socket
import subprocess
import time

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class ServerFailed(Exception):
    """The server could not be started; the message is what it said."""


class Server:
    """One way to serve one image over a Unix socket.

    `command` is called with the image's path, its format and the socket's path, and gives the
    arguments. `export` is the export's name.
    """

    def __init__(self, name, program, command, cache, formats=("raw", "qcow2"), export=""):
        self.name = name
        self.program = program
        self.command = command
        self.cache = cache
        self.formats = formats
        self.export = export

    @property
    def is_merino(self):
        return self.name.startswith("merino")

    def available(self):
        return shutil.which(self.program) is not None

    def start(self, image, image_format, socket_path, wait=True):
        return Running([self.program] + self.command(image, image_format, socket_path),
                       socket_path, wait)

    def uri(self, socket_path):
        return uri(self.export, socket_path)


def uri(export, socket_path):
    return f"nbd+unix:///{export}?socket={socket_path}"


class Running:
    """A server process; a context manager that ends what it started, and only that."""

    def __init__(self, arguments, socket_path, wait=True):
        if os.path.exists(socket_path):
            os.unlink(socket_path)
        self.socket_path = socket_path
        self.arguments = arguments
        self.errors = open(socket_path + ".log", "w+b")
        self.process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=self.errors, stderr=self.errors)
        if wait:
            try:
                self.wait_until_listening()
            except ServerFailed:
                self.stop()
                raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    @property
    def pid(self):
        return self.process.pid

    def wait_until_listening(self, seconds=10):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.connect(self.socket_path)
                    return
            except OSError:
                time.sleep(0.002)
        raise ServerFailed(self.said() or "it never listened")

    def said(self):
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace").strip()[-400:]

    def cpu_seconds(self):
        """User and system time of the process: all its threads, ended ones and io_uring's
        kernel workers (which belong to the process) included."""
        with open(f"/proc/{self.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS

    def memory(self):
        """Proportional and resident set size in KiB."""
        result = {}
        with open(f"/proc/{self.pid}/smaps_rollup") as file:
            for line in file:
                key, _, rest = line.partition(":")
                if key in ("Pss", "Rss"):
                    result[key.lower()] = int(rest.split()[0])
        return result

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.errors.close()
        for path in (self.socket_path, self.socket_path + ".log"):
            if os.path.exists(path):
                os.unlink(path)


CACHE_OPTION = {"buffered": "writeback", "direct": "none"}


def one_image_server(cache, aio=None, verb=()):
    """The command line that qemu-nbd and `merino serve` share."""

    def command(image, image_format, socket_path):
        arguments = [*verb, "-t", "-e", "16", "-k", socket_path, "-f", image_format,
                     f"--cache={CACHE_OPTION[cache]}"]
        if aio:
            arguments.append(f"--aio={aio}")
        return arguments + [image]

    return command


def file_node(name, path, cache, aio=None):
    text = f"driver=file,node-name={name},filename={path}"
    text += f",cache.direct={'on' if cache == 'direct' else 'off'}"
    return text + (f",aio={aio}" if aio else "")


def daemon(cache, aio=None, verb=()):
    """The command line that qemu-storage-daemon and `merino daemon` share."""

    def command(image, image_format, socket_path):
        return [*verb,
                "--blockdev", file_node("storage", image, cache, aio),
                "--blockdev", f"driver={image_format},node-name=disk,file=storage",
                "--nbd-server", f"addr.type=unix,addr.path={socket_path}",
                "--export", "type=nbd,id=export0,node-name=disk,name=disk,writable=on"]

    return command


def fleecing_daemon(cache, temporary, aio=None, verb=()):
    """A daemon that holds a snapshot of the disk: the guest's export is `disk`, the frozen view
    is `frozen`."""

    def command(image, image_format, socket_path):
        return [*verb,
                "--blockdev", file_node("storage", image, cache, aio),
                "--blockdev", f"driver={image_format},node-name=active,file=storage",
                "--blockdev", file_node("temporary-file", temporary, cache, aio),
                "--blockdev", "driver=qcow2,node-name=temporary,file=temporary-file",
                "--blockdev",
                "driver=copy-before-write,node-name=filter,file=active,target=temporary",
                "--blockdev", "driver=snapshot-access,node-name=view,file=filter",
                "--nbd-server", f"addr.type=unix,addr.path={socket_path}",
                "--export", "type=nbd,id=export0,node-name=filter,name=disk,writable=on",
                "--export", "type=nbd,id=export1,node-name=view,name=frozen"]

    return command


def all_servers(merino):
    """Every server, with cache modes alike: a group is compared within itself."""
    servers = []
    for cache in ("buffered", "direct"):
        modes = ("threads", "io_uring") if cache == "buffered" else ("threads", "native", "io_uring")
        for aio in modes:
            servers.append(Server(f"qemu-nbd/{aio}", "qemu-nbd",
                                  one_image_server(cache, aio), cache))
        for aio in modes:
            servers.append(Server(f"qsd/{aio}", "qemu-storage-daemon",
                                  daemon(cache, aio), cache, export="disk"))
        servers.append(Server("merino-serve", merino,
                              one_image_server(cache, verb=("serve",)), cache))
        servers.append(Server("merino-daemon", merino,
                              daemon(cache, verb=("daemon",)), cache, export="disk"))
    servers.append(Server("nbdkit", "nbdkit",
                          lambda image, _, path: ["-f", "-U", path, "file", image],
                          "buffered", formats=("raw",)))
    return servers


def floor(directory):
    """The least that a server can do (floor.c), built into `directory`; nothing without a C compiler."""
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "floor.c")
    program = os.path.join(directory, "floor")
    if not os.path.exists(program):
        if shutil.which("cc") is None:
            return []
        subprocess.run(["cc", "-O2", "-o", program, source], check=True)
    return [Server("floor", program, lambda image, _, path: [image, path], "buffered",
                   formats=("raw",))]


def fleecing_servers(merino, temporary):
    servers = []
    for aio in ("threads", "io_uring"):
        servers.append(Server(f"qsd/{aio}", "qemu-storage-daemon",
                              fleecing_daemon("buffered", temporary, aio), "buffered",
                              export="disk"))
    servers.append(Server("merino-daemon", merino,
                          fleecing_daemon("buffered", temporary, verb=("daemon",)), "buffered",
                          export="disk"))
    return servers
