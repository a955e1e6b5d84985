// swift-tools-version: 6.2
import PackageDescription

let settings: [SwiftSetting] = [
    .swiftLanguageMode(.v6),
    .treatAllWarnings(as: .error),
    .enableUpcomingFeature("ExistentialAny"),
    .enableUpcomingFeature("NonisolatedNonsendingByDefault"),
]

/// One target per box of docs/architecture.md; arrows go down only.
func box(_ name: String, _ dependencies: [Target.Dependency] = []) -> Target {
    .target(name: name, dependencies: dependencies, swiftSettings: settings)
}

func tests(_ name: String, _ dependencies: [Target.Dependency] = []) -> Target {
    .testTarget(
        name: "\(name)Tests", dependencies: [.byName(name: name)] + dependencies,
        swiftSettings: settings)
}

let package = Package(
    name: "merino",
    products: [
        .executable(name: "merino", targets: ["merino"])
    ],
    dependencies: [
        .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.2")
    ],
    targets: [
        // C libraries, Debian's -dev packages.
        .systemLibrary(name: "CLiburing"),
        .systemLibrary(name: "CZlib"),
        .systemLibrary(name: "CZstd"),

        // Linux calls that Swift's C library module leaves out.
        .target(name: "CLinux"),

        // GnuTLS, loaded when TLS is first used.
        .target(name: "CGnuTLS"),

        // OpenSSL's libcrypto, loaded when encryption is first used.
        .target(name: "CLibcrypto"),

        // Which trace points are on: read in one load.
        .target(name: "CTrace"),

        // Pure: no I/O, no Foundation.
        // Loops over bytes: unoptimised they are most of what tests do.
        .target(
            name: "BlockCore", dependencies: ["CTrace"],
            swiftSettings: settings + [
                .unsafeFlags(["-O"], .when(configuration: .debug))
            ]),
        box("QMP", ["BlockCore"]),
        box("NBDProtocol", ["BlockCore"]),
        box("BlockTLS", ["BlockCore", "CGnuTLS"]),
        box("BlockCrypto", ["BlockCore", "CLibcrypto"]),

        // The engine.
        // Optimised for tests too: what the optimiser makes of tasks that change threads is to be tested.
        .target(
            name: "BlockIO",
            dependencies: [
                "BlockCore",
                .target(name: "CLinux", condition: .when(platforms: [.linux])),
                .target(name: "CLiburing", condition: .when(platforms: [.linux])),
            ],
            swiftSettings: settings + [
                .unsafeFlags(["-O"], .when(configuration: .debug))
            ]),
        box("BlockGraph", ["BlockIO", "QMP", "BlockCrypto"]),
        box("BlockProtocols", ["BlockGraph"]),
        box("BlockFormats", ["BlockGraph", "BlockCrypto", "CZlib", "CZstd"]),
        box("BlockFilters", ["BlockGraph"]),
        box("BlockExports", ["BlockGraph", "NBDProtocol", "BlockTLS"]),
        // What tests stand on.
        .target(name: "CBlockTesting"),
        // Models look at every byte of every request: unoptimised that takes minutes.
        .target(
            name: "BlockTesting", dependencies: ["BlockGraph", "CBlockTesting"],
            swiftSettings: settings + [
                .unsafeFlags(["-O"], .when(configuration: .debug))
            ]),

        // What people drive it with.
        box(
            "StorageDaemon",
            [
                "BlockExports", "BlockProtocols", "BlockFormats", "BlockFilters",
                .target(name: "CLinux", condition: .when(platforms: [.linux])),
            ]),
        box("ImageTools", ["BlockProtocols", "BlockFormats", "BlockFilters"]),
        .executableTarget(
            name: "merino",
            dependencies: [
                "StorageDaemon", "ImageTools",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
            ],
            swiftSettings: settings),

        tests("BlockCore", ["BlockTesting"]),
        tests("QMP", ["BlockTesting"]),
        tests("BlockIO", ["BlockTesting", "CBlockTesting"]),
        tests("NBDProtocol", ["BlockTesting"]),
        tests("BlockGraph", ["BlockTesting"]),
        tests("BlockProtocols", ["BlockTesting"]),
        tests("BlockFilters", ["BlockProtocols", "BlockFormats", "BlockTesting"]),
        tests("BlockFormats", ["BlockProtocols", "BlockTesting"]),
        tests("BlockTLS", ["BlockTesting"]),
        tests("BlockCrypto"),
        tests("StorageDaemon", ["BlockTesting"]),
        tests("BlockExports", ["BlockProtocols", "BlockFormats", "BlockTesting"]),
        tests("ImageTools"),
        // The commands from outside: the built program beside QEMU's tools.
        tests("merino", ["BlockTesting"]),
        tests("BlockTesting", ["BlockProtocols", "BlockFormats", "BlockFilters"]),
    ]
)
