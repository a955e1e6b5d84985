import BlockCore
import BlockIO

/// How far a command is, and who is told. Confined to the session's thread.
///
/// Forms: `    (12.34/100%)` between carriage returns, as scripts know it; a bar for people, with rate and
/// time left; one JSON object a line on a descriptor for programs.
public final class Progress: @unchecked Sendable {
    public enum Style: Sendable { case silent, percent, bar }

    private let style: Style
    private let print: @Sendable (String) -> Void
    /// Told of progress as lines of JSON.
    private let machine: (@Sendable (String) -> Void)?
    private let clock: @Sendable () -> UInt64
    private var total = 0
    private var done = 0
    private var start: UInt64 = 0
    private var shown = -1.0
    private var lastShown: UInt64 = 0
    private var isRunning = false

    /// - Parameters:
    ///   - print: shows text to whoever asked for progress.
    ///   - machine: takes lines of JSON.
    ///   - clock: nanoseconds.
    public init(
        _ style: Style = .silent, clock: @escaping @Sendable () -> UInt64 = { 0 },
        machine: (@Sendable (String) -> Void)? = nil,
        print: @escaping @Sendable (String) -> Void = { _ in }
    ) {
        self.style = style
        self.print = print
        self.machine = machine
        self.clock = clock
    }

    /// - Parameter total: bytes, or whatever is counted.
    func begin(_ total: Int) {
        self.total = total
        done = 0
        start = clock()
        shown = -1
        isRunning = true
        show(force: true)
    }

    func advance(_ count: Int) {
        done = min(total, done.adding(count) ?? total)
        show(force: false)
    }

    /// The work is done.
    func finish() {
        guard isRunning else { return }
        done = total
        show(force: true)
        end()
    }

    /// Ends the line that progress is shown on, wherever the work stopped.
    public func end() {
        guard isRunning else { return }
        isRunning = false
        if style != .silent { print("\n") }
    }

    /// The line that a signal asks for.
    public var line: String { "    (\(percentText)/100%)\n" }

    private var percent: Double { total == 0 ? 100 : Double(done) / Double(total) * 100 }

    private var percentText: String { Self.hundredths(percent) }

    /// Two decimals, as in `12.34`.
    static func hundredths(_ value: Double) -> String {
        let scaled = Int((max(0, min(value, 1e12)) * 100).rounded())
        let fraction = scaled % 100
        return "\(scaled / 100).\(fraction < 10 ? "0" : "")\(fraction)"
    }

    private func show(force: Bool) {
        guard style != .silent || machine != nil else { return }
        // A hundred lines are enough for scripts; people see it move four times a second.
        let now = style == .bar ? clock() : 0
        let isDue = style == .bar ? now &- lastShown >= 250_000_000 : percent - shown >= 1
        guard force || isDue else { return }
        shown = percent
        lastShown = now
        switch style {
        case .silent: break
        case .percent: print("    (\(percentText)/100%)\r")
        case .bar: print(bar(now))
        }
        machine?(
            "{\"done\": \(done), \"total\": \(total), \"percent\": \(percentText)}\n")
    }

    private func bar(_ now: UInt64) -> String {
        let width = 30
        let filled = Int(percent / 100 * Double(width))
        let seconds = Double(now &- start) / 1e9
        var text = "\r[" + String(repeating: "#", count: filled)
        text += String(repeating: "-", count: width - filled) + "] \(percentText) %"
        if seconds > 0.2, done > 0 {
            let rate = Double(done) / seconds
            text += "  \(SizeText.format(Int(min(rate, 1e18))))/s"
            let left = Double(total - done) / rate
            text += "  \(Self.duration(left)) left"
        }
        // What an earlier, longer line left there goes.
        return text + "\u{1b}[K"
    }

    /// `1:02:03`, or `2:03`.
    static func duration(_ seconds: Double) -> String {
        let whole = Int(max(0, min(seconds, 1e9)).rounded())
        func two(_ value: Int) -> String { value < 10 ? "0\(value)" : "\(value)" }
        let minutes = whole / 60 % 60
        let end = two(whole % 60)
        return whole >= 3600 ? "\(whole / 3600):\(two(minutes)):\(end)" : "\(minutes):\(end)"
    }
}
