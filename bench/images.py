"""The images that the cases of tools.py work on, each made when first asked for."""

import os
import random
import subprocess

MEBI = 1 << 20


def text_like():
    """4 MiB that compress to about a third."""
    random.seed(1)
    words = [random.randbytes(random.randint(2, 12)) for _ in range(2000)]
    return b"".join(random.choice(words) for _ in range(700000))[:4 * MEBI]


class Images:
    """`get("full.raw")` makes an image with the function `make_full_raw`."""

    def __init__(self, directory, mebibytes):
        self.directory = directory
        self.mebibytes = mebibytes
        self.made = {}
        self.text = None

    def path(self, name):
        return os.path.join(self.directory, name)

    def get(self, name):
        if name not in self.made:
            path = self.path(name)
            getattr(self, "make_" + name.replace(".", "_").replace("-", "_"))(path)
            self.made[name] = path
        return self.made[name]

    def copy_of(self, name, owner):
        """An image of one program's own, for commands that change it."""
        key = f"{owner}-{name}"
        if key not in self.made:
            path = self.path(key)
            subprocess.run(["cp", "--sparse=always", self.get(name), path], check=True)
            self.made[key] = path
        return self.made[key]

    def convert(self, *arguments):
        subprocess.run(["qemu-img", "convert", *arguments], check=True)

    def create(self, *arguments):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *arguments], check=True)

    def script(self, path, lines):
        """Has qemu-io carry out commands on a qcow2 image."""
        subprocess.run(["qemu-io", "-f", "qcow2", "-t", "unsafe", path], input="\n".join(lines),
                       text=True, check=True, stdout=subprocess.DEVNULL)

    def mixed(self, path, mebibytes):
        """What disks hold: of eight mebibytes four random ones, three of text and one of zeroes."""
        self.text = self.text or text_like()
        random.seed(4)
        with open(path, "wb") as file:
            for index in range(mebibytes):
                if index % 8 == 7:
                    file.write(bytes(MEBI))
                elif index % 2:
                    file.write(os.urandom(MEBI))
                else:
                    start = random.randrange(3 * MEBI)
                    file.write(self.text[start:start + MEBI])

    def make_full_raw(self, path):
        self.mixed(path, self.mebibytes)

    def make_small_raw(self, path):
        """For what takes long: a quarter of the disk."""
        self.mixed(path, self.mebibytes // 4)

    def make_full_qcow2(self, path):
        self.convert("-f", "raw", "-O", "qcow2", self.get("full.raw"), path)

    def make_packed_qcow2(self, path):
        self.convert("-c", "-f", "raw", "-O", "qcow2", self.get("small.raw"), path)

    def make_copy_raw(self, path):
        subprocess.run(["cp", "--reflink=never", self.get("full.raw"), path], check=True)

    def make_chain_base_qcow2(self, path):
        self.convert("-f", "raw", "-O", "qcow2", self.get("full.raw"), path)

    def make_chain_qcow2(self, path):
        """An image that has half of its clusters itself, over one that has all."""
        self.create("-b", self.get("chain-base.qcow2"), "-F", "qcow2", path)
        self.script(path, [f"write -q -P {index % 254 + 1} {index * 2}M 1M"
                           for index in range(self.mebibytes // 2)])

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

    def make_allocated_qcow2(self, path):
        """1 TiB whose 16 Mi clusters are all allocated: 128 MiB of tables. The data are holes."""
        self.create("-o", "preallocation=metadata", path, "1T")

    def make_partly_qcow2(self, path):
        """1 TiB, the first 128 GiB allocated like that: what qemu-img snapshots within seconds."""
        self.create("-o", "preallocation=metadata", path, "128G")
        subprocess.run(["qemu-img", "resize", "-q", "-f", "qcow2", path, "1T"], check=True)

    def make_fragmented_qcow2(self, path):
        """A disk whose clusters of 4 KiB were written in random order: no two lie together."""
        size = min(self.mebibytes, 512)
        self.create("-o", "cluster_size=4k", path, f"{size}M")
        random.seed(3)
        places = list(range(0, size * 256, 2))
        random.shuffle(places)
        self.script(path, [f"write -q {place * 4}k 4k" for place in places])

    def scaled(self, path, virtual):
        """256 MiB of data, spread over a disk of `virtual` bytes."""
        self.create(path, str(virtual))
        step = virtual // 256
        self.script(path, [f"write -q -P {index % 254 + 1} {index * step} 1M"
                           for index in range(256)])

    def make_scale_1G_qcow2(self, path):
        self.scaled(path, 1 << 30)

    def make_scale_1T_qcow2(self, path):
        self.scaled(path, 1 << 40)

    def make_scale_64T_qcow2(self, path):
        self.scaled(path, 1 << 46)
