import BlockCore

/// Tells once that a node was written past a mark, so that its storage can be grown in time.
final class WriteThreshold: WriteObserver {
    let offset: Int
    private let node: BlockNode
    private let exceeded: (_ bytes: Int) -> Void

    init(_ offset: Int, of node: BlockNode, exceeded: @escaping (_ bytes: Int) -> Void) {
        self.offset = offset
        self.node = node
        self.exceeded = exceeded
    }

    func changed(_ range: ByteRange) {
        guard range.end > offset else { return }
        node.setWriteThreshold(nil) { _ in }
        exceeded(range.end - offset)
    }

    /// What is given back needs no space.
    func discarded(_ range: ByteRange) {}
}

extension BlockNode {
    /// The mark that is waited for, in bytes; `nil` for none.
    public var writeThreshold: Int? { threshold?.offset }

    /// Calls `exceeded` once, when a write or a write of zeroes ends past `offset`: with the bytes that
    /// it reaches past it. `nil` ends the wait. The one before is forgotten.
    public func setWriteThreshold(_ offset: Int?, exceeded: @escaping (_ bytes: Int) -> Void) {
        if let threshold { removeWriteObserver(threshold) }
        threshold = offset.map { WriteThreshold($0, of: self, exceeded: exceeded) }
        if let threshold { addWriteObserver(threshold) }
    }
}
