"""The load: fio's NBD engine against a server's socket, and a bare NBD client for the start time."""

import json
import socket
import struct
import subprocess


class LoadFailed(Exception):
    """fio failed; the message is what it said."""


class Load:
    def __init__(self, name, pattern, block, depth, extra=()):
        self.name = name
        self.pattern = pattern
        self.block = block
        self.depth = depth
        self.extra = list(extra)

    @property
    def writes(self):
        return "write" in self.pattern


LOADS = [
    *(Load(f"{pattern}-4k-d{depth}", pattern, "4k", depth)
      for pattern in ("randread", "randwrite") for depth in (1, 4, 8, 32)),
    Load("read-256k-d16", "read", "256k", 16),
    Load("write-256k-d16", "write", "256k", 16),
]

# What a server has had when its memory is looked at.
BUSY = next(load for load in LOADS if load.name == "randread-4k-d32")

# Guest writes while a snapshot is held. The first touches each 64 KiB cluster once, so that every
# write has old data to save; the second is what a guest does.
FLEECING_LOADS = [
    Load("first-write-4k-d1", "write:60k", "4k", 1),
    Load("first-write-4k-d32", "write:60k", "4k", 32),
    Load("randwrite-4k-d32", "randwrite", "4k", 32),
]

# What of a disk is copied to the target when its frozen view is read: nothing, all of it in the order of the
# disk, all of it in random order.
FROZEN_STATES = ["untouched", "copied", "scattered"]


def copy_clusters(state, uri, mebibytes, seed):
    """Writes to each 64 KiB cluster of the disk once, so that its old data is copied."""
    if state == "untouched":
        return
    pattern = {"copied": "write", "scattered": "randwrite"}[state]
    done = subprocess.run(
        ["fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", f"--rw={pattern}", "--bs=64k",
         "--iodepth=1", f"--size={mebibytes}M", f"--randseed={seed}", "--eta=never"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise LoadFailed((done.stderr or done.stdout).strip()[-400:])


def copy_to_nowhere(uri):
    done = subprocess.run(["nbdcopy", uri, "null:"], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise LoadFailed(done.stderr.strip()[-400:])


def run_fio(load, uri, seconds, seed, size=None):
    """Runs one load for `seconds`, or once over `size` bytes, and gives its figures."""
    arguments = ["fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", f"--rw={load.pattern}",
                 f"--bs={load.block}", f"--iodepth={load.depth}", f"--randseed={seed}",
                 "--output-format=json", "--eta=never", *load.extra]
    if size is None:
        arguments += ["--time_based", f"--runtime={seconds}"]
    else:
        arguments += [f"--size={size}", f"--runtime={seconds}"]
    done = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=seconds * 4 + 60)
    start = done.stdout.find("{")
    if done.returncode != 0 or start < 0:
        raise LoadFailed((done.stderr or done.stdout).strip()[-400:])
    job = json.loads(done.stdout[start:])["jobs"][0]
    side = job["write" if load.writes else "read"]
    if job["error"] != 0 or side["total_ios"] == 0:
        raise LoadFailed(done.stderr.strip()[-400:] or "no request completed")
    return {
        "operations": side["total_ios"],
        "operations_per_second": side["iops"],
        "latency_microseconds_mean": side["lat_ns"]["mean"] / 1000,
        "latency_microseconds_p99": side["clat_ns"]["percentile"]["99.000000"] / 1000,
    }


class BareClient:
    """Just enough NBD (the fixed newstyle handshake, simple replies) to time a first reply."""

    MAGIC = 0x4E42444D41474943
    OPTION_MAGIC = 0x49484156454F5054

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        try:
            self.socket.connect(path)
        except OSError:
            self.socket.close()
            raise

    def receive(self, count):
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise ConnectionError("the server closed the connection")
            data += more
        return data

    def read_first_block(self, export):
        magic, option_magic, _ = struct.unpack(">QQH", self.receive(18))
        if (magic, option_magic) != (self.MAGIC, self.OPTION_MAGIC):
            raise ConnectionError("not an NBD server")
        name = export.encode()
        # Flags FIXED_NEWSTYLE and NO_ZEROES, then NBD_OPT_EXPORT_NAME, then a read of 4 KiB at 0.
        self.socket.sendall(struct.pack(">IQII", 3, self.OPTION_MAGIC, 1, len(name)) + name)
        self.receive(10)
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 4096))
        self.receive(16 + 4096)

    def close(self):
        self.socket.close()
