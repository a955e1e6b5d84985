import BlockCore
import BlockGraph
import QMP

extension StorageDaemon {
    /// What `x-blockdev-amend` changes, by driver: the keys of encrypted images.
    private static let amendable: [String: Set<String>] = [
        "luks": ["state", "new-secret", "old-secret", "keyslot", "iter-time"],
        "qcow2": ["encrypt"],
    ]

    /// `x-blockdev-amend`: changes the keys of an open image, as a job.
    func blockdevAmend(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "x-blockdev-amend")
        let identifier = try reader.required("job-id")
        let node = try await onThread(of: try reader.required("node-name")) { $0 }
        guard case .object(var options)? = try reader.value("options") else {
            throw BlockError(.invalidArgument, "x-blockdev-amend: parameter 'options' is missing")
        }
        let isForced = try reader.bool("force") ?? false
        try reader.finish()
        try checkJobName(identifier)
        try Self.takeDriver(from: &options, of: node)
        let job = ImageJob(identifier, .amend)
        let amendment = ImageAmendment(
            try OptionReader(.object(options), of: "x-blockdev-amend options"), isForced: isForced
        ) { [thread] done, total in
            thread.spawn { job.progress = (done, total) }
        }
        let hold = "job \(identifier)"
        try await node.seat.visit { () throws(BlockError) in node.hold(hold) }
        start(job) { () throws(BlockError) in
            try await node.seat.visit { () throws(BlockError) in
                let graph = node.graph
                let result: Result<Void, BlockError>
                do throws(BlockError) {
                    result = .success(try await graph.amend(node, amendment))
                } catch { result = .failure(error) }
                node.release(hold)
                try await graph.collect()
                try result.get()
            }
        }
        return [:]
    }

    /// Takes the driver's name out of the options, and looks at what is left.
    private static func takeDriver(
        from options: inout JSONObject, of node: BlockNode
    ) throws(BlockError) {
        guard case .string(let driver)? = options["driver"] else {
            throw BlockError(.invalidArgument, "x-blockdev-amend: option 'driver' is missing")
        }
        options["driver"] = nil
        guard driver == node.description.name else {
            throw BlockError(
                .invalidArgument,
                "its driver is '\(node.description.name)', not '\(driver)'", node: node.name)
        }
        guard let known = amendable[driver] else {
            throw BlockError(
                .unsupported, "open images of driver '\(driver)' cannot be amended",
                node: node.name)
        }
        for (key, _) in options.members where !known.contains(key) {
            throw BlockError(
                .invalidArgument, "'\(key)' of an open image cannot be amended",
                remedy: "use \(known.sorted().joined(separator: ", "))", node: node.name)
        }
    }
}
