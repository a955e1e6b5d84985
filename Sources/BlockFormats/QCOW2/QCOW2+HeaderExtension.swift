import BlockCore

extension QCOW2 {
    /// One header extension (§Header extensions): type, length, data padded to 8 bytes.
    struct HeaderExtension: Equatable, Sendable {
        static let backingFormat: UInt32 = 0xe279_2aca
        static let featureNames: UInt32 = 0x6803_f857
        static let bitmaps: UInt32 = 0x2385_2875
        static let encryptionHeader: UInt32 = 0x0537_be77
        static let externalDataName: UInt32 = 0x4441_5441

        var type: UInt32
        var data: [UInt8]
    }

    /// A line of the feature name table (§Feature name table).
    struct FeatureName: Equatable, Sendable {
        enum Kind: UInt8, Sendable { case incompatible, compatible, autoclear }
        static let length = 48

        var kind: UInt8
        var bit: UInt8
        var name: String
    }
}

extension QCOW2.HeaderExtension {
    /// The extensions in `[start, end)`, up to the end marker.
    static func parse(
        _ bytes: UnsafeRawBufferPointer, from start: Int, to end: Int
    ) throws(BlockError) -> [QCOW2.HeaderExtension] {
        var result: [QCOW2.HeaderExtension] = []
        var offset = start
        while end - offset >= 8 {
            let type: UInt32 = bytes.bigEndian(at: offset)
            if type == 0 { break }
            let length = Int(bytes.bigEndian(at: offset + 4, as: UInt32.self))
            offset += 8
            guard length <= end - offset else {
                throw BlockError(
                    .corrupt,
                    "header extension 0x\(String(type, radix: 16)) of \(length) bytes "
                        + "reaches past the header")
            }
            result.append(.init(type: type, data: Array(bytes[offset..<(offset + length)])))
            offset += (length + 7) & ~7
        }
        return result
    }

    /// With the end marker.
    static func serialise(_ extensions: [QCOW2.HeaderExtension]) -> [UInt8] {
        var bytes: [UInt8] = []
        func append(_ value: UInt32) {
            withUnsafeBytes(of: value.bigEndian) { bytes.append(contentsOf: $0) }
        }
        for item in extensions {
            append(item.type)
            append(UInt32(truncatingIfNeeded: item.data.count))
            bytes.append(contentsOf: item.data)
            bytes.append(contentsOf: [UInt8](repeating: 0, count: -item.data.count & 7))
        }
        append(0)
        append(0)
        return bytes
    }
}

extension QCOW2.FeatureName {
    /// The names that images get, of the features known here.
    static let all: [QCOW2.FeatureName] = [
        .init(kind: 0, bit: 0, name: "dirty bit"),
        .init(kind: 0, bit: 1, name: "corrupt bit"),
        .init(kind: 0, bit: 2, name: "external data file"),
        .init(kind: 0, bit: 3, name: "compression type"),
        .init(kind: 0, bit: 4, name: "extended L2 entries"),
        .init(kind: 1, bit: 0, name: "lazy refcounts"),
        .init(kind: 2, bit: 0, name: "bitmaps"),
        .init(kind: 2, bit: 1, name: "raw external data"),
    ]

    static func parse(_ data: [UInt8]) -> [QCOW2.FeatureName] {
        stride(from: 0, to: data.count - data.count % length, by: length).map { start in
            let name = data[(start + 2)..<(start + length)].prefix { $0 != 0 }
            return QCOW2.FeatureName(
                kind: data[start], bit: data[start + 1], name: String(decoding: name, as: UTF8.self)
            )
        }
    }

    static func serialise(_ names: [QCOW2.FeatureName]) -> [UInt8] {
        names.flatMap { entry -> [UInt8] in
            let name = Array(entry.name.utf8.prefix(length - 2))
            return [entry.kind, entry.bit] + name
                + [UInt8](repeating: 0, count: length - 2 - name.count)
        }
    }
}

extension QCOW2.Header {
    /// Leaves the names of features out where the header has no room for them: they are a courtesy.
    mutating func dropNamesIfTooLong() {
        if (try? serialised()) == nil {
            extensions.removeAll { $0.type == QCOW2.HeaderExtension.featureNames }
        }
    }

    /// What the image calls incompatible `features`; their bit numbers where it does not say.
    func featureNames(_ features: QCOW2.IncompatibleFeatures) -> [String] {
        let table = extensions.first { $0.type == QCOW2.HeaderExtension.featureNames }
        let names = QCOW2.FeatureName.parse(table?.data ?? [])
        return (0..<64).filter { features.rawValue & (1 << UInt64($0)) != 0 }.map { bit in
            let found = names.first { $0.kind == 0 && Int($0.bit) == bit && !$0.name.isEmpty }
            return found?.name ?? "incompatible feature bit \(bit)"
        }
    }

    /// The format of the backing file, where the image names it.
    var backingFormat: String? {
        extensions.first { $0.type == QCOW2.HeaderExtension.backingFormat }
            .map { String(decoding: $0.data, as: UTF8.self) }
    }

    /// Whether there are dirty bitmaps that still describe the image.
    var hasBitmaps: Bool {
        autoclear.contains(.bitmaps)
            && extensions.contains { $0.type == QCOW2.HeaderExtension.bitmaps }
    }
}
