import BlockCore

/// The options of one of QEMU's tools, or of a command of its image tool, as their manuals list them.
///
/// These programs take long options abbreviated, as long as one option alone begins so. Here the words of
/// a command line get their whole names, before anything else looks at them. To tell an option from another
/// one's value, it must be known which take values. Options that only Merino has are not abbreviated, and
/// make no abbreviation ambiguous.
struct ToolOptions {
    /// With `:` behind those that take a value.
    private let long: [Substring]
    /// Letters, with `:` behind those that take a value.
    private let short: [Character]

    private init(_ long: String, short: String) {
        self.long = long.split(separator: " ")
        self.short = Array(short)
    }

    // MARK: Tables

    /// What stands before a command of the image tool.
    private static let imageTool = ToolOptions("help version trace:", short: "hVT:")

    /// Only the one that is asked for is made: a program does not start before.
    private static func imageCommand(_ name: String) -> ToolOptions? {
        switch name {
        case "amend":
            .init("help object: image-opts force", short: "ho:f:t:pq")
        case "bench":
            .init(
                "help flush-interval: pattern: image-opts force-share no-drain",
                short: "hc:d:f:ni:o:qs:S:t:wU")
        case "bitmap":
            .init(
                "help object: image-opts add remove clear enable disable merge: granularity: "
                    + "source-file: source-format:", short: "hb:f:F:g:")
        case "check":
            .init(
                "help format: repair: output: object: image-opts force-share", short: "hf:r:T:qU")
        case "commit":
            .init("help object: image-opts", short: "hf:t:b:dpqr:")
        case "compare":
            .init("help object: image-opts force-share", short: "hf:F:T:pqsU")
        case "convert":
            .init(
                "help object: image-opts force-share target-image-opts salvage "
                    + "target-is-zero bitmaps skip-broken-bitmaps",
                short: "hf:O:B:CcF:o:l:S:pt:T:qnm:WUr:")
        case "create":
            .init("help object:", short: "F:b:f:ho:qu")
        case "dd":
            .init("help object: image-opts force-share", short: "hf:O:U")
        case "info":
            .init(
                "help format: output: backing-chain object: image-opts force-share", short: "hf:U")
        case "map":
            .init(
                "help format: output: object: image-opts force-share start-offset: max-length:",
                short: "f:s:l:hU")
        case "measure":
            .init(
                "help image-opts object: output: size: force-share", short: "hf:l:o:O:U")
        case "rebase":
            .init("help object: image-opts force-share", short: "hf:F:b:upt:T:qU")
        case "resize":
            .init("help object: image-opts preallocation: shrink", short: "f:hq")
        case "snapshot":
            .init("help object: image-opts force-share", short: "la:c:d:hqU")
        default: nil
        }
    }

    private static func tool(_ program: String) -> ToolOptions? {
        switch program {
        case "qemu-io":
            .init(
                "help version cmd: format: read-only snapshot nocache copy-on-read misalign native-aio "
                    + "discard: cache: trace: force-share aio: object: image-opts",
                short: "hVc:d:f:rsnCmki:t:T:U")
        case "qemu-nbd":
            .init(
                "help version bind: port: socket: offset: read-only allocation-depth bitmap: connect: "
                    + "disconnect list snapshot load-snapshot: nocache cache: aio: discard: "
                    + "detect-zeroes: shared: format: persistent verbose object: export-name: "
                    + "description: tls-creds: tls-hostname: tls-authz: image-opts trace: fork pid-file: "
                    + "selinux-label:", short: "hVb:o:p:rsnc:dvk:e:f:tl:x:T:D:AB:L")
        case "qemu-storage-daemon":
            .init(
                "help version trace: blockdev: chardev: daemonize export: monitor: nbd-server: object: "
                    + "pidfile:", short: "hT:V")
        default: nil
        }
    }

    // MARK: Names

    /// The arguments with whole names of long options; of other programs as they are.
    ///
    /// - Throws: `invalidArgument` with the options that an abbreviation may mean, where there are several.
    static func withWholeNames(
        _ arguments: [String], of program: String
    ) throws(BlockError) -> [String] {
        if let tool = tool(program) {
            return try tool.withWholeNames(arguments, endsAtWord: false)
        }
        guard program == "qemu-img" else { return arguments }
        let start = try imageTool.withWholeNames(arguments, endsAtWord: true)
        guard let place = imageTool.firstWord(start), let command = imageCommand(start[place])
        else { return start }
        return start[...place]
            + (try command.withWholeNames(Array(start[(place + 1)...]), endsAtWord: false))
    }

    /// - Parameter endsAtWord: what is behind the first word that is no option belongs to another table.
    private func withWholeNames(
        _ arguments: [String], endsAtWord: Bool
    ) throws(BlockError) -> [String] {
        var result = arguments
        var index = 0
        while index < arguments.count {
            let word = arguments[index]
            if word == "--" || endsAtWord && !word.hasPrefix("-") { break }
            result[index] = try wholeName(word)
            index += takesNext(result[index]) ? 2 : 1
        }
        return result
    }

    /// The first word that is neither an option nor the value of one.
    private func firstWord(_ arguments: [String]) -> Int? {
        var index = 0
        while index < arguments.count, arguments[index].hasPrefix("-") {
            index += takesNext(arguments[index]) ? 2 : 1
        }
        return index < arguments.count ? index : nil
    }

    private func wholeName(_ word: String) throws(BlockError) -> String {
        guard word.hasPrefix("--"), word.count > 2 else { return word }
        let text = word.dropFirst(2)
        let name = text.prefix { $0 != "=" }
        let names = long.map { $0.last == ":" ? $0.dropLast() : $0 }
        if name.isEmpty || names.contains(name) { return word }
        let found = names.filter { $0.hasPrefix(name) }
        guard found.count > 1 else {
            return found.first.map { "--\($0)\(text[name.endIndex...])" } ?? word
        }
        let list = found.sorted().map { "--\($0)" }.joined(separator: ", ")
        throw BlockError(
            .invalidArgument, "the option '--\(name)' is ambiguous: it may mean \(list)")
    }

    /// Whether the word behind an option is its value.
    private func takesNext(_ word: String) -> Bool {
        if word.hasPrefix("--") { return long.contains { $0 == "\(word.dropFirst(2)):" } }
        guard word.hasPrefix("-") else { return false }
        // Letters may stand together; what follows one that takes a value is the value.
        let letters = Array(word.dropFirst())
        for (index, letter) in letters.enumerated() {
            guard let place = short.firstIndex(of: letter) else { return false }
            if place + 1 < short.count, short[place + 1] == ":" {
                return index == letters.count - 1
            }
        }
        return false
    }
}
