import BlockTesting
import Foundation
import Testing

typealias ProgramResult = ChildProgram.Output

/// Runs programs in a private folder that is removed at the end.
final class Workplace {
    private let place: TemporaryFolder
    var folder: String { place.path }

    init() throws { place = try TemporaryFolder() }

    deinit { place.remove() }

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
        try run(arguments[0], Array(arguments.dropFirst()), input: input)
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
        // What hangs ends the test, not the whole run.
        try ChildProgram.run([program] + arguments, in: folder, input: input, limit: 120)
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
