import Foundation
import Testing

/// `check` beside `qemu-img check`.
@Suite struct CheckCommandTests {
    enum State: String, CaseIterable {
        case clean, leaky, corrupt, compressed, snapshots, bitmaps, empty, extended, version2
    }

    private func make(_ state: State, _ place: Workplace) throws {
        let options: String? =
            switch state {
            case .extended: "extended_l2=on"
            case .version2: "compat=0.10"
            default: nil
            }
        if state == .compressed {
            try place.tool("qemu-img", "create", "-q", "a.raw", "3M")
            try place.tool("qemu-io", "-f", "raw", "-c", "write -P 3 0 2M", "a.raw")
            try place.tool("qemu-img", "convert", "-c", "-O", "qcow2", "a.raw", "a.qcow2")
        } else {
            _ = try place.run(
                "/usr/bin/env",
                ["qemu-img", "create", "-q", "-f", "qcow2"] + (options.map { ["-o", $0] } ?? [])
                    + ["a.qcow2", "10M"])
        }
        if state == .empty { return }
        try place.tool("qemu-io", "-c", "write 0 1M", "-c", "write 1024k 100k", "a.qcow2")
        if state == .snapshots {
            try place.tool("qemu-img", "snapshot", "-c", "one", "a.qcow2")
            try place.tool("qemu-io", "-c", "write 64k 130k", "a.qcow2")
        }
        if state == .bitmaps { try place.tool("qemu-img", "bitmap", "--add", "a.qcow2", "b") }
        if state == .leaky || state == .corrupt {
            let file = try #require(FileHandle(forUpdatingAtPath: "\(place.folder)/a.qcow2"))
            // The count of a cluster past the last one; that of one in use.
            try file.seek(toOffset: 0x20000 + (state == .leaky ? 60 : 12))
            try file.write(contentsOf: Data([0, 2]))
            try file.truncate(atOffset: 64 << 16)
            try file.close()
        }
    }

    @Test(arguments: State.allCases, ["human", "json"])
    func checkSaysWhatQemuImgSays(_ state: State, _ output: String) throws {
        let place = try Workplace()
        try make(state, place)
        let own = try place.merino("check", "--output", output, "a.qcow2")
        let other = try place.tool("qemu-img", "check", "--output", output, "a.qcow2")
        #expect(own.output == other.output, "\(own.errors)")
        #expect(own.status == other.status)
        #expect(own.status == (state == .leaky ? 3 : state == .corrupt ? 2 : 0))
    }

    @Test(arguments: [State.leaky, .corrupt], ["leaks", "all"])
    func repairSaysWhatQemuImgSays(_ state: State, _ repair: String) throws {
        for output in ["human", "json"] {
            let (ours, theirs) = (try Workplace(), try Workplace())
            try make(state, ours)
            try make(state, theirs)
            let own = try ours.merino("check", "-r", repair, "--output", output, "a.qcow2")
            let other = try theirs.tool(
                "qemu-img", "check", "-r", repair, "--output", output, "a.qcow2")
            #expect(own.output == other.output, "\(own.errors)")
            #expect(own.status == other.status)
        }
    }

    @Test func quietSaysNothingAndStillRepairs() throws {
        let place = try Workplace()
        try make(.leaky, place)
        let result = try place.merino("check", "-q", "-r", "all", "a.qcow2")
        #expect(result.status == 0 && result.output.isEmpty)
        #expect(try place.tool("qemu-img", "check", "a.qcow2").status == 0)
    }

    @Test func formatsWithNothingToCheckEndWith63() throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "a.raw", "1M")
        let result = try place.merino("check", "a.raw")
        #expect(result.status == 63 && result.output.isEmpty)
        #expect(result.errors.hasPrefix("merino: "))
    }

    @Test func whatCannotBeOpenedEndsWith1() throws {
        let place = try Workplace()
        #expect(try place.merino("check", "none").status == 1)
        #expect(try place.merino("check", "-r", "some", "none").status == 1)
        try make(.clean, place)
        #expect(try place.merino("check", "-U", "-r", "all", "a.qcow2").status == 1)
    }
}
