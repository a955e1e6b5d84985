import BlockCore
import QMP

extension StorageDaemon {
    /// `query-version`.
    func queryVersion(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        QMPSession.version
    }

    /// `query-commands`.
    func queryCommands(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        Self.schema.commandList
    }

    /// `query-qmp-schema`.
    func querySchema(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        Self.schema.introspection
    }

    /// `quit`: the reply leaves before the daemon ends.
    func quitCommand(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        quit()
        return [:]
    }
}
