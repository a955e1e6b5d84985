import Foundation
import Testing

/// Images that nobody vouches for: nothing that they name is opened, and what a guest wrote does not
/// decide how they are read. The catalogue's rows are named.
@Suite struct UntrustedImageTests {
    /// Where a backing file would be opened, the command would wait here for ever.
    private func makeTrap(_ place: Workplace) throws {
        #expect(mkfifo("\(place.folder)/trap", 0o600) == 0)
    }

    /// An image with a backing file of that name.
    private func make(_ place: Workplace, backing: String) throws {
        let result = try place.tool(
            "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", "raw", "a.qcow2",
            "1M")
        #expect(result.status == 0, "\(result.errors)")
    }

    private static let names = [
        "trap", "file:trap", #"json:{"driver":"file","filename":"trap"}"#,
        #"json:{"driver":"raw","file":{"driver":"file","filename":"trap"}}"#,
    ]

    @Test(
        "CVE-2011-3147, CVE-2024-4467: a stored name is told by info and inspect, and not opened",
        arguments: names)
    func storedNamesAreNotOpened(_ name: String) throws {
        let place = try Workplace()
        try makeTrap(place)
        try make(place, backing: name)
        for arguments in [
            ["info", "-f", "qcow2", "--untrusted", "a.qcow2"], ["info", "a.qcow2"],
            ["inspect", "a.qcow2"], ["inspect", "--output", "json", "a.qcow2"],
            ["check", "-f", "qcow2", "--untrusted", "a.qcow2"],
        ] {
            let result = try place.run(
                "/usr/bin/timeout", ["20", Workplace.merino] + arguments)
            #expect(result.status == 0, "\(arguments): \(result.errors)")
            if arguments[0] != "check" { #expect(result.output.contains("trap")) }
        }
    }

    @Test(
        "CVE-2011-3147, CVE-2024-32498: an untrusted image that names a backing file is refused",
        arguments: names)
    func backingFilesAreNotFollowed(_ name: String) throws {
        let place = try Workplace()
        try makeTrap(place)
        try make(place, backing: name)
        for arguments in [
            ["map", "-f", "qcow2", "--untrusted", "a.qcow2"],
            ["io", "-f", "qcow2", "--untrusted", "-r", "-c", "read 0 512", "a.qcow2"],
            ["convert", "--untrusted", "-f", "qcow2", "-O", "raw", "a.qcow2", "out.raw"],
            ["serve", "-f", "qcow2", "--untrusted", "-r", "-k", "\(place.folder)/s", "a.qcow2"],
        ] {
            let result = try place.run(
                "/usr/bin/timeout", ["20", Workplace.merino] + arguments)
            #expect(result.status == 1, "\(arguments): \(result.output)")
            #expect(result.errors.contains("not followed"), "\(result.errors)")
        }
        let result = try place.merino(
            "map", "--image-opts", "--untrusted",
            "driver=qcow2,backing=,file.driver=file,file.filename=a.qcow2")
        #expect(result.status == 1)
    }

    /// An image whose data file has that name; nothing of that name is there.
    private func make(_ place: Workplace, dataFile name: String) throws {
        // As long, so that one can stand for the other.
        let stand = String(repeating: "d", count: name.utf8.count - 4) + ".raw"
        let result = try place.tool(
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=\(stand)", "a.qcow2", "1M")
        #expect(result.status == 0, "\(result.errors)")
        try FileManager.default.removeItem(atPath: "\(place.folder)/\(stand)")
        let path = "\(place.folder)/a.qcow2"
        var image = try Data(contentsOf: URL(fileURLWithPath: path))
        let found = try #require(image.range(of: Data(stand.utf8)))
        image.replaceSubrange(found, with: Data(name.utf8))
        try image.write(to: URL(fileURLWithPath: path))
    }

    private static let dataNames = [
        #"json:{"driver":"file","filename":"trap"}"#, "json:trap", "file:trap", "host_device:trap",
        "raw:trap", "nbd:localhost:1", "ssh://localhost/trap",
    ]

    @Test(
        "CVE-2024-4467: a data file's name is told by info, and is that of a local file",
        arguments: dataNames)
    func dataFilesAreLocalFiles(_ name: String) throws {
        let place = try Workplace()
        try makeTrap(place)
        try make(place, dataFile: name)
        for arguments in [["info", "a.qcow2"], ["info", "-f", "qcow2", "--untrusted", "a.qcow2"]] {
            let result = try place.run("/usr/bin/timeout", ["20", Workplace.merino] + arguments)
            #expect(result.status == 0, "\(arguments): \(result.errors)")
            #expect(result.output.contains(name), "\(result.output)")
        }
        for arguments in [
            ["map", "a.qcow2"], ["io", "-r", "-c", "read 0 512", "a.qcow2"],
            ["convert", "-O", "raw", "a.qcow2", "out.raw"], ["measure", "-O", "raw", "a.qcow2"],
            ["serve", "-r", "-k", "\(place.folder)/s", "a.qcow2"],
        ] {
            let result = try place.run("/usr/bin/timeout", ["20", Workplace.merino] + arguments)
            #expect(result.status == 1, "\(arguments): \(result.output)")
            // Of a protocol that nothing here speaks, it is a file's name as any other.
            #expect(
                result.errors.contains("only names of local files are followed")
                    || name.hasPrefix("nbd:") && result.errors.contains("No such file"),
                "\(result.errors)")
        }
    }

    @Test("CVE-2024-4467: info opens no data file, whether it is there or not")
    func informationNeedsNoDataFile() throws {
        let place = try Workplace()
        try makeTrap(place)
        for name in ["trap", "gone"] {
            try make(place, dataFile: "./" + name)
            for arguments in [["info", "a.qcow2"], ["info", "--output=json", "a.qcow2"]] {
                let own = try place.run("/usr/bin/timeout", ["20", Workplace.merino] + arguments)
                let other = try place.run("/usr/bin/env", ["qemu-img"] + arguments)
                #expect(own.status == 0, "\(own.errors)")
                #expect(own.output == other.output)
            }
        }
        let map = try place.merino("map", "a.qcow2")
        #expect(map.status == 1 && map.errors.contains("gone"), "\(map.errors)")
    }

    @Test("CVE-2008-2004, CVE-2013-1922, CVE-2024-40767: an untrusted image is not probed")
    func untrustedImagesAreNotProbed() throws {
        let place = try Workplace()
        try makeTrap(place)
        try make(place, backing: "trap")
        for command in ["map", "check", "info"] {
            let result = try place.merino(command, "--untrusted", "a.qcow2")
            #expect(result.status == 1 && result.errors.contains("-f"), "\(result.errors)")
        }
        // What a guest wrote is data when the disk is said to be raw.
        let info = try place.merino("info", "--untrusted", "-f", "raw", "a.qcow2")
        #expect(info.output.contains("file format: raw") && !info.output.contains("backing"))
        let map = try place.merino("map", "--untrusted", "-f", "raw", "--output", "json", "a.qcow2")
        #expect(map.status == 0 && map.output.contains("\"start\": 0"))
    }

    @Test func namesOfUntrustedImagesArePaths() throws {
        let place = try Workplace()
        for name in [#"json:{"driver":"null-co"}"#, "nbd:localhost:1", "fat:/"] {
            let result = try place.merino("info", "--untrusted", "-f", "raw", name)
            #expect(result.status == 1)
            let inspected = try place.merino("inspect", name)
            #expect(inspected.status == 1, "\(inspected.output)")
        }
    }

    @Test("inspect recognises formats by their marks") func inspectRecognisesFormats() throws {
        let place = try Workplace()
        for (format, expected) in [
            ("qcow2", "qcow2"), ("vmdk", "vmdk"), ("vhdx", "vhdx"), ("vdi", "vdi"), ("qed", "qed"),
            ("vpc", "vpc"), ("parallels", "parallels"), ("raw", "raw"),
        ] {
            try place.tool("qemu-img", "create", "-q", "-f", format, "a.\(format)", "4M")
            let result = try place.merino("inspect", "a.\(format)")
            #expect(result.status == 0)
            #expect(result.output.contains("file format: \(expected)"), "\(result.output)")
        }
    }

    @Test func inspectDescribesWhatItCannotLookInto() throws {
        let place = try Workplace()
        try make(place, backing: "trap")
        let file = try #require(FileHandle(forUpdatingAtPath: "\(place.folder)/a.qcow2"))
        try file.seek(toOffset: 36)
        try file.write(contentsOf: Data([0xff, 0xff, 0xff, 0xff]))
        try file.close()
        let result = try place.merino("inspect", "a.qcow2")
        #expect(result.status == 0)
        #expect(result.output.contains("file format: qcow2"))
        #expect(result.output.contains("problem: "))
    }

    @Test("CVE-2015-5162: info of a small hostile image is done at once", arguments: 0..<8)
    func infoOfHostileImagesIsQuick(_ seed: Int) throws {
        let place = try Workplace()
        try make(place, backing: "trap")
        // The largest tables that a header can ask for, and a disk to go with them.
        let file = try #require(FileHandle(forUpdatingAtPath: "\(place.folder)/a.qcow2"))
        func set(_ offset: UInt64, _ bytes: [UInt8]) throws {
            try file.seek(toOffset: offset)
            try file.write(contentsOf: Data(bytes))
        }
        if seed & 1 != 0 { try set(36, [0, 0x40, 0, 0]) }
        if seed & 2 != 0 { try set(56, [0, 0, 0, 0x80]) }
        if seed & 4 != 0 { try set(60, [0, 1, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0]) }
        try file.close()
        let result = try place.run(
            "/usr/bin/timeout",
            ["20", "/bin/sh", "-c", "ulimit -d 524288; exec \"$0\" info a.qcow2", Workplace.merino])
        #expect(result.status == 0 || result.status == 1, "\(result.status)")
    }

    @Test("CVE-2015-5162: bitmaps of a large disk, all alike, take little memory")
    func alikeBitmapsTakeLittleMemory() throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "16T")
        for name in ["one", "two"] {
            try place.tool("qemu-img", "bitmap", "--add", "-g", "4k", "a.qcow2", name)
        }
        // Tells how many MiB a program took.
        let script = """
            import resource, subprocess, sys
            result = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
            print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
            sys.exit(result.returncode)
            """
        for arguments in [
            ["info", "a.qcow2"], ["map", "--output=json", "a.qcow2"],
            ["snapshot", "-l", "a.qcow2"],
            ["measure", "-O", "raw", "a.qcow2"], ["bitmap", "--disable", "a.qcow2", "one"],
            ["bitmap", "--merge", "one", "a.qcow2", "two"],
        ] {
            let result = try place.run(
                "/usr/bin/env", ["python3", "-c", script, Workplace.merino] + arguments)
            #expect(result.status == 0, "\(arguments): \(result.errors)")
            let taken = Int(result.output.trimmingCharacters(in: .whitespacesAndNewlines)) ?? .max
            #expect(taken < 128, "\(arguments): \(taken) MiB")
        }
    }
}
