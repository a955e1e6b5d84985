import Foundation
import Testing

/// `--object` of image commands takes secrets however they are kept, as the daemon and QEMU's tools do.
@Suite struct SecretObjectTests {
    private static let key = String(repeating: "6b", count: 32)
    private static let vector = String(repeating: "31", count: 16)

    /// An image with the passphrase `correct horse`, and files with it: plain, in base64, encrypted.
    private static func makeFiles(_ place: Workplace) throws {
        let script = """
            set -e
            printf 'correct horse' > plain
            base64 < plain | tr -d '\\n' > encoded
            openssl enc -aes-256-cbc -K \(key) -iv \(vector) -in plain -out encrypted
            base64 < encrypted | tr -d '\\n' > encrypted.txt
            head -c 32 /dev/zero | tr '\\0' k > master
            printf 1111111111111111 | base64 > iv
            """
        try EncryptedImage.qcow2.write("disk.qcow2", in: place)
        let result = try place.run("/bin/sh", ["-c", script])
        #expect(result.status == 0, "\(result.errors)")
    }

    private static let image = "driver=qcow2,file.filename=disk.qcow2,encrypt.key-secret=s"
    private static let master = "secret,id=m,file=master"

    private static func vectorText(_ place: Workplace) throws -> String {
        try String(contentsOfFile: place.folder + "/iv", encoding: .utf8)
            .trimmingCharacters(in: .whitespacesAndNewlines)
    }

    @Test(arguments: [
        "secret,id=s,data=correct horse", "secret,id=s,file=plain",
        "secret,id=s,file=encoded,format=base64",
        "secret,id=s,file=encrypted,keyid=m,iv=IV",
        "secret,id=s,file=encrypted.txt,format=base64,keyid=m,iv=IV",
    ])
    func theImageOpens(object: String) throws {
        let place = try Workplace()
        try Self.makeFiles(place)
        let object = object.replacing("IV", with: try Self.vectorText(place))
        let words = [
            "--object", Self.master, "--object", object, "--image-opts", Self.image,
        ]
        for program in [["qemu-img"], [Workplace.merino]] {
            let result = try place.run("/usr/bin/env", program + ["check"] + words)
            #expect(result.status == 0, "\(program) \(object): \(result.errors)")
        }
        let read = try place.run(
            Workplace.merino, ["io", "-c", "read -P 0 0 64k"] + words)
        #expect(read.status == 0, "\(object): \(read.output)\(read.errors)")
    }

    @Test(arguments: [
        "secret,id=s,file=encrypted,keyid=none,iv=IV", "secret,id=s,file=encrypted,keyid=m",
        "secret,id=s,file=plain,iv=IV", "secret,id=s,file=plain,keyid=m,iv=IV",
        "secret,id=s,file=plain,format=base64", "secret,id=s,file=nothing",
        "secret,id=s,data=x,file=plain", "secret,id=s", "secret_keyring,id=s",
        "secret_keyring,id=s,serial=2000000000", "secret,id=s,data=x,color=blue",
    ])
    func secretsThatCannotBeReadAreRefused(object: String) throws {
        let place = try Workplace()
        try Self.makeFiles(place)
        let object = object.replacing("IV", with: try Self.vectorText(place))
        let result = try place.merino(
            "info", "--object", Self.master, "--object", object, "--image-opts", Self.image)
        #expect(result.status == 1)
        #expect(result.errors.hasPrefix("merino: "))
        #expect(!result.errors.contains("correct horse"))
    }
}
