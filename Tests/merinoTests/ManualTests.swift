import Foundation
import Testing

/// `--help`, the page under `docs/commands` and the manual made of it name the same options; the
/// completions know all commands.
@Suite struct ManualTests {
    private struct Command {
        let name: String
        let isShown: Bool
        /// The names of each option, as they are given: `-f`, `--format`.
        let options: [[String]]
    }

    private static let root = URL(fileURLWithPath: #filePath)
        .deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent().path

    private static func commands() throws -> [Command] {
        let place = try Workplace()
        let dump = try place.merino("--experimental-dump-help").output
        let top = try JSONSerialization.jsonObject(with: Data(dump.utf8)) as? [String: Any]
        let root = top?["command"] as? [String: Any]
        let all = root?["subcommands"] as? [[String: Any]] ?? []
        return try all.compactMap { entry in
            guard let name = entry["commandName"] as? String, name != "help" else { return nil }
            var options = (entry["arguments"] as? [[String: Any]] ?? []).compactMap(names)
            // These read their own words. Their options stand where the rows of their help begin.
            if ["daemon", "serve"].contains(name) {
                options = try place.merino(name, "--help").output.split(separator: "\n")
                    .filter { $0.hasPrefix("  -") }.map { tokens(in: String($0.prefix(26))) }
            }
            return Command(
                name: name, isShown: entry["shouldDisplay"] as? Bool ?? true,
                options: options.filter { !$0.contains("--help") && !$0.contains("--version") })
        }
    }

    private static func names(_ argument: [String: Any]) -> [String]? {
        guard argument["shouldDisplay"] as? Bool ?? true,
            let names = argument["names"] as? [[String: Any]]
        else { return nil }
        return names.compactMap { entry in
            guard let name = entry["name"] as? String else { return nil }
            return entry["kind"] as? String == "long" ? "--" + name : "-" + name
        }
    }

    /// What looks like an option's name.
    private static func tokens(in text: String) -> [String] {
        text.matches(of: /(?:^|[ `,(])(--?[A-Za-z][A-Za-z0-9-]*)/).map { String($0.1) }
    }

    private static func page(_ command: Command) throws -> String {
        try String(contentsOfFile: "\(root)/docs/commands/\(command.name).md", encoding: .utf8)
    }

    @Test(arguments: [["help", "serve"], ["serve", "-h"], ["serve", "a", "b", "--help"]])
    func theServersHelpIsShown(words: [String]) throws {
        let result = try Workplace().run(Workplace.merino, words)
        #expect(result.status == 0 && result.errors == "")
        #expect(result.output.contains("\n  -k, --socket <socket> "))
    }

    @Test func everyCommandHasAPageThatTheIndexNames() throws {
        let index = try String(contentsOfFile: Self.root + "/docs/README.md", encoding: .utf8)
        let commands = try Self.commands()
        #expect(commands.count > 8)
        for command in commands where command.isShown {
            #expect(throws: Never.self) { try Self.page(command) }
            #expect(index.contains("commands/\(command.name).md"), "\(command.name)")
        }
    }

    @Test func everyOptionOfTheHelpIsOnThePage() throws {
        for command in try Self.commands() where command.isShown {
            let page = try Self.page(command)
            let named = Set(
                page.matches(of: /`([^`\n]*)`/).flatMap { Self.tokens(in: " " + $0.1) })
            for option in command.options {
                #expect(
                    !named.isDisjoint(with: option),
                    "docs/commands/\(command.name).md says nothing of \(option)")
            }
        }
    }

    @Test func everyOptionOfThePagesTableIsInTheHelp() throws {
        for command in try Self.commands() where command.isShown {
            let known = Set(command.options.flatMap { $0 } + ["-h", "--help", "-V", "--version"])
            var isOptions = false
            for line in try Self.page(command).split(
                separator: "\n", omittingEmptySubsequences: false)
            {
                guard line.hasPrefix("|") else {
                    isOptions = false
                    continue
                }
                if line.hasPrefix("| option") { isOptions = true }
                guard isOptions, let first = line.split(separator: "|").first else { continue }
                for name in Self.tokens(in: String(first)) {
                    #expect(
                        known.contains(name),
                        "docs/commands/\(command.name).md has \(name), which the command has not")
                }
            }
        }
    }

    @Test func manualsAndCompletionsAreMadeOfBoth() throws {
        let place = try Workplace()
        let made = try place.run(Self.root + "/scripts/manual", [Workplace.merino, place.folder])
        try #require(made.status == 0, "\(made.errors)")
        let commands = try Self.commands().filter(\.isShown)
        for name in ["merino"] + commands.map({ "merino-\($0.name)" }) {
            let path = "\(place.folder)/share/man/man1/\(name).1"
            let checked = try place.tool("groff", "-Kutf8", "-man", "-ww", "-z", "-Tutf8", path)
            #expect(checked.status == 0 && checked.errors.isEmpty, "\(name): \(checked.errors)")
        }
        let bash = "\(place.folder)/share/bash-completion/completions/merino"
        #expect(try place.tool("bash", "-n", bash).status == 0)
        for path in [
            bash, "\(place.folder)/share/zsh/site-functions/_merino",
            "\(place.folder)/share/fish/vendor_completions.d/merino.fish",
        ] {
            let text = try String(contentsOfFile: path, encoding: .utf8)
            for command in commands { #expect(text.contains(command.name), "\(path)") }
            // The daemon and the server read their options by themselves.
            #expect(text.contains("--nbd-server"), "\(path)")
            #expect(text.contains("--handshake-limit"), "\(path)")
        }
    }
}
