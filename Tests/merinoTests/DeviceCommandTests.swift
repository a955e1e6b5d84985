import Testing

/// Commands on block devices of the host; where none can be made, nothing is tested.
@Suite struct DeviceCommandTests {
    /// A loop device of 16 MiB, as long as `body` runs.
    private static func withDevice(_ body: (Workplace, String) throws -> Void) throws {
        let place = try Workplace()
        try place.tool("truncate", "-s", "16M", "disk")
        let found = try place.tool("losetup", "-f", "--show", "disk")
        // Not everybody may make devices.
        guard found.status == 0 else { return }
        let device = String(found.output.dropLast())
        defer { _ = try? place.tool("losetup", "-d", device) }
        try body(place, device)
    }

    @Test func createRawMakesARawDiskOfADevice() throws {
        try Self.withDevice { place, device in
            try place.tool("qemu-img", "create", "-q", "-f", "qcow2", device, "8M")
            let result = try place.merino("create", "-q", "-f", "raw", device, "16M")
            #expect(result.status == 0, "\(result.errors)")
            let info = try place.tool("qemu-img", "info", device)
            #expect(info.output.contains("file format: raw"), "\(info.output)")
            #expect(info.output.contains("(16777216 bytes)"), "\(info.output)")
            // A smaller disk is one of the device's size.
            #expect(try place.merino("create", "-q", "-f", "raw", device, "8M").status == 0)
        }
    }

    @Test(arguments: [["32M"], ["-o", "preallocation=full", "16M"]])
    func createRawRefusesWhatADeviceCannotDo(words: [String]) throws {
        try Self.withDevice { place, device in
            try place.tool("qemu-img", "create", "-q", "-f", "qcow2", device, "8M")
            let options = words.dropLast() + [device] + words.suffix(1)
            let result = try place.run(Workplace.merino, ["create", "-q", "-f", "raw"] + options)
            #expect(result.status == 1, "\(result.output)")
            #expect(result.errors.contains("device"), "\(result.errors)")
            let info = try place.tool("qemu-img", "info", device)
            #expect(info.output.contains("file format: qcow2"), "\(info.output)")
        }
    }

    @Test func aDeviceIsAFormatOfItsOwn() throws {
        try Self.withDevice { place, device in
            try place.tool("qemu-img", "create", "-q", "-f", "qcow2", device, "8M")
            let info = try place.merino("info", "-f", "host_device", device)
            #expect(info.output.contains("file format: host_device"), "\(info.errors)")
            #expect(info.output.contains("(16777216 bytes)"), "\(info.output)")
            let file = try place.merino("create", "-q", "-f", "file", device, "16M")
            #expect(file.status == 1 && file.errors.contains("is a block device"))
            let made = try place.merino("create", "-q", "-f", "host_device", device, "16M")
            #expect(made.status == 0, "\(made.errors)")
            let now = try place.tool("qemu-img", "info", device)
            #expect(now.output.contains("file format: raw"), "\(now.output)")
        }
    }

    @Test func createRawLeavesADeviceInUseAlone() throws {
        try Self.withDevice { place, device in
            try place.tool("qemu-img", "create", "-q", "-f", "qcow2", device, "8M")
            let script = """
                mkfifo in
                qemu-io -f qcow2 '\(device)' <in >seen & exec 4>in
                echo 'read 0 1' >&4
                for n in $(seq 200); do grep -q 'read 1/1' seen && break; sleep 0.05; done
                '\(Workplace.merino)' create -q -f raw '\(device)' 16M; echo "status $?"
                exec 4>&-; wait
                """
            let result = try place.tool("bash", "-c", script)
            #expect(result.output.contains("status 1"), "\(result.output)\(result.errors)")
            let info = try place.tool("qemu-img", "info", device)
            #expect(info.output.contains("file format: qcow2"), "\(info.output)")
        }
    }
}
