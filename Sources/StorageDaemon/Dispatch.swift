import BlockCore
import BlockIO
import QMP

extension StorageDaemon: QMPExecutor {
    /// Carries out a command by its name, as if a client had sent it.
    ///
    /// - Throws: `unsupported` when there is no such command.
    public func execute(
        _ command: String, _ arguments: JSONValue
    ) async throws(BlockError) -> JSONValue {
        guard let schema = Self.schema.command(named: command),
            let handler = Self.handlers[command]
        else {
            throw BlockError(.unsupported, "the command '\(command)' has not been found")
        }
        try Self.schema.check(arguments, of: schema)
        await turns.take()
        defer { turns.pass() }
        try checkOpen()
        return try await handler(self)(arguments)
    }

    /// Runs a command whose arguments were checked.
    ///
    /// Commands run one at a time, in the order in which they came, whichever client sent them:
    /// each finds the graph as the one before left it. Those out of band do not wait.
    ///
    /// - Parameter descriptors: of the client that sent it.
    func execute(
        _ request: QMPSession.Request, from descriptors: PassedDescriptors? = nil
    ) async throws(BlockError) -> JSONValue {
        guard let handler = Self.handlers[request.command.name] else {
            throw BlockError(.unsupported, "nobody runs '\(request.command.name)'")
        }
        TracePoint.qmpCommand("command \(request.command.name)")
        if request.isOutOfBand { return try await handler(self)(request.arguments) }
        // It has to wait for its turn too, but not for a passphrase that is being tried.
        if request.command.name == "quit" { graph.endLongWork() }
        await turns.take()
        callerDescriptors = descriptors
        defer {
            callerDescriptors = nil
            turns.pass()
        }
        try checkOpen()
        return try await handler(self)(request.arguments)
    }
}
