import BlockCore

/// Follows a long transfer through a file and says which parts of it the page cache need not keep.
///
/// Requests come roughly in order, several at a time: a part is given up only when the next one is complete,
/// so that nothing is dropped that is being read ahead or written.
struct StreamWindow {
    static let byteCount = 16 << 20

    private var current: ByteRange?
    private var currentBytes = 0
    private var previous: ByteRange?

    /// Takes note of a request.
    ///
    /// - Returns: what may be dropped now.
    mutating func note(_ range: ByteRange) -> ByteRange? {
        guard !range.isEmpty else { return nil }
        let known = current ?? range
        current = ByteRange(
            from: min(known.offset, range.offset), to: max(known.end, range.end))
        currentBytes += range.count
        guard currentBytes >= Self.byteCount else { return nil }
        defer {
            previous = current
            current = nil
            currentBytes = 0
        }
        return previous
    }
}
