import ArgumentParser
import BlockCore
import StorageDaemon

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
    @Option(
        name: [.customShort("k", allowingJoined: true), .long],
        help: "Listen on this Unix socket.")
    var socket: String?
    @Option(
        name: [.customShort("p", allowingJoined: true), .long], help: "Listen on this TCP port.")
    var port: UInt16?
    @Option(
        name: [.customShort("b", allowingJoined: true), .long], help: "Listen on this address.")
    var bind: String?
    @Option(
        name: [.customShort("x", allowingJoined: true), .customLong("export-name")],
        help: "The export's name.")
    var exportName = ""

    func validate() throws {
        if snapshot != nil, writable {
            throw ValidationError("a snapshot cannot be written: --snapshot excludes --writable")
        }
    }

    func run() throws {
        var options = ServeOptions()
        options.file = file
        options.format = form.format
        options.imageOptions = form.imageOptions
        options.loadSnapshot = snapshot
        options.readOnly = !writable
        options.untrusted = untrusted
        options.persistent = true
        options.shared = 0
        options.printsURI = true
        options.place.socket = socket
        options.place.port = port.map { Int($0) }
        options.place.bind = bind
        options.place.exportName = exportName
        if !options.place.hasSocketOrAddress {
            options.place.socket = "/tmp/merino-export-\(getpid()).sock"
        }
        let program = ServeProgram(options: options)
        try Failure.rethrow { () throws(BlockError) in
            try program.options.validate()
            try program.run()
        }
    }
}
