import BlockCore
import BlockGraph

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// The snapshots inside an image, as lists show them.
public enum SnapshotList {
    /// With its title; empty when there are none.
    public static func text(_ snapshots: [InternalSnapshot]) -> String {
        if snapshots.isEmpty { return "" }
        let heading = row("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
        return "Snapshot list:\n" + heading + snapshots.map(row).joined()
    }

    private static func row(_ snapshot: InternalSnapshot) -> String {
        row(
            snapshot.identifier, snapshot.name,
            SizeText.format(Int(clamping: snapshot.vmStateSize)),
            localDate(snapshot.date), clock(snapshot.vmClockNanoseconds),
            snapshot.instructionCount.map { String($0) } ?? "")
    }

    private static func row(
        _ identifier: String, _ name: String, _ size: String, _ date: String, _ clock: String,
        _ instructions: String
    ) -> String {
        left(identifier, 9) + " " + left(name, 16) + " " + right(size, 8) + right(date, 20)
            + right(clock, 13) + right(instructions, 11) + "\n"
    }

    private static func left(_ text: String, _ width: Int) -> String {
        text + String(repeating: " ", count: max(0, width - text.utf8.count))
    }

    private static func right(_ text: String, _ width: Int) -> String {
        String(repeating: " ", count: max(0, width - text.utf8.count)) + text
    }

    /// In the local time zone, to the second.
    private static func localDate(_ date: SnapshotDate) -> String {
        var seconds = time_t(date.seconds)
        var parts = tm()
        guard localtime_r(&seconds, &parts) != nil else { return String(date.seconds) }
        return "\(Int(parts.tm_year) + 1900)-\(digits(Int(parts.tm_mon) + 1))-"
            + "\(digits(Int(parts.tm_mday))) \(digits(Int(parts.tm_hour))):"
            + "\(digits(Int(parts.tm_min))):\(digits(Int(parts.tm_sec)))"
    }

    /// Hours, minutes, seconds and milliseconds.
    private static func clock(_ nanoseconds: UInt64) -> String {
        let seconds = Int(clamping: nanoseconds / 1_000_000_000)
        let milliseconds = Int(clamping: nanoseconds / 1_000_000 % 1000)
        return "\(digits(seconds / 3600)):\(digits(seconds / 60 % 60)):\(digits(seconds % 60))."
            + digits(milliseconds, 3)
    }

    private static func digits(_ value: Int, _ count: Int = 2) -> String {
        let text = String(value)
        return String(repeating: "0", count: max(0, count - text.count)) + text
    }
}
