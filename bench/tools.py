"""The image tool beside qemu-img: the same command on the same images, in alternation."""

import os
import resource
import statistics
import subprocess
import tempfile
import time

import report
from images import MEBI, Images  # noqa: F401: bench/run makes them


class Case:
    """One command. `{0}`, `{1}` are its images, `{target}` what it writes.

    Commands that change their image have `changes`: then each program has a copy of its own, and
    qemu-img carries out `before` and `after`, which are not measured.
    """

    def __init__(self, name, command, images, target=None, changes=False, before=None, after=None,
                 runs=1, goal=None):
        self.name = "tools/" + name
        self.command = command.split()
        self.images = images
        self.target = target
        self.changes = changes
        self.before = before
        self.after = after
        # How often a measured run starts the command: short ones would be too short for the clock.
        self.runs = runs
        # How many times faster than qemu-img it is to be.
        self.goal = goal


def convert(name, options, image, target, goal=1.0):
    return Case(f"convert/{name}", f"convert {options} {{0}} {{target}}", [image], target, goal=goal)


def cases():
    raw_raw, raw_qcow2 = "-f raw -O raw", "-f raw -O qcow2"
    qcow2_raw, qcow2_qcow2 = "-f qcow2 -O raw", "-f qcow2 -O qcow2"
    found = [
        convert("compressed-zlib", f"-c {raw_qcow2}", "small.raw", "qcow2", 1.8),
        convert("compressed-zstd", f"-c {raw_qcow2} -o compression_type=zstd", "small.raw", "qcow2",
                1.8),
        convert("decompress", qcow2_raw, "packed.qcow2", "raw"),
        convert("raw-qcow2", raw_qcow2, "full.raw", "qcow2"),
        convert("qcow2-raw", qcow2_raw, "full.qcow2", "raw"),
        convert("raw-raw", raw_raw, "full.raw", "raw"),
        convert("raw-raw-offload", f"-C {raw_raw}", "full.raw", "raw"),
        convert("qcow2-chain", qcow2_qcow2, "chain.qcow2", "qcow2"),
        convert("sparse-raw", raw_raw, "sparse.raw", "raw"),
        convert("sparse-qcow2", raw_qcow2, "sparse.raw", "qcow2"),
        Case("compare/raw-raw", "compare -f raw -F raw {0} {1}", ["full.raw", "copy.raw"],
             goal=1.5),
        Case("compare/raw-qcow2", "compare -f raw -F qcow2 {0} {1}", ["full.raw", "full.qcow2"],
             goal=1.5),
        Case("compare/sparse", "compare -f raw -F qcow2 {0} {1}", ["sparse.raw", "sparse.qcow2"],
             goal=1.5),
        Case("check/full", "check -f qcow2 {0}", ["full.qcow2"], runs=10),
        Case("check/sparse-1T", "check -f qcow2 {0}", ["sparse.qcow2"], runs=10, goal=1.5),
        Case("check/allocated-1T", "check -f qcow2 {0}", ["allocated.qcow2"], goal=1.5),
        Case("check/fragmented", "check -f qcow2 {0}", ["fragmented.qcow2"], runs=10, goal=1.5),
        Case("map/fragmented", "map -f qcow2 --output=json {0}", ["fragmented.qcow2"], goal=1.5),
        Case("measure/sparse", "measure -f raw -O qcow2 {0}", ["sparse.raw"], runs=10),
    ]
    for image in ("sparse", "partly"):
        found += [
            Case(f"snapshot/create-{image}-1T", "snapshot -c one {0}", [f"{image}.qcow2"],
                 changes=True, after="snapshot -d one {0}", goal=1.5),
            Case(f"snapshot/delete-{image}-1T", "snapshot -d one {0}", [f"{image}.qcow2"],
                 changes=True, before="snapshot -c one {0}", goal=1.5),
        ]
    for size in ("1G", "1T", "64T"):
        image = [f"scale-{size}.qcow2"]
        found += [
            Case(f"scale/convert-{size}", "convert -f qcow2 -O qcow2 {0} {target}", image, "qcow2"),
            Case(f"scale/compare-{size}", "compare -f qcow2 -F qcow2 {0} {0}", image),
            Case(f"scale/check-{size}", "check -f qcow2 {0}", image, runs=5),
            Case(f"scale/map-{size}", "map -f qcow2 --output=json {0}", image, runs=5),
            Case(f"scale/info-{size}", "info -f qcow2 {0}", image, runs=20),
            Case(f"scale/snapshot-{size}", "snapshot -c one {0}", image, changes=True,
                 after="snapshot -d one {0}"),
        ]
    return found


CASES = cases()


class ToolFailed(Exception):
    """A command did not do what it was to; the message is what it said."""


class Runner:
    """Runs one case with one program."""

    def __init__(self, case, name, program, directory, images):
        self.case = case
        self.program = program
        self.target = os.path.join(directory, f"target-{name}")
        self.target_bytes = 0
        if case.changes:
            self.paths = [images.copy_of(image, name) for image in case.images]
        else:
            self.paths = [images.get(image) for image in case.images]

    def arguments(self, words):
        return [word.format(*self.paths, target=self.target) for word in words]

    def prepare(self):
        """What earlier runs wrote is on the disk, their target is gone, the images are in the cache."""
        if self.case.target and os.path.exists(self.target):
            os.unlink(self.target)
        if self.case.before:
            subprocess.run(["qemu-img"] + self.arguments(self.case.before.split()), check=True)
        os.sync()
        for path in self.paths:
            read_into_cache(path)
        if self.case.target:
            provide_pages(self.target, self.target_bytes)

    def finish(self):
        if self.case.after:
            subprocess.run(["qemu-img"] + self.arguments(self.case.after.split()), check=True)

    def memory(self):
        """A run of its own, through time(1): what this process has in memory would count else."""
        self.prepare()
        with tempfile.NamedTemporaryFile("r") as file:
            self.command(["time", "-f", "%M", "-o", file.name])
            if self.case.target:
                self.target_bytes = os.stat(self.target).st_blocks * 512
            mebibytes = int(file.read().split()[-1]) / 1024
        return mebibytes

    def timed(self):
        """Seconds and CPU seconds of one command."""
        self.prepare()
        before = children_seconds()
        begin = time.monotonic()
        for _ in range(self.case.runs):
            self.command([])
        seconds = time.monotonic() - begin
        cpu = children_seconds() - before
        sample = {"seconds": seconds / self.case.runs, "cpu_seconds": cpu / self.case.runs}
        if self.case.target:
            sample["target_mebibytes"] = os.stat(self.target).st_blocks * 512 / MEBI
        self.finish()
        return sample

    def command(self, prefix):
        done = subprocess.run(prefix + [self.program] + self.arguments(self.case.command),
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise ToolFailed(done.stderr.strip() or f"exit code {done.returncode}")

    def verify(self):
        """The target has the source's contents; a qcow2 image that was written has no errors."""
        if self.case.target:
            source = self.paths[0]
            kind = "raw" if source.endswith(".raw") else "qcow2"
            self.expect(["compare", "-f", kind, "-F", self.case.target, source, self.target])
        if self.case.target == "qcow2":
            self.expect(["check", "-q", "-f", "qcow2", self.target])
        if self.case.changes:
            self.expect(["check", "-q", "-f", "qcow2", self.paths[0]])

    def expect(self, arguments):
        done = subprocess.run(["qemu-img"] + arguments, capture_output=True, text=True)
        if done.returncode != 0:
            raise ToolFailed(f"qemu-img {arguments[0]} finds: " + done.stdout + done.stderr)


def children_seconds():
    """CPU seconds of all commands that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def provide_pages(path, count):
    """Writes a file of as many bytes, and removes it.

    A virtual machine's host takes back memory that was free for a while, and to have it again takes several times
    as long as to fill it: that is nobody's cost.
    """
    piece = b"x" * MEBI
    with open(path, "wb", buffering=0) as file:
        for _ in range(count // MEBI + 16):
            file.write(piece)
    os.unlink(path)


def read_into_cache(path):
    """Reads the data, not the holes."""
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
    """All runs of a case, the programs in alternation.

    Each program's first run warms up, gives the memory, and has its result verified.
    """
    runners = {name: Runner(case, name, program, directory, images)
               for name, program in programs.items()}
    memory = {}
    for name, runner in runners.items():
        memory[name] = runner.memory()
        runner.verify()
        runner.finish()
    samples = {name: [] for name in programs}
    for turn in range(repeats):
        # Neither is always the one that comes first.
        for name, runner in sorted(runners.items(), reverse=turn % 2 == 1):
            samples[name].append(runner.timed() | {"memory_mebibytes": memory[name]})
    for runner in runners.values():
        if case.target and os.path.exists(runner.target):
            os.unlink(runner.target)
    return samples


FIGURES = [("seconds", "seconds"), ("cpu_seconds", "CPU seconds"), ("memory_mebibytes", "peak MiB"),
           ("target_mebibytes", "target MiB")]


def medians(runs):
    return {key: statistics.median(run[key] for run in runs) for key, _ in FIGURES
            if key in runs[0]}


def least(runs):
    """The shortest run: what a command takes when nothing else is in its way."""
    return min(run["seconds"] for run in runs)


def ratios(samples):
    """Merino against qemu-img, above 1 is ahead; of the targets' sizes what ours are of theirs."""
    if any(not samples.get(name) for name in ("merino", "qemu-img")):
        return {}
    ours, theirs = medians(samples["merino"]), medians(samples["qemu-img"])
    found = {key: theirs[key] / ours[key] for key in theirs if ours[key] and theirs[key]}
    found["least"] = least(samples["qemu-img"]) / least(samples["merino"])
    if "target_mebibytes" in found:
        found["target_mebibytes"] = 1 / found["target_mebibytes"]
    return found


def text(case, samples):
    """The table, with the ratio of the medians below."""
    rows = []
    for name, runs in samples.items():
        middle = medians(runs)
        rows.append([name] + [seconds(middle.get(key)) for key, _ in FIGURES])
    lines = [f"## {case.name}", report.table(["program"] + [heading for _, heading in FIGURES], rows)]
    found = ratios(samples)
    if found:
        goal = f"; the goal is {case.goal:g}×" if case.goal else ""
        lines.append("merino against qemu-img (above 1 is ahead): "
                     + ", ".join(f"{heading} {found[key]:.2f}×"
                                 for key, heading in FIGURES[:3] if key in found)
                     + f", shortest run {found['least']:.2f}×" + goal)
    if "target_mebibytes" in found:
        lines.append(f"merino's target is {found['target_mebibytes']:.3f} of qemu-img's")
    return "\n".join(lines)


def seconds(value):
    """Commands take from milliseconds to minutes."""
    return f"{value:.4f}" if value is not None and value < 1 else value


def summary(results):
    """One line for each case, as docs/benchmarks.md has them."""
    rows = []
    for case in CASES:
        samples = results.get(case.name, {}).get("runs")
        if not samples or not ratios(samples):
            continue
        found = ratios(samples)
        ours, theirs = medians(samples["merino"]), medians(samples["qemu-img"])
        rows.append([case.name, seconds(ours["seconds"]), seconds(theirs["seconds"]),
                     f"{found['seconds']:.2f}×", f"{found['least']:.2f}×",
                     f"{found['cpu_seconds']:.2f}×" if "cpu_seconds" in found else "-",
                     f"{case.goal:g}×" if case.goal else "-",
                     ours["memory_mebibytes"], theirs["memory_mebibytes"]])
    if not rows:
        return ""
    return "## tools, all cases\n" + report.table(
        ["case", "merino s", "qemu-img s", "ratio", "shortest", "CPU ratio", "goal", "merino MiB",
         "qemu-img MiB"], rows)
