import BlockCore

/// The command line of `merino serve`, as `qemu-nbd(8)` has it.
public struct ServeOptions: Sendable {
    /// The image; with ``disconnect`` the device.
    public var file: String?

    // Instead of waiting for clients.
    public var list = false
    public var tlsHostname: String?
    public var connect: String?
    public var disconnect = false

    // How the image is opened.
    /// nil: found out.
    public var format: String?
    /// The image is given as options.
    public var imageOptions = false
    public var offset: String?
    public var readOnly = false
    public var nocache = false
    public var cache: String?
    public var untrusted = false
    public var aio: String?
    public var discard: String?
    public var detectZeroes: String?
    public var snapshot = false
    public var loadSnapshot: String?

    // How it is served.
    public var place = ExportPlace()
    public var description: String?
    /// Clients at a time, 1 if not given; 0 for no limit.
    public var shared: Int?
    /// Go on when the last client has left.
    public var persistent = false
    public var verbose = false
    /// Seconds; 10 if not given.
    public var handshakeLimit: Int?
    public var allocationDepth = false
    public var bitmaps: [String] = []
    public var tlsCredentials: String?
    public var tlsAuthorization: String?
    public var objects: [String] = []
    public var traces: [String] = []
    public var pidFile: String?
    public var printsURI = false
    /// Return when ready; go on in the background.
    public var forks = false

    public private(set) var wantsHelp = false
    public private(set) var wantsVersion = false
    private var partition: String?
    private var securityLabel: String?

    public init() {}

    /// - Parameter words: without the program's and the command's name.
    /// - Throws: `invalidArgument` that says what is wrong with them.
    public init(_ words: [String]) throws(BlockError) {
        self.init()
        let operands = try Self.table.read(words, into: &self)
        if wantsHelp || wantsVersion { return }
        guard operands.count <= 1 else {
            throw Self.wrong(
                "unexpected argument '\(operands[1])': one image is served, and that is "
                    + "'\(operands[0])'")
        }
        file = operands.first
        try validate()
    }

    /// Whether clients may write.
    public var isWritable: Bool { !readOnly && loadSnapshot == nil }

    // MARK: What excludes what

    /// - Throws: `invalidArgument` that names the options that do not go together.
    public func validate() throws(BlockError) {
        guard shared ?? 0 >= 0, handshakeLimit ?? 0 >= 0 else {
            throw Self.wrong("--shared and --handshake-limit cannot be negative")
        }
        if tlsAuthorization != nil, tlsCredentials == nil {
            throw Self.wrong("--tls-authz needs --tls-creds")
        }
        try validateMode()
        if list, isAboutAnExport {
            throw Self.wrong("--list is incompatible with options of an export")
        }
        if tlsHostname != nil, !list || tlsCredentials == nil {
            throw Self.wrong("--tls-hostname is for --list with --tls-creds")
        }
        if connect != nil { try validateDevice() }
        if partition != nil {
            throw BlockError(
                .unsupported, "--partition is no option of qemu-nbd any more",
                remedy: "serve the part of the image with --offset, or with --image-opts "
                    + "driver=raw,offset=…,size=…")
        }
        if securityLabel != nil {
            throw BlockError(
                .unsupported,
                "--selinux-label is not supported: the socket gets its label from the system",
                remedy: "leave it out; label the process with runcon, or hand over a socket that a "
                    + "service manager labelled (LISTEN_FDS)")
        }
    }

    /// The kernel is the only client, and speaks plaintext.
    private func validateDevice() throws(BlockError) {
        if place.hasSocketOrAddress {
            throw Self.wrong("--connect and --socket, --port or --bind exclude each other")
        }
        if tlsCredentials != nil {
            throw Self.wrong(
                "--connect and --tls-creds exclude each other: the kernel reaches the image inside "
                    + "this machine, without TLS")
        }
        if printsURI { throw Self.wrong("--connect and --print-uri exclude each other") }
    }

    private func validateMode() throws(BlockError) {
        let others = [list, connect != nil, disconnect].filter { $0 }.count
        guard others <= 1 else {
            throw Self.wrong("--list, --connect and --disconnect exclude each other")
        }
        if list {
            guard file == nil else {
                throw Self.wrong("--list is incompatible with a file name")
            }
        } else if disconnect {
            guard file != nil else {
                throw Self.wrong("--disconnect needs the device's name, as in -d /dev/nbd0")
            }
        } else if file == nil {
            throw Self.wrong("the file to serve is missing", remedy: "name an image, or see --help")
        }
    }

    private var isAboutAnExport: Bool {
        !(place.exportName ?? "").isEmpty || !(description ?? "").isEmpty || allocationDepth
            || !bitmaps.isEmpty || format != nil || offset != nil || tlsAuthorization != nil
    }

    private static func wrong(_ message: String, remedy: String? = nil) -> BlockError {
        BlockError(.invalidArgument, message, remedy: remedy)
    }

    // MARK: Table

    /// What there is, by the long names.
    public static var names: [String] { table.names }

    private static let table = OptionTable<ServeOptions>([
        .flag("L", "list", "Tell what another server exports, and end.") { $0.list = true },
        .text(
            nil, "tls-hostname", "With --list: the name that the server's certificate must have."
        ) { $0.tlsHostname = $1 },
        .text(
            "c", "connect", "Connect this device, /dev/nbdN, to the image (Linux)."
        ) { $0.connect = $1 },
        .flag("d", "disconnect", "Disconnect the device that is named, and end.") {
            $0.disconnect = true
        },
        .text("f", "format", "The image's format; found out when not given.") { $0.format = $1 },
        .flag(
            nil, "image-opts", "The image is given as options: driver=qcow2,file.filename=…."
        ) { $0.imageOptions = true },
        .text("o", "offset", "Serve the image from this byte on.") { $0.offset = $1 },
        .flag("r", "read-only", "Let nobody write.") { $0.readOnly = true },
        .flag("n", "nocache", "The same as --cache=none.") { $0.nocache = true },
        .text(
            nil, "cache",
            "none, writeback, writethrough, directsync or unsafe. (default: writeback)"
        ) { $0.cache = $1 },
        .flag(
            nil, "untrusted", "Follow nothing that the image names; its format must be given."
        ) { $0.untrusted = true },
        .text(nil, "aio", "threads, native or io_uring.") { $0.aio = $1 },
        .text(nil, "discard", "ignore or unmap. (default: ignore)") { $0.discard = $1 },
        .text(nil, "detect-zeroes", "off, on or unmap.") { $0.detectZeroes = $1 },
        .flag(
            "s", "snapshot", "Write to a temporary file, which is gone at the end."
        ) { $0.snapshot = true },
        .text(
            "l", "load-snapshot",
            "Serve this snapshot inside the image: snapshot.id=…, snapshot.name=…, or either."
        ) { $0.loadSnapshot = $1 },
        .text(
            "k", "socket", "Listen on this Unix socket; --port and --bind count for nothing then."
        ) { $0.place.socket = $1 },
        .number("p", "port", "Listen on this TCP port.", in: 0...65535) { $0.place.port = $1 },
        .text("b", "bind", "Listen on this address.") { $0.place.bind = $1 },
        .text("x", "export-name", "The export's name.") { $0.place.exportName = $1 },
        .text("D", "description", "What the export is, for people.") { $0.description = $1 },
        .number(
            "e", "shared", "Clients at a time; 0 for no limit. (default: 1)"
        ) { $0.shared = $1 },
        .flag("t", "persistent", "Go on when the last client has left.") { $0.persistent = true },
        .flag("v", "verbose", "Say more of what happens; with --connect, stay in the foreground.") {
            $0.verbose = true
        },
        .number(
            nil, "handshake-limit", "Seconds a client may take to negotiate. (default: 10)"
        ) { $0.handshakeLimit = $1 },
        .flag("A", "allocation-depth", "Tell how deep.") { $0.allocationDepth = true },
        .text(
            "B", "bitmap", "Offer this dirty bitmap; may be given again."
        ) { $0.bitmaps.append($1) },
        .text(
            nil, "tls-creds", "Clients must use TLS, with these credentials."
        ) { $0.tlsCredentials = $1 },
        .text(
            nil, "tls-authz", "Whom the authorization object lets in."
        ) { $0.tlsAuthorization = $1 },
        .text(
            nil, "object", "Credentials, authorization lists and secrets, with id=… and the like."
        ) { $0.objects.append($1) },
        .text(
            "T", "trace",
            "Tell what happens at trace events: [PATTERN][,events=FILE][,file=FILE], or help."
        ) { $0.traces.append($1) },
        .text(nil, "pid-file", "Write the process's number here when ready.") { $0.pidFile = $1 },
        .flag(
            nil, "print-uri", "Print the export's NBD URI when clients can come."
        ) { $0.printsURI = true },
        .flag(nil, "fork", "Return when ready; go on in the background.") { $0.forks = true },
        // These are refused by their names.
        .text("P", "partition", nil) { $0.partition = $1 },
        .text(nil, "selinux-label", nil) { $0.securityLabel = $1 },
        .flag("V", "version", "Show the version.", isLast: true) { $0.wantsVersion = true },
        .flag("h", "help", "Show help information.", isLast: true) { $0.wantsHelp = true },
    ])

    // MARK: Help

    /// The command in one sentence.
    public static let abstract = "Serve one image over NBD, as qemu-nbd does."

    public static var help: String {
        """
        OVERVIEW: \(abstract)

        It ends on SIGINT, SIGTERM or SIGHUP, or without -t when the last client has
        left. Listening sockets of a service manager (LISTEN_FDS) take the place of -k,
        -p and -b.

        USAGE: merino serve [<options>] [<file>]

        ARGUMENTS:
          <file>                  The image.

        OPTIONS:
        \(table.help)

        """
    }
}
