import BlockCore
import BlockIO
import QMP
import Testing

@testable import StorageDaemon

/// `blockdev-create` as a job: how many there are, and that the daemon waits for them.
@Suite struct JobTests {
    private static func with<T: Sendable>(
        _ body: @escaping @Sendable (StorageDaemon) async throws(BlockError) -> T
    ) async throws -> T {
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        return try await thread.run { () async throws(BlockError) -> T in
            try await body(StorageDaemon(on: thread))
        }
    }

    private static func start(
        _ identifier: String, _ daemon: StorageDaemon
    ) async throws(BlockError) {
        _ = try await daemon.blockdevCreate(
            [
                "job-id": .string(identifier),
                "options": ["driver": "file", "filename": "/none/disk", "size": 512],
            ])
    }

    @Test func closingWaitsForJobs() async throws {
        let states = try await Self.with { daemon throws(BlockError) in
            for index in 0..<8 { try await Self.start("j\(index)", daemon) }
            try await daemon.close()
            return daemon.jobs.map(\.status)
        }
        #expect(states.count == 8 && states.allSatisfy { $0 == "concluded" })
    }

    @Test(arguments: [
        (#"{"driver": "file", "filename": "/none/disk"}"#, "'options.size' is missing"),
        (#"{"driver": "file", "filename": "/none/disk", "size": "1"}"#, "'options.size' expects"),
        (#"{"driver": "raw", "file": 7, "size": 1}"#, "'options.file' expects"),
        (#"{"driver": "qcow2", "size": 1}"#, "'options.file' is missing"),
        (#"{"driver": "qcow2", "file": "n", "size": 1, "version": "v9"}"#, "use one of v2, v3"),
        (#"{"driver": "qcow2", "file": "n", "size": 1, "sice": 1}"#, "did you mean"),
        (
            #"{"driver": "qcow2", "file": "n", "size": 1, "encrypt": {"format": "no"}}"#,
            "'options.encrypt.format'"
        ),
        (
            #"{"driver": "luks", "file": "n", "size": 1, "cipher-alg": "no"}"#,
            "'options.cipher-alg'"
        ),
        (#"{"driver": "null-co", "size": 1}"#, "cannot create images"),
        (#"{"driver": "none"}"#, "'none'"),
    ])
    func optionsThatMakeNoSenseStartNoJob(options: String, part: String) async throws {
        let arguments: JSONValue = ["job-id": "j", "options": try JSONParser.parse(options)]
        try await Self.with { daemon throws(BlockError) in
            do throws(BlockError) {
                _ = try await daemon.execute("blockdev-create", arguments)
                Issue.record("a job began")
            } catch {
                #expect(error.description.contains(part), "\(error)")
            }
            #expect(daemon.jobs.isEmpty)
            try await daemon.close()
        }
    }

    @Test func whatTheDriverCannotUseIsTheJobsError() async throws {
        let failure = try await Self.with { daemon throws(BlockError) in
            let options: JSONValue = [
                "driver": "qcow2", "file": "none", "size": 65536, "cluster-size": 3,
            ]
            _ = try await daemon.execute("blockdev-create", ["job-id": "j", "options": options])
            await daemon.jobs.first?.task?.value
            let failure = daemon.jobs.first?.failure?.description
            try await daemon.close()
            return failure
        }
        #expect(failure?.contains("cluster-size") == true)
    }

    @Test func jobsThatNobodyDismissesAreLimited() async throws {
        try await Self.with { daemon throws(BlockError) in
            for index in 0..<Limits.jobCountMax { try await Self.start("j\(index)", daemon) }
            do throws(BlockError) {
                try await Self.start("more", daemon)
                Issue.record("there is no limit")
            } catch {
                #expect(error.code == .exhausted)
                #expect(error.description.contains("job-dismiss"))
            }
            for job in daemon.jobs { await job.task?.value }
            _ = try await daemon.jobDismiss(["id": "j0"])
            try await Self.start("more", daemon)
            try await daemon.close()
        }
    }
}
