import Foundation
import Testing

/// What a program left behind.
struct ProgramResult {
    let status: Int32
    let output: String
    let errors: String
}

/// Runs programs in a private folder that is removed at the end.
final class Workplace {
    let folder: String

    init() throws {
        folder = "/tmp/merino-commands-\(getpid())-\(UInt32.random(in: 0 ... .max))"
        try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: true)
    }

    deinit {
        try? FileManager.default.removeItem(atPath: folder)
    }

    /// The program beside this test bundle.
    static let merino =
        (CommandLine.arguments.lazy.map { URL(fileURLWithPath: $0).deletingLastPathComponent() }
            .map { $0.appendingPathComponent("merino").path }
            .first { FileManager.default.isExecutableFile(atPath: $0) }) ?? ".build/debug/merino"

    @discardableResult
    func merino(_ arguments: String..., input: String = "") throws -> ProgramResult {
        try run(Self.merino, arguments, input: input)
    }

    /// A program of the system, found in `PATH`.
    @discardableResult
    func tool(_ arguments: String..., input: String = "") throws -> ProgramResult {
        try run("/usr/bin/env", arguments, input: input)
    }

    func run(_ program: String, _ arguments: [String], input: String = "") throws -> ProgramResult {
        var result = try runOnce(program, arguments, input)
        // On a loaded machine qemu-img cannot always measure how fast it makes keys.
        for _ in 0..<5 where result.errors.contains("Unable to get accurate CPU usage") {
            result = try runOnce(program, arguments, input)
        }
        return result
    }

    private func runOnce(
        _ program: String, _ arguments: [String], _ input: String
    ) throws -> ProgramResult {
        let process = Process()
        // What hangs ends the test, not the whole run.
        process.executableURL = URL(fileURLWithPath: "/usr/bin/timeout")
        process.arguments = ["120", program] + arguments
        process.currentDirectoryURL = URL(fileURLWithPath: folder)
        // Files, not pipes: however much comes, nobody waits for anybody.
        let names = ["in", "out", "err"].map { "\(folder)/.\($0)-\(UInt64.random(in: 0 ... .max))" }
        try input.write(toFile: names[0], atomically: false, encoding: .utf8)
        for name in names.dropFirst() {
            try "".write(toFile: name, atomically: false, encoding: .utf8)
        }
        process.standardInput = FileHandle(forReadingAtPath: names[0])
        process.standardOutput = FileHandle(forWritingAtPath: names[1])
        process.standardError = FileHandle(forWritingAtPath: names[2])
        try process.run()
        process.waitUntilExit()
        let texts = names.map { (try? String(contentsOfFile: $0, encoding: .utf8)) ?? "" }
        for name in names { try? FileManager.default.removeItem(atPath: name) }
        return ProgramResult(
            status: process.terminationStatus, output: texts[1], errors: texts[2])
    }

    /// Takes out what differs from run to run: times and rates.
    static func withoutTimes(_ text: String) -> String {
        text.split(separator: "\n", omittingEmptySubsequences: false)
            .map { line in
                guard let end = line.range(of: " ops; ") else { return String(line) }
                return String(line[..<end.upperBound])
            }
            .joined(separator: "\n")
    }
}
