import BlockCore

/// The drivers that nodes can have, by name.
public struct DriverRegistry: Sendable {
    private var byName: [String: DriverDescription] = [:]
    /// In the order they were registered.
    public private(set) var drivers: [DriverDescription] = []

    public init(_ drivers: [DriverDescription] = []) {
        for driver in drivers { register(driver) }
    }

    public mutating func register(_ driver: DriverDescription) {
        precondition(byName[driver.name] == nil, "two drivers named \(driver.name)")
        byName[driver.name] = driver
        drivers.append(driver)
    }

    /// - Throws: `unsupported`, with the drivers there are.
    public func driver(named name: String) throws(BlockError) -> DriverDescription {
        guard let driver = byName[name] else {
            throw BlockError(
                .unsupported, "there is no driver '\(name)'",
                remedy: "use one of \(drivers.map(\.name).sorted().joined(separator: ", "))")
        }
        return driver
    }

    /// The format whose images begin like this, whether or not there is a driver for it; `raw` when none
    /// does.
    public func probe(_ start: UnsafeRawBufferPointer) -> String {
        var best = ("raw", 0)
        for driver in drivers {
            let score = driver.probe?(start) ?? 0
            if score > best.1 { best = (driver.name, score) }
        }
        // What a driver knows and does not take for its own is not decided by the mark alone.
        if best.1 == 0, let format = ImageMarks.format(ofStart: start), byName[format] == nil {
            return format
        }
        return best.0
    }

    /// The format of the image `name`, which begins like this and is about to be opened.
    ///
    /// - Throws: `unsupported` where there is no driver for it: read as a raw disk, such an image would
    ///   show what is not its disk, and a write would destroy it.
    public func format(
        of name: String, beginning start: [UInt8]
    ) throws(BlockError) -> String {
        let format = start.withUnsafeBytes { probe($0) }
        guard byName[format] != nil || format == "raw" else {
            throw BlockError(
                .unsupported, "'\(name)' looks like \(format), which is not supported yet",
                remedy: "give the format raw if it is raw data")
        }
        return format
    }
}
