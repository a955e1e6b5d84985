import ArgumentParser
import BlockCore

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// Results, as they are: unbuffered, so that they stand in order with errors and other processes'.
enum StandardOutput {
    static func print(_ text: String) {
        var text = text
        text.withUTF8 { send(UnsafeRawBufferPointer($0)) }
    }

    static func print(_ text: [UInt8]) {
        text.withUnsafeBytes { send($0) }
    }

    private static func send(_ bytes: UnsafeRawBufferPointer) {
        var rest = bytes
        while !rest.isEmpty {
            let count = write(1, rest.baseAddress, rest.count)
            if count < 0, errno == EINTR { continue }
            // Nobody reads any more.
            guard count > 0 else { return }
            rest = UnsafeRawBufferPointer(rebasing: rest[count...])
        }
    }
}

/// Errors and notices go to standard error, with the program's name in front.
enum StandardError {
    static func print(_ message: String) {
        let line = message + "\n"
        _ = line.withCString { write(2, $0, strlen($0)) }
    }
}

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
