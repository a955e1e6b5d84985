// Names of images and options of command lines, as scripts write them.

extension CompatibleLines {
    /// What a name stands for.
    static let imageNames = [
        #"qemu-img create -q -f qcow2 backup-10:30.qcow2 1M; ls"#,
        #"qemu-img create -q -f qcow2 :x 1M; ls"#,
        #"qemu-img create -q -f qcow2 'json:{"driver":"file","filename":"x.qcow2"}' 1M; ls"#,
        #"qemu-img create -q -f qcow2 nbd:localhost:1 1M; ls"#,
        #"qemu-img create -q -f qcow2 file:f:g.qcow2 1M && ls"#,
        #"qemu-img create -q -f qcow2 ./f:g.qcow2 1M && qemu-img info file:f:g.qcow2"#,
        #"qemu-img convert -O raw r.raw v:1.raw; ls"#,
        #"qemu-img convert -O raw r.raw v:1.raw"#,
        #"qemu-img convert -O raw r.raw file:v:1.raw && ls && cmp r.raw ./v:1.raw"#,
        #"qemu-img convert -O raw plain.qcow2 nbd:localhost:1; ls"#,
        #"qemu-img convert -O raw plain.qcow2 'json:{"driver":"file","filename":"x.raw"}'; ls"#,
        #"qemu-img dd -O raw if=plain.qcow2 of=x:y.raw; ls"#,
        #"cp r.raw x:y; qemu-img info x:y"#,
        #"cp r.raw x:y; qemu-img info ./x:y"#,
        #"cp r.raw x:y; qemu-img info --image-opts file.filename=x:y"#,
        #"qemu-img info 'json:{"driver":"qcow2","file.filename":"plain.qcow2"}'"#,
        #"qemu-img info 'json:{"file.driver":"file","file.filename":"plain.qcow2"}'"#,
        #"qemu-img info 'json:{"file":{"filename":"plain.qcow2"}}'"#,
        #"qemu-img info 'json:{"file.filename":"plain.qcow2","file":"x"}'"#,
        #"qemu-img create -q -u -f qcow2 -b 'json:{"driver":"qcow2","file.filename":"a.qcow2"}' -F qcow2 j.qcow2 4M && qemu-img compare j.qcow2 a.qcow2"#,
        #"qemu-img create -q -u -f qcow2 -b 'json:{"file.filename":"a.qcow2"}' -F qcow2 j.qcow2 4M && qemu-img compare j.qcow2 a.qcow2"#,
        #"qemu-img compare --image-opts driver=qcow2,file.filename=o.qcow2,backing.file.filename=plain.qcow2,backing.driver=qcow2 file.filename=o.qcow2"#,
        #"qemu-img compare --image-opts driver=qcow2,file.filename=o.qcow2,backing.file.filename=plain.qcow2 file.filename=o.qcow2"#,
        #"qemu-img convert --object throttle-group,id=g -O raw --image-opts driver=throttle,throttle-group=g,file.driver=qcow2,file.file.driver=file,file.file.filename=plain.qcow2 x.raw && qemu-img compare x.raw plain.qcow2"#,
        #"qemu-img info --image-opts driver=raw,offset=512,file.filename=r.raw"#,
        #"qemu-img info --output json --image-opts driver=raw,offset=512,size=1024,file.filename=r.raw"#,
        #"qemu-img info 'json:{"driver":"raw","size":1024,"file.filename":"r.raw"}'"#,
        #"qemu-img info --image-opts driver=qcow2,lazy-refcounts=on,file.filename=plain.qcow2"#,
        #"qemu-img info --object secret,id=s,file=password --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=luks.qcow2"#,
        #"qemu-img info --object secret,id=s,data=wrong --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=luks.qcow2"#,
        #"qemu-img info --image-opts driver=qcow2,encrypt.key-secret=nosuch,file.filename=luks.qcow2"#,
        #"qemu-img info --backing-chain --image-opts driver=qcow2,file.filename=o.qcow2"#,
        #"qemu-img create -q -f qcow2 -b luks.qcow2 -F qcow2 x.qcow2 && qemu-img info x.qcow2 | grep virtual"#,
        #"qemu-img measure -O luks --object secret,id=s,data=abc -o key-secret=s,iter-time=10 --size 1M"#,
        #"qemu-img measure -O luks --object secret,id=s,data=abc -o key-secret=s,iter-time=10 plain.qcow2"#,
        #"qemu-img measure -O luks --size 1M"#,
    ]

    /// Where a new image goes, and what it becomes there.
    static let imageTargets = [
        #"mkfifo p; qemu-img convert -O raw plain.qcow2 p; ls -l p | cut -c 1"#,
        #"mkfifo p; qemu-img create -q -f raw p 1M; ls -l p | cut -c 1"#,
        #"mkdir d; qemu-img convert -O raw plain.qcow2 d; ls"#,
        #"qemu-img convert -O raw plain.qcow2 /dev/null"#,
        #": > s.raw; : > t.raw; unshare -Urm sh -c 'mount --bind s.raw t.raw && qemu-img convert -O raw plain.qcow2 t.raw' && qemu-img compare s.raw plain.qcow2; ls"#,
        #": > s.raw; : > 't t.raw'; unshare -Urm sh -c 'mount --bind s.raw "t t.raw" && qemu-img convert -O raw plain.qcow2 "t t.raw"' && qemu-img compare s.raw plain.qcow2"#,
        #"mkdir d && chmod 1777 d && : > d/y.raw && chmod 666 d/y.raw && chown 1000 d/y.raw && setpriv --reuid=65534 --clear-groups qemu-img convert -O raw plain.qcow2 d/y.raw && ls d && qemu-img compare plain.qcow2 d/y.raw"#,
        #"qemu-img convert -f raw -O qcow2 -o preallocation=full r.raw x.qcow2 && qemu-img check x.qcow2 | grep allocated && qemu-img compare r.raw x.qcow2"#,
        #"qemu-img convert -f raw -O qcow2 -o preallocation=falloc r.raw x.qcow2 && qemu-img check x.qcow2 | grep allocated && qemu-img compare r.raw x.qcow2"#,
        #"qemu-img convert -f raw -O qcow2 -o preallocation=metadata r.raw x.qcow2 && qemu-img check x.qcow2 | grep allocated && qemu-img compare r.raw x.qcow2"#,
        #"qemu-img convert -f raw -O raw -o preallocation=full r.raw x.raw && [ $(du -k x.raw | cut -f 1) -ge 4096 ] && qemu-img compare r.raw x.raw"#,
        #"qemu-img convert -f raw -O raw -o preallocation=falloc r.raw x.raw && [ $(du -k x.raw | cut -f 1) -ge 4096 ] && qemu-img compare r.raw x.raw"#,
        #"printf x > x.raw; ln x.raw y.raw; qemu-img convert -f raw -O raw -o preallocation=full r.raw x.raw && [ $(du -k y.raw | cut -f 1) -ge 4096 ] && qemu-img compare r.raw y.raw"#,
        #"qemu-img convert -O qcow2 -o backing_file=a.qcow2,backing_fmt=qcow2 o.qcow2 t.qcow2 && qemu-io -r -c map t.qcow2 && qemu-img compare o.qcow2 t.qcow2"#,
        #"qemu-img convert -O qcow2 -o backing_file=a.qcow2 o.qcow2 t.qcow2; ls"#,
        #"qemu-img convert -O qcow2 -o backing_file=a.qcow2 -F qcow2 o.qcow2 t.qcow2 && qemu-io -r -c map t.qcow2"#,
        #"qemu-img convert -O qcow2 -o backing_file=a.qcow2,backing_fmt=qcow2 o.qcow2 r.raw t.qcow2; ls"#,
        #"qemu-img convert -l s1 --bitmaps -O qcow2 a.qcow2 x.qcow2 && qemu-img info x.qcow2 | grep -c 'name: b0'"#,
    ]

    /// Chains that the command line says, not the images.
    static let imageChains: [String] = {
        let chain =
            #"qemu-img create -q -f qcow2 -b o.qcow2 -F qcow2 t.qcow2 && "#
            + #"qemu-io -c 'write -P 31 192k 64k' t.qcow2 >/dev/null && "#
        let over = "driver=qcow2,file.filename=t.qcow2,backing.driver=qcow2,"
        let maps = "; for i in t o a; do qemu-io -r -c map $i.qcow2; done"
        return [
            "\(chain) qemu-img commit --image-opts \(over)backing.file.filename=a.qcow2\(maps)",
            "\(chain) qemu-img commit -d --image-opts \(over)backing.file.filename=a.qcow2\(maps)",
            "\(chain) qemu-img commit --image-opts driver=qcow2,file.filename=t.qcow2\(maps)",
            "\(chain) qemu-img commit --image-opts driver=qcow2,file.filename=t.qcow2,backing=\(maps)",
            "\(chain) qemu-img commit -d -b $PWD/a.qcow2 t.qcow2\(maps)",
            "\(chain) qemu-img commit -d -b ./a.qcow2 t.qcow2\(maps)",
            "\(chain) qemu-img commit -d -b ./nosuch.qcow2 t.qcow2\(maps)",
            "mkdir d && mv a.qcow2 o.qcow2 d && cd d && \(chain) cd .. && "
                + "qemu-img commit -d -b a.qcow2 d/t.qcow2; qemu-io -r -c map d/a.qcow2",
            "\(chain) qemu-img rebase -b '' --image-opts \(over)backing.file.filename=plain.qcow2 "
                + "&& qemu-io -r -c map t.qcow2 && qemu-io -r -c 'read -P 1 64k 64k' t.qcow2",
            // The header's name, while another image is what is below.
            "\(chain) qemu-img create -q -f qcow2 n.qcow2 4M && "
                + "qemu-img rebase -b $PWD/o.qcow2 -F qcow2 --image-opts "
                + "\(over)backing.file.filename=n.qcow2 && qemu-io -r -c 'read -P 0 0 64k' t.qcow2",
        ]
    }()

    /// What `-o` and sizes take.
    static let optionLists: [String] =
        [
            "cluster_size=4k,", ",cluster_size=4k", "''", "cluster_size=4k,,", "lazy_refcounts",
            "nolazy_refcounts", "lazy_refcounts,cluster_size=4k", "preallocation", "cluster_size",
            "nosuch", "nonosuch", "nocow",
        ].map { "qemu-img create -q -f qcow2 -o \($0) x.qcow2 1M && qemu-img info x.qcow2" } + [
            #"qemu-img convert -o lazy_refcounts -O qcow2 plain.qcow2 x.qcow2 && qemu-img info x.qcow2"#,
            #"qemu-img amend -o lazy_refcounts plain.qcow2 && qemu-img info plain.qcow2"#,
            #"qemu-img create -q -f raw x ' 1M' && qemu-img info x"#,
            #"qemu-img create -q -f raw x +1M && qemu-img info x"#,
            #"qemu-img create -q -f raw x 1M 2M"#,
            #"qemu-img create -f qcow2 -o size=2M x 1M; ls"#,
            #"qemu-img convert -q -O qcow2 -o size=2M plain.qcow2 x && qemu-img info x"#,
            #"qemu-img snapshot -c -x a.qcow2 && qemu-img snapshot -l a.qcow2 | wc -l"#,
            #"qemu-img snapshot -l -l a.qcow2"#,
            #"qemu-img snapshot -c x -c y a.qcow2"#,
            #"qemu-img snapshot -l -c y a.qcow2"#,
        ]

    /// `-b` of the exerciser.
    static let machineState = [
        #"qemu-io -c 'write -b -P 7 0 64k' -c 'read -b -P 7 0 64k' -c 'read -b 60k 8k' plain.qcow2 && qemu-img check plain.qcow2 | head -n 1"#,
        #"qemu-io -c 'write -b -P 3 600M 4k' -c 'read -b -P 3 600M 4k' -c 'read -b -P 0 599M 4k' plain.qcow2 && qemu-img check plain.qcow2 | head -n 1"#,
        #"qemu-io -c 'write -b -P 7 0 64k' -c 'read -P 1 0 64k' -c map -c info plain.qcow2"#,
        #"qemu-io -c 'write -b -P 7 0 1M' plain.qcow2 && qemu-io -c 'read -b -P 7 0 1M' plain.qcow2 && qemu-img compare plain.qcow2 same.qcow2"#,
        #"qemu-io -c 'write -b -P 7 64k 512' -c 'read -b -P 0 64512 512' -c 'read -b -P 7 64k 512' o.qcow2"#,
        #"qemu-io -r -c 'write -b 0 512' plain.qcow2"#,
    ]
}
