import BlockCore

// Changes in several steps, each a transaction of its own, that are one to users: as the daemon's
// `transaction` command makes them. Between the steps nodes may be without users who get them back; what a
// driver decides by its users it decides when all is done.

extension BlockGraph {
    /// The hold of a transaction, on whatever thread its nodes are.
    public static let transactionHold = "transaction"

    /// Keeps all nodes that are there: a step may be undone.
    public func beginTransaction() {
        thread.preconditionOnThread()
        isInTransaction = true
        for node in nodes { node.hold(Self.transactionHold) }
    }

    /// All steps are done, or undone. While users are still held back.
    public func settleTransaction() {
        thread.preconditionOnThread()
        isInTransaction = false
        for node in nodes where node.isReady { node.driver.transactionEnds() }
    }

    /// Lets nodes go that have no users any more; ``collect()`` closes them.
    public func endTransaction() {
        thread.preconditionOnThread()
        isInTransaction = false
        for node in nodes { node.release(Self.transactionHold) }
    }
}

extension BlockNode {
    /// Whether it has, or gets back, users that only another step of the change took from it.
    public var isInTransaction: Bool { graph.isInTransaction }
}
