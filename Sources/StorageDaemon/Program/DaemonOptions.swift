import BlockCore
import QMP

/// The command line of the daemon, as `qemu-storage-daemon(1)` has it.
///
/// Steps keep their order: an object, a node or a server comes before those that refer to it.
public struct DaemonOptions: Sendable {
    /// What is set up, in the order of the command line.
    public enum Step: Sendable, Equatable {
        case object(JSONValue)
        case blockdev(JSONValue)
        case characterDevice(JSONValue)
        case monitor(JSONValue)
        case nbdServer(JSONValue)
        case export(JSONValue)

        /// The option it came from.
        var option: String {
            switch self {
            case .object: "--object"
            case .blockdev: "--blockdev"
            case .characterDevice: "--chardev"
            case .monitor: "--monitor"
            case .nbdServer: "--nbd-server"
            case .export: "--export"
            }
        }
    }

    public private(set) var steps: [Step] = []
    public private(set) var pidFile: String?
    /// Go to the background once everything is set up.
    public private(set) var daemonizes = false
    /// Of `--trace`, in their order; they take effect before all else.
    public private(set) var traces: [String] = []
    public private(set) var wantsHelp = false
    /// What an option was asked to tell of itself, to be printed instead of anything done; what stands behind
    /// it on the command line was not looked at.
    public private(set) var listing: String?
    public private(set) var wantsVersion = false

    /// What there is, by the long names.
    public static let names = [
        "--help", "--version", "--blockdev", "--chardev", "--daemonize", "--export", "--monitor",
        "--nbd-server", "--object", "--pidfile", "--trace",
    ]

    /// - Parameter arguments: without the program's name; `--option value` or `--option=value`.
    /// - Throws: `invalidArgument` that names the option.
    public init(_ arguments: [String]) throws(BlockError) {
        var rest = arguments[...]
        while let argument = rest.popFirst() {
            let (name, attached) = Self.split(argument)
            switch name {
            case "-h", "--help":
                try Self.refuse(attached, name)
                wantsHelp = true
            case "-V", "--version":
                try Self.refuse(attached, name)
                wantsVersion = true
            case "--daemonize":
                try Self.refuse(attached, name)
                daemonizes = true
            default:
                guard Self.names.contains(name) || name == "-T" else { throw Self.unknown(name) }
                guard let text = attached ?? rest.popFirst() else {
                    throw BlockError(.invalidArgument, "option '\(name)' needs a value")
                }
                try take(name, text)
                if listing != nil { return }
            }
        }
    }

    private mutating func take(_ name: String, _ text: String) throws(BlockError) {
        do throws(BlockError) {
            switch name {
            case "--object":
                if let request = KeyValue.helpRequest(in: text, impliedKey: "qom-type") {
                    return listing = OptionHelp.objects(request)
                }
                steps.append(.object(try KeyValue.parse(text, impliedKey: "qom-type")))
            case "--blockdev":
                steps.append(.blockdev(try KeyValue.parse(text, impliedKey: "driver")))
            case "--chardev":
                if let request = KeyValue.helpRequest(in: text, impliedKey: "backend") {
                    return listing = OptionHelp.characterDevices(request)
                }
                steps.append(
                    .characterDevice(
                        try KeyValue.parse(text, impliedKey: "backend", allowsFlags: true)))
            case "--monitor":
                steps.append(.monitor(try KeyValue.parse(text, impliedKey: "chardev")))
            case "--nbd-server":
                steps.append(.nbdServer(try KeyValue.parse(text)))
            case "--export":
                steps.append(.export(try KeyValue.parse(text, impliedKey: "type")))
            case "--pidfile": pidFile = text
            default: traces.append(text)
            }
        } catch {
            throw error.doing("\(name) \(text)")
        }
    }

    private static func split(_ argument: String) -> (name: String, value: String?) {
        guard argument.hasPrefix("--"), let equals = argument.firstIndex(of: "=") else {
            return (argument, nil)
        }
        return (String(argument[..<equals]), String(argument[argument.index(after: equals)...]))
    }

    private static func refuse(_ value: String?, _ name: String) throws(BlockError) {
        if value != nil {
            throw BlockError(.invalidArgument, "option '\(name)' takes no value")
        }
    }

    private static func unknown(_ name: String) -> BlockError {
        guard name.hasPrefix("-") else {
            return BlockError(
                .invalidArgument, "unexpected argument '\(name)'",
                remedy: "everything is given by options: see --help")
        }
        let near = OptionReader.nearest(to: name, in: names)
        return BlockError(
            .invalidArgument, "there is no option '\(name)'",
            remedy: near.map { "did you mean '\($0)'?" } ?? "see --help")
    }

    public static let help = """
        USAGE: merino daemon [options]

        Serves disk images, and is controlled over QMP. Options take effect in their order: an
        object, a node or a server comes before what refers to it. Values are JSON or key=value
        pairs with commas between; a comma in a value is written twice.

          -h, --help              Show this and end.
          -V, --version           Show the version and end.
          --object TYPE,id=ID[,PROPERTY=VALUE…]
                                  Make an object: secret, secret_keyring, tls-creds-x509,
                                  tls-creds-psk, tls-creds-anon, authz-simple, authz-list,
                                  authz-list-file, iothread, main-loop, throttle-group.
                                  --object help lists them, --object TYPE,help the properties of
                                  one.
          --blockdev DRIVER,node-name=NAME[,OPTION=VALUE…]
                                  Open a block node.
          --nbd-server addr.type=unix,addr.path=PATH[,OPTION=VALUE…]
          --nbd-server addr.type=inet,addr.host=HOST,addr.port=PORT[,OPTION=VALUE…]
                                  Start the NBD server. Options: max-connections, tls-creds,
                                  tls-authz, handshake-max-seconds.
          --export nbd,id=ID,node-name=NAME[,name=NAME][,writable=on]
                                  Export a node.
          --chardev socket,id=ID,path=PATH,server=on,wait=off
          --chardev socket,id=ID,host=HOST,port=PORT,server=on,wait=off
                                  Make a socket for a monitor; others are stdio, file, pipe, pty,
                                  serial and udp. --chardev help lists them.
          --monitor CHARDEV[,pretty=on]
                                  Answer QMP on a socket.
          -T, --trace [PATTERN][,events=FILE][,file=FILE]
                                  Tell what happens at the trace events that match; help lists them.
          --pidfile PATH          Write the process's number here once all is set up.
          --daemonize             Go to the background once all is set up.

        The daemon ends on the QMP command quit, and on SIGINT, SIGTERM and SIGHUP.
        """
}
