import BlockCore

/// Stands in for the driver of a node that is closed, or not open yet: refuses all requests.
///
/// Who still has a closed node, a request that was under way or a reply that tells where data is, gets an
/// error from it.
final class AbsentDriver: BlockDriver {
    static let shared = AbsentDriver()

    private static let refusal = BlockError(.disconnected, "the node is not open (any more)")

    func read(
        _ offset: Int, into vector: IOVector, _ flags: ReadFlags
    ) async throws(BlockError) {
        throw Self.refusal
    }

    func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        throw Self.refusal
    }

    func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        throw Self.refusal
    }

    func discard(_ range: ByteRange) async throws(BlockError) {
        throw Self.refusal
    }

    func flush() async throws(BlockError) {
        throw Self.refusal
    }

    func blockStatus(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList
    ) async throws(BlockError) {
        throw Self.refusal
    }

    func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {
        throw Self.refusal
    }

    func checkAccess(_ access: Access) throws(BlockError) {
        throw Self.refusal
    }

    func check(
        _ repair: CheckRepair, _ notice: @escaping CheckNotice
    ) async throws(BlockError) -> CheckReport {
        throw Self.refusal
    }

    var information: NodeInformation {
        get async throws(BlockError) { throw Self.refusal }
    }

    var filename: String { "" }
}
