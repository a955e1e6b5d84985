import BlockCore
import Testing

@testable import StorageDaemon

@Suite struct DaemonOptionsTests {
    @Test func stepsKeepTheirOrder() throws {
        let options = try DaemonOptions([
            "--blockdev", "file,node-name=a,filename=x", "--object=secret,id=s,data=d",
            "--export", "nbd,id=e,node-name=a", "--monitor", "q", "--pidfile", "p", "--daemonize",
        ])
        #expect(
            options.steps == [
                .blockdev(["driver": "file", "node-name": "a", "filename": "x"]),
                .object(["qom-type": "secret", "id": "s", "data": "d"]),
                .export(["type": "nbd", "id": "e", "node-name": "a"]), .monitor(["chardev": "q"]),
            ])
        #expect(options.pidFile == "p" && options.daemonizes)
    }

    @Test(arguments: [
        (["--blokdev", "x"], "--blockdev"), (["--blockdev"], "needs a value"),
        (["disk.img"], "disk.img"), (["--daemonize=yes"], "--daemonize"),
        (["--blockdev", "{"], "--blockdev {"),
    ])
    func aWrongOptionIsNamed(arguments: [String], part: String) {
        do throws(BlockError) {
            _ = try DaemonOptions(arguments)
            Issue.record("accepted")
        } catch {
            #expect(error.description.contains(part), "\(error)")
        }
    }
}

@Suite struct DaemonSchemaTests {
    @Test func everyTypeThatIsNamedIsThere() {
        #expect(StorageDaemon.schema.undefinedNames == [])
    }

    @Test func commandsAreDeclaredOnce() {
        let names = StorageDaemon.schema.commands.map(\.name)
        #expect(Set(names).count == names.count)
    }

    @Test func everyDriverIsDescribed() {
        let described = Set(StorageDaemon.driverOptions.map(\.name))
        for name in StorageDaemon.registry.drivers.map(\.name) {
            #expect(described.contains(name), "\(name)")
        }
    }

    @Test(arguments: [
        ("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v\nYmFy", "foobar"),
    ])
    func base64IsDecoded(text: String, expected: String) {
        #expect(Base64.decode(Array(text.utf8)) == Array(expected.utf8))
    }

    @Test(arguments: ["Z", "Zg=", "Zg==Zg==", "Z===", "Zh==", "Zm9v!"])
    func whatIsNoBase64IsRefused(text: String) {
        #expect(Base64.decode(Array(text.utf8)) == nil)
    }
}
