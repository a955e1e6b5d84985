/// Names of images, and how one names another.
public enum ImageName {
    /// The name of a backing image, as seen from where the command runs: a relative path is
    /// relative to the folder of the image that names it.
    ///
    /// - Parameters:
    ///   - name: what the image says.
    ///   - image: the name of the image that says it.
    public static func resolve(_ name: String, besides image: String) -> String {
        if name.hasPrefix("/") || hasProtocol(name) { return name }
        guard let slash = image.lastIndex(of: "/") else { return name }
        return String(image[...slash]) + name
    }

    /// Whether a name begins with `scheme:` before any slash.
    static func hasProtocol(_ name: String) -> Bool {
        guard let colon = name.firstIndex(of: ":") else { return false }
        return !name[..<colon].contains("/")
    }
}
