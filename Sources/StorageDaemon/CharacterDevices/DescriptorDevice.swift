import BlockCore
import BlockIO
import QMP

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

/// Open files for a monitor: one that commands come from, if any, and one that replies go to. Confined to
/// the daemon's thread.
///
/// None of them makes anybody wait: a reader that has fallen behind misses replies, as on a serial line.
final class DescriptorDevice: CharacterDevice, MonitorChannel, @unchecked Sendable {
    let typeName: String
    let filename: String
    private(set) var isUsed = false
    private let input: DescriptorInput
    private let output: Int32
    /// Kept open, so that the other end's coming and going changes nothing.
    private let other: Int32?
    private var isClosed = false

    init(
        _ kind: String, _ filename: String, input: Int32?, output: Int32, other: Int32? = nil,
        on thread: IOThread
    ) {
        typeName = "chardev-\(kind)"
        self.filename = filename
        self.input = DescriptorInput(input, "from '\(filename)'", on: thread)
        self.output = output
        self.other = other
        for descriptor in [input ?? output, output] {
            let flags = fcntl(descriptor, F_GETFL)
            if flags >= 0 { _ = fcntl(descriptor, F_SETFL, flags | O_NONBLOCK) }
        }
    }

    func attach(to monitors: MonitorServer, isPretty: Bool) throws(BlockError) {
        try checkUnused()
        isUsed = true
        monitors.serve(self, isPretty: isPretty)
    }

    /// Called by the daemon, and by the monitor once its replies are out: the second one closes.
    func close() {
        guard !isUsed || input.isShutDown else { return shutdown() }
        shutdown()
        guard !isClosed else { return }
        isClosed = true
        for descriptor in Set([input.descriptor, output, other].compactMap { $0 }) {
            PassedDescriptors.close(descriptor)
        }
    }

    // MARK: Channel

    func receive(_ vector: IOVector) async throws(BlockError) -> Int {
        try await input.receive(vector)
    }

    func send(_ vector: IOVector) async throws(BlockError) {
        var rest = vector.array[...]
        while !rest.isEmpty, !isClosed {
            let count = rest.withUnsafeBytes { write(output, $0.baseAddress, $0.count) }
            if count < 0, errno == EINTR { continue }
            // Nobody takes it, or there is nobody.
            if count < 0, [EAGAIN, ECONNREFUSED, EIO].contains(errno) { return }
            guard count >= 0 else { throw .system("cannot write to '\(filename)'", errno) }
            rest = rest.dropFirst(count)
        }
    }

    func shutdown() { input.shutdown() }
}

// MARK: Kinds

extension DescriptorDevice {
    private static func opened(_ path: String, _ flags: Int32) throws(BlockError) -> Int32 {
        let descriptor = open(path, flags | O_CLOEXEC | O_NOCTTY, 0o666)
        guard descriptor >= 0 else { throw .system("cannot open '\(path)'", errno) }
        return descriptor
    }

    /// A name that the command line and QMP call differently.
    private static func either(
        _ options: OptionReader, _ first: String, _ second: String
    ) throws(BlockError) -> String {
        if let name = try options.string(first) { return name }
        return try options.required(second)
    }

    /// `file`: what comes goes to the end of a file, which is emptied first unless `append` is on; commands
    /// come from another one, if `in` names one.
    static func file(
        _ options: OptionReader, on thread: IOThread
    ) throws(BlockError) -> DescriptorDevice {
        // The names of the command line, and those of QMP.
        let path = try either(options, "path", "out")
        var source = try options.string("input-path")
        if source == nil { source = try options.string("in") }
        let appends = try options.bool("append") ?? false
        try options.finish()
        let output = try opened(path, O_WRONLY | O_CREAT | (appends ? O_APPEND : O_TRUNC))
        // A pipe is opened at once, whether or not somebody writes to it.
        let input = try source.map { path throws(BlockError) in
            try opened(path, O_RDONLY | O_NONBLOCK)
        }
        return DescriptorDevice("file", "file", input: input, output: output, on: thread)
    }

    /// `pipe`: two named pipes, `PATH.in` and `PATH.out`, or one that is used for both.
    static func pipe(
        _ options: OptionReader, on thread: IOThread
    ) throws(BlockError) -> DescriptorDevice {
        let path = try either(options, "path", "device")
        try options.finish()
        // For both directions: so that it opens at once, and never ends.
        let input = open("\(path).in", O_RDWR | O_CLOEXEC)
        let output = open("\(path).out", O_RDWR | O_CLOEXEC)
        if input >= 0, output >= 0 {
            return DescriptorDevice("pipe", "pipe", input: input, output: output, on: thread)
        }
        for descriptor in [input, output] where descriptor >= 0 {
            PassedDescriptors.close(descriptor)
        }
        let both = try opened(path, O_RDWR)
        return DescriptorDevice("pipe", "pipe", input: both, output: both, on: thread)
    }

    /// `serial`: a line of the machine, or another terminal that is there.
    static func serial(
        _ options: OptionReader, on thread: IOThread
    ) throws(BlockError) -> DescriptorDevice {
        let path = try either(options, "path", "device")
        try options.finish()
        let descriptor = try opened(path, O_RDWR | O_NONBLOCK)
        makeRaw(descriptor)
        return DescriptorDevice(
            "serial", "serial", input: descriptor, output: descriptor, on: thread)
    }

    /// `pty`: a new terminal, that its user opens by the name it got.
    static func terminal(
        _ options: OptionReader, on thread: IOThread
    ) throws(BlockError) -> DescriptorDevice {
        try options.finish()
        var (main, other): (Int32, Int32) = (-1, -1)
        var name = [CChar](repeating: 0, count: 128)
        guard openpty(&main, &other, &name, nil, nil) == 0 else {
            throw .system("cannot make a terminal", errno)
        }
        for descriptor in [main, other] { _ = fcntl(descriptor, F_SETFD, FD_CLOEXEC) }
        makeRaw(other)
        let path = String(
            decoding: name.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
        return DescriptorDevice(
            "pty", "pty:\(path)", input: main, output: main, other: other, on: thread)
    }

    /// The terminal's name, of a `pty`.
    var terminalName: String? {
        typeName == "chardev-pty" ? String(filename.dropFirst(4)) : nil
    }

    /// Bytes as they are: no echo, no lines. What is no terminal has none of it.
    private static func makeRaw(_ descriptor: Int32) {
        var mode = termios()
        guard tcgetattr(descriptor, &mode) == 0 else { return }
        cfmakeraw(&mode)
        tcsetattr(descriptor, TCSANOW, &mode)
    }

    /// `udp`: datagrams to and from one address.
    static func datagrams(
        _ options: OptionReader, on thread: IOThread
    ) async throws(BlockError) -> DescriptorDevice {
        let remote = try address(options, "remote", host: "host", port: "port")
        let local = try address(options, "local", host: "localaddr", port: "localport")
        try options.finish()
        guard let remote else {
            throw BlockError(
                .invalidArgument, "datagrams need an address to go to",
                remedy: "give 'host' and 'port'")
        }
        let descriptor = try await thread.offload { () throws(BlockError) in
            try connected(remote, from: local)
        }
        return DescriptorDevice(
            "udp", "udp:\(remote.host):\(remote.port)", input: descriptor, output: descriptor,
            on: thread)
    }

    private struct Address: Sendable {
        let host: String
        let port: String
        /// `AF_UNSPEC` where either will do.
        let family: Int32
    }

    /// Which addresses `ipv4` and `ipv6` leave: either on means no other, unless that is on too.
    private static func family(_ options: OptionReader) throws(BlockError) -> Int32 {
        let (four, six) = (try options.bool("ipv4"), try options.bool("ipv6"))
        switch (four ?? (six != true), six ?? (four != true)) {
        case (true, true): return AF_UNSPEC
        case (true, false): return AF_INET
        case (false, true): return AF_INET6
        case (false, false):
            throw BlockError(.invalidArgument, "'ipv4' and 'ipv6' are both off")
        }
    }

    /// An address as QMP gives it, or as the command line does.
    private static func address(
        _ options: OptionReader, _ name: String, host: String, port: String
    ) throws(BlockError) -> Address? {
        var (hostText, portText) = (try options.string(host), try options.string(port))
        var family = name == "remote" ? try family(options) : AF_UNSPEC
        if let group = try options.object(name) {
            let type = try group.string("type") ?? "inet"
            guard type == "inet" else {
                throw BlockError(
                    .invalidArgument, "datagrams do not go to an address of type '\(type)'")
            }
            var data = group
            if let inner = try group.object("data") { data = inner }
            (hostText, portText) = (try data.string("host"), try data.string("port"))
            family = try Self.family(data)
            try data.finish()
        }
        guard hostText != nil || portText != nil else { return nil }
        return Address(host: hostText ?? "localhost", port: portText ?? "0", family: family)
    }

    private static func connected(
        _ remote: Address, from local: Address?
    ) throws(BlockError) -> Int32 {
        var hints = addrinfo()
        #if canImport(Glibc)
        hints.ai_socktype = Int32(SOCK_DGRAM.rawValue)
        #else
        hints.ai_socktype = SOCK_DGRAM
        #endif
        func resolve(_ address: Address, _ family: Int32) throws(BlockError)
            -> UnsafeMutablePointer<addrinfo>
        {
            var result: UnsafeMutablePointer<addrinfo>?
            hints.ai_family = family
            guard getaddrinfo(address.host, address.port, &hints, &result) == 0, let result else {
                throw BlockError(
                    .notFound, "cannot resolve '\(address.host)' port '\(address.port)'")
            }
            return result
        }
        let target = try resolve(remote, remote.family)
        defer { freeaddrinfo(target) }
        let descriptor = socket(target.pointee.ai_family, hints.ai_socktype, 0)
        guard descriptor >= 0 else { throw .system("cannot make a socket", errno) }
        _ = fcntl(descriptor, F_SETFD, FD_CLOEXEC)
        do throws(BlockError) {
            if let local {
                guard [AF_UNSPEC, target.pointee.ai_family].contains(local.family) else {
                    throw BlockError(
                        .invalidArgument, "'\(local.host)' and '\(remote.host)' are of two families"
                    )
                }
                let own = try resolve(local, target.pointee.ai_family)
                defer { freeaddrinfo(own) }
                guard bind(descriptor, own.pointee.ai_addr, own.pointee.ai_addrlen) == 0 else {
                    throw .system("cannot use '\(local.host)' port '\(local.port)'", errno)
                }
            }
            guard connect(descriptor, target.pointee.ai_addr, target.pointee.ai_addrlen) == 0 else {
                throw .system("cannot send to '\(remote.host)' port '\(remote.port)'", errno)
            }
            return descriptor
        } catch {
            PassedDescriptors.close(descriptor)
            throw error
        }
    }
}
