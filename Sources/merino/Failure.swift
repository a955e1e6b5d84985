import BlockCore

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// Ends the command with a message and exit code 1.
struct Failure: Error, CustomStringConvertible {
    let description: String
    init(_ description: String) {
        self.description = description
    }

    /// Runs a command's work; its error becomes the command's end.
    static func rethrow(_ body: () throws(BlockError) -> Void) throws {
        do throws(BlockError) {
            try body()
        } catch {
            throw Failure(error.plainDescription)
        }
    }
}

/// Ends the process with an exit code.
func end(_ code: Int32) -> Never {
    exit(code)
}

extension BlockError {
    /// The description without the name of a node that got it by itself: it tells users nothing.
    var plainDescription: String {
        guard let node, node.hasPrefix("#") else { return description }
        return remedy.map { "\(message); \($0)" } ?? message
    }
}
