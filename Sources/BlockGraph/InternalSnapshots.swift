import BlockCore
import QMP

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// A snapshot that an image holds inside itself, as lists show it.
public struct InternalSnapshot: Sendable, Equatable {
    /// Unique within the image; mostly a number.
    public var identifier: String
    public var name: String
    /// The size of the disk when it was made, in bytes.
    public var diskSize: Int
    /// The saved state of a virtual machine, in bytes; 0 for a disk alone.
    public var vmStateSize: UInt64
    public var date: SnapshotDate
    /// How long the guest had been running, in nanoseconds.
    public var vmClockNanoseconds: UInt64
    /// `nil` where the image does not say.
    public var instructionCount: UInt64?

    public init(
        identifier: String, name: String, diskSize: Int, vmStateSize: UInt64, date: SnapshotDate,
        vmClockNanoseconds: UInt64, instructionCount: UInt64?
    ) {
        self.identifier = identifier
        self.name = name
        self.diskSize = diskSize
        self.vmStateSize = vmStateSize
        self.date = date
        self.vmClockNanoseconds = vmClockNanoseconds
        self.instructionCount = instructionCount
    }
}

/// When a snapshot was made: since 1970, UTC.
public struct SnapshotDate: Sendable, Equatable {
    public var seconds: UInt32
    public var nanoseconds: UInt32

    public init(seconds: UInt32, nanoseconds: UInt32) {
        self.seconds = seconds
        self.nanoseconds = nanoseconds
    }

    /// By the system's clock.
    public static var now: SnapshotDate {
        var time = timespec()
        clock_gettime(CLOCK_REALTIME, &time)
        return SnapshotDate(
            seconds: UInt32(truncatingIfNeeded: time.tv_sec),
            nanoseconds: UInt32(truncatingIfNeeded: time.tv_nsec))
    }
}

extension InternalSnapshot {
    /// With the keys of QMP's `SnapshotInfo`.
    public var json: JSONValue {
        var result: JSONObject = [:]
        if let instructionCount { result["icount"] = .integer(Int(clamping: instructionCount)) }
        result["vm-clock-nsec"] = .integer(Int(clamping: vmClockNanoseconds % 1_000_000_000))
        result["name"] = .string(name)
        result["date-sec"] = .integer(Int(date.seconds))
        result["date-nsec"] = .integer(Int(date.nanoseconds))
        result["vm-clock-sec"] = .integer(Int(clamping: vmClockNanoseconds / 1_000_000_000))
        result["id"] = .string(identifier)
        result["vm-state-size"] = .integer(Int(clamping: vmStateSize))
        return .object(result)
    }
}

/// How a snapshot is named: by what is given, all of which must fit.
public struct SnapshotSelector: Sendable, Equatable {
    public var identifier: String?
    public var name: String?

    public init(identifier: String? = nil, name: String? = nil) {
        self.identifier = identifier
        self.name = name
    }

    /// What of it is given, for errors.
    public var text: String {
        switch (identifier, name) {
        case (let identifier?, let name?): "'\(name)' with id '\(identifier)'"
        case (let identifier?, nil): "with id '\(identifier)'"
        case (nil, let name?): "'\(name)'"
        case (nil, nil): "without a name"
        }
    }
}

/// A driver whose images hold snapshots.
///
/// Snapshots are made, applied and deleted while nothing is in flight on the node: drain it first. On
/// return they are on stable storage.
public protocol InternalSnapshotStore: AnyObject {
    /// In the image's order.
    var internalSnapshots: [InternalSnapshot] { get }

    /// Keeps the disk as it is now under a name; several may have the same.
    func createSnapshot(
        _ name: String, at date: SnapshotDate
    ) async throws(BlockError) -> InternalSnapshot

    /// Makes the disk what it was, its size included.
    ///
    /// - Throws: `busy` while somebody reads the snapshot, naming the reader.
    func applySnapshot(_ identifier: String) async throws(BlockError)

    /// - Throws: `busy` while somebody reads the snapshot, naming the reader.
    func deleteSnapshot(_ identifier: String) async throws(BlockError)

    /// Lets `user` read a snapshot while the disk is written and other snapshots come and go.
    func openSnapshot(
        _ identifier: String, for user: BlockNode
    ) async throws(BlockError) -> any SnapshotSource
}

extension InternalSnapshotStore {
    /// The snapshot that `selector` names; the first of several.
    public func snapshot(_ selector: SnapshotSelector) -> InternalSnapshot? {
        internalSnapshots.first { snapshot in
            (selector.identifier.map { $0 == snapshot.identifier } ?? true)
                && (selector.name.map { $0 == snapshot.name } ?? true)
        }
    }

    /// The snapshot with this identifier, or else with this name.
    public func snapshot(identifierOrName text: String) -> InternalSnapshot? {
        snapshot(SnapshotSelector(identifier: text)) ?? snapshot(SnapshotSelector(name: text))
    }
}

extension BlockNode {
    /// The driver's snapshots.
    ///
    /// - Throws: `unsupported` where its images hold none.
    public func requireSnapshotStore() throws(BlockError) -> any InternalSnapshotStore {
        guard let store = driver.snapshotStore else {
            throw BlockError(
                .unsupported, "images of '\(description.name)' hold no internal snapshots",
                remedy: "use qcow2", node: name)
        }
        return store
    }
}

extension BlockGraph {
    /// Keeps the disk of `node` as it is now, while its users are held back.
    public func createSnapshot(
        _ name: String, of node: BlockNode, at date: SnapshotDate
    ) async throws(BlockError) -> InternalSnapshot {
        try await changeSnapshots(of: node) { store throws(BlockError) in
            try await store.createSnapshot(name, at: date)
        }
    }

    /// Makes the disk of `node` what it was, while its users are held back.
    ///
    /// - Throws: `permissionDenied` where a user relies on the disk as it is: a frozen view of it.
    public func applySnapshot(
        _ identifier: String, of node: BlockNode
    ) async throws(BlockError) {
        let user = try attach(
            NamedUser("the snapshot that is applied"), to: node, as: "root",
            Access(uses: [.write, .resize], shares: .all))
        do throws(BlockError) {
            try await changeSnapshots(of: node) { store throws(BlockError) in
                try await store.applySnapshot(identifier)
            }
        } catch {
            try? await detach(user)
            throw error
        }
        try await detach(user)
    }

    /// Deletes a snapshot of `node`, while its users are held back.
    public func deleteSnapshot(
        _ identifier: String, of node: BlockNode
    ) async throws(BlockError) {
        try await changeSnapshots(of: node) { store throws(BlockError) in
            try await store.deleteSnapshot(identifier)
        }
    }

    private func changeSnapshots<T>(
        of node: BlockNode, _ body: (any InternalSnapshotStore) async throws(BlockError) -> T
    ) async throws(BlockError) -> T {
        let store = try node.requireSnapshotStore()
        do throws(BlockError) {
            return try await drained([node]) { () throws(BlockError) in try await body(store) }
        } catch {
            throw error.on(node: node.name)
        }
    }
}
