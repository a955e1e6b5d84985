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
    /// What commands name exports, jobs and objects by: a letter, then letters, digits, `-`, `.`, `_`.
    static func checkIdentifier(_ identifier: String, of what: String) throws(BlockError) {
        let bytes = Array(identifier.utf8)
        func isLetter(_ byte: UInt8) -> Bool { (0x61...0x7a).contains(byte | 0x20) }
        let isWellFormed =
            bytes.first.map(isLetter) ?? false
            && bytes.allSatisfy { byte in
                isLetter(byte) || (0x30...0x39).contains(byte) || [0x2d, 0x2e, 0x5f].contains(byte)
            }
        guard isWellFormed, bytes.count <= Limits.nameLengthMax else {
            throw BlockError(
                .invalidArgument, "'\(identifier)' is no valid identifier of \(what)",
                remedy: "begin with a letter, go on with letters, digits, '-', '.', '_'; "
                    + "\(Limits.nameLengthMax) characters at most")
        }
    }

    /// - Throws: `alreadyExists`, or `exhausted` where no more jobs are taken.
    func checkJobName(_ identifier: String) throws(BlockError) {
        try Self.checkIdentifier(identifier, of: "a job")
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

    /// `query-block-jobs`: jobs on the devices of guests, of which there are none here.
    func queryBlockJobs(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        []
    }

    /// `job-cancel`. What makes or changes an image runs to its end: half of it would be of no use.
    func jobCancel(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "job-cancel")
        let identifier = try reader.required("id")
        try reader.finish()
        guard let job = jobs.first(where: { $0.identifier == identifier }) else {
            throw BlockError(.notFound, "there is no job '\(identifier)'")
        }
        throw BlockError(
            .unsupported,
            "job '\(identifier)' in state '\(job.status)' cannot be cancelled",
            remedy: "it ends by itself; job-dismiss it when it has concluded")
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
