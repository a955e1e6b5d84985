/// What block status says of a run of bytes.
public struct ExtentFlags: OptionSet, Hashable, Sendable {
    public let rawValue: UInt8
    @inlinable public init(rawValue: UInt8) { self.rawValue = rawValue }

    /// Reading goes to storage: the bytes are not known without it.
    public static let data = ExtentFlags(rawValue: 1)
    /// Reads as zeroes.
    public static let zero = ExtentFlags(rawValue: 2)
    /// This layer, not one below it in the backing chain, says what the bytes are.
    public static let allocated = ExtentFlags(rawValue: 4)
    /// Stored compressed.
    public static let compressed = ExtentFlags(rawValue: 8)
    /// The run reaches the end of the node.
    public static let endOfNode = ExtentFlags(rawValue: 16)
}
