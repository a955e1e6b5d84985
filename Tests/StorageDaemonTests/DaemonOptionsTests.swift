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

@Suite struct OptionHelpTests {
    private func listing(_ arguments: String...) throws -> String? {
        try DaemonOptions(arguments).listing
    }

    @Test(arguments: ["help", "?", "help,id=x", "nosuch,help"])
    func objectsAreListed(text: String) throws {
        let lines = try #require(try listing("--object", text)).split(separator: "\n")
        #expect(lines.first == "List of user creatable objects:")
        #expect(lines.dropFirst().count == DaemonObject.Kind.allCases.count)
        #expect(lines.contains("  tls-creds-x509") && lines.contains("  iothread"))
    }

    @Test(arguments: ["authz-list,help", "authz-list,id=x,?", "qom-type=authz-list,help"])
    func thePropertiesOfAnObjectAreListed(text: String) throws {
        #expect(
            try listing("--object", text) == """
                authz-list options:
                  policy=<QAuthZListPolicy>
                  rules=<QAuthZListRule>
                """)
    }

    @Test func everyObjectHasProperties() throws {
        for kind in DaemonObject.Kind.allCases {
            let text = try #require(try listing("--object", "\(kind.rawValue),help"))
            #expect(text.hasPrefix("\(kind.rawValue) options:\n  "), "\(kind)")
        }
    }

    @Test func characterDevicesAreListed() throws {
        let text = try #require(try listing("--chardev", "help"))
        #expect(text.hasPrefix("Available chardev backend types:"))
        for backend in CharacterDevices.backends {
            #expect(text.contains("\n  \(backend)"), "\(backend)")
            let options = try #require(try listing("--chardev", "\(backend),help"))
            #expect(options.hasPrefix("\(backend) options:\n  id=<string>"), "\(backend)")
        }
    }

    @Test func whatStandsBehindARequestForHelpIsNotLookedAt() throws {
        #expect(try listing("--object", "help", "--nosuch") != nil)
        #expect(throws: BlockError.self) { try DaemonOptions(["--nosuch", "--object", "help"]) }
    }

    /// Help is a word by itself.
    @Test(arguments: [
        "secret,id=help,data=x", "secret,id=x,data=help", "secret,id=x,help=on",
        "{\"qom-type\": \"help\"}", "qom-type=help,id=x", "secret,id=x,data=a,,help",
    ])
    func valuesAreNoRequestForHelp(text: String) throws {
        #expect(try listing("--object", text) == nil)
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

    @Test func everyCreationIsDescribed() {
        let creating = StorageDaemon.registry.drivers.filter { $0.create != nil }.map(\.name)
        #expect(Set(creating) == Set(StorageDaemon.creationOptions.keys))
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
