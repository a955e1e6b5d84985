import ArgumentParser
import BlockCore

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#endif

/// `merino export`: an image, or a snapshot inside it, over NBD to as many readers as come.
struct ExportCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "export", _superCommandName: "merino",
        abstract: "Export an image, or a snapshot inside it, and print where to read it.",
        discussion: """
            Read-only unless --writable is given. It goes on until Ctrl-C. Without -k, -p or -b it \
            listens on a Unix socket of its own in /tmp. 'merino serve' has more options.
            """)

    @Argument(help: "The image.") var file: String
    @Option(
        name: .long,
        help: "Export this snapshot inside the image: an identifier or a name, or snapshot.id=….")
    var snapshot: String?
    @OptionGroup var form: ImageFormArguments
    @Flag(help: "Clients may write.") var writable = false
    @Flag(help: "Follow nothing that the image names; its format must be given.")
    var untrusted = false
    @OptionGroup var place: ExportPlace

    func validate() throws {
        if snapshot != nil, writable {
            throw ValidationError("a snapshot cannot be written: --snapshot excludes --writable")
        }
    }

    func run() throws {
        var arguments = ["--persistent", "--shared", "0", "--print-uri"]
        func add(_ name: String, _ value: String?) {
            if let value { arguments += [name, value] }
        }
        add("--load-snapshot", snapshot)
        add("--format", form.format)
        add("--port", place.port.map { String($0) })
        add("--bind", place.bind)
        add("--export-name", place.exportName)
        if form.imageOptions { arguments.append("--image-opts") }
        if untrusted { arguments.append("--untrusted") }
        if !writable { arguments.append("--read-only") }
        let ownSocket = "/tmp/merino-export-\(getpid()).sock"
        add("--socket", place.hasSocketOrAddress ? place.socket : ownSocket)
        let serve = try ServeCommand.parse(arguments + ["--", file])
        try serve.run()
    }
}
