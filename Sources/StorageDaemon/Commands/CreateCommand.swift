import BlockCore
import BlockGraph
import QMP

extension StorageDaemon {
    /// `blockdev-create`: makes an image, as a job.
    func blockdevCreate(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "blockdev-create")
        let identifier = try reader.required("job-id")
        guard let options = try reader.value("options") else {
            throw BlockError(.invalidArgument, "blockdev-create: parameter 'options' is missing")
        }
        try reader.finish()
        try checkJobName(identifier)
        let creationOptions = try OptionReader(options, of: "blockdev-create options")
        let driver = try graph.registry.driver(named: try creationOptions.required("driver"))
        guard let create = driver.create else {
            throw BlockError(.unsupported, "driver '\(driver.name)' cannot create images")
        }
        let home = home(of: options)
        start(ImageJob(identifier, .create)) { () throws(BlockError) in
            try await home.thread.visit { () throws(BlockError) in
                try await Self.create(in: home, creationOptions, create)
            }
        }
        return [:]
    }

    private static func create(
        in graph: BlockGraph, _ options: OptionReader,
        _ create: (ImageCreation) async throws(BlockError) -> Void
    ) async throws(BlockError) {
        let creation = ImageCreation(graph, options: options)
        var failure: BlockError?
        do throws(BlockError) { try await create(creation) } catch { failure = error }
        do throws(BlockError) { try await creation.finish() } catch { failure = failure ?? error }
        if let failure { throw failure }
    }
}
