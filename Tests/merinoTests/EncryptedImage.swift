import Foundation

/// An encrypted image of 1 MiB with the passphrase `correct horse`, made once by QEMU's tools and copied for each
/// test: one takes them seconds, in which they measure how fast passphrases are tried here.
struct EncryptedImage {
    static let luks = EncryptedImage("luks", "key-secret=s,iter-time=10")
    static let qcow2 = EncryptedImage(
        "qcow2", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10")

    private let bytes: Result<Data, any Error>

    private struct NotMade: Error { let errors: String }

    private init(_ format: String, _ options: String) {
        bytes = Result {
            let place = try Workplace()
            let result = try place.tool(
                "qemu-img", "create", "-q", "--object", "secret,id=s,data=correct horse", "-f",
                format, "-o", options, "image", "1M")
            guard result.status == 0 else { throw NotMade(errors: result.errors) }
            return try Data(contentsOf: URL(fileURLWithPath: place.folder + "/image"))
        }
    }

    /// Puts it into the folder of a test.
    func write(_ name: String, in place: Workplace) throws {
        try bytes.get().write(to: URL(fileURLWithPath: place.folder + "/" + name))
    }
}
