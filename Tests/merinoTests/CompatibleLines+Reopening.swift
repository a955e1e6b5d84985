extension CompatibleLines {
    /// The exerciser's image with other options, from the start or later: what is refused leaves it open as it is.
    static let exerciserReopening = [
        #"qemu-io -c 'reopen -o read-only=on' -c 'read 0 1' -c 'write 0 1' a.qcow2"#,
        #"qemu-io -r -c 'reopen -o read-only=off' -c 'write 0 1' a.qcow2"#,
        #"qemu-io -r -c 'reopen -w' -c 'write -P 7 0 4k' -c 'reopen -r' -c 'read -P 7 0 4k' -c 'write 0 4k' a.qcow2"#,
        #"qemu-io -r -c 'reopen -r -o read-only=on' -c 'read 0 1' a.qcow2"#,
        #"qemu-io -c 'reopen -r -w' -c 'read 0 1' a.qcow2"#,
        #"qemu-io -c 'reopen -c none -o cache.direct=off' -c 'read 0 1' a.qcow2"#,
        #"qemu-io -c 'reopen -c nosuch' -c 'read 0 1' a.qcow2"#,
        #"qemu-io -c 'reopen -o driver=raw' -c 'read -P 1 0 4k' -c length a.qcow2"#,
        #"qemu-io -f qcow2 -c 'reopen -o driver=raw' -c 'write 0 4k' -c length a.qcow2"#,
        #"qemu-io -c 'reopen -o driver=qcow2' -c 'read -P 1 0 4k' a.qcow2"#,
        #"qemu-io -c 'reopen -o node-name=x' -c 'read 0 1' a.qcow2"#,
        #"qemu-io -c 'reopen -o nosuch=x' -c 'read 0 1' a.qcow2"#,
        #"qemu-io -c 'reopen -o file.driver=file' -c 'read 0 1' a.qcow2"#,
        #"qemu-io -c 'reopen -o file.filename=same.qcow2' -c 'read 0 1' a.qcow2"#,
        #"qemu-io -c 'reopen -o lazy-refcounts=on' -c 'reopen -o lazy-refcounts=off' -c 'read -P 2 64k 4k' o.qcow2"#,
        #"qemu-io -c 'reopen -o backing.driver=raw' -c 'read -P 1 0 4k' o.qcow2"#,
        #"qemu-io --image-opts -c 'reopen -o lazy-refcounts=on' -c 'read 0 4k' driver=qcow2,file.filename=a.qcow2"#,
        #"qemu-io -c 'reopen -o discard=unmap' -c 'read -P 1 0 4k' blkdebug::a.qcow2"#,
        #"qemu-io -C -c 'reopen -r' -c 'read 0 4k' o.qcow2"#,
        #"qemu-img create -q -f qcow2 -b o.qcow2 -F qcow2 x && qemu-io -c 'reopen -r' -c 'reopen -w' -c 'read -P 2 64k 4k' -c 'write 0 4k' x"#,
    ]
}
