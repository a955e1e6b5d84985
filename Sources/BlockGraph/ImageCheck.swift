import BlockCore

/// What a check of an image may repair.
public struct CheckRepair: OptionSet, Hashable, Sendable {
    public let rawValue: UInt8
    @inlinable public init(rawValue: UInt8) { self.rawValue = rawValue }

    /// Space that is counted as used and is not.
    public static let leaks = CheckRepair(rawValue: 1)
    /// Everything else. What cannot be mended is dropped.
    public static let errors = CheckRepair(rawValue: 2)
    public static let all: CheckRepair = [.leaks, .errors]
}

/// What a check of an image found, and what it repaired.
public struct CheckReport: Sendable, Equatable {
    /// What does or may destroy data. What was repaired is not among them.
    public var corruptions = 0
    /// Clusters that are counted as used and are not. What was repaired is not among them.
    public var leaks = 0
    /// What could not be looked at.
    public var checkErrors = 0
    public var corruptionsFixed = 0
    public var leaksFixed = 0
    /// One past the last byte of the file that is used; 0 where that is not known.
    public var imageEndOffset = 0
    /// Clusters that the guest's disk has.
    public var totalClusters = 0
    /// Of those, the ones that have a place in the image.
    public var allocatedClusters = 0
    /// Allocated clusters that do not follow the one before them.
    public var fragmentedClusters = 0
    public var compressedClusters = 0

    public init() {}

    public var isClean: Bool { corruptions == 0 && leaks == 0 && checkErrors == 0 }
}

/// Damage that was come across while an image was in use.
public struct ImageCorruption: Sendable {
    public var message: String
    /// Where in the image's file, if at one place.
    public var place: ByteRange?
    /// The image takes no more writes.
    public var isFatal: Bool

    public init(message: String, place: ByteRange?, isFatal: Bool) {
        self.message = message
        self.place = place
        self.isFatal = isFatal
    }
}

/// Takes one line on something that a check found.
public typealias CheckNotice = (String) -> Void

extension BlockDriver {
    public func check(
        _ repair: CheckRepair, _ notice: @escaping CheckNotice
    ) async throws(BlockError) -> CheckReport {
        throw BlockError(.unsupported, "images of this format have nothing to check")
    }
}

extension Edge {
    /// Looks for damage in the structures of the image behind the edge, and repairs it if asked.
    ///
    /// Nobody else uses the image meanwhile: its own commands open it for that, with
    /// ``NodeOptions/isForCheck``.
    ///
    /// - Parameter notice: called on the graph's thread for each thing that is found.
    /// - Throws: `unsupported` where the format has nothing to check.
    public func check(
        _ repair: CheckRepair = [], _ notice: @escaping CheckNotice = { _ in }
    ) async throws(BlockError) -> CheckReport {
        if isRoot { await enter() }
        defer { if isRoot { leave() } }
        let node = node
        if !repair.isEmpty {
            if node.isReadOnly {
                throw BlockError(.readOnly, "the node is read-only", node: node.name)
            }
            guard access.uses.isSuperset(of: [.write, .resize]) else {
                throw BlockError(
                    .permissionDenied, "\(parentDescription) may not write it", node: node.name)
            }
        }
        do throws(BlockError) {
            return try await node.driver.check(repair, notice)
        } catch {
            throw error.on(node: node.name)
        }
    }
}
