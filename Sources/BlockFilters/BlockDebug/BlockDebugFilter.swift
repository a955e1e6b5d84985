import BlockCore
import BlockGraph
import BlockIO
import QMP

/// `blkdebug`: makes requests fail, and holds them up, where a test wants it.
///
/// A parent that stands directly above tells of points in its work (``DebugEvent``); rules turn these
/// into errors of requests that come here afterwards. A breakpoint suspends the work that gets to its
/// event until it is resumed by its tag.
///
/// Nothing stays suspended while the graph is drained or the node is closed.
public final class BlockDebugFilter: FilterDriver, DebugEventWatcher, @unchecked Sendable {
    private struct Breakpoint {
        let event: DebugEvent
        let tag: String
        let notify: (String) -> Void
    }
    private struct Suspended {
        let tag: String
        let notify: (String) -> Void
        let continuation: UnsafeContinuation<Void, Never>
    }

    private let node: BlockNode
    public let child: Edge
    private let configurationPath: String?
    private var rules: DebugRules
    private let limits: DebugLimits
    private let taken: Permission
    private let unshared: Permission
    private var breakpoints: [Breakpoint] = []
    private var suspended: [Suspended] = []
    private var drainCount = 0
    /// Who waits until something is suspended.
    private let watchers = WaitQueue()

    private init(
        _ node: BlockNode, _ child: Edge, configurationPath: String?, _ rules: DebugRules,
        _ limits: DebugLimits, taken: Permission, unshared: Permission
    ) {
        self.node = node
        self.child = child
        self.configurationPath = configurationPath
        self.rules = rules
        self.limits = limits
        self.taken = taken
        self.unshared = unshared
        node.size = child.size
        node.limits = limits.applied(to: child.node.limits)
        node.eventWatcher = self
        self.rules.reach(.none)
    }

    // MARK: Open

    static func open(_ opening: NodeOpening) async throws(BlockError) -> BlockDebugFilter {
        let options = opening.options
        let path = try options.string("config").flatMap { $0.isEmpty ? nil : $0 }
        var rules = DebugRules()
        if let path {
            rules = try DebugConfiguration.parse(await text(of: path, opening), path: path)
        }
        for (index, value) in (try options.list("inject-error") ?? []).enumerated() {
            try rules.addInjection(try OptionReader(value, of: "'inject-error.\(index)'"))
        }
        for (index, value) in (try options.list("set-state") ?? []).enumerated() {
            try rules.addStateChange(try OptionReader(value, of: "'set-state.\(index)'"))
        }
        let taken = try permissions(options, "take-child-perms")
        let unshared = try permissions(options, "unshare-child-perms")
        let child = try await opening.requiredChild("image", roles: [.filtered, .primary])
        let limits = try DebugLimits(options, child: child.node.limits)
        return BlockDebugFilter(
            opening.node, child, configurationPath: path, rules, limits, taken: taken,
            unshared: unshared)
    }

    private static func text(
        of path: String, _ opening: NodeOpening
    ) async throws(BlockError) -> String {
        let file = try await File.open(path, FileOptions(writable: false), on: opening.thread)
        let memory = try IOVector(allocating: DebugConfiguration.fileBytesMax + 1)
        let result: Result<Int, BlockError>
        do throws(BlockError) {
            result = .success(try await file.read(memory, at: 0))
        } catch { result = .failure(error) }
        await file.close()
        let count = try result.get()
        guard count <= DebugConfiguration.fileBytesMax else {
            throw BlockError(.invalidArgument, "the configuration file '\(path)' is too long")
        }
        return String(decoding: memory.slice(0, count).array, as: UTF8.self)
    }

    private static func permissions(
        _ options: OptionReader, _ key: String
    ) throws(BlockError) -> Permission {
        var result: Permission = []
        for value in try options.list(key) ?? [] {
            guard case .string(let name) = value,
                let known = Permission.each.first(where: { $0.name == name })
            else {
                let names = Permission.each.map(\.name).joined(separator: ", ")
                throw BlockError(
                    .invalidArgument, "'\(key)' names a permission that is not there",
                    remedy: "use \(names)")
            }
            result.insert(known.permission)
        }
        return result
    }

    public func access(to edge: Edge, for users: Access) -> Access {
        Access(uses: users.uses.union(taken), shares: users.shares.subtracting(unshared))
    }

    // MARK: Events and breakpoints

    public func reached(_ event: DebugEvent) async {
        rules.reach(event)
        while drainCount == 0, let index = breakpoints.firstIndex(where: { $0.event == event }) {
            // A breakpoint holds up one request.
            let breakpoint = breakpoints.remove(at: index)
            breakpoint.notify("blkdebug: Suspended request '\(breakpoint.tag)'\n")
            await withUnsafeContinuation { continuation in
                suspended.append(
                    Suspended(
                        tag: breakpoint.tag, notify: breakpoint.notify, continuation: continuation))
                watchers.wakeAll()
            }
        }
    }

    /// Suspends the next request that gets to `event`.
    ///
    /// - Parameter notify: told, in a line of text, when it is suspended and when it goes on.
    public func setBreakpoint(
        at event: DebugEvent, tag: String, notify: @escaping (String) -> Void
    ) {
        breakpoints.append(Breakpoint(event: event, tag: tag, notify: notify))
    }

    /// - Returns: whether one was suspended with that tag.
    public func resume(tag: String) -> Bool {
        guard let index = suspended.firstIndex(where: { $0.tag == tag }) else { return false }
        goOn(suspended.remove(at: index))
        return true
    }

    /// Removes the breakpoints of a tag and resumes what they hold up.
    ///
    /// - Returns: whether there was anything.
    public func removeBreakpoints(tag: String) -> Bool {
        let had = breakpoints.contains { $0.tag == tag }
        breakpoints.removeAll { $0.tag == tag }
        var found = had
        while resume(tag: tag) { found = true }
        return found
    }

    public func isSuspended(tag: String) -> Bool {
        suspended.contains { $0.tag == tag }
    }

    /// Waits until a request is suspended with that tag.
    public func untilSuspended(tag: String) async {
        while !isSuspended(tag: tag) { await watchers.wait() }
    }

    /// The blkdebug that is nearest below `node`, on the way to its storage.
    public static func nearest(to node: BlockNode) -> BlockDebugFilter? {
        var node = node
        while true {
            if let debug = node.driver as? BlockDebugFilter { return debug }
            guard let next = node.children.first(where: { $0.roles.contains(.primary) }) else {
                return nil
            }
            node = next.node
        }
    }

    private func goOn(_ request: Suspended) {
        request.notify("blkdebug: Resuming request '\(request.tag)'\n")
        request.continuation.resume()
    }

    public func drainBegins() {
        drainCount += 1
        let all = suspended
        suspended = []
        for request in all { goOn(request) }
    }

    public func drainEnds() {
        drainCount -= 1
    }

    public var simulatesStorage: Bool { true }

    public func close() async throws(BlockError) {
        node.eventWatcher = nil
    }

    // MARK: Requests

    private func check(_ kind: DebugRules.Kind, _ range: ByteRange?) async throws(BlockError) {
        guard let injection = rules.strike(kind, range) else { return }
        if !injection.isImmediate { await node.thread.yield() }
        throw BlockError.system(
            "blkdebug injected an error into a request to \(kind.rawValue)", injection.systemError)
    }

    public func read(
        _ offset: Int, into vector: IOVector, _ flags: ReadFlags
    ) async throws(BlockError) {
        try await check(.read, ByteRange(offset, vector.count))
        try await child.read(offset, into: vector, flags)
    }

    public func write(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        await reached(.pwritev)
        try await check(.write, ByteRange(offset, vector.count))
        try await child.write(offset, from: vector, flags)
        await reached(.pwritevDone)
    }

    public func writeZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        await reached(.pwritevZero)
        for part in DebugLimits.parts(range, unit: limits.zeroUnit, longest: limits.zeroMax) {
            try await check(.writeZeroes, part)
            try await child.writeZeroes(part, flags)
        }
        await reached(.pwritevDone)
    }

    public func discard(_ range: ByteRange) async throws(BlockError) {
        for part in DebugLimits.parts(range, unit: limits.discardUnit, longest: limits.discardMax) {
            try await check(.discard, part)
            try await child.discard(part)
        }
    }

    public func flush() async throws(BlockError) {
        await reached(.flushToOS)
        await reached(.flushToDisk)
        try await check(.flush, nil)
        try await child.flush()
    }

    public func blockStatus(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList
    ) async throws(BlockError) {
        try await check(.blockStatus, range)
        try await child.forwardStatus(range, precise: precise, into: answer)
    }

    public func resize(to size: Int, _ preallocation: Preallocation) async throws(BlockError) {
        try await child.resize(to: size, preallocation)
    }

    public var filename: String {
        "blkdebug:\(configurationPath ?? ""):\(child.node.driver.filename)"
    }
}

extension BlockDebugFilter {
    public static let driver = DriverDescription(
        name: "blkdebug", kind: .filter,
        open: { opening throws(BlockError) in try await BlockDebugFilter.open(opening) })
}
