import BlockCore

/// Keeps dirty bitmaps from one opening of an image to the next.
///
/// The driver puts the bitmaps that it finds on its node while it opens, and stores the persistent
/// ones when it closes.
public protocol BitmapStore: AnyObject {
    /// - Throws: why such a bitmap cannot be kept.
    func checkStorable(name: String, granularity: Int) throws(BlockError)

    /// The node, or one of its persistent bitmaps, is about to change for the first time since
    /// ``BlockNode/awaitsFirstChange`` was set: from here on what is stored of them says nothing, and
    /// that is durable on return.
    func beginChanges() async throws(BlockError)

    /// Takes a bitmap out of the image; durable on return. Nothing happens when it is not there.
    func removeStored(_ name: String) async throws(BlockError)
}

extension BlockNode {
    public func dirtyBitmap(named name: String) -> DirtyBitmap? {
        dirtyBitmaps.first { $0.name.utf8.elementsEqual(name.utf8) }
    }

    /// - Throws: `notFound`.
    public func requireDirtyBitmap(named name: String) throws(BlockError) -> DirtyBitmap {
        guard let bitmap = dirtyBitmap(named: name) else {
            throw BlockError(.notFound, "it has no dirty bitmap '\(name)'", node: self.name)
        }
        return bitmap
    }

    /// Puts a bitmap on the node: from here on it is told of changes.
    ///
    /// - Throws: `alreadyExists` where there is one of its name.
    public func addDirtyBitmap(_ bitmap: DirtyBitmap) throws(BlockError) {
        guard dirtyBitmap(named: bitmap.name) == nil else {
            throw BlockError(
                .alreadyExists, "it has a dirty bitmap '\(bitmap.name)' already", node: name)
        }
        guard dirtyBitmaps.count < Limits.bitmapCountMax else {
            throw BlockError(
                .exhausted, "it has \(Limits.bitmapCountMax) dirty bitmaps already", node: name)
        }
        bitmap.node = self
        dirtyBitmaps.append(bitmap)
        addWriteObserver(bitmap)
    }

    /// Takes a bitmap off the node, whatever its state. Nothing happens to what is stored of it.
    public func removeDirtyBitmap(_ bitmap: DirtyBitmap) {
        dirtyBitmaps.removeAll { $0 === bitmap }
        removeWriteObserver(bitmap)
    }

    /// Makes a bitmap as `block-dirty-bitmap-add` does.
    ///
    /// - Parameter granularity: bytes; `nil` for the node's own, from its clusters.
    /// - Throws: also when it is to be persistent and the node has nowhere to keep it.
    @discardableResult
    public func makeDirtyBitmap(
        named name: String, granularity: Int? = nil, persistent: Bool = false,
        enabled: Bool = true
    ) async throws(BlockError) -> DirtyBitmap {
        var unit = granularity ?? 0
        if granularity == nil {
            unit = DirtyBitmap.granularity(
                forClusters: try await driver.information.clusterSize)
        }
        let bitmap = try DirtyBitmap(name: name, granularity: unit, size: size)
        bitmap.isEnabled = enabled
        bitmap.isPersistent = persistent
        if persistent { try checkStorable(bitmap) }
        try addDirtyBitmap(bitmap)
        return bitmap
    }

    private func checkStorable(_ bitmap: DirtyBitmap) throws(BlockError) {
        guard let store = driver.bitmapStore else {
            throw BlockError(
                .unsupported, "driver '\(description.name)' cannot keep dirty bitmaps",
                remedy: "use persistent=off, or a qcow2 image", node: name)
        }
        try store.checkStorable(name: bitmap.name, granularity: bitmap.granularity)
    }

    /// Comes before every change of the node's data, size or persistent bitmaps.
    @inline(__always)
    public func willChange() async throws(BlockError) {
        if awaitsFirstChange { try await driver.bitmapStore?.beginChanges() }
    }

    /// Comes before a bitmap of the node is changed by others than the node's requests.
    ///
    /// - Throws: what speaks against the change: before the image is told of it, and once it has been,
    ///   for the bitmap may be another's to change by then, or gone.
    private func willChange(
        _ bitmap: DirtyBitmap, unless obstacles: DirtyBitmap.Obstacles = .all
    ) async throws(BlockError) {
        try bitmap.check(obstacles)
        // What is stored of a node that is read-only stays as it is.
        guard bitmap.isPersistent, !isReadOnly, awaitsFirstChange else { return }
        try await willChange()
        guard dirtyBitmaps.contains(where: { $0 === bitmap }) else {
            throw BlockError(
                .notFound, "the dirty bitmap '\(bitmap.name)' was removed meanwhile", node: name)
        }
        try bitmap.check(obstacles)
    }

    /// Clears a bitmap.
    ///
    /// - Throws: what speaks against it: see ``DirtyBitmap/check(_:)``.
    public func clearDirtyBitmap(_ bitmap: DirtyBitmap) async throws(BlockError) {
        try await willChange(bitmap)
        bitmap.clear()
    }

    /// Has a bitmap record changes, or not.
    ///
    /// - Throws: what speaks against it.
    public func setDirtyBitmap(
        _ bitmap: DirtyBitmap, enabled: Bool
    ) async throws(BlockError) {
        try await willChange(bitmap, unless: [.busy, .inconsistent])
        bitmap.isEnabled = enabled
    }

    /// Marks in `target`, a bitmap of this node, what is dirty in others, of any node: in all or none.
    ///
    /// - Throws: what speaks against it.
    public func mergeDirtyBitmaps(
        _ sources: [DirtyBitmap], into target: DirtyBitmap
    ) async throws(BlockError) {
        for source in sources {
            await source.load()
            try source.check([.busy, .inconsistent])
        }
        try await willChange(target)
        for source in sources { try source.check([.busy, .inconsistent]) }
        let before = target.contents
        do throws(BlockError) {
            for source in sources { try target.merge(source) }
        } catch {
            target.contents = before
            throw error
        }
    }

    /// Takes a bitmap off the node, and out of the image that keeps it.
    ///
    /// - Throws: when the image cannot be changed; the bitmap is off the node all the same.
    public func discardDirtyBitmap(_ bitmap: DirtyBitmap) async throws(BlockError) {
        removeDirtyBitmap(bitmap)
        if bitmap.isPersistent { try await driver.bitmapStore?.removeStored(bitmap.name) }
    }
}

extension BlockGraph {
    /// - Throws: `notFound`.
    public func requireDirtyBitmap(
        node: String, name: String
    ) throws(BlockError) -> DirtyBitmap {
        try requireNode(named: node).requireDirtyBitmap(named: name)
    }
}
