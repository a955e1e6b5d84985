import BlockCore
import QMP

/// What `amend` changes of an image that is there already.
public struct ImageAmendment {
    /// The driver's options of creation that it can change; what it does not read is an error.
    public let options: OptionReader
    /// Do also what may make data unreadable for good, as erasing the last key.
    public let isForced: Bool
    /// Told how much of the work is done.
    public let progress: (_ done: Int, _ total: Int) -> Void

    public init(
        _ options: OptionReader, isForced: Bool = false,
        progress: @escaping (_ done: Int, _ total: Int) -> Void = { _, _ in }
    ) {
        self.options = options
        self.isForced = isForced
        self.progress = progress
    }
}

extension BlockGraph {
    /// Changes properties of the image behind `node`. Its users' requests wait meanwhile.
    ///
    /// Everything is durable on return.
    ///
    /// - Throws: `unsupported` where the driver, or the image, cannot change so; `readOnly`.
    public func amend(_ node: BlockNode, _ amendment: ImageAmendment) async throws(BlockError) {
        thread.preconditionOnThread()
        if node.isReadOnly {
            throw BlockError(.readOnly, "the node is read-only", node: node.name)
        }
        try await drained([node]) { () throws(BlockError) in
            do throws(BlockError) {
                try await node.driver.amend(amendment)
            } catch {
                throw error.on(node: node.name)
            }
        }
    }
}
