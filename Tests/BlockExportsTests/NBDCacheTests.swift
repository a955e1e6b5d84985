import Foundation
import Testing

/// Bounds of `NBD_CMD_CACHE` (proto.md, "NBD_CMD_CACHE").
@Suite struct NBDCacheTests {
    @Test func theWholeDiskCanBeCachedAndNothingPastItsEnd() async throws {
        try await NBDTestServer.with { server in
            try server.python(
                """
                h.set_strict_mode(0)
                h.connect_uri(uri)
                size = h.get_size()
                h.cache(size, 0)
                h.cache(1, size - 1)
                for count, offset in [(1, size), (2, size - 1), (size, 1), (512, 1 << 62)]:
                    try:
                        h.cache(count, offset)
                        assert False, (count, offset)
                    except nbd.Error as e:
                        assert e.errno in ('EINVAL', 'ENOSPC'), (count, offset, e.errno)
                # The connection is as good as before.
                assert len(h.pread(512, size - 512)) == 512
                h.shutdown()
                """)
        }
    }

    @Test func cachingChangesNothing() async throws {
        try await NBDTestServer.with { server in
            let before = try server.contents("fixed")
            try server.python(
                """
                h.connect_uri(uri)
                pending = [h.aio_cache(1 << 20, place << 20) for place in range(8)]
                while any(not h.aio_command_completed(cookie) for cookie in pending[:1]):
                    h.poll(-1)
                h.flush() if h.can_flush() else None
                """, uri: server.uri("fixed"))
            #expect(try server.contents("fixed") == before)
        }
    }
}
