import Foundation
import Testing

@Suite struct ReadErrorTests {
    @Test(arguments: [0, 1, 384, 2047]) func convertNamesTheSectorThatCannotBeRead(
        sector: Int
    ) throws {
        let place = try Workplace()
        try place.tool("qemu-img", "create", "-q", "-f", "raw", "source.raw", "1M")
        try place.tool("qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", "source.raw")
        let options =
            "driver=raw,file.driver=blkdebug,file.image.filename=source.raw,"
            + "file.inject-error.0.event=read_aio,file.inject-error.0.sector=\(sector)"
        let result = try place.merino(
            "convert", "--image-opts", "-O", "raw", options, "target.raw")
        #expect(result.status == 1)
        #expect(result.errors.contains("at offset \(sector * 512):"), "\(result.errors)")
        #expect(!FileManager.default.fileExists(atPath: place.folder + "/target.raw"))
    }
}
