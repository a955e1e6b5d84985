import BlockCore
import BlockIO
import Foundation
import Testing

@testable import StorageDaemon

@Suite struct ServeOptionsTests {
    @Test(arguments: [
        ["-k", "s", "a.raw"], ["-ks", "a.raw"], ["-k=s", "a.raw"], ["--socket", "s", "a.raw"],
        ["--socket=s", "a.raw"], ["a.raw", "-k", "s"], ["-k", "s", "--", "a.raw"],
        ["-k", "none", "--socket", "s", "a.raw"],
    ])
    func aValueIsGivenInAnyForm(words: [String]) throws {
        let options = try ServeOptions(words)
        #expect(options.place.socket == "s" && options.file == "a.raw")
    }

    @Test func lettersStandTogether() throws {
        let options = try ServeOptions(["-rtk", "s", "-vAe3", "a.raw"])
        #expect(options.readOnly && options.persistent && options.verbose)
        #expect(options.allocationDepth && options.shared == 3)
        #expect(options.place.socket == "s" && options.file == "a.raw")
        #expect(!options.snapshot && !options.nocache && !options.forks)
    }

    @Test func someOptionsCollectAndOfOthersTheLastCounts() throws {
        let options = try ServeOptions([
            "-B", "a", "--bitmap=b", "--object", "x", "--object", "y", "-T", "t", "--trace=u",
            "-f", "raw", "-f", "qcow2", "image",
        ])
        #expect(options.bitmaps == ["a", "b"] && options.objects == ["x", "y"])
        #expect(options.traces == ["t", "u"] && options.format == "qcow2")
    }

    @Test(arguments: [
        (["-x", "-r", "a"], "-r"), (["--export-name=", "a"], ""), (["-x", "", "a"], ""),
        (["--export-name=a=b", "a"], "a=b"), (["-x", "--", "a"], "--"),
    ])
    func aValueMayBeAnyWord(words: [String], name: String) throws {
        let options = try ServeOptions(words)
        #expect(options.place.exportName == name && options.file == "a" && !options.readOnly)
    }

    @Test(arguments: [
        ["-k", "s", "-p", "1", "-b", "127.0.0.1", "a"], ["-b", "x", "-k", "s", "-L"],
    ])
    func aSocketTakesThePlaceOfAPort(words: [String]) async throws {
        let place = try ServeOptions(words).place
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        for connecting in [false, true] {
            let addresses = try await thread.run { () async throws(BlockError) in
                try await place.addresses(connecting: connecting, on: thread)
            }
            #expect(addresses == [.unix(path: "s")])
        }
        #expect(place.connectedHost == nil)
    }

    @Test(arguments: [["--", "-r"], ["-"], [""]])
    func whatIsNoOptionIsTheFile(words: [String]) throws {
        let options = try ServeOptions(words)
        #expect(options.file == words.last && !options.readOnly)
    }

    @Test func numbersAreRead() throws {
        let options = try ServeOptions(["-p", "0", "--handshake-limit", "5", "-e0", "a"])
        #expect(options.place.port == 0 && options.handshakeLimit == 5 && options.shared == 0)
        #expect(try ServeOptions(["--port=65535", "a"]).place.port == 65535)
    }

    @Test(arguments: [
        ["-h"], ["--help", "a", "b"], ["-rh", "--nosuch"], ["-V"], ["--version", "-k"],
    ])
    func helpAndVersionNeedNothingElse(words: [String]) throws {
        let options = try ServeOptions(words)
        #expect(options.wantsHelp != options.wantsVersion)
    }

    @Test(arguments: [
        (["--read-onyl", "a"], "did you mean '--read-only'?"), (["-rq", "a"], "'-q', as in '-rq'"),
        (["-qersistent", "a"], "'--persistent'"), (["--=", "a"], "'--'"),
        (["a", "-k"], "'-k' needs a value"), (["-rk"], "'-k' needs a value"),
        (["--fork=1", "a"], "'--fork' takes no value"), (["-r=1", "a"], "'-r' takes no value"),
        (["-e", "x", "a"], "'-e' takes a number, not 'x'"),
        (["--shared=99999999999999999999", "a"], "'--shared' takes a number"),
        (["-p", "65536", "a"], "from 0 to 65535, not '65536'"), (["-p", "", "a"], "not ''"),
        (["--port=-1", "a"], "not '-1'"), (["-e-1", "a"], "cannot be negative"),
        (["--handshake-limit", "-1", "a"], "cannot be negative"), (["a", "b"], "argument 'b'"),
        (["-r"], "file to serve is missing"), (["-L", "a"], "--list is incompatible with a file"),
        (["-d"], "--disconnect needs the device"), (["-d", "x", "a"], "unexpected argument 'a'"),
        (["-d", "-L"], "exclude"),
        (["-c", "x", "-k", "s", "a"], "--connect"),
        (["-c", "x", "--tls-creds", "t", "a"], "--connect and --tls-creds"),
        (["-c", "x", "--print-uri", "a"], "--connect and --print-uri"),
        (["--tls-authz", "x", "a"], "needs --tls-creds"), (["-L", "-D", "x"], "of an export"),
        (["--selinux-label", "x", "a"], "--selinux-label is not supported"),
        (["--tls-hostname", "x", "a"], "for --list"), (["-P", "1", "a"], "--offset"),
    ])
    func whatIsWrongIsSaid(words: [String], part: String) {
        do throws(BlockError) {
            _ = try ServeOptions(words)
            Issue.record("accepted: \(words)")
        } catch {
            #expect(error.description.contains(part), "\(error)")
        }
    }

    /// The empty name stands for an address of each family.
    @Test func aNameIsListenedOnAtAllItsAddresses() async throws {
        let place = try ServeOptions(["-b", "", "-p", "0", "a"]).place
        let thread = try IOThread(name: "test")
        defer { thread.stop() }
        let (found, expected) = try await thread.run {
            () async throws(BlockError) -> (Set<SocketAddress>, Set<SocketAddress>) in
            let named = try SocketAddress.resolve(host: "", port: 0, passive: true)
            let listeners = try await place.listen(on: thread)
            defer { for listener in listeners { listener.close() } }
            // What this machine does not have, nobody can listen on.
            var expected: Set<SocketAddress> = []
            for address in named {
                guard let listener = try? Listener(on: address, thread: thread) else { continue }
                listener.close()
                expected.insert(address)
            }
            return (Set(listeners.map { $0.address.with(port: 0) }), expected)
        }
        #expect(found == expected && !found.isEmpty)
    }

    @Test func theFirstAddressThatAnswersIsConnectedTo() async throws {
        let addresses = (1...3).map { SocketAddress.ipv4(address: 0x7f00_0001, port: $0) }
        let failures = [ECONNREFUSED, EADDRNOTAVAIL]
        let found = try await ExportPlace.atFirstReachable(addresses) {
            address throws(BlockError) -> SocketAddress in
            guard let index = addresses.firstIndex(of: address), index < failures.count else {
                return address
            }
            throw .system("cannot connect", failures[index])
        }
        #expect(found == addresses[2])
        await #expect(throws: BlockError.self) {
            try await ExportPlace.atFirstReachable(addresses) {
                address throws(BlockError) -> SocketAddress in
                // It was reached, and did not want the client.
                guard address == addresses[0] else { return address }
                throw BlockError(.permissionDenied, "it wants TLS")
            }
        }
    }

    @Test(arguments: [
        (["-r"], SocketAddress.ipv4(address: 0, port: 4321), "nbd://127.0.0.1:4321/"),
        (
            ["-p", "0"], SocketAddress.ipv6(address: [UInt8](repeating: 0, count: 16), port: 5),
            "nbd://[::1]:5/"
        ),
        (
            ["-b", "localhost", "-p", "0"], SocketAddress.ipv4(address: 0x7f00_0001, port: 7),
            "nbd://localhost:7/"
        ),
        (["-x", "a b"], SocketAddress.unix(path: "/run/s"), "nbd+unix:///a%20b?socket=/run/s"),
    ])
    func theURITellsWhereTheServerListens(
        words: [String], address: SocketAddress, uri: String
    ) throws {
        let place = try ServeOptions(words + ["a"]).place
        #expect(try place.uri(at: address) == uri)
        let secure = try place.uri(at: address, usesTLS: true)
        #expect(secure == "nbds" + uri.dropFirst(3))
    }

    @Test func theURIOfARelativePathIsAbsolute() throws {
        let uri = try ServeOptions(["-k", "s", "a"]).place.uri(at: .unix(path: "s"))
        #expect(uri.hasPrefix("nbd+unix:///?socket=/") && uri.hasSuffix("/s"), "\(uri)")
    }

    @Test func theHelpHasARowForEachOption() {
        let lines = ServeOptions.help.split(separator: "\n")
        for name in ServeOptions.names {
            #expect(lines.contains { "\($0) ".prefix(40).contains(" \(name) ") }, "\(name)")
        }
        #expect(lines.allSatisfy { $0.count <= 80 })
        #expect(lines.contains("  -t, --persistent        Go on when the last client has left."))
        #expect(!ServeOptions.help.contains("--partition"))
    }

    @Test(arguments: [["-d", "-v", "/dev/nbd9"], ["-dv", "/dev/nbd9"], ["/dev/nbd9", "-d"]])
    func theDeviceToDisconnectIsTheOperand(words: [String]) throws {
        let options = try ServeOptions(words)
        #expect(options.disconnect && options.file == "/dev/nbd9")
    }
}
