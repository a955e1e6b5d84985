import ArgumentParser
import BlockCore
import ImageTools

/// What an image's name stands for.
struct ImageFormArguments: ParsableArguments {
    @Option(
        name: [.customShort("f", allowingJoined: true), .long],
        help: "The image's format; found out when not given.")
    var format: String?
    @Flag(
        name: .customLong("image-opts"),
        help: "The image is given as options: driver=qcow2,file.filename=….")
    var imageOptions = false

    func source(_ name: String) -> ImageSource {
        ImageSource(name, format: format, isOptions: imageOptions)
    }
}

/// How the commands that look at images name them.
struct ImageArguments: ParsableArguments {
    @OptionGroup var form: ImageFormArguments
    @Flag(
        name: [.customShort("U"), .customLong("force-share")],
        help: "Look at it even while another program writes it.")
    var forceShare = false
    @Flag(help: "Follow nothing that the image names; its format must be given.")
    var untrusted = false
    @Option(help: "An object that the image needs, as in secret,id=….") var object: [String] = []

    func source(_ name: String) throws(BlockError) -> ImageSource {
        var source = form.source(name)
        source.sharesAll = forceShare
        source.objects = object
        source.isUntrusted = untrusted
        return source
    }
}

/// Reads numbers of command lines.
enum ArgumentText {
    static func size(_ text: String, _ what: String) throws(BlockError) -> Int {
        guard let size = SizeText.parse(text) else {
            throw BlockError(
                .invalidArgument, "\(what) cannot be '\(text)'",
                remedy: "give bytes, or a number with k, M, G, T, P or E")
        }
        return size
    }
}

extension ImageSource {
    /// Warns where the image's format is found out to be raw.
    mutating func warnOfProbing() {
        let name = name
        foundRaw = {
            StandardError.print(
                """
                WARNING: the format of '\(name)' was not given, and it looks raw.
                         Writes that would make its first bytes look like another format are refused.
                         Say '-f raw' to lift that.
                """)
        }
    }
}
