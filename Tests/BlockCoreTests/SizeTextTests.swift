import BlockCore
import Testing

@Suite struct SizeTextTests {
    @Test(arguments: [
        ("0", 0), ("4096", 4096), ("64k", 65536), ("1.5G", 1_610_612_736), ("0x1000", 4096),
        ("512b", 512), ("7E", 7 << 60), (" 1k", 1024), ("+1M", 1 << 20), (" +2", 2),
        ("9223372036854775807", Int.max),
    ]) func parsesWhatUsersWrite(text: String, bytes: Int) {
        #expect(SizeText.parse(text) == bytes)
    }

    @Test(arguments: [
        "", "k", "-1", "++1", "+", "+ 1", "1.5", "8E", "1.5x", "0x", "0x-1", "9223372036854775808",
        "1 ", "1.G",
    ])
    func refusesWhatIsNoSize(text: String) {
        #expect(SizeText.parse(text) == nil)
    }

    @Test(arguments: [
        (0, "0 B"), (512, "512 B"), (1024, "1 KiB"), (1_610_612_736, "1.5 GiB"), (65536, "64 KiB"),
        (1000, "0.977 KiB"), (196_616, "192 KiB"), (1_048_064, "1 MiB"), (1 << 46, "64 TiB"),
        (10_737_418_240, "10 GiB"), (105_000_000, "100 MiB"), (1_300_000, "1.24 MiB"),
    ]) func printsThreeDigits(bytes: Int, text: String) {
        #expect(SizeText.format(bytes) == text)
    }
}
