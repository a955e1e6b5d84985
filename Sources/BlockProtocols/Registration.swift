import BlockCore
import BlockGraph
import QMP

/// The drivers of this target.
public enum BlockProtocols {
    public static let drivers: [DriverDescription] = [
        DriverDescription(
            name: "file", kind: .storage,
            open: { opening throws(BlockError) in
                try await FileDriver.open(opening, device: false)
            },
            create: { creation throws(BlockError) in try await FileCreation.create(creation) }),
        DriverDescription(
            name: "host_device", kind: .storage,
            open: { opening throws(BlockError) in
                try await FileDriver.open(opening, device: true)
            }),
        null("null-co"),
        null("null-aio"),
    ]

    private static func null(_ name: String) -> DriverDescription {
        DriverDescription(
            name: name, kind: .storage,
            open: { opening throws(BlockError) in try await NullDriver.open(opening) })
    }
}
