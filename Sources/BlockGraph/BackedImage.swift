import BlockCore

/// A driver of images that keep what is theirs above a backing image that they name.
///
/// Called on the graph's thread, by who writes the node; the image is open for writing.
public protocol BackedImage: BlockDriver {
    /// Changes which backing image the image names. What is open stays as it is.
    ///
    /// Everything written before is durable first, then the name: cut at any point, the image names the
    /// one or the other.
    ///
    /// - Parameters:
    ///   - name: as the image is to have it; `nil` for none.
    ///   - format: the backing image's format; `nil` where the image is not to tell.
    func setBacking(name: String?, format: String?) async throws(BlockError)

    /// Gives up all data of the image itself: what its backing image has shows through everywhere.
    /// Durable on return.
    func empty() async throws(BlockError)
}
