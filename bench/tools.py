"""The image tool beside qemu-img: the same command on the same images, in alternation."""

import os
import random
import statistics
import subprocess
import time

import report

MEBI = 1 << 20


class Images:
    """Images to work on, made when first asked for."""

    def __init__(self, directory, mebibytes):
        self.directory = directory
        self.mebibytes = mebibytes
        self.made = {}

    def path(self, name):
        return os.path.join(self.directory, name)

    def get(self, name):
        if name not in self.made:
            path = self.path(name)
            getattr(self, "make_" + name.replace(".", "_").replace("-", "_"))(path)
            self.made[name] = path
        return self.made[name]

    def convert(self, *arguments):
        subprocess.run(["qemu-img", "convert", *arguments], check=True)

    def make_full_raw(self, path):
        """Data that compresses about as disks do: random bytes, text-like bytes and zeroes, mixed."""
        random.seed(1)
        words = [random.randbytes(random.randint(2, 12)) for _ in range(2000)]
        text = b"".join(random.choice(words) for _ in range(600000))[:4 * MEBI]
        with open(path, "wb") as file:
            for index in range(self.mebibytes):
                if index % 8 == 7:
                    file.write(bytes(MEBI))
                elif index % 2:
                    file.write(os.urandom(MEBI))
                else:
                    start = random.randrange(3 * MEBI)
                    file.write(text[start:start + MEBI])

    def make_full_qcow2(self, path):
        self.convert("-f", "raw", "-O", "qcow2", self.get("full.raw"), path)

    def make_copy_raw(self, path):
        subprocess.run(["cp", "--reflink=never", self.get("full.raw"), path], check=True)

    def make_chain_base_qcow2(self, path):
        self.convert("-f", "raw", "-O", "qcow2", self.get("full.raw"), path)

    def make_chain_qcow2(self, path):
        """An image that has half of its clusters itself, over one that has all."""
        base = self.get("chain-base.qcow2")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", path],
                       check=True)
        script = "".join(f"write -q -P {index % 255} {index * 2}M 1M\n"
                         for index in range(self.mebibytes // 2))
        subprocess.run(["qemu-io", "-t", "unsafe", path], input=script, text=True, check=True,
                       stdout=subprocess.DEVNULL)

    def make_sparse_raw(self, path):
        """1 TiB, of which as much as the disk's size is data, in pieces of 1 MiB."""
        random.seed(2)
        with open(path, "wb") as file:
            file.truncate(1 << 40)
            for place in sorted(random.sample(range(1 << 20), self.mebibytes)):
                file.seek(place * MEBI)
                file.write(os.urandom(MEBI))

    def make_sparse_qcow2(self, path):
        self.convert("-f", "raw", "-O", "qcow2", self.get("sparse.raw"), path)

    def make_fragmented_qcow2(self, path):
        """A disk whose clusters of 4 KiB were written in random order: no two lie together."""
        size = min(self.mebibytes, 512)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path,
                        f"{size}M"], check=True)
        random.seed(3)
        places = list(range(0, size * 256, 2))
        random.shuffle(places)
        script = "".join(f"write -q {place * 4}k 4k\n" for place in places)
        subprocess.run(["qemu-io", "-t", "unsafe", path], input=script, text=True, check=True,
                       stdout=subprocess.DEVNULL)


class Case:
    """One command; `arguments` are made with the images at hand and the path of a target."""

    def __init__(self, name, arguments, images, target=None):
        self.name = "tools/" + name
        self.arguments = arguments
        self.images = images
        self.target = target


CASES = [
    Case("convert/raw-qcow2", lambda i, t: ["convert", "-f", "raw", "-O", "qcow2", i[0], t],
         ["full.raw"], "qcow2"),
    Case("convert/qcow2-raw", lambda i, t: ["convert", "-f", "qcow2", "-O", "raw", i[0], t],
         ["full.qcow2"], "raw"),
    Case("convert/raw-raw", lambda i, t: ["convert", "-f", "raw", "-O", "raw", i[0], t],
         ["full.raw"], "raw"),
    Case("convert/raw-raw-offload", lambda i, t: ["convert", "-C", "-f", "raw", "-O", "raw", i[0], t],
         ["full.raw"], "raw"),
    Case("convert/qcow2-chain", lambda i, t: ["convert", "-f", "qcow2", "-O", "qcow2", i[0], t],
         ["chain.qcow2"], "qcow2"),
    Case("convert/sparse-raw", lambda i, t: ["convert", "-f", "raw", "-O", "raw", i[0], t],
         ["sparse.raw"], "raw"),
    Case("convert/sparse-qcow2", lambda i, t: ["convert", "-f", "raw", "-O", "qcow2", i[0], t],
         ["sparse.raw"], "qcow2"),
    Case("convert/compressed-zlib",
         lambda i, t: ["convert", "-c", "-f", "raw", "-O", "qcow2", i[0], t], ["full.raw"], "qcow2"),
    Case("convert/compressed-zstd",
         lambda i, t: ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd",
                       i[0], t], ["full.raw"], "qcow2"),
    Case("compare/raw-raw", lambda i, t: ["compare", "-f", "raw", "-F", "raw", i[0], i[1]],
         ["full.raw", "copy.raw"]),
    Case("compare/raw-qcow2", lambda i, t: ["compare", "-f", "raw", "-F", "qcow2", i[0], i[1]],
         ["full.raw", "full.qcow2"]),
    Case("compare/sparse", lambda i, t: ["compare", "-f", "raw", "-F", "qcow2", i[0], i[1]],
         ["sparse.raw", "sparse.qcow2"]),
    Case("map/fragmented", lambda i, t: ["map", "-f", "qcow2", "--output=json", i[0]],
         ["fragmented.qcow2"]),
    Case("measure/sparse", lambda i, t: ["measure", "-f", "raw", "-O", "qcow2", i[0]],
         ["sparse.raw"]),
]


class ToolFailed(Exception):
    """A command did not do what it was to; the message is what it said."""


def run(program, case, images, directory):
    """One run: seconds, CPU seconds and the most memory of the process, and the target's size."""
    paths = [images.get(name) for name in case.images]
    target = os.path.join(directory, f"target-{os.path.basename(program)}")
    if case.target and os.path.exists(target):
        os.unlink(target)
    for path in paths:
        settle(path)
    arguments = [program] + case.arguments(paths, target)
    begin = time.monotonic()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    seconds = time.monotonic() - begin
    if status != 0:
        raise ToolFailed(errors.decode(errors="replace").strip() or f"status {status}")
    sample = {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime,
              "memory_mebibytes": usage.ru_maxrss / 1024}
    if case.target:
        sample["target_mebibytes"] = os.stat(target).st_blocks * 512 / MEBI
        sample["target"] = target
    return sample


def verify(case, images, sample):
    """The target has the source's contents and, as qcow2, no errors."""
    if not case.target:
        return
    source = images.get(case.images[0])
    kind = "raw" if source.endswith(".raw") else "qcow2"
    done = subprocess.run(["qemu-img", "compare", "-f", kind, "-F", case.target, source,
                           sample["target"]], capture_output=True, text=True)
    if done.returncode != 0:
        raise ToolFailed("the target differs: " + done.stdout + done.stderr)
    if case.target == "qcow2":
        done = subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", sample["target"]],
                              capture_output=True, text=True)
        if done.returncode != 0:
            raise ToolFailed("the target is damaged: " + done.stdout + done.stderr)


def settle(path):
    """What earlier runs wrote reaches the disk, and the image is in the page cache for everybody."""
    os.sync()
    with open(path, "rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        offset = 0
        while offset < end:
            try:
                offset = os.lseek(file.fileno(), offset, os.SEEK_DATA)
            except OSError:
                return
            hole = os.lseek(file.fileno(), offset, os.SEEK_HOLE)
            while offset < hole:
                offset += len(os.pread(file.fileno(), min(hole - offset, MEBI), offset))


def measure(case, programs, directory, images, repeats):
    """All runs of a case, the programs in alternation; the first targets are verified."""
    samples = {name: [] for name in programs}
    for turn in range(repeats):
        for name, program in programs.items():
            sample = run(program, case, images, directory)
            if turn == 0:
                verify(case, images, sample)
            sample.pop("target", None)
            samples[name].append(sample)
    return samples


FIGURES = [("seconds", "seconds"), ("cpu_seconds", "CPU seconds"), ("memory_mebibytes", "peak MiB"),
           ("target_mebibytes", "target MiB")]


def text(case, samples):
    """The table, with the ratio of the medians below."""
    rows, medians = [], {}
    for name, runs in samples.items():
        medians[name] = {key: statistics.median(run[key] for run in runs)
                         for key, _ in FIGURES if key in runs[0]}
        rows.append([name] + [medians[name].get(key) for key, _ in FIGURES])
    lines = [f"## {case.name}", report.table(["program"] + [text for _, text in FIGURES], rows)]
    ours, theirs = medians.get("merino"), medians.get("qemu-img")
    if ours and theirs:
        lines.append("merino against qemu-img (above 1 is ahead): "
                     + ", ".join(f"{heading} {theirs[key] / ours[key]:.2f}×"
                                 for key, heading in FIGURES if ours.get(key) and theirs.get(key)))
    return "\n".join(lines)
