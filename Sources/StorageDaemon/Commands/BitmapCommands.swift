import BlockCore
import BlockGraph
import BlockTLS
import QMP

// Dirty bitmaps. Each change is carried out at once and knows how to be undone, so that the commands
// and the transaction's actions of the same names are one thing.

extension StorageDaemon {
    /// What changes dirty bitmaps: commands, and actions of a transaction.
    enum BitmapAction: String, CaseIterable {
        case add = "block-dirty-bitmap-add"
        case remove = "block-dirty-bitmap-remove"
        case clear = "block-dirty-bitmap-clear"
        case enable = "block-dirty-bitmap-enable"
        case disable = "block-dirty-bitmap-disable"
        case merge = "block-dirty-bitmap-merge"
    }

    // MARK: Commands

    /// `block-dirty-bitmap-add`.
    func bitmapAdd(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        try await run(.add, arguments)
    }

    /// `block-dirty-bitmap-remove`.
    func bitmapRemove(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        try await run(.remove, arguments)
    }

    /// `block-dirty-bitmap-clear`.
    func bitmapClear(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        try await run(.clear, arguments)
    }

    /// `block-dirty-bitmap-enable`.
    func bitmapEnable(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        try await run(.enable, arguments)
    }

    /// `block-dirty-bitmap-disable`.
    func bitmapDisable(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        try await run(.disable, arguments)
    }

    /// `block-dirty-bitmap-merge`.
    func bitmapMerge(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        try await run(.merge, arguments)
    }

    private func run(
        _ action: BitmapAction, _ arguments: JSONValue
    ) async throws(BlockError) -> JSONValue {
        let undo = try await carryOut(action, arguments)
        try await undo.finish()
        return [:]
    }

    /// `x-debug-block-dirty-bitmap-sha256`: of the bits, in whole words of 64.
    func bitmapChecksum(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "x-debug-block-dirty-bitmap-sha256")
        let bits = try await onThread(of: try reader.required("node")) { node throws(BlockError) in
            let bitmap = try bitmap(of: node, reader)
            await bitmap.load()
            return bitmap.contents
        }
        try reader.finish()
        var bytes = [UInt8](repeating: 0, count: bits.byteCount)
        bytes.withUnsafeMutableBytes { bits.copyBytes(from: 0, to: $0) }
        return ["sha256": .string(try Digest.sha256(bytes))]
    }

    // MARK: Actions

    /// Carries out one change.
    ///
    /// - Returns: what undoes it, and what remains to be done once it will not be undone.
    func carryOut(
        _ action: BitmapAction, _ arguments: JSONValue
    ) async throws(BlockError) -> Undo {
        let reader = try OptionReader(arguments, of: action.rawValue)
        return try await onThread(of: try reader.required("node")) { node throws(BlockError) in
            try await carryOut(action, on: node, reader).on(node.seat)
        }
    }

    private func carryOut(
        _ action: BitmapAction, on node: BlockNode, _ reader: OptionReader
    ) async throws(BlockError) -> Undo {
        switch action {
        case .add: return try await add(node, reader)
        case .remove: return try remove(node, reader)
        case .clear: return try await clear(node, reader)
        case .enable: return try await enable(node, reader, true)
        case .disable: return try await enable(node, reader, false)
        case .merge: return try await merge(node, reader)
        }
    }

    private func bitmap(
        of node: BlockNode, _ reader: OptionReader, named key: String = "name"
    ) throws(BlockError) -> DirtyBitmap {
        try node.requireDirtyBitmap(named: try reader.required(key))
    }

    private func add(_ node: BlockNode, _ reader: OptionReader) async throws(BlockError) -> Undo {
        let name = try reader.required("name")
        let granularity = try reader.int("granularity")
        let isPersistent = try reader.bool("persistent") ?? false
        let isDisabled = try reader.bool("disabled") ?? false
        try reader.finish()
        let bitmap = try await node.makeDirtyBitmap(
            named: name, granularity: granularity, persistent: isPersistent, enabled: !isDisabled)
        return Undo(atOnce: { () throws(BlockError) in node.removeDirtyBitmap(bitmap) })
    }

    private func remove(_ node: BlockNode, _ reader: OptionReader) throws(BlockError) -> Undo {
        let bitmap = try bitmap(of: node, reader)
        try reader.finish()
        try bitmap.check([.busy, .readOnly])
        node.removeDirtyBitmap(bitmap)
        return Undo(
            atOnce: { () throws(BlockError) in try node.addDirtyBitmap(bitmap) },
            finish: { () throws(BlockError) in try await node.discardDirtyBitmap(bitmap) })
    }

    private func clear(_ node: BlockNode, _ reader: OptionReader) async throws(BlockError) -> Undo {
        let bitmap = try bitmap(of: node, reader)
        try reader.finish()
        let before = bitmap.contents
        try await node.clearDirtyBitmap(bitmap)
        return Undo(atOnce: { () throws(BlockError) in bitmap.contents = before })
    }

    private func enable(
        _ node: BlockNode, _ reader: OptionReader, _ isEnabled: Bool
    ) async throws(BlockError) -> Undo {
        let bitmap = try bitmap(of: node, reader)
        try reader.finish()
        let was = bitmap.isEnabled
        try await node.setDirtyBitmap(bitmap, enabled: isEnabled)
        return Undo(atOnce: { () throws(BlockError) in bitmap.isEnabled = was })
    }

    private func merge(_ node: BlockNode, _ reader: OptionReader) async throws(BlockError) -> Undo {
        let bitmap = try bitmap(of: node, reader, named: "target")
        guard let list = try reader.list("bitmaps") else {
            throw BlockError(.invalidArgument, "\(reader.subject): 'bitmaps' is missing")
        }
        try reader.finish()
        var sources: [DirtyBitmap] = []
        for value in list { sources.append(try await dirtyBitmap(value, defaultNode: node)) }
        let before = bitmap.contents
        try await node.mergeDirtyBitmaps(sources, into: bitmap)
        return Undo(atOnce: { () throws(BlockError) in bitmap.contents = before })
    }

    /// The bitmap that a name on `defaultNode`, or an object with `node` and `name`, stands for; a copy of
    /// it as it is now where its node is on another thread.
    private func dirtyBitmap(
        _ value: JSONValue, defaultNode: BlockNode
    ) async throws(BlockError) -> DirtyBitmap {
        if case .string(let name) = value { return try defaultNode.requireDirtyBitmap(named: name) }
        let reader = try OptionReader(value, of: "a dirty bitmap")
        let found = try await onThread(of: try reader.required("node")) { node throws(BlockError) in
            let found = try bitmap(of: node, reader)
            if node.graph === defaultNode.graph { return found }
            await found.load()
            try found.check([.busy, .inconsistent])
            return try found.copy()
        }
        try reader.finish()
        return found
    }
}

extension DirtyBitmap {
    /// As queries tell of it (`BlockDirtyInfo`).
    var description: JSONValue {
        var result: JSONObject = [
            "name": .string(name), "recording": .bool(isRecording),
            "persistent": .bool(isPersistent), "busy": .bool(isBusy),
            "granularity": .integer(granularity), "count": .integer(dirtyBytes),
        ]
        if isInconsistent { result["inconsistent"] = true }
        return .object(result)
    }
}
