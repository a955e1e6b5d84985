import ArgumentParser
import QMP

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// How results are printed.
enum OutputFormat: String, ExpressibleByArgument, CaseIterable {
    case human, json

    func print(_ text: @autoclosure () -> String, _ json: @autoclosure () -> JSONValue) {
        switch self {
        case .human: StandardOutput.print(text())
        case .json: StandardOutput.print(json().text(pretty: true) + "\n")
        }
    }
}

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

    /// What a server tells beside its work: it does not wait for whoever reads, and where nobody does, the
    /// notice is lost.
    static func note(_ message: String) {
        // A pipe that is writable takes a line, which is short, whole.
        var stream = pollfd(fd: 2, events: Int16(POLLOUT), revents: 0)
        guard poll(&stream, 1, 0) == 1 else { return }
        print(message)
    }
}
