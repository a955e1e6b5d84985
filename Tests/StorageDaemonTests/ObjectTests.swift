import BlockCore
import BlockIO
import BlockTLS
import BlockTesting
import Foundation
import QMP
import Testing

@testable import StorageDaemon

/// Objects: what they hold, who they let in, and how the object model shows them.
@Suite struct ObjectTests {
    /// Adds objects to a daemon without sockets.
    private func objects(
        _ list: [JSONValue], in folder: String = "/tmp"
    ) async throws -> [String: DaemonObject] {
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        return try await thread.run { () async throws(BlockError) -> [String: DaemonObject] in
            let daemon = StorageDaemon(on: thread)
            for arguments in list { _ = try await daemon.objectAdd(arguments) }
            return daemon.objects
        }
    }

    private func bytes(_ object: DaemonObject?) -> [UInt8]? {
        if case .secret(let secret)? = object { return secret.array }
        return nil
    }

    private static let key = (0..<32).map { UInt8($0) }
    private static let vector = (0..<16).map { UInt8(100 + $0) }

    /// What openssl makes of `text` with the key and the vector, in base64.
    private func encrypt(_ text: String) throws -> String {
        func hex(_ bytes: [UInt8]) -> String {
            bytes.map { String(format: "%02x", $0) }.joined()
        }
        return try ChildProgram.run(
            ["openssl", "enc", "-aes-256-cbc", "-a", "-K", hex(Self.key), "-iv", hex(Self.vector)],
            input: text
        ).output
    }

    private func secret(_ id: String, _ more: JSONObject) -> JSONValue {
        var options: JSONObject = ["qom-type": "secret", "id": .string(id)]
        for (key, value) in more.members { options[key] = value }
        return .object(options)
    }

    private var master: JSONValue {
        secret("master", ["data": .string(Base64.encode(Self.key)), "format": "base64"])
    }

    @Test(arguments: ["", "x", "sixteen bytes ...", "a password that is longer than two blocks"])
    func encryptedSecretsAreDecrypted(text: String) async throws {
        let wrapped = secret(
            "s",
            [
                "data": .string(try encrypt(text)), "format": "base64", "keyid": "master",
                "iv": .string(Base64.encode(Self.vector)),
            ])
        let made = try await objects([master, wrapped])
        #expect(bytes(made["s"]) == Array(text.utf8))
    }

    @Test(arguments: [
        (["keyid": "none", "iv": "AAAA"], "'none'"), (["keyid": "master"], "'iv'"),
        (["iv": "AAAA"], "'keyid'"), (["keyid": "master", "iv": "AAAA"], "16"),
        (["keyid": "master", "iv": "!"], "base64"),
        (["keyid": "master", "iv": "AAAAAAAAAAAAAAAAAAAAAA==", "data": "AAAA"], "blocks"),
        (
            [
                "keyid": "master", "iv": "AAAAAAAAAAAAAAAAAAAAAA==",
                "data": "AAAAAAAAAAAAAAAAAAAAAA==",
            ], "is not the one"
        ),
    ])
    func secretsThatCannotBeDecryptedAreRefused(
        options: [String: String], part: String
    ) async throws {
        var all: JSONObject = ["data": "AAAA", "format": "base64"]
        for (key, value) in options { all[key] = .string(value) }
        do {
            _ = try await objects([master, secret("s", all)])
            Issue.record("it was taken")
        } catch let error as BlockError {
            #expect(error.description.contains(part), "\(error)")
        }
    }

    @Test func keysOfTheKernelsKeyringThatAreNotThereAreRefused() async throws {
        do {
            _ = try await objects([
                ["qom-type": "secret_keyring", "id": "s", "serial": 2_000_000_000]
            ])
            Issue.record("it was taken")
        } catch let error as BlockError {
            #expect(error.description.contains("2000000000"), "\(error)")
        }
    }

    @Test func aCertificateThatPeersRefuseIsTakenWithoutSanityCheckOnly() async throws {
        func credentials(_ more: JSONObject) -> JSONValue {
            var options: JSONObject = [
                "qom-type": "tls-creds-x509", "id": "t", "endpoint": "server",
                "dir": .string(TestCertificates.path("expired")),
            ]
            for (key, value) in more.members { options[key] = value }
            return .object(options)
        }
        for more: JSONObject in [[:], ["sanity-check": true]] {
            do {
                _ = try await objects([credentials(more)])
                Issue.record("it was taken")
            } catch let error as BlockError {
                #expect(error.description.contains("uses expired"), "\(error)")
            }
        }
        #expect(try await objects([credentials(["sanity-check": false])]).count == 1)
    }

    // MARK: Authorization

    @Test(arguments: [
        ("fred", true), ("fredx", false), ("CN=guest1,O=x", true), ("CN=guest", false),
        ("CN=guestevil,O=x", false), ("bob", false),
    ])
    func theFirstRuleThatMatchesDecides(name: String, isAllowed: Bool) throws {
        let list = try AuthorizationList(
            OptionReader(
                [
                    "rules": [
                        ["match": "fred", "policy": "allow"],
                        ["match": "*evil*", "policy": "deny", "format": "glob"],
                        ["match": "CN=guest?*,O=x", "policy": "allow", "format": "glob"],
                        ["match": "fred", "policy": "deny"],
                    ]
                ], of: "test"))
        #expect(list.allows(name) == isAllowed)
    }

    @Test func aListInAFileIsReadAgainWhenItChanges() async throws {
        let folder = try TemporaryFolder()
        defer { folder.remove() }
        let path = folder["list"]
        func write(_ text: String) throws {
            try text.write(toFile: path, atomically: true, encoding: .utf8)
        }
        try write("{\"rules\": [{\"match\": \"a\", \"policy\": \"allow\"}]}")
        let live = try AuthorizationFile(path, refreshes: true)
        let once = try AuthorizationFile(path, refreshes: false)
        #expect(live.allows("a") && !live.allows("b") && once.allows("a"))
        try write("{\"rules\": [{\"match\": \"b\", \"policy\": \"allow\"}]}")
        #expect(!live.allows("a") && live.allows("b") && once.allows("a"))
        try write("{ not a list")
        #expect(live.allows("b"))
        #expect(throws: BlockError.self) { try AuthorizationFile(path, refreshes: true) }
    }

    @Test func theServerAsksTheAuthorizationListThatWasChanged() async throws {
        try await MonitoredDaemon.with(DaemonTests.exported) { daemon in
            let client = try daemon.client()
            let key = String(repeating: "a1", count: 16)
            try "alice:\(key)\nbob:\(key)\n".write(
                toFile: "\(daemon.folder)/keys.psk", atomically: false, encoding: .utf8)
            try client.execute("nbd-server-stop")
            let credentials: JSONValue = [
                "qom-type": "tls-creds-psk", "id": "t", "endpoint": "server",
                "dir": .string(daemon.folder),
            ]
            try client.execute("object-add", credentials)
            try client.execute(
                "object-add",
                [
                    "qom-type": "authz-list", "id": "who",
                    "rules": [["match": "alice", "policy": "allow"]],
                ])
            try client.execute(
                "nbd-server-start",
                [
                    "addr": [
                        "type": "unix", "data": ["path": .string("\(daemon.folder)/tls")],
                    ], "tls-creds": "t", "tls-authz": "who",
                ])
            try client.execute(
                "block-export-add", ["type": "nbd", "id": "x", "node-name": "r"])
            func comesIn(_ name: String) throws -> Bool {
                try ChildProgram.run([
                    "nbdinfo", "--size",
                    "nbds+unix://\(name)@/r?socket=\(daemon.folder)/tls&tls-psk-file="
                        + "\(daemon.folder)/keys.psk",
                ]).status == 0
            }
            #expect(try comesIn("alice"))
            #expect(!(try comesIn("bob")))
            try client.execute(
                "qom-set",
                [
                    "path": "/objects/who", "property": "rules",
                    "value": [["match": "bob", "policy": "allow"]],
                ])
            #expect(!(try comesIn("alice")))
            #expect(try comesIn("bob"))
        }
    }

    @Test func qemuConnectsWithoutAnybodyShowingCredentials() async throws {
        try await MonitoredDaemon.with(
            [
                "--object", "tls-creds-anon,id=t,endpoint=server", "--blockdev",
                "driver=file,node-name=f,filename=$/disk", "--nbd-server",
                "addr.type=unix,addr.path=$/nbd,tls-creds=t", "--export", "nbd,id=e,node-name=f",
            ]
        ) { daemon in
            let result = try ChildProgram.run([
                "qemu-io", "--object", "tls-creds-anon,id=c,endpoint=client", "-r", "--image-opts",
                "-c",
                "read 0 4k",
                "driver=nbd,server.type=unix,server.path=\(daemon.folder)/nbd,export=f,tls-creds=c",
            ])
            #expect(result.status == 0, "\(result.errors)")
        }
    }

    // MARK: The object model

    @Test func theTextOfASecretIsNotShown() async throws {
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        let all = try await thread.run { () async throws(BlockError) -> [JSONValue] in
            let daemon = StorageDaemon(on: thread)
            _ = try await daemon.objectAdd(
                ["qom-type": "secret", "id": "s", "data": "TopSecretPassword"])
            return [
                try await daemon.qomGet(["path": "/objects/s", "property": "data"]),
                try await daemon.qomListGet(["paths": ["/objects/s"]]),
                .array(daemon.objectProperties.values.map { .object($0.values) }),
            ]
        }
        #expect(all[0] == .null)
        for value in all { #expect(!value.text().contains("TopSecret"), "\(value.text())") }
    }

    @Test func whatIsNotInTheTreeIsToldByTheClassOfTheError() async throws {
        let options = ["--object", "secret,id=s,data=x", "--object", "throttle-group,id=t"]
        try await MonitoredDaemon.with(options) { daemon in
            let client = try daemon.client()
            func kind(_ command: String, _ arguments: JSONValue) throws -> String {
                do {
                    return "gave \(try client.execute(command, arguments).text())"
                } catch let refused as RawQMPClient.Refused {
                    return refused.kind
                }
            }
            let absent: [(String, JSONValue)] = [
                ("qom-list", ["path": "/none"]), ("qom-list-get", ["paths": ["/none"]]),
                ("qom-get", ["path": "/objects/none", "property": "x"]),
                ("qom-set", ["path": "/objects/none", "property": "x", "value": 1]),
                ("qom-list-properties", ["typename": "none"]),
            ]
            for (command, arguments) in absent {
                #expect(try kind(command, arguments) == "DeviceNotFound", "\(command)")
            }
            for path in ["/objects/s", "/objects/t", "/objects"] {
                let property: JSONObject = ["path": .string(path), "property": "none"]
                #expect(try kind("qom-get", .object(property)) == "GenericError", "\(path)")
            }
            #expect(try kind("object-del", ["id": "none"]) == "GenericError")
        }
    }

    @Test func objectsAreATreeThatCanBeLookedAt() async throws {
        try await MonitoredDaemon.with { daemon in
            let client = try daemon.client()
            try client.execute(
                "object-add", ["qom-type": "iothread", "id": "io", "poll-max-ns": 7])
            #expect(
                try client.execute("qom-list", ["path": "/"]) == [
                    ["name": "type", "type": "string"],
                    ["name": "objects", "type": "child<container>"],
                    ["name": "chardevs", "type": "child<container>"],
                ])
            #expect(
                QueryTests.element(
                    try client.execute("qom-list", ["path": "/objects"]), "name", "io")?["type"]
                    == "child<iothread>")
            #expect(
                QueryTests.element(
                    try client.execute("qom-list", ["path": "/chardevs"]), "name", "q")?["type"]
                    == "child<chardev-socket>")
            let property: JSONObject = ["path": "/objects/io", "property": "poll-max-ns"]
            #expect(try client.execute("qom-get", .object(property)) == 7)
            var change = property
            change["value"] = 9
            try client.execute("qom-set", .object(change))
            #expect(try client.execute("qom-get", .object(property)) == 9)
            change["value"] = "many"
            #expect(try client.refusal("qom-set", .object(change)).contains("poll-max-ns"))
            let types = try client.execute("qom-list-types", ["implements": "tls-creds"])
            #expect(QueryTests.element(types, "name", "tls-creds-psk") != nil)
            #expect(QueryTests.element(types, "name", "secret") == nil)
            let properties = try client.execute(
                "qom-list-properties", ["typename": "authz-list"])
            #expect(QueryTests.element(properties, "name", "rules") != nil)
            #expect(try client.refusal("qom-list", ["path": "/none"]).contains("/none"))
            try client.execute("object-del", ["id": "io"])
            #expect(try client.refusal("qom-get", .object(property)).contains("io"))
        }
    }
}
