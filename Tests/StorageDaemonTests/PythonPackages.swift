import BlockTesting
import Foundation

/// The Python packages that tests use: where scripts/setup puts them, in this checkout or in the one
/// that it is a worktree of, or the system's own.
enum PythonPackages {
    /// Whether qemu.qmp is there.
    static let canRun = (try? run("import qemu.qmp", "", isQuiet: true)) == 0

    private static let path: String = {
        let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
            .deletingLastPathComponent().deletingLastPathComponent()
        var roots = [root]
        // A worktree's .git is a file: "gitdir: MAIN/.git/worktrees/NAME".
        if let link = try? String(
            contentsOf: root.appendingPathComponent(".git"), encoding: .utf8),
            link.hasPrefix("gitdir: ")
        {
            let folder = link.dropFirst(8).trimmingCharacters(in: .whitespacesAndNewlines)
            roots.append(
                URL(fileURLWithPath: folder).deletingLastPathComponent()
                    .deletingLastPathComponent().deletingLastPathComponent())
        }
        let inherited = ProcessInfo.processInfo.environment["PYTHONPATH"].map { [$0] } ?? []
        return (roots.map { $0.path + "/.build/python" } + inherited).joined(separator: ":")
    }()

    /// - Returns: the exit status.
    static func run(
        _ script: String, _ argument: String, isQuiet: Bool = false
    ) throws -> Int32 {
        let result = try ChildProgram.run(
            ["python3", "-c", script, argument],
            environment: ProcessInfo.processInfo.environment.merging(
                ["PYTHONPATH": path], uniquingKeysWith: { $1 }))
        if !isQuiet, result.status != 0 { print(result.output + result.errors) }
        return result.status
    }
}
