import BlockCore
import BlockIO
import QMP
import Synchronization

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// The option `--trace` of all commands, and where trace points tell what they have to.
///
///     [[enable=]PATTERN][,events=FILE][,file=FILE]
///
/// A pattern is a name, or holds `*` and `?` for many; with `-` before it the points are switched off
/// again. A file of events has a pattern a line; empty lines and those that begin with `#` say nothing.
public enum Tracing {
    static let eventsFileBytesMax = 1 << 20

    /// The names of all points, a line each: `--trace help`.
    public static var help: String {
        TracePoint.allCases.map { $0.name + "\n" }.joined()
    }

    /// Whether an option asks for the names alone.
    public static func isHelp(_ text: String) -> Bool { text == "help" || text == "?" }

    /// Carries an option out.
    ///
    /// - Throws: for patterns that no point matches, and files that cannot be used.
    public static func apply(_ text: String) throws(BlockError) {
        let reader = try OptionReader(
            try KeyValue.parse(text, impliedKey: "enable"), of: "--trace \(text)")
        let pattern = try reader.string("enable")
        let events = try reader.string("events")
        let file = try reader.string("file")
        try reader.finish()
        try output.withLock { output throws(BlockError) in
            if let file { try output.open(file) }
        }
        TracePoint.setSink { point, text in write(point, text) }
        if let events {
            let bytes = try SmallFile.read(events, bytesMax: eventsFileBytesMax)
            for line in String(decoding: bytes, as: UTF8.self).split(separator: "\n") {
                let pattern = line.trimmingSpaces
                if pattern.isEmpty || pattern.hasPrefix("#") { continue }
                try enable(pattern)
            }
        }
        if let pattern { try enable(pattern) }
    }

    private static func enable(_ pattern: String) throws(BlockError) {
        let isOff = pattern.hasPrefix("-")
        let name = isOff ? String(pattern.dropFirst()) : pattern
        for point in try points(matching: name) { point.setEnabled(!isOff) }
    }

    /// - Throws: `notFound` when there are none, with the nearest name.
    static func points(matching pattern: String) throws(BlockError) -> [TracePoint] {
        let found = TracePoint.allCases.filter { fnmatch(pattern, $0.name, 0) == 0 }
        guard found.isEmpty else { return found }
        let near = OptionReader.nearest(to: pattern, in: TracePoint.allCases.map(\.name))
        throw BlockError(
            .notFound, "there is no trace event '\(pattern)'",
            remedy: near.map { "did you mean '\($0)'?" } ?? "--trace help lists them")
    }

    /// Switches points from outside of the command line; they tell standard error then.
    static func set(_ points: [TracePoint], enabled: Bool) {
        TracePoint.setSink { point, text in write(point, text) }
        for point in points { point.setEnabled(enabled) }
    }

    // MARK: Output

    private struct Output: ~Copyable {
        var descriptor: Int32 = 2

        mutating func open(_ path: String) throws(BlockError) {
            #if canImport(Glibc)
            let opened = Glibc.open(
                path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0o644)
            #elseif canImport(Musl)
            let opened = Musl.open(path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0o644)
            #else
            let opened = Darwin.open(
                path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0o644)
            #endif
            guard opened >= 0 else { throw .system("cannot write '\(path)'", errno) }
            if descriptor != 2 { close(descriptor) }
            descriptor = opened
        }
    }

    private static let output = Mutex(Output())

    /// A line with the process's number and the time, since the epoch: `12345@1700000000.123456:…`
    private static func write(_ point: TracePoint, _ text: String) {
        var time = timespec()
        clock_gettime(CLOCK_REALTIME, &time)
        let digits = String(time.tv_nsec / 1000)
        let micros = String(repeating: "0", count: max(0, 6 - digits.count)) + digits
        var line = Array("\(getpid())@\(time.tv_sec).\(micros):\(point.name) \(text)\n".utf8)
        output.withLock { output in
            // A line at once; what is full or gone loses lines, and nothing else.
            #if canImport(Glibc)
            _ = Glibc.write(output.descriptor, &line, line.count)
            #elseif canImport(Musl)
            _ = Musl.write(output.descriptor, &line, line.count)
            #else
            _ = Darwin.write(output.descriptor, &line, line.count)
            #endif
        }
    }
}

extension Substring {
    fileprivate var trimmingSpaces: String {
        var rest = self
        while let first = rest.first, first.isWhitespace { rest.removeFirst() }
        while let last = rest.last, last.isWhitespace { rest.removeLast() }
        return String(rest)
    }
}

// MARK: QMP

extension StorageDaemon {
    /// `trace-event-get-state`.
    func traceEventGetState(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "trace-event-get-state")
        let points = try Tracing.points(matching: try reader.required("name"))
        try reader.finish()
        return .array(
            points.map {
                ["name": .string($0.name), "state": $0.isEnabled ? "enabled" : "disabled"]
            })
    }

    /// `trace-event-set-state`.
    func traceEventSetState(_ arguments: JSONValue) async throws(BlockError) -> JSONValue {
        let reader = try OptionReader(arguments, of: "trace-event-set-state")
        let points = try Tracing.points(matching: try reader.required("name"))
        guard let enabled = try reader.bool("enable") else {
            throw BlockError(
                .invalidArgument, "trace-event-set-state: parameter 'enable' is missing")
        }
        // All points there are can be switched.
        _ = try reader.bool("ignore-unavailable")
        try reader.finish()
        Tracing.set(points, enabled: enabled)
        return [:]
    }

    static let traceCommands = [
        DaemonCommand(
            CommandSchema(
                "trace-event-get-state", .required("name", .string),
                result: .array(.named("TraceEventInfo"))), StorageDaemon.traceEventGetState),
        DaemonCommand(
            CommandSchema(
                "trace-event-set-state", .required("name", .string),
                .required("enable", .boolean), .optional("ignore-unavailable", .boolean)),
            StorageDaemon.traceEventSetState),
    ]

    static let traceDefinitions: [String: SchemaDefinition] = [
        "TraceEventInfo": .object(
            ObjectSchema([
                .required("name", .string), .required("state", .named("TraceEventState")),
            ])),
        "TraceEventState": .enumeration(["unavailable", "disabled", "enabled"]),
    ]
}
