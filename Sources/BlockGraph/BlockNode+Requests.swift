import BlockCore

// What dispatch does between the edge and the driver.

extension BlockNode {
    // MARK: Read

    @inline(__always)
    func alignedRead(
        _ offset: Int, into vector: IOVector, _ flags: ReadFlags
    ) async throws(BlockError) {
        if (offset | vector.count).isAligned(to: limits.requestAlignment),
            vector.count <= limits.transferMax, vector.isAligned(to: limits.memoryAlignment)
        {
            try await driver.read(offset, into: vector, flags)
        } else {
            try await awkwardRead(offset, into: vector, flags)
        }
    }

    /// Too long, or not aligned.
    private func awkwardRead(
        _ offset: Int, into vector: IOVector, _ flags: ReadFlags
    ) async throws(BlockError) {
        var done = 0
        while done < vector.count {
            let wanted = ByteRange(offset + done, min(vector.count - done, transferUnit))
            let around = try aligned(wanted)
            // The driver needs aligned memory, or reads more than was asked for: it reads here first.
            let bounce = try IOVector(allocating: around.count)
            try await driver.read(around.offset, into: bounce, flags)
            vector.slice(done, wanted.count)
                .copy(from: bounce.slice(wanted.offset - around.offset, wanted.count))
            done += wanted.count
        }
    }

    /// Whole units around `range`. Only storage has something past the end of the node; what is above
    /// it ends where the node ends, and the edge below aligns again.
    private func aligned(_ range: ByteRange) throws(BlockError) -> ByteRange {
        guard let around = range.aligned(to: limits.requestAlignment) else {
            throw BlockError(.outOfRange, "a request ends past every size", node: name)
        }
        guard description.kind != .storage, around.end > size else { return around }
        return ByteRange(from: around.offset, to: max(size, range.end))
    }

    /// Pieces of what is too long or unaligned; a multiple of the alignment, with room around.
    private var transferUnit: Int {
        max(limits.requestAlignment, min(limits.transferMax, 1 << 20) - limits.requestAlignment)
            .roundedDown(to: limits.requestAlignment)
    }

    // MARK: Write

    /// Enters a request, once nobody is in its way.
    ///
    /// - Parameter end: where it ends in the node. It was checked before; but what the request waited for
    ///   since, here or before, may have shrunk the node.
    /// - Throws: `outOfRange` then.
    @inline(__always)
    func begin(
        _ range: ByteRange, serialising: Bool, end: Int
    ) async throws(BlockError) -> RequestTracker.Request {
        let request = tracker.enter(range, serialising: serialising)
        if !tracker.allowsImmediateWrites { await waitForTurn(request) }
        guard end <= size else {
            tracker.leave(request)
            throw BlockError(
                .outOfRange, "a request up to \(end) came when the node had shrunk to \(size)",
                node: name)
        }
        return request
    }

    private func waitForTurn(_ request: RequestTracker.Request) async {
        while let obstacle = tracker.obstacle(of: request) {
            await withUnsafeContinuation { tracker.wait(for: obstacle, $0) }
        }
    }

    @inline(__always)
    func trackedWrite(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        try await willChange()
        if flags.contains(.fua) { try checkFlushes() }
        let range = ByteRange(offset, vector.count)
        let isAligned = range.isAligned(to: limits.requestAlignment)
        let tracked =
            isAligned ? range : (range.aligned(to: limits.requestAlignment) ?? range)
        let request = try await begin(
            tracked, serialising: !isAligned || flags.contains(.serialising), end: range.end)
        let synchronisation = flags.contains(.fua) ? beginSynchronisation() : nil
        defer { if let synchronisation { synchronisations.end(synchronisation) } }
        do throws(BlockError) {
            if isAligned, vector.count <= limits.transferMax,
                vector.isAligned(to: limits.memoryAlignment),
                options.zeroDetection == .off, !flags.contains(.fua) || driver.supportsFUA,
                !flags.contains(.compressed)
            {
                try await driver.write(offset, from: vector, flags)
            } else {
                try await awkwardWrite(offset, from: vector, flags)
            }
        } catch {
            if flags.contains(.fua) {
                await durableChangeFailed(error) { () throws(BlockError) in
                    try await awkwardWrite(offset, from: vector, flags.subtracting(.fua))
                }
            }
            failed(range)
            tracker.leave(request)
            throw error
        }
        written(range)
        tracker.leave(request)
    }

    /// A change that failed may have happened in part: who records changes counts it as one.
    func failed(_ range: ByteRange) {
        changedSinceFlush = true
        for observer in writeObservers { observer.changed(range) }
    }

    /// The system tells of a failed write-back once, whatever kept the data from the storage: when a
    /// durable change is told, later flushes must tell it too.
    ///
    /// - Parameter again: the change without its promise. What wants space may be the change itself; if
    ///   it has its space, what was written before had none.
    private func durableChangeFailed(
        _ error: BlockError, again: () async throws(BlockError) -> Void
    ) async {
        // Where the driver promises nothing, a flush came after; a change that is not supported did nothing.
        guard driver.supportsFUA, error.code != .unsupported else { return }
        if error.code == .noSpace, !hasLossBelow {
            guard description.kind == .storage else { return }
            do throws(BlockError) { try await again() } catch { return }
        } else if error.code != .inputOutput, !isLoss {
            return
        }
        rememberFlushFailure(error)
    }

    /// A durable change that the driver itself makes durable is under way; `nil` where nobody minds.
    private func beginSynchronisation() -> Int? {
        driver.supportsFUA && description.kind == .storage ? synchronisations.begin() : nil
    }

    /// Whether a failure of the node to make something durable is one of storage.
    private var isLoss: Bool {
        description.kind == .storage || driver.simulatesStorage || hasLossBelow
    }

    private var hasLossBelow: Bool { nodesBelow.contains { $0.flushFailure != nil } }

    private func rememberFlushFailure(_ error: BlockError) {
        // Told once, by however many nodes it passes.
        let words = "an earlier flush failed: "
        flushFailure = BlockError(
            error.code, error.message.hasPrefix(words) ? error.message : words + error.message,
            remedy: "what was written since the last good flush may be lost: check it, then "
                + "close and open the image again", node: error.node ?? name,
            systemError: error.systemError)
    }

    @inline(__always)
    func written(_ range: ByteRange) {
        changedSinceFlush = true
        if range.end > highestWrittenOffset { highestWrittenOffset = range.end }
        if !writeObservers.isEmpty {
            for observer in writeObservers { observer.changed(range) }
        }
    }

    /// Too long, not aligned, to be looked through for zeroes, or in need of a flush.
    private func awkwardWrite(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        var passed = flags
        let flushesAfter = flags.contains(.fua) && !driver.supportsFUA
        if flushesAfter { passed.remove(.fua) }
        if options.zeroDetection != .off,
            ByteRange(offset, vector.count).isAligned(to: limits.requestAlignment), vector.isZero
        {
            var zeroFlags = passed
            if options.zeroDetection == .unmap { zeroFlags.insert(.mayUnmap) }
            zeroFlags.remove(.compressed)
            try await zeroesOrWrites(ByteRange(offset, vector.count), zeroFlags)
        } else if flags.contains(.compressed) {
            try await compressedWrite(offset, from: vector, passed)
        } else {
            var done = 0
            while done < vector.count {
                let piece = ByteRange(
                    offset + done, pieceLength(offset + done, vector.count - done))
                try await writePiece(piece, vector.slice(done, piece.count), passed)
                done += piece.count
            }
        }
        if flushesAfter { try await stickyFlush() }
    }

    /// In one piece: what is compressed together stays together, and where it may begin and end is the
    /// driver's to say.
    private func compressedWrite(
        _ offset: Int, from vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        guard driver.supportsCompressedWrites else {
            throw BlockError(
                .unsupported, "driver '\(description.name)' does not write compressed data",
                node: name)
        }
        let end = offset + vector.count
        // The end of the node counts as aligned.
        guard offset.isAligned(to: limits.requestAlignment),
            end.isAligned(to: limits.requestAlignment) || end == size,
            vector.count <= limits.transferMax
        else {
            throw BlockError(
                .invalidArgument,
                "a compressed write of \(vector.count) bytes at \(offset) is not aligned to "
                    + "\(limits.requestAlignment) bytes, or too long", node: name)
        }
        try await driver.write(offset, from: vector, flags)
    }

    /// How much of `count` bytes at `offset` goes in one call: an unaligned head or tail alone.
    private func pieceLength(_ offset: Int, _ count: Int) -> Int {
        let alignment = limits.requestAlignment
        let head = offset & (alignment - 1)
        if head != 0 { return min(count, alignment - head) }
        if count < alignment { return count }
        return min(count.roundedDown(to: alignment), transferUnit)
    }

    private func writePiece(
        _ range: ByteRange, _ vector: IOVector, _ flags: WriteFlags
    ) async throws(BlockError) {
        let isAligned = range.isAligned(to: limits.requestAlignment)
        if isAligned, vector.isAligned(to: limits.memoryAlignment) {
            try await driver.write(range.offset, from: vector, flags)
            return
        }
        let around = try aligned(range)
        // Read-modify-write; the request is serialising, so nothing changes in between.
        let bounce = try IOVector(allocating: around.count)
        if !isAligned {
            await reachedRMW(range, around, .pwritevRMWHead, .pwritevRMWTail)
            try await driver.read(around.offset, into: bounce, [])
            await reachedRMW(range, around, .pwritevRMWAfterHead, .pwritevRMWAfterTail)
        }
        bounce.slice(range.offset - around.offset, range.count).copy(from: vector)
        try await driver.write(around.offset, from: bounce, flags)
    }

    private func reachedRMW(
        _ range: ByteRange, _ around: ByteRange, _ head: DebugEvent, _ tail: DebugEvent
    ) async {
        guard let eventWatcher else { return }
        if around.offset < range.offset { await eventWatcher.reached(head) }
        if around.end > range.end { await eventWatcher.reached(tail) }
    }

    // MARK: Zeroes

    func trackedZeroes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        try await willChange()
        if flags.contains(.fua) { try checkFlushes() }
        let alignment = limits.requestAlignment
        let isAligned = range.isAligned(to: alignment)
        let request = try await begin(
            isAligned ? range : (range.aligned(to: alignment) ?? range),
            serialising: !isAligned || flags.contains(.serialising), end: range.end)
        defer { tracker.leave(request) }
        var passed = flags.subtracting(.compressed)
        let flushesAfter = flags.contains(.fua) && !driver.supportsFUA
        if flushesAfter { passed.remove(.fua) }
        // Zeroes give space back only where discards may.
        if !options.discards { passed.remove(.mayUnmap) }

        let synchronisation = flags.contains(.fua) ? beginSynchronisation() : nil
        defer { if let synchronisation { synchronisations.end(synchronisation) } }
        do throws(BlockError) {
            try await zeroParts(range, passed)
        } catch {
            if flags.contains(.fua) {
                await durableChangeFailed(error) { () throws(BlockError) in
                    try await zeroParts(range, passed.subtracting(.fua))
                }
            }
            failed(range)
            throw error
        }
        written(range)
        if flushesAfter { try await stickyFlush() }
    }

    private func zeroParts(_ range: ByteRange, _ passed: WriteFlags) async throws(BlockError) {
        let alignment = limits.requestAlignment
        // The unaligned ends are written; the aligned middle is for the driver.
        let start = range.offset.roundedUp(to: alignment) ?? range.end
        let end = range.end.roundedDown(to: alignment)
        if start < end {
            if start > range.offset {
                try await writeZeroBytes(ByteRange(from: range.offset, to: start), passed)
            }
            try await zeroesOrWrites(ByteRange(from: start, to: end), passed)
            if end < range.end {
                try await writeZeroBytes(ByteRange(from: end, to: range.end), passed)
            }
        } else {
            try await writeZeroBytes(range, passed)
        }
    }

    /// `range` is aligned.
    private func zeroesOrWrites(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        do throws(BlockError) {
            try await driver.writeZeroes(range, flags)
        } catch  where error.code == .unsupported && !flags.contains(.noFallback) {
            try await writeZeroBytes(range, flags)
        }
    }

    private func writeZeroBytes(_ range: ByteRange, _ flags: WriteFlags) async throws(BlockError) {
        let chunk = min(range.count, min(transferUnit, 1 << 20))
        let zeroes = try IOVector(allocating: chunk)
        zeroes.fill(0)
        var passed = flags
        passed.remove([.mayUnmap, .noFallback])
        var offset = range.offset
        while offset < range.end {
            let count = min(pieceLength(offset, range.end - offset), chunk)
            try await writePiece(ByteRange(offset, count), zeroes.slice(0, count), passed)
            offset += count
        }
    }

    // MARK: Discard, flush

    func trackedDiscard(_ range: ByteRange) async throws(BlockError) {
        let alignment = max(limits.requestAlignment, 1)
        // A hint: what does not fill whole units stays.
        guard let start = range.offset.roundedUp(to: alignment) else { return }
        // The end of the node counts as aligned.
        let end = range.end == size ? range.end : range.end.roundedDown(to: alignment)
        guard start < end else { return }
        try await willChange()
        let inner = ByteRange(from: start, to: end)
        let request = try await begin(inner, serialising: false, end: inner.end)
        defer { tracker.leave(request) }
        do throws(BlockError) {
            try await driver.discard(inner)
        } catch {
            if error.code == .unsupported { return }
            failed(inner)
            throw error
        }
        changedSinceFlush = true
        for observer in writeObservers { observer.discarded(inner) }
    }

    /// A failure of storage to flush stays; what else keeps a flush from its end, such as no space for a
    /// table that is still in memory, may be over when the next one comes.
    func stickyFlush() async throws(BlockError) {
        try checkFlushes()
        if options.ignoresFlush && description.kind == .storage { return }
        // What is written from here on needs another one.
        changedSinceFlush = false
        let synchronisation = synchronisations.begin()
        do throws(BlockError) {
            try await driver.flush()
        } catch {
            if isLoss { rememberFlushFailure(error) }
            changedSinceFlush = true
            synchronisations.end(synchronisation)
            throw error
        }
        synchronisations.end(synchronisation)
        guard description.kind == .storage else { return }
        await synchronisations.untilBegunEnd()
        try checkFlushes()
    }

    /// Makes durable what nobody flushed, and tells of a flush that failed, which its user may not have
    /// asked about again.
    func flushBeforeClosing() async throws(BlockError) {
        try checkFlushes()
        if description.kind == .storage, changedSinceFlush { try await stickyFlush() }
    }

    /// - Throws: after a flush that failed: nothing is promised to be durable any more.
    @inline(__always)
    private func checkFlushes() throws(BlockError) {
        if let flushFailure { throw flushFailure }
    }

    /// Whether a flush of the node's storage failed: what was written before may be lost.
    public var hasLostWrites: Bool { flushFailure != nil }

    // MARK: Status

    /// Asks the driver, in whole units; see ``Edge/blockStatus(_:precise:into:)``.
    ///
    /// - Parameter answer: empty.
    func status(
        _ range: ByteRange, precise: Bool, into answer: BlockStatusList
    ) async throws(BlockError) {
        let asked =
            (range.aligned(to: limits.requestAlignment) ?? range)
            .intersection(ByteRange(0, max(size, range.end))) ?? range
        do throws(BlockError) {
            try await driver.blockStatus(asked, precise: precise, into: answer)
        } catch {
            // What is known up to there is an answer; a question that begins there meets the error.
            if answer.isEmpty { throw error }
        }
        // Back from the aligned question to the one that was put.
        answer.trim(skipping: range.offset - asked.offset, to: range.count)
        answer.complete(endsNode: range.offset + answer.byteCount == size)
    }
}

extension IOVector {
    /// Whether every part's address and length is a multiple of `alignment`.
    @inline(__always)
    func isAligned(to alignment: Int) -> Bool {
        if alignment <= 1 { return true }
        var result = true
        forEachSegment { segment in
            let address = Int(bitPattern: segment.bytes.baseAddress)
            if !(address | segment.count).isAligned(to: alignment) { result = false }
        }
        return result
    }
}
