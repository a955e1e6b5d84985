import Foundation
import Testing

/// `snapshot`, and snapshots served, beside the tools they are compatible with.
@Suite struct SnapshotCommandTests {
    private func image(_ place: Workplace) throws {
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "4M")
        try place.tool("qemu-io", "-c", "write -P 1 0 1M", "a.qcow2")
        try place.merino("snapshot", "-c", "one", "a.qcow2")
        try place.tool("qemu-io", "-c", "write -P 2 512k 1M", "a.qcow2")
        try place.tool("qemu-img", "snapshot", "-c", "two", "a.qcow2")
        try place.tool("qemu-io", "-c", "write -P 3 0 4M", "a.qcow2")
    }

    @Test func listsAndInformationAreThoseOfThePeer() throws {
        let place = try Workplace()
        let none = try place.merino("snapshot", "-l", "a.raw")
        #expect(none.status == 1)
        try image(place)
        for arguments in [
            ["snapshot", "-l", "a.qcow2"], ["info", "a.qcow2"],
            ["info", "--output=json", "a.qcow2"],
        ] {
            let own = try place.run(Workplace.merino, arguments)
            let other = try place.run("/usr/bin/env", ["qemu-img"] + arguments)
            #expect(own.status == 0, "\(own.errors)")
            #expect(own.output == other.output)
        }
        let list = try place.merino("snapshot", "-l", "a.qcow2").output
        #expect(try place.merino("snapshot", "a.qcow2").output == list)
    }

    @Test func snapshotsOfOverlaysAreReadThroughTheirBackingImage() throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "4M")
        try place.tool("qemu-io", "-c", "write -P 1 0 4M", "base.qcow2")
        try place.tool(
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2",
            "a.qcow2")
        try place.tool("qemu-io", "-c", "write -P 2 1M 64k", "a.qcow2")
        try place.tool("qemu-img", "snapshot", "-c", "one", "a.qcow2")
        try place.tool("qemu-io", "-c", "write -P 3 0 2M", "a.qcow2")
        let own = try place.merino("convert", "-l", "one", "-O", "raw", "a.qcow2", "own.raw")
        #expect(own.status == 0, "\(own.errors)")
        try place.tool("qemu-img", "convert", "-l", "one", "-O", "raw", "a.qcow2", "other.raw")
        #expect(try place.tool("cmp", "own.raw", "other.raw").status == 0)
        let measured = try place.merino("measure", "-O", "qcow2", "-l", "one", "a.qcow2")
        #expect(measured.status == 0, "\(measured.errors)")
    }

    @Test func snapshotsAreAppliedAndDeleted() throws {
        let place = try Workplace()
        try image(place)
        #expect(try place.merino("snapshot", "-a", "1", "a.qcow2").status == 0)
        let read = try place.tool(
            "qemu-io", "-r", "-c", "read -P 1 0 1M", "-c", "read -P 0 1M 3M", "a.qcow2")
        #expect(read.status == 0 && !read.output.contains("verification failed"))
        #expect(try place.merino("snapshot", "-q", "-d", "one", "a.qcow2").status == 0)
        #expect(try place.merino("snapshot", "-d", "two", "a.qcow2").status == 0)
        #expect(try place.merino("snapshot", "a.qcow2").output == "")
        #expect(try place.tool("qemu-img", "check", "a.qcow2").status == 0)
    }

    @Test(
        "snapshot refuses what it cannot do, with exit code 1 and a reason",
        arguments: [
            (["-a", "none", "a.qcow2"], "'none'"), (["-d", "1", "a.qcow2"], "'1'"),
            (["-l", "-c", "x", "a.qcow2"], "one of -l"), (["-c", "x", "a.raw"], "raw"),
            (["-c", "x", "missing"], "missing"), ([], "<file>"),
            (["-c", String(repeating: "n", count: 256), "a.qcow2"], "255"),
        ])
    func refuses(_ arguments: [String], _ words: String) throws {
        let place = try Workplace()
        try image(place)
        try place.tool("qemu-img", "create", "-q", "a.raw", "1M")
        let result = try place.run(Workplace.merino, ["snapshot"] + arguments)
        #expect(result.status == 1)
        #expect(
            result.errors.hasPrefix("merino: ") && result.errors.contains(words), "\(result.errors)"
        )
    }

    @Test(arguments: ["one", "2", "snapshot.name=two", "snapshot.id=1,snapshot.name=one"])
    func aSnapshotIsServedReadOnly(name: String) throws {
        let place = try Workplace()
        try image(place)
        let value = name == "one" || name.contains("=one") ? 1 : 2
        let result = try place.tool(
            "bash", "-c",
            """
            \(URL(fileURLWithPath: Workplace.merino).path) serve -k $PWD/s --fork -l \(name) a.qcow2
            nbdinfo --size "nbd+unix:///?socket=$PWD/s" >/dev/null || exit 9
            """)
        #expect(result.status == 0, "\(result.errors)")
        let copy = try place.tool(
            "bash", "-c",
            """
            \(URL(fileURLWithPath: Workplace.merino).path) serve -k $PWD/s --fork --load-snapshot=\(name) a.qcow2
            nbdcopy "nbd+unix:///?socket=$PWD/s" out.raw
            """)
        #expect(copy.status == 0, "\(copy.errors)")
        try place.tool(
            "qemu-img", "convert", "-l", "snapshot.id=\(value)", "-O", "raw", "a.qcow2", "peer.raw")
        let same = try place.tool("cmp", "out.raw", "peer.raw")
        #expect(same.status == 0, "\(same.output)")
    }

    @Test func anExportSaysWhereItIsRead() throws {
        let place = try Workplace()
        try image(place)
        let result = try place.tool(
            "bash", "-c",
            """
            \(URL(fileURLWithPath: Workplace.merino).path) export --snapshot one a.qcow2 > uri &
            for attempt in $(seq 200); do test -s uri && break; sleep 0.1; done
            nbdcopy "$(cat uri)" one.raw && nbdinfo --can write "$(cat uri)"; echo "write $?"
            kill $!; wait
            """)
        #expect(result.output.contains("write 2"), "\(result.output) \(result.errors)")
        try place.tool(
            "qemu-img", "convert", "-l", "snapshot.name=one", "-O", "raw", "a.qcow2", "peer.raw")
        #expect(try place.tool("cmp", "one.raw", "peer.raw").status == 0)
    }

    @Test func aSnapshotIsConverted() throws {
        let place = try Workplace()
        try image(place)
        for (own, peers) in [("one", "snapshot.name=one"), ("snapshot.id=2", "snapshot.id=2")] {
            try place.tool(
                "qemu-img", "convert", "-l", peers, "-O", "raw", "a.qcow2", "peer.raw")
            let result = try place.merino("convert", "-l", own, "-O", "qcow2", "a.qcow2", "b.qcow2")
            #expect(result.status == 0, "\(result.errors)")
            let same = try place.tool("qemu-img", "compare", "b.qcow2", "peer.raw")
            #expect(same.status == 0, "\(same.output)")
        }
    }

    @Test func theExerciserWritesToATemporaryImage() throws {
        let place = try Workplace()
        try image(place)
        let before = try place.tool("sha256sum", "a.qcow2").output
        let result = try place.merino(
            "io", "-s", "-c", "write -P 9 1M 1M", "-c", "read -P 9 1M 1M", "-c", "read -P 3 2M 2M",
            "a.qcow2")
        #expect(result.status == 0, "\(result.output) \(result.errors)")
        #expect(try place.tool("sha256sum", "a.qcow2").output == before)
    }

    @Test func aTemporaryImageIsReopenedWithWhatWasWritten() throws {
        let place = try Workplace()
        try image(place)
        let before = try place.tool("sha256sum", "a.qcow2").output
        let result = try place.merino(
            "io", "-s", "-c", "write -P 9 0 64k", "-c", "reopen -c none", "-c", "read -P 9 0 64k",
            "-c", "reopen -r", "-c", "read -P 9 0 64k", "-c", "reopen -w -c writeback", "-c",
            "write -P 8 64k 64k", "-c", "read -P 9 0 64k", "-c", "read -P 8 64k 64k", "a.qcow2")
        #expect(result.status == 0, "\(result.output) \(result.errors)")
        #expect(try place.tool("sha256sum", "a.qcow2").output == before)
    }

    @Test func aTemporaryOverlayTakesTheWrites() throws {
        let place = try Workplace()
        try image(place)
        let before = try place.tool("sha256sum", "a.qcow2").output
        let result = try place.tool(
            "bash", "-c",
            """
            export TMPDIR=$PWD
            \(URL(fileURLWithPath: Workplace.merino).path) serve -k $PWD/s --fork -t -s --pid-file p a.qcow2
            qemu-io -f raw -c 'write -P 9 1M 1M' -c 'read -P 9 1M 1M' -c 'read -P 3 2M 2M' \
              "nbd+unix:///?socket=$PWD/s"
            ls *overlay* 2>/dev/null && echo left
            kill $(cat p)
            """)
        #expect(!result.output.contains("verification failed") && !result.output.contains("left"))
        #expect(result.output.contains("wrote 1048576"), "\(result.output) \(result.errors)")
        #expect(try place.tool("sha256sum", "a.qcow2").output == before)
    }
}
