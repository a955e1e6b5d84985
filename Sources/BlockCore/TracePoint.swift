import CTrace
import Synchronization

/// A named point in the code that tells what happens there, while somebody wants to know.
///
/// Switched off it costs one load: the text is not made. docs/tracing.md lists the points with what they
/// tell; a point is added by a case here and a call where it stands:
///
///     TracePoint.cbwCopy("node \(name) offset \(offset) bytes \(count)")
public enum TracePoint: UInt32, Sendable, CaseIterable {
    // At most 64: each has a bit.
    case edgeRequest
    case ioSubmit
    case ioComplete
    case nbdRequest
    case cbwCopy
    case qcow2Allocate
    case qmpCommand

    /// As `--trace` and QMP name it.
    public var name: String {
        switch self {
        case .edgeRequest: "edge_request"
        case .ioSubmit: "io_submit"
        case .ioComplete: "io_complete"
        case .nbdRequest: "nbd_request"
        case .cbwCopy: "cbw_copy"
        case .qcow2Allocate: "qcow2_allocate"
        case .qmpCommand: "qmp_command"
        }
    }

    @inlinable @inline(__always)
    public var isEnabled: Bool { merino_trace_is_on(rawValue) }

    /// Takes effect for other threads soon.
    public func setEnabled(_ isEnabled: Bool) {
        merino_trace_switch(rawValue, isEnabled)
    }

    /// Tells `text`, in `name value` pairs, when the point is switched on.
    @inlinable @inline(__always)
    public func callAsFunction(_ text: @autoclosure () -> String) {
        if isEnabled { tell(text()) }
    }

    @usableFromInline
    func tell(_ text: String) {
        let sink = Self.sink.withLock { $0 }
        sink(self, text)
    }

    // MARK: Where it goes

    /// Called on any thread.
    public typealias Sink = @Sendable (TracePoint, String) -> Void
    private static let sink = Mutex<Sink>({ _, _ in })

    public static func setSink(_ sink: @escaping Sink) {
        self.sink.withLock { $0 = sink }
    }
}
