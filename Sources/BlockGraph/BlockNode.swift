import BlockCore
import BlockIO
import QMP

/// One node of the graph: a driver, its children and its users. Confined to the graph's thread.
///
/// Invariants:
/// 1. `file` and `backing` are what the roles of `children` say; see `deriveLinks`. Nobody sets them.
/// 2. Every parent's uses are within what every other parent shares, and within what the driver
///    accepted.
/// 3. A node lives while it has a holder: the monitor, a parent edge, or a temporary hold. Who
///    they are is there to be asked.
/// 4. A node and its driver keep each other in memory from when the node opens to when it is closed, and
///    no longer: ``letGo()`` takes them apart. So a driver may keep its node as it likes.
public final class BlockNode: @unchecked Sendable {
    public let name: String
    public private(set) unowned var graph: BlockGraph
    /// That of its graph.
    public private(set) var thread: IOThread
    /// Where its own work runs that is no part of a request: it moves along with the node.
    public let seat: IOSeat
    public let description: DriverDescription
    /// The options it was opened with, children by name.
    public internal(set) var options: NodeOptions

    private var openDriver: (any BlockDriver)?
    /// The driver of an open node; of one that is not open yet, or closed, one that refuses everything.
    @inline(__always)
    public var driver: any BlockDriver { openDriver ?? AbsentDriver.shared }
    var isOpen: Bool { openDriver != nil }

    /// In bytes. The driver sets it when it opens and when it changes.
    public var size = 0 {
        didSet { if size != oldValue { sizeChanged() } }
    }
    /// The driver sets them when it opens and when they change.
    public var limits = NodeLimits() {
        didSet { if limits != oldValue { announceLimits() } }
    }

    /// In the order they were attached.
    public internal(set) var children: [Edge] = []
    /// In the order they were attached.
    public internal(set) var parents: [Edge] = []
    public private(set) var file: Edge?
    public private(set) var backing: Edge?
    /// Somebody above waits for its requests for some time only: what may take long must not keep the
    /// thread from noticing that the time is up.
    public private(set) var isTimed = false

    /// The monitor (or the command line) holds it, until `blockdev-del`.
    public internal(set) var isMonitorOwned = false
    var temporaryHolds: [String: Int] = [:]
    /// The edge that it was opened together with, from options in its parent's: it follows that parent.
    weak var openedFor: Edge?
    /// The options as they were given: what reopening compares with.
    var openedWith = JSONObject()

    /// What all users together do and allow.
    public internal(set) var cumulativeAccess = Access.none

    // Of the requests path; see `Edge+Requests.swift`.
    var tracker = RequestTracker()
    /// Invariant: once set it stays; every later flush, durable write and the closing report it (design: a
    /// failed flush is sticky).
    var flushFailure: BlockError?
    /// Flushes, and writes that the driver makes durable.
    let synchronisations = OperationsInFlight()
    /// Something was changed after the last flush began.
    var changedSinceFlush = false
    /// Bytes past this were never written through this node.
    public internal(set) var highestWrittenOffset = 0
    /// A blkdebug's own: told of events in its parent's work.
    public var eventWatcher: (any DebugEventWatcher)?
    /// Its dirty bitmaps, in the order they came.
    public internal(set) var dirtyBitmaps: [DirtyBitmap] = []
    /// Its image has dirty bitmaps that have to be marked before anything changes: see
    /// ``BitmapStore/beginChanges()``. What keeps them sets it.
    public var awaitsFirstChange = false
    /// Who is told of every change: dirty bitmaps, and jobs.
    public internal(set) var writeObservers: [any WriteObserver] = []
    var threshold: WriteThreshold?

    init(
        name: String, graph: BlockGraph, description: DriverDescription, options: NodeOptions
    ) {
        self.name = name
        self.graph = graph
        self.description = description
        self.options = options
        thread = graph.thread
        seat = IOSeat(on: graph.thread)
    }

    /// The last step but one of a move: the seat follows.
    func join(_ other: BlockGraph) {
        graph = other
        thread = other.thread
    }

    func setDriver(_ driver: any BlockDriver) {
        openDriver = driver
    }

    /// Takes the node and its closed driver apart: without that each would keep the other, and all that
    /// they have, in memory. Requests that come all the same are refused.
    func letGo() {
        openDriver = nil
        eventWatcher = nil
        writeObservers = []
        dirtyBitmaps = []
        threshold = nil
    }

    /// Puts another driver of the same image in the place of the open one, which has written
    /// everything out and is not closed. For that driver, while the node is drained.
    public func replaceDriver(with driver: any BlockDriver) {
        setDriver(driver)
    }

    public var isReadOnly: Bool { options.isReadOnly }

    /// A node's users, for queries and errors.
    public var holders: [String] {
        (isMonitorOwned ? ["monitor"] : []) + parents.map(\.parentDescription)
            + temporaryHolds.keys.sorted()
    }

    var isHeld: Bool { isMonitorOwned || !parents.isEmpty || !temporaryHolds.isEmpty }

    /// The one child of a filter.
    public var filteredChild: Edge? {
        children.first { $0.roles.contains([.filtered, .primary]) }
    }

    public func child(named name: String) -> Edge? {
        children.first { $0.name == name }
    }

    // MARK: Links

    /// Invariant 1, in the one place where children come and go.
    func deriveLinks() {
        file = nil
        backing = nil
        for edge in children {
            if edge.roles.contains(.cow) {
                backing = edge
            } else if edge.roles.contains([.filtered, .primary]) {
                if description.filtersBacking { backing = edge } else { file = edge }
            } else if edge.roles.contains(.primary) {
                file = edge
            }
        }
    }

    private func sizeChanged() {
        for bitmap in dirtyBitmaps { bitmap.resize(to: size) }
        for edge in parents {
            switch edge.parent {
            case .node(let parent): if parent.isOpen { parent.driver.childResized(edge) }
            case .user(let user): user.nodeResized(edge)
            }
        }
    }

    private func announceLimits() {
        for edge in parents {
            if let parent = edge.parentNode, parent.isOpen {
                parent.driver.childLimitsChanged(edge)
            }
        }
    }

    // MARK: Time limits

    /// `isTimed`, from its parents, whose own is right already.
    func deriveTimeLimit() {
        isTimed = parents.contains { edge in
            guard let parent = edge.parentNode, parent.isOpen else { return false }
            return parent.isTimed || parent.driver.limitsTime(of: edge)
        }
    }

    /// A parent's driver says something else of ``BlockDriver/limitsTime(of:)`` than before.
    public func timeLimitChanged() {
        for node in PermissionUpdate.topological([self]) { node.deriveTimeLimit() }
    }

    // MARK: Observers

    public func addWriteObserver(_ observer: any WriteObserver) {
        writeObservers.append(observer)
    }

    public func removeWriteObserver(_ observer: any WriteObserver) {
        writeObservers.removeAll { $0 === observer }
    }
}

/// Told of every range that a node's users changed, after the change: dirty bitmaps.
public protocol WriteObserver: AnyObject {
    func changed(_ range: ByteRange)
    /// The range was discarded: a change too, unless the observer sees that otherwise.
    func discarded(_ range: ByteRange)
}

extension WriteObserver {
    public func discarded(_ range: ByteRange) { changed(range) }
}

extension BlockNode {
    /// For a driver that was allowed to fall back (`auto-read-only`) while it opens.
    public func setReadOnly() {
        precondition(!isOpen, "a node's mode is settled once it is open")
        options.isReadOnly = true
    }
}

extension BlockNode {
    /// Whether its driver is there: not while it opens.
    public var isReady: Bool { isOpen }
}
