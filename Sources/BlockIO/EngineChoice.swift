import BlockCore

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// Which engine a thread gets.
public enum EngineChoice: String, Sendable, CaseIterable {
    /// io_uring where the kernel allows it, worker threads elsewhere.
    case automatic = "auto"
    case uring = "io_uring"
    case threads

    /// What `MERINO_IO_ENGINE` asks for; automatic when it is not set.
    ///
    /// - Throws: `invalidArgument` when its value names no engine.
    public static func fromEnvironment() throws(BlockError) -> EngineChoice {
        guard let pointer = getenv("MERINO_IO_ENGINE") else { return .automatic }
        let text = String(cString: pointer)
        if text.isEmpty { return .automatic }
        guard let choice = EngineChoice(rawValue: text) else {
            throw BlockError(
                .invalidArgument, "MERINO_IO_ENGINE names no I/O engine: '\(text)'",
                remedy: "use auto, io_uring or threads")
        }
        return choice
    }

    /// Makes the engine; on the thread that it is for.
    ///
    /// - Throws: `unsupported` when io_uring is asked for by name and refused.
    public func makeEngine() throws(BlockError) -> any IOEngine {
        switch self {
        case .threads:
            return try ThreadsEngine()
        case .uring:
            #if os(Linux)
            return try URingEngine()
            #else
            throw BlockError(.unsupported, "io_uring is Linux's", remedy: "use threads")
            #endif
        case .automatic:
            #if os(Linux)
            if let engine = try? URingEngine() { return engine }
            #endif
            return try ThreadsEngine()
        }
    }
}
