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
