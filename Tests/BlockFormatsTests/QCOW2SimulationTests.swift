import BlockCore
import BlockGraph
import BlockIO
import BlockTesting
import QMP
import Testing

/// qcow2 on a disk that loses power and fails, against a model of what may be read.
@Suite struct QCOW2SimulationTests {
    /// How an image is made and opened.
    struct Variant: Sendable, CustomTestStringConvertible {
        var name: String
        var clusterSize: Int
        var isLazy = false
        var creation: JSONObject = [:]
        var opening: JSONObject = [:]
        /// Units of compressed writes; 0 for none.
        var compressedUnit = 0
        var testDescription: String { "\(name), \(clusterSize)" }
    }

    static let encryption: JSONObject = [
        "encrypt": ["format": "luks", "key-secret": "good", "iter-time": 10]
    ]
    static let key: JSONObject = ["encrypt": ["format": "luks", "key-secret": "good"]]
    static let dataFile: JSONObject = [
        "data-file": ["driver": "file", "filename": "/data", "locking": "off"]
    ]

    static func merged(_ one: JSONObject, _ other: JSONObject) -> JSONObject {
        var result = one
        for (key, value) in other.members { result[key] = value }
        return result
    }

    static let variants: [Variant] = [
        Variant(name: "plain", clusterSize: 512),
        Variant(name: "plain", clusterSize: 4096),
        Variant(name: "lazy", clusterSize: 4096, isLazy: true),
        Variant(name: "plain", clusterSize: 65536),
        Variant(name: "subclusters", clusterSize: 16384, creation: ["extended-l2": true]),
        Variant(name: "zlib", clusterSize: 512, compressedUnit: 512),
        Variant(
            name: "zstd", clusterSize: 4096, creation: ["compression-type": "zstd"],
            compressedUnit: 4096),
        Variant(name: "zlib", clusterSize: 65536, compressedUnit: 65536),
        Variant(
            name: "preallocated", clusterSize: 4096, creation: ["preallocation": "metadata"]),
        Variant(name: "encrypted", clusterSize: 512, creation: encryption, opening: key),
        Variant(name: "encrypted", clusterSize: 65536, creation: encryption, opening: key),
        Variant(
            name: "encrypted and preallocated", clusterSize: 4096,
            creation: merged(encryption, ["preallocation": "metadata"]), opening: key),
        Variant(
            name: "encrypted subclusters", clusterSize: 16384,
            creation: merged(encryption, ["extended-l2": true]), opening: key),
        Variant(name: "data file", clusterSize: 512, creation: dataFile, opening: dataFile),
        Variant(
            name: "raw data file", clusterSize: 65536,
            creation: merged(dataFile, ["data-file-raw": true]), opening: dataFile),
        Variant(
            name: "data file, subclusters", clusterSize: 16384,
            creation: merged(dataFile, ["extended-l2": true]), opening: dataFile),
        Variant(
            name: "data file, lazy", clusterSize: 4096, isLazy: true, creation: dataFile,
            opening: dataFile),
    ]

    @Test(arguments: variants) func afterPowerLossTheImageLeaksAtWorst(
        variant: Variant
    ) async throws {
        for seed in 1...(variant.creation.members.isEmpty ? 10 : 5) as ClosedRange<UInt64> {
            let simulation = Simulation(seed: seed)
            try await QCOW2SimulatedImage.create(
                simulation, clusterSize: variant.clusterSize, isLazy: variant.isLazy,
                more: variant.creation)
            var requests = RandomRequests.Options()
            requests.count = 400
            requests.compressedUnit = variant.compressedUnit
            try await QCOW2SimulatedImage.checkPowerLoss(
                simulation, variant.opening, requests, checksCut: !variant.isLazy)
        }
    }

    @Test(arguments: [512, 65536]) func failingWritesLeakAtWorst(clusterSize: Int) async throws {
        for seed in 1...10 as ClosedRange<UInt64> {
            let simulation = Simulation(seed: seed)
            try await QCOW2SimulatedImage.create(
                simulation, clusterSize: clusterSize, isLazy: false)
            simulation.faults = [
                FaultRule(.write, .fail(5), skip: Int(seed) * 7, times: 20, perMille: 100)
            ]
            let model = QCOW2SimulatedImage.Model()
            var options = RandomRequests.Options()
            options.mayFailWith = [.inputOutput]
            let requests = options
            let violations = try await simulation.run { thread throws(BlockError) in
                try await QCOW2SimulatedImage.use(thread) { edge throws(BlockError) in
                    let run = RandomRequests(edge, model.shadow, seed: seed, requests)
                    await run.run()
                    return run.violations
                }
            }
            #expect(violations == [], "seed \(seed)")
            try QCOW2SimulatedImage.check(simulation)
        }
    }
}
