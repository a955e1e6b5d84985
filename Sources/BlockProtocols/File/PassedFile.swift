import BlockCore
import BlockGraph
import BlockIO

/// Opening a file that was passed in.
///
/// Locks and direct I/O belong to what the system calls an open file description, which a duplicate of
/// a descriptor shares with the original: two nodes on duplicates would not see each other's locks, and
/// one that closes would drop the other's. So the file behind the descriptor is opened anew. Where this
/// process may not do that, the duplicate is used, with what it brings along, by one node at a time.
enum PassedFile {
    static func open(
        _ passed: DescriptorSets.Member, as path: String, _ options: FileOptions,
        in graph: BlockGraph
    ) async throws(BlockError) -> File {
        #if os(Linux)
        // The member may be removed while a worker thread opens what its number stands for.
        let copy = try graph.descriptorSets.duplicate(passed, as: path)
        defer { graph.thread.system.close(IOHandle(copy)) }
        do throws(BlockError) {
            return try await File.open(
                "/proc/self/fd/\(copy)", options, as: path, on: graph.thread)
        } catch  where error.code == .permissionDenied || error.code == .notFound {
            return try await borrow(passed, as: path, options, in: graph)
        } catch {
            throw error.doing("opening '\(path)'")
        }
        #else
        return try await borrow(passed, as: path, options, in: graph)
        #endif
    }

    /// Uses the opening that was passed in.
    static func borrow(
        _ passed: DescriptorSets.Member, as path: String, _ options: FileOptions,
        in graph: BlockGraph
    ) async throws(BlockError) -> File {
        let loan = try graph.descriptorSets.borrow(passed, as: path)
        let file = await File.adopt(
            IOHandle(loan.descriptor), as: path, isDirect: options.direct, owner: loan,
            on: graph.thread)
        do throws(BlockError) {
            let isDirect = try await file.status().directAlignment > 1
            guard isDirect == options.direct else {
                throw BlockError(
                    .invalidArgument,
                    "'\(path)' was opened \(isDirect ? "with" : "without") direct I/O, and this "
                        + "process may not open it anew: cache.direct=\(options.direct ? "on" : "off") "
                        + "cannot be had",
                    remedy:
                        "use cache.direct=\(isDirect ? "on" : "off"), or pass the file in opened "
                        + "\(options.direct ? "with" : "without") O_DIRECT")
            }
        } catch {
            await file.close()
            throw error
        }
        return file
    }
}
