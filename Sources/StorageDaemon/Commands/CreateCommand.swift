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
        let creation = ImageCreation(graph, options: creationOptions)
        start(ImageJob(identifier, .create)) { () throws(BlockError) in
            let result: Result<Void, BlockError>
            do throws(BlockError) {
                result = .success(try await create(creation))
            } catch { result = .failure(error) }
            do throws(BlockError) {
                try await creation.finish()
            } catch  where (try? result.get()) == nil {
                // The first failure tells more.
            }
            try result.get()
        }
        return [:]
    }
}
