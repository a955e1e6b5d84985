import BlockCore
import BlockTLS
import BlockTesting
import Foundation
import Testing

@testable import BlockExports

/// The server and the clients that people have: libnbd's tools and QEMU's.
@Suite struct NBDClientsTests {
    // MARK: Information

    @Test func nbdinfoShowsTheExport() async throws {
        try await NBDTestServer.with { server in
            let text = try server.check(["nbdinfo", "--json", server.uri()])
            for part in [
                "\"export-name\": \"disk\"", "\"description\": \"the disk\"",
                "\"export-size\": 8388608", "\"is_read_only\": false", "\"can_multi_conn\": true",
                "\"can_fua\": true", "\"can_fast_zero\": true", "\"can_cache\": true",
                "\"can_df\": true", "\"structured\": true", "base:allocation",
                "qemu:allocation-depth",
            ] {
                #expect(text.contains(part), "\(part) is not in \(text)")
            }
        }
    }

    @Test func nbdinfoListsAllExports() async throws {
        try await NBDTestServer.with { server in
            let text = try server.check(["nbdinfo", "--list", "--json", server.uri("")])
            #expect(text.contains("\"export-name\": \"disk\""))
            #expect(text.contains("\"export-name\": \"fixed\""))
            #expect(text.contains("\"is_read_only\": true"))
        }
    }

    @Test func nbdinfoMapsDataAndHoles() async throws {
        try await NBDTestServer.with { server in
            let text = try server.check(["nbdinfo", "--map", "--json", server.uri("fixed")])
            #expect(text.contains("\"offset\": 0, \"length\": 65536, \"type\": 0"), "\(text)")
            #expect(text.contains("\"offset\": 65536, \"length\": 983040, \"type\": 3"), "\(text)")
            #expect(text.contains("\"offset\": 8323072, \"length\": 65536, \"type\": 0"), "\(text)")
            let depth = try server.check([
                "nbdinfo", "--map=qemu:allocation-depth", "--json", server.uri("fixed"),
            ])
            #expect(depth.contains("\"length\""), "\(depth)")
        }
    }

    @Test func anUnknownExportIsAnError() async throws {
        try await NBDTestServer.with { server in
            let output = try server.run(["nbdinfo", server.uri("nope")])
            #expect(output.status != 0)
            #expect(output.text.contains("nope"), "\(output.text)")
        }
    }

    // MARK: Copies

    @Test func nbdcopyReadsWhatIsThere() async throws {
        try await NBDTestServer.with { server in
            try server.check(["nbdcopy", server.uri("fixed"), "copy"])
            #expect(try server.contents("copy") == server.contents("fixed"))
        }
    }

    @Test func nbdcopyWritesOverSeveralConnections() async throws {
        try await NBDTestServer.with { server in
            let bytes = Data(
                (0..<NBDTestServer.size).map { UInt8(truncatingIfNeeded: $0 &* 7 / 100) })
            try bytes.write(to: URL(fileURLWithPath: "\(server.folder)/source"))
            try server.check(["nbdcopy", "--connections=4", "--flush", "source", server.uri()])
            #expect(try server.contents() == bytes)
        }
    }

    @Test func qemuImgCopiesOverTCP() async throws {
        try await NBDTestServer.with { server in
            try server.check([
                "qemu-img", "convert", "-O", "raw", "nbd://127.0.0.1:\(server.port)/fixed", "copy",
            ])
            #expect(try server.contents("copy") == server.contents("fixed"))
        }
    }

    @Test func qemuImgSeesAndComparesTheExport() async throws {
        try await NBDTestServer.with { server in
            let text = try server.check(["qemu-img", "info", "-f", "raw", server.uri("fixed")])
            #expect(text.contains("8 MiB"), "\(text)")
            try server.check([
                "qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri("fixed"), "fixed.full",
            ])
            let map = try server.check([
                "qemu-img", "map", "--output=json", "-f", "raw", server.uri("fixed"),
            ])
            #expect(map.contains("\"zero\": true"), "\(map)")
        }
    }

    @Test func qemuIoReadsWritesZeroesAndDiscards() async throws {
        try await NBDTestServer.with { server in
            let text = try server.check([
                "qemu-io", "-f", "raw", "-d", "unmap", server.uri(), "-c", "write -P 0x5a 100 5000",
                "-c", "read -P 0x5a 100 5000", "-c", "write -f -P 0x11 2M 64k",
                "-c", "write -z 2M 4k", "-c", "write -z -u 2100k 4k", "-c", "discard 3M 1M",
                "-c", "flush", "-c", "read -P 0 2M 4k", "-c", "read -P 0x11 2052k 4k",
            ])
            #expect(!text.contains("Pattern verification failed"), "\(text)")
            #expect(try server.contents()[100..<5_100].allSatisfy { $0 == 0x5a })
        }
    }

    @Test func aReadOnlyExportTakesNoWrites() async throws {
        try await NBDTestServer.with { server in
            let output = try server.run([
                "qemu-io", "-f", "raw", server.uri("fixed"), "-c", "write 0 512",
            ])
            #expect(output.status != 0)
            try server.python(
                """
                h.set_strict_mode(0)
                h.connect_uri('\(server.uri("fixed"))')
                for f in (lambda: h.pwrite(b'x' * 512, 0), lambda: h.zero(512, 0),
                          lambda: h.trim(512, 0)):
                    try:
                        f()
                        assert False
                    except nbd.Error as e:
                        assert e.errno == 'EPERM', e.errno
                assert h.pread(512, 0)
                """)
        }
    }

    @Test(arguments: ["randrw", "rw"])
    func fioVerifiesWhatItWrote(load: String) async throws {
        try await NBDTestServer.with { server in
            let text = try server.check([
                "fio", "--name=x", "--ioengine=nbd", "--uri=\(server.uri())", "--rw=\(load)",
                "--bsrange=512-128k", "--iodepth=16", "--size=8M", "--verify=crc32c",
                "--verify_fatal=1", "--randseed=\(UInt32.random(in: 0 ... .max))",
            ])
            #expect(text.contains("err= 0"), "\(text)")
        }
    }

    // MARK: Commands and flags

    @Test func everyCommandAndFlagWorks() async throws {
        try await NBDTestServer.with { server in
            try server.python(
                """
                h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
                h.connect_uri(uri)
                h.pwrite(b'A' * 4096, 4096, nbd.CMD_FLAG_FUA)
                assert h.pread(4096, 4096) == b'A' * 4096
                assert h.pread(4096, 4096) == b'A' * 4096
                h.zero(4096, 4096, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
                assert h.pread(4096, 4096) == bytes(4096)
                h.trim(65536, 0, nbd.CMD_FLAG_FUA)
                h.cache(65536, 0)
                h.flush()
                def chunk(buf, offset, status, err): assert status in (1, 2)
                h.pread_structured(1 << 20, 0, chunk, nbd.CMD_FLAG_DF)
                holes = []
                def sparse(buf, offset, status, err): holes.append((offset, len(buf), status))
                h.pread_structured(2 << 20, 1 << 20, sparse)
                assert (1 << 20, 65536, nbd.READ_DATA) in holes, holes
                assert any(s == nbd.READ_HOLE for _, _, s in holes), holes
                extents = []
                def extent(ctx, offset, entries, err): extents.extend(entries)
                h.block_status(8 << 20, 0, extent)
                assert sum(extents[0::2]) == 8 << 20, extents
                del extents[:]
                h.block_status(8 << 20, 0, extent, nbd.CMD_FLAG_REQ_ONE)
                assert len(extents) == 2, extents
                h.shutdown()
                """)
        }
    }

    @Test func pastTheEndHasTheProtocolsErrors() async throws {
        try await NBDTestServer.with { server in
            try server.python(
                """
                h.set_strict_mode(0)
                h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
                h.connect_uri(uri)
                size = h.get_size()
                def expect(name, f):
                    try:
                        f()
                    except nbd.Error as e:
                        assert e.errno == name, (name, e.errno)
                        return
                    assert False, name
                expect('EINVAL', lambda: h.pread(512, size))
                expect('EINVAL', lambda: h.pread(512, size - 511))
                expect('ENOSPC', lambda: h.pwrite(b'x' * 512, size))
                expect('ENOSPC', lambda: h.zero(512, size - 1))
                expect('EINVAL', lambda: h.trim(512, size))
                expect('EINVAL', lambda: h.pread(512, 1 << 62))
                expect('ENOSPC', lambda: h.pwrite(b'x' * 512, (1 << 63) - 512))
                h.pread(512, size - 512)
                """)
        }
    }

    @Test func manyRequestsInFlightAreAllAnswered() async throws {
        try await NBDTestServer.with { server in
            try server.python(
                """
                h.connect_uri(uri)
                bufs = [nbd.Buffer(65536) for _ in range(600)]
                cookies = [h.aio_pread(b, (i % 128) * 65536) for i, b in enumerate(bufs)]
                while h.aio_in_flight() > 0: h.poll(-1)
                with open('disk.full', 'rb') as f: data = f.read()
                for i, b in enumerate(bufs):
                    o = (i % 128) * 65536
                    assert b.to_bytearray() == data[o:o + 65536], i
                """)
        }
    }

    @Test func simpleRepliesServeClientsThatKnowNoOthers() async throws {
        try await NBDTestServer.with { server in
            try server.python(
                """
                h.set_request_structured_replies(False)
                h.connect_uri(uri)
                assert not h.get_structured_replies_negotiated()
                assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
                h.pwrite(b'S' * 4096, 8192)
                h.zero(4096, 16384)
                h.flush()
                assert h.pread(8 << 20, 0)[8192:12288] == b'S' * 4096
                """)
        }
    }

    @Test func optionsOneByOneInAnyOrder() async throws {
        try await NBDTestServer.with { server in
            try server.python(
                """
                h.set_opt_mode(True)
                h.set_full_info(True)
                h.connect_unix('\(server.socketPath)')
                names = []
                h.opt_list(lambda name, desc: names.append((name, desc)))
                assert names == [('disk', 'the disk'), ('fixed', 'the fixed')], names
                h.set_export_name('fixed')
                contexts = []
                h.opt_list_meta_context(lambda name: contexts.append(name))
                assert contexts == ['base:allocation', 'qemu:allocation-depth'], contexts
                h.add_meta_context('qemu:')
                del contexts[:]
                h.opt_list_meta_context(lambda name: contexts.append(name))
                assert contexts == ['qemu:allocation-depth'], contexts
                h.clear_meta_contexts()
                h.set_export_name('nope')
                try:
                    h.opt_go()
                    assert False
                except nbd.Error:
                    pass
                h.set_export_name('fixed')
                h.opt_info()
                assert h.is_read_only()
                assert h.get_export_description() == 'the fixed'
                h.opt_abort()
                """)
        }
    }

    // MARK: TLS

    func secure(_ credentials: TLSCredentials) -> NBDServer.Options {
        var options = NBDServer.Options()
        options.credentials = credentials
        return options
    }

    func certificates(verifiesPeer: Bool = true) throws -> NBDServer.Options {
        secure(
            try .x509(
                directory: TestCertificates.path("x509"), endpoint: .server,
                verifiesPeer: verifiesPeer))
    }

    @Test func libnbdConnectsWithCertificates() async throws {
        try await NBDTestServer.with(options: certificates()) { server in
            try server.python(
                """
                h.set_tls(nbd.TLS_REQUIRE)
                h.set_tls_certificates('\(TestCertificates.path("x509"))')
                h.set_tls_verify_peer(True)
                h.set_export_name('disk')
                h.connect_tcp('localhost', '\(server.port)')
                assert h.get_tls_negotiated()
                h.pwrite(b'T' * (3 << 20), 12345)
                assert h.pread(3 << 20, 12345) == b'T' * (3 << 20)
                h.shutdown()
                """)
            #expect(try server.contents()[12_345..<(12_345 + 3 << 20)].allSatisfy { $0 == 0x54 })
        }
    }

    @Test func qemuConnectsWithCertificates() async throws {
        try await NBDTestServer.with(options: certificates()) { server in
            let object =
                "tls-creds-x509,id=t,endpoint=client,dir=\(TestCertificates.path("x509"))"
            try server.check([
                "qemu-img", "convert", "--object", object, "-O", "raw", "--image-opts",
                "driver=nbd,host=127.0.0.1,port=\(server.port),export=fixed,tls-creds=t", "copy",
            ])
            #expect(try server.contents("copy") == server.contents("fixed"))
        }
    }

    @Test func sharedKeysWorkForBoth() async throws {
        let options = secure(try .psk(directory: TestCertificates.path("psk"), endpoint: .server))
        try await NBDTestServer.with(options: options) { server in
            let keys = TestCertificates.path("psk/keys.psk")
            let uri =
                "nbds+unix://qemu@/fixed?socket=\(server.socketPath)&tls-psk-file=\(keys)"
            try server.check(["nbdcopy", uri, "copy"])
            #expect(try server.contents("copy") == server.contents("fixed"))
            let object = "tls-creds-psk,id=t,endpoint=client,dir=\(TestCertificates.path("psk"))"
            try server.check([
                "qemu-img", "convert", "--object", object, "-O", "raw", "--image-opts",
                "driver=nbd,host=127.0.0.1,port=\(server.port),export=fixed,tls-creds=t", "copy2",
            ])
            #expect(try server.contents("copy2") == server.contents("fixed"))
        }
    }

    @Test func aClientWithoutTLSIsRefused() async throws {
        try await NBDTestServer.with(options: certificates()) { server in
            let output = try server.run(["nbdinfo", server.uri()])
            #expect(output.status != 0)
            #expect(try server.run(["qemu-img", "info", server.uri()]).status != 0)
        }
    }

    @Test func aClientOfAnotherAuthorityIsRefused() async throws {
        try await NBDTestServer.with(options: certificates()) { server in
            try server.python(
                """
                h.set_tls(nbd.TLS_REQUIRE)
                h.set_tls_certificates('\(TestCertificates.path("stranger"))')
                h.set_tls_verify_peer(False)
                h.set_export_name('disk')
                try:
                    h.connect_tcp('localhost', '\(server.port)')
                    assert False
                except nbd.Error:
                    pass
                """)
            // What the server says of a client it says before the client is off its list.
            try await NBDWireTests.untilNobodyIsThere(server)
            let said = server.messages.withLock { $0 }
            #expect(
                said.contains { $0.contains("not accepted") || $0.contains("refused") }, "\(said)")
        }
    }

    @Test func onlyAuthorizedClientsComeIn() async throws {
        for allowed in [true, false] {
            var options = try certificates()
            options.authorize = { name in allowed && name.contains("Test client") }
            try await NBDTestServer.with(options: options) { server in
                try server.python(
                    """
                    h.set_tls(nbd.TLS_REQUIRE)
                    h.set_tls_certificates('\(TestCertificates.path("x509"))')
                    h.set_export_name('disk')
                    try:
                        h.connect_tcp('localhost', '\(server.port)')
                        ok = True
                    except nbd.Error:
                        ok = False
                    assert ok == \(allowed ? "True" : "False"), ok
                    """)
            }
        }
    }
}
