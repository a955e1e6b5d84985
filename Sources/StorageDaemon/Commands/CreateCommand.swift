import BlockCore
import BlockGraph
import QMP

/// A `blockdev-create` job: it ends by itself, and is kept until it is dismissed.
final class CreationJob {
    let identifier: String
    var status = "created"
    var failure: BlockError?

    init(_ identifier: String) {
        self.identifier = identifier
    }
}

extension StorageDaemon {
    /// `blockdev-create`: makes an image, as a job.
    func blockdevCreate(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "blockdev-create")
        let identifier = try reader.required("job-id")
        guard let options = try reader.value("options") else {
            throw BlockError(.invalidArgument, "blockdev-create: parameter 'options' is missing")
        }
        try reader.finish()
        guard !jobs.contains(where: { $0.identifier == identifier }) else {
            throw BlockError(.alreadyExists, "there is a job '\(identifier)' already")
        }
        let creationOptions = try OptionReader(options, of: "blockdev-create options")
        let driver = try graph.registry.driver(named: try creationOptions.required("driver"))
        guard let create = driver.create else {
            throw BlockError(.unsupported, "driver '\(driver.name)' cannot create images")
        }
        let job = CreationJob(identifier)
        jobs.append(job)
        announce(job, "created")
        announce(job, "running")
        let creation = ImageCreation(graph, options: creationOptions)
        thread.spawn { [self] in
            do throws(BlockError) {
                try await create(creation)
            } catch { job.failure = error }
            do throws(BlockError) {
                try await creation.finish()
            } catch { job.failure = job.failure ?? error }
            for status in job.failure == nil ? ["waiting", "pending"] : ["aborting"] {
                announce(job, status)
            }
            announce(job, "concluded")
        }
        return [:]
    }

    private func announce(_ job: CreationJob, _ status: String) {
        job.status = status
        emit("JOB_STATUS_CHANGE", ["id": .string(job.identifier), "status": .string(status)])
    }

    /// `query-jobs`.
    func queryJobs(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        .array(
            jobs.map { job in
                var result: JSONObject = [
                    "id": .string(job.identifier), "type": "create",
                    "status": .string(job.status),
                    "current-progress": .integer(job.status == "concluded" ? 1 : 0),
                    "total-progress": 1,
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
