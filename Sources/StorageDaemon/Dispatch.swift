import BlockCore
import BlockIO
import QMP

extension StorageDaemon: QMPExecutor {
    /// Carries out a command by its name.
    ///
    /// - Throws: `unsupported` when there is no such command.
    public func execute(
        _ command: String, _ arguments: JSONValue
    ) async throws(BlockError) -> JSONValue {
        switch command {
        case "block-export-add": try await blockExportAdd(arguments)
        case "block-export-del": try await blockExportDel(arguments)
        case "block_resize": try await blockResize(arguments)
        case "blockdev-add": try await blockdevAdd(arguments)
        case "blockdev-create": try await blockdevCreate(arguments)
        case "blockdev-del": try await blockdevDel(arguments)
        case "blockdev-replace": try await blockdevReplace(arguments)
        case "job-dismiss": try await jobDismiss(arguments)
        case "nbd-server-add": try await nbdServerAdd(arguments)
        case "nbd-server-remove": try await nbdServerRemove(arguments)
        case "nbd-server-start": try await nbdServerStart(arguments)
        case "nbd-server-stop": try await nbdServerStop(arguments)
        case "query-block": try await queryBlock(arguments)
        case "query-block-exports": try await queryBlockExports(arguments)
        case "query-blockstats": try await queryBlockstats(arguments)
        case "query-jobs": try await queryJobs(arguments)
        case "query-named-block-nodes": try await queryNamedBlockNodes(arguments)
        case "transaction": try await transaction(arguments)
        case "x-debug-query-block-graph": try await queryBlockGraph(arguments)
        case "x-query-nbd-server": try await queryNBDServer(arguments)
        default:
            throw BlockError(.unsupported, "The command \(command) has not been found")
        }
    }
}
