import BlockCore
import Foundation
import QMP
import Testing

@testable import StorageDaemon

/// Keys of open images change: `x-blockdev-amend`.
@Suite struct AmendTests {
    private static let secrets = [
        "--object", "secret,id=one,data=first", "--object", "secret,id=two,data=second",
    ]

    private static func wait(_ client: RawQMPClient) throws {
        var status: JSONValue?
        while status != "concluded" { status = try client.event()["data"]?["status"] }
    }

    private static func create(
        _ client: RawQMPClient, _ options: JSONObject, at path: String
    ) throws {
        #expect(FileManager.default.createFile(atPath: path, contents: nil))
        var all = options
        all["size"] = 1_048_576
        all["file"] = ["driver": "file", "filename": .string(path)]
        try client.execute("blockdev-create", ["job-id": "c", "options": .object(all)])
        try wait(client)
        try client.execute("job-dismiss", ["id": "c"])
    }

    @Test(arguments: ["luks", "qcow2"]) func aSecondKeyIsSetAndTheFirstErased(
        driver: String
    ) async throws {
        try await MonitoredDaemon.with(Self.secrets) { daemon in
            let client = try daemon.client()
            let path = "\(daemon.folder)/disk"
            let isPlain = driver == "luks"
            let keys: JSONObject = ["key-secret": "one", "iter-time": 10]
            var creation: JSONObject = ["driver": .string(driver)]
            if isPlain {
                for (key, value) in keys.members { creation[key] = value }
            } else {
                var encrypt = keys
                encrypt["format"] = "luks"
                creation["encrypt"] = .object(encrypt)
            }
            try Self.create(client, creation, at: path)
            func options(_ secret: String) -> JSONValue {
                var options: JSONObject = [
                    "driver": .string(driver), "node-name": "disk",
                    "file": ["driver": "file", "filename": .string(path)],
                ]
                if isPlain {
                    options["key-secret"] = .string(secret)
                } else {
                    options["encrypt"] = ["format": "luks", "key-secret": .string(secret)]
                }
                return .object(options)
            }
            func amend(_ change: JSONObject) throws {
                var all: JSONObject = ["driver": .string(driver)]
                if isPlain {
                    for (key, value) in change.members { all[key] = value }
                } else {
                    var encrypt = change
                    encrypt["format"] = "luks"
                    all["encrypt"] = .object(encrypt)
                }
                try client.execute(
                    "x-blockdev-amend",
                    ["job-id": "a", "node-name": "disk", "options": .object(all)])
                try Self.wait(client)
                guard case .array(let jobs) = try client.execute("query-jobs") else { return }
                #expect(jobs.first?["type"] == "amend")
                #expect(jobs.first?["error"] == nil)
                try client.execute("job-dismiss", ["id": "a"])
            }
            try client.execute("blockdev-add", options("one"))
            try amend(["state": "active", "new-secret": "two", "iter-time": 10])
            try amend(["state": "inactive", "old-secret": "one"])
            try client.execute("blockdev-del", ["node-name": "disk"])
            let reason = try client.refusal("blockdev-add", options("one"))
            #expect(reason.contains("passphrase"), "\(reason)")
            try client.execute("blockdev-add", options("two"))
        }
    }

    @Test func whatAnOpenImageCannotChangeIsRefusedByName() async throws {
        try await MonitoredDaemon.with(Self.secrets) { daemon in
            let client = try daemon.client()
            let path = "\(daemon.folder)/disk"
            try Self.create(client, ["driver": "qcow2"], at: path)
            try client.execute(
                "blockdev-add",
                [
                    "driver": "qcow2", "node-name": "disk",
                    "file": ["driver": "file", "filename": .string(path), "node-name": "file"],
                    "overlap-check": ["template": "cached", "inactive-l2": true],
                    "pass-discard-other": true, "discard-no-unref": true,
                ])
            for (node, options, word) in [
                ("disk", ["driver": "qcow2", "size": 1], "'size'"),
                ("disk", ["driver": "luks", "state": "active"], "'luks'"),
                ("file", ["driver": "file"], "'file'"), ("disk", [:], "'driver'"),
                ("gone", ["driver": "qcow2"], "'gone'"),
            ] as [(String, JSONValue, String)] {
                let reason = try client.refusal(
                    "x-blockdev-amend",
                    ["job-id": "a", "node-name": .string(node), "options": options])
                #expect(reason.contains(word), "\(reason)")
            }
            // A job that fails says so.
            try client.execute(
                "x-blockdev-amend",
                [
                    "job-id": "a", "node-name": "disk",
                    "options": [
                        "driver": "qcow2", "encrypt": ["state": "active", "new-secret": "one"],
                    ],
                ])
            try Self.wait(client)
            guard case .array(let jobs) = try client.execute("query-jobs") else { return }
            #expect(jobs.first?["error"] != nil)
            // The job lets go of the image.
            try client.execute("blockdev-del", ["node-name": "disk"])
        }
    }
}
