import BlockCore
import QMP

/// A job that makes or changes an image: it ends by itself, and is kept until it is dismissed. Confined
/// to the daemon's main thread; its work visits that of its nodes.
final class ImageJob: @unchecked Sendable {
    /// As `query-jobs` names what it does.
    enum Kind: String { case create, amend }

    let identifier: String
    let kind: Kind
    var status = "created"
    /// Of the work, in steps of the work's own.
    var progress = (done: 0, total: 1)
    var failure: BlockError?
    /// Its work; done when the job has concluded.
    var task: Task<Void, Never>?

    init(_ identifier: String, _ kind: Kind) {
        self.identifier = identifier
        self.kind = kind
    }
}

extension StorageDaemon {
    /// - Throws: `alreadyExists`, or `exhausted` where no more jobs are taken.
    func checkJobName(_ identifier: String) throws(BlockError) {
        guard !jobs.contains(where: { $0.identifier == identifier }) else {
            throw BlockError(.alreadyExists, "there is a job '\(identifier)' already")
        }
        guard jobs.count < Limits.jobCountMax else {
            throw BlockError(
                .exhausted, "there are \(Limits.jobCountMax) jobs already",
                remedy: "job-dismiss those that have concluded")
        }
    }

    /// Begins a job; `body` goes on after the return.
    func start(
        _ job: ImageJob, _ body: sending @escaping () async throws(BlockError) -> Void
    ) {
        jobs.append(job)
        announce(job, "created")
        announce(job, "running")
        job.task = thread.spawn { [self] in
            do throws(BlockError) {
                try await body()
                job.progress.done = job.progress.total
            } catch { job.failure = error }
            for status in job.failure == nil ? ["waiting", "pending"] : ["aborting"] {
                announce(job, status)
            }
            announce(job, "concluded")
        }
    }

    private func announce(_ job: ImageJob, _ status: String) {
        job.status = status
        emit("JOB_STATUS_CHANGE", ["id": .string(job.identifier), "status": .string(status)])
    }

    /// `query-jobs`.
    func queryJobs(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        .array(
            jobs.map { job in
                var result: JSONObject = [
                    "id": .string(job.identifier), "type": .string(job.kind.rawValue),
                    "status": .string(job.status),
                    "current-progress": .integer(job.progress.done),
                    "total-progress": .integer(job.progress.total),
                ]
                if let failure = job.failure { result["error"] = .string(failure.description) }
                return .object(result)
            })
    }

    /// `job-dismiss`.
    func jobDismiss(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "job-dismiss")
        let identifier = try reader.required("id")
        try reader.finish()
        guard let job = jobs.first(where: { $0.identifier == identifier }) else {
            throw BlockError(.notFound, "there is no job '\(identifier)'")
        }
        guard job.status == "concluded" else {
            throw BlockError(
                .busy, "job '\(identifier)' in state '\(job.status)' has not concluded")
        }
        jobs.removeAll { $0 === job }
        announce(job, "null")
        return [:]
    }
}
