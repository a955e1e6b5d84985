import BlockCore
import BlockGraph
import BlockIO
import NBDProtocol

/// One request of a client, from the graph to its reply.
struct NBDRequestExecution {
    let request: NBDRequest
    let connection: NBDConnection
    let edge: Edge

    /// What is read at a time of a read in pieces.
    static let pieceBytesMax = 1 << 20

    /// Whether it is a long read whose reply may come in pieces.
    var isDivisible: Bool {
        request.command == .read && request.range.count > Self.pieceBytesMax && isFragmentable
    }

    /// The protocol allows a read's reply to be several.
    private var isFragmentable: Bool {
        connection.mode >= .structured && !request.flags.contains(.dontFragment)
    }

    /// Executes the request and queues its reply; a reply that cannot be queued ends the connection.
    ///
    /// - Parameter inPieces: for what ``isDivisible``: a piece is read when the one before can leave.
    func run(_ payload: IOVector, inPieces: Bool = false) async {
        do throws(BlockError) {
            do throws(BlockError) {
                if inPieces { try await readInPieces() } else { try await execute(payload) }
            } catch {
                try connection.reply(
                    failure: NBDErrorCode(error, replyingTo: request), error.description,
                    to: request)
            }
        } catch {
            connection.abandon()
        }
    }

    /// Executes the request and queues its reply, where that can be done without waiting.
    ///
    /// Called once for each request that is not read in pieces, first of all.
    ///
    /// - Returns: `false` where it cannot: ``run(_:)`` does it then, or tells what is wrong.
    @inline(__always)
    func runNow(_ payload: IOVector) -> Bool {
        trace()
        switch request.command {
        case .read where !request.range.isEmpty:
            guard let data = try? IOVector(allocating: request.range.count),
                edge.readNow(request.range.offset, into: data)
            else { return false }
            answer { () throws(BlockError) in try deliver(data) }
        case .write where !request.flags.contains(.fua):
            guard edge.writeNow(request.range.offset, from: payload) else { return false }
            answer { () throws(BlockError) in try succeed() }
        default:
            return false
        }
        return true
    }

    @inline(__always)
    private func trace() {
        TracePoint.nbdRequest(
            "node \(edge.node.name) command \(request.command) offset \(request.range.offset) "
                + "bytes \(request.range.count) flags \(request.flags.rawValue)")
    }

    /// Queues a reply; one that cannot be queued ends the connection.
    @inline(__always)
    private func answer(_ reply: () throws(BlockError) -> Void) {
        do throws(BlockError) {
            try reply()
        } catch {
            connection.abandon()
        }
    }

    private func execute(_ payload: IOVector) async throws(BlockError) {
        switch request.command {
        case .read:
            try await read()
            return
        case .write:
            try await edge.write(request.range.offset, from: payload, writeFlags)
        case .writeZeroes:
            var flags = writeFlags
            if !request.flags.contains(.noHole) { flags.insert(.mayUnmap) }
            if request.flags.contains(.fastZero) { flags.insert(.noFallback) }
            try await edge.writeZeroes(request.range, flags)
        case .trim:
            try await edge.discard(request.range)
            if request.flags.contains(.fua) { try await edge.flush() }
        case .flush:
            try await edge.flush()
        case .cache:
            try await prefetch()
        case .blockStatus:
            try await status(payload)
            return
        case .disconnect:
            return
        }
        try succeed()
    }

    private func succeed() throws(BlockError) {
        try connection.reply(capacity: NBDReply.headerCountMax) { memory in
            NBDReply.success(request, mode: connection.mode, to: memory)
        }
    }

    private var writeFlags: WriteFlags { request.flags.contains(.fua) ? .fua : [] }

    // MARK: Read

    private func read() async throws(BlockError) {
        guard !request.range.isEmpty else {
            try connection.reply(capacity: NBDReply.headerCountMax) { memory in
                NBDReply.readHeader(request, mode: connection.mode, to: memory)
            }
            return
        }
        let data = try IOVector(allocating: request.range.count)
        try await edge.read(request.range.offset, into: data)
        try deliver(data)
    }

    private func readInPieces() async throws(BlockError) {
        trace()
        var done = 0
        while done < request.range.count {
            try await connection.untilReplyLeaves()
            let count = min(request.range.count - done, Self.pieceBytesMax)
            let data = try IOVector(allocating: count)
            try await edge.read(request.range.offset + done, into: data)
            try replySparsely(data, at: done)
            done += count
        }
    }

    private func deliver(_ data: IOVector) throws(BlockError) {
        if isFragmentable {
            try replySparsely(data, at: 0)
            return
        }
        try connection.reply(capacity: NBDReply.headerCountMax, data: data) { memory in
            NBDReply.readHeader(request, mode: connection.mode, to: memory)
        }
    }

    /// Zeroes shorter than this within other data are sent as data.
    private static let holeBytesMin = 64 << 10

    /// Replies with the data, and where it is zeroes with a hole in its place. To look is cheaper than
    /// to send, and finds zeroes that block status knows nothing of.
    ///
    /// - Parameter place: of the data, in the request.
    private func replySparsely(_ data: IOVector, at place: Int) throws(BlockError) {
        if data.count <= Self.holeBytesMin {
            try replyPart(data, at: place, 0, data.count, data.isZero)
            return
        }
        var start = 0
        var isHole = false
        var offset = 0
        while offset < data.count {
            let count = min(Self.holeBytesMin, data.count - offset)
            let isZero = data.slice(offset, count).isZero
            if offset > start, isZero != isHole {
                try replyPart(data, at: place, start, offset, isHole)
                start = offset
            }
            isHole = isZero
            offset += count
        }
        try replyPart(data, at: place, start, offset, isHole)
    }

    private func replyPart(
        _ data: IOVector, at place: Int, _ start: Int, _ end: Int, _ isHole: Bool
    ) throws(BlockError) {
        let range = ByteRange(request.range.offset + place + start, end - start)
        let flags: NBDChunkFlags = place + end == request.range.count ? .done : []
        let mode = connection.mode
        try connection.reply(
            capacity: NBDReply.headerCountMax,
            data: isHole ? nil : range.count == data.count ? data : data.slice(start, range.count),
            isLast: flags.contains(.done)
        ) { memory in
            isHole
                ? NBDReply.hole(range, flags, replyingTo: request, mode: mode, to: memory)
                : NBDReply.data(range, flags, replyingTo: request, mode: mode, to: memory)
        }
    }

    /// What is read at a time for the effect on caches.
    static let prefetchBytesMax = 1 << 20

    /// What is read of one request for the effect on caches: as much as a request without extended headers
    /// can be about. Beyond that it is work for hours that a few bytes from a client set going.
    static let cacheBytesMax = 4 << 30

    /// Reads for the effect on caches, in pieces; others get their turn between them. A hint is answered
    /// with success also where not all of it is followed.
    private func prefetch() async throws(BlockError) {
        var range = ByteRange(
            request.range.offset, min(request.range.count, Self.cacheBytesMax))
        while !range.isEmpty, !connection.isEnding {
            let count = min(range.count, Self.prefetchBytesMax)
            try await edge.read(range.offset, into: IOVector(allocating: count), .prefetch)
            range = ByteRange(range.offset + count, range.count - count)
            await edge.node.thread.yield()
        }
    }

    // MARK: Block status

    /// Questions to the graph for one context of one reply: where runs are short, status stops short.
    private static let statusQueryCountMax = NBDLimits.statusExtentCountMax
    /// Runs that one question asks for.
    private static let statusRunCountMax = 128
    /// Questions in a row before other requests get their turn.
    private static let statusTurnCount = 8
    /// Runs of a dirty bitmap in a row before other requests get their turn.
    private static let bitmapTurnCount = 4096

    /// What the reply to a block status may hold: no extent is shorter than a sector.
    static func statusBytesMax(_ request: NBDRequest) -> Int {
        let isOne = request.flags.contains(.requestOne)
        let count =
            request.payloadCount > 0
            ? NBDLimits.statusExtentCountMax
            : min(request.range.count / 512 + 1, NBDLimits.statusExtentCountMax)
        return (isOne ? 1 : count) * (MemoryLayout<NBDStatusExtent>.stride + 16)
    }

    private func status(_ payload: IOVector) async throws(BlockError) {
        var request = request
        var identifiers = connection.statusRules?.contextIDs ?? []
        if request.payloadCount > 0 {
            let answer = payload.array.withUnsafeBytes {
                connection.statusRules?.status(request, payload: $0)
            }
            guard case .success(let asked)? = answer else {
                throw BlockError(.invalidArgument, "the payload of a block status is malformed")
            }
            request = asked.request
            identifiers = asked.contextIDs
        }
        for (index, identifier) in identifiers.enumerated() {
            guard let context = connection.context(identifier) else { continue }
            let extents =
                if case .dirtyBitmap(let name) = context {
                    try await bitmapExtents(name, request)
                } else {
                    try await extents(of: context, request)
                }
            let isLast = index == identifiers.count - 1
            let mode = connection.mode
            try connection.reply(
                capacity: NBDReply.statusCount(extents.count, mode: mode), isLast: isLast
            ) {
                NBDReply.status(
                    extents, contextID: identifier, isLast ? .done : [], replyingTo: request,
                    mode: mode, to: $0)
            }
        }
    }

    /// The extents of a context: one, or as many as the limits allow. Status may stop short.
    private func extents(
        of context: NBDContext, _ request: NBDRequest
    ) async throws(BlockError) -> [NBDStatusExtent] {
        var list = NBDExtentList(
            context, of: request.range, alignment: connection.blockSize,
            countMax: request.flags.contains(.requestOne) ? 1 : NBDLimits.statusExtentCountMax)
        let answer = BlockStatusList(limit: Self.statusRunCountMax)
        var range = request.range
        var queryCount = 0
        questions: while !range.isEmpty, list.extents.count < NBDLimits.statusExtentCountMax,
            queryCount < Self.statusQueryCountMax
        {
            queryCount += 1
            if queryCount % Self.statusTurnCount == 0 {
                // What is known up to here is an answer.
                if connection.isEnding { break }
                await edge.node.thread.yield()
            }
            try await edge.chainStatus(range, into: answer)
            for status in answer.runs {
                let flags = Self.flags(of: status, in: context)
                guard list.append(status.count, flags) else { break questions }
            }
            range = ByteRange(from: range.offset + answer.byteCount, to: range.end)
        }
        guard !list.extents.isEmpty else {
            throw BlockError(.cancelled, "the connection is ending")
        }
        return list.extents
    }

    /// The extents of a dirty bitmap's context: bit 0 where it is dirty (QEMU's interop/nbd.txt).
    private func bitmapExtents(
        _ name: String, _ request: NBDRequest
    ) async throws(BlockError) -> [NBDStatusExtent] {
        guard let bitmap = connection.bitmap(named: name) else {
            throw BlockError(.notFound, "the dirty bitmap '\(name)' is not exported any more")
        }
        let single = request.flags.contains(.requestOne)
        let alignment = connection.blockSize
        var result: [NBDStatusExtent] = []
        var runCount = 0
        var offset = request.range.offset
        while offset < request.range.end, result.count < NBDLimits.statusExtentCountMax {
            // Whoever resizes the node all the same, past the bitmap's end there is nothing to tell.
            guard offset < bitmap.size else { break }
            runCount += 1
            if runCount % Self.bitmapTurnCount == 0 {
                if connection.isEnding { break }
                await edge.node.thread.yield()
                guard offset < bitmap.size else { break }
            }
            let run = bitmap.alignedRun(at: offset, alignment: alignment)
            let end = min(run.end, request.range.end)
            let flags: UInt64 = run.isDirty ? 1 : 0
            if let last = result.last, last.flags == flags {
                result[result.count - 1].count += end - offset
            } else {
                if single, !result.isEmpty { break }
                result.append(NBDStatusExtent(count: end - offset, flags: flags))
            }
            offset = end
        }
        guard !result.isEmpty else {
            throw BlockError(.outOfRange, "the dirty bitmap '\(name)' ends before that")
        }
        return result
    }

    private static func flags(of status: BlockStatus, in context: NBDContext) -> UInt64 {
        switch context {
        case .baseAllocation:
            // Bit 0: a hole; bit 1: reads as zeroes (proto.md, "base:allocation").
            (status.flags.contains(.data) ? 0 : 1) | (status.flags.contains(.zero) ? 2 : 0)
        case .allocationDepth:
            // 0 unallocated, 1 in the top layer, 2 in its backing… (QEMU's interop/nbd.txt)
            UInt64(status.depth.map { $0 + 1 } ?? 0)
        case .dirtyBitmap:
            // Not of the graph: see `bitmapExtents`.
            0
        }
    }
}

extension DirtyBitmap {
    /// The run at `offset`, cut so that it ends at a multiple of `alignment` or at the end: what is
    /// dirty in part is dirty.
    func alignedRun(at offset: Int, alignment: Int) -> (isDirty: Bool, end: Int) {
        let (isDirty, end) = run(at: offset)
        if end == size || end.isAligned(to: alignment) { return (isDirty, end) }
        let down = end.roundedDown(to: alignment)
        if !isDirty, down > offset { return (false, down) }
        return (true, min(end.roundedUp(to: alignment) ?? size, size))
    }
}
