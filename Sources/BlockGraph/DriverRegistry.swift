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

    /// The format whose images begin like this; `raw` when none does.
    public func probe(_ start: UnsafeRawBufferPointer) -> String {
        var best = ("raw", 0)
        for driver in drivers {
            let score = driver.probe?(start) ?? 0
            if score > best.1 { best = (driver.name, score) }
        }
        return best.0
    }
}
