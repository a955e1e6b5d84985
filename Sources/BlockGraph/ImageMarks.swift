/// The marks that images begin or end with, as the formats' specifications give them: also of formats that
/// there is no driver for, so that their images are called what they are and never taken for raw disks.
package enum ImageMarks {
    /// Bytes that stand at an offset.
    private typealias Part = (offset: Int, bytes: [UInt8])

    /// All parts of a mark must be there: a raw disk may begin with the words of one.
    private static let leading: [(format: String, parts: [Part])] = [
        ("qcow", [(0, [0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 1])]),
        ("qed", [(0, Array("QED\0".utf8))]),
        ("vmdk", [(0, Array("KDMV".utf8))]),
        ("vmdk", [(0, Array("COWD".utf8))]),
        ("vmdk", [(0, Array("# Disk DescriptorFile\nversion=".utf8))]),
        ("vmdk", [(0, Array("# Disk DescriptorFile\r\nversion=".utf8))]),
        ("vhdx", [(0, Array("vhdxfile".utf8))]),
        ("vpc", [(0, Array("conectix".utf8))]),
        ("vdi", [(64, [0x7f, 0x10, 0xda, 0xbe])]),
        ("parallels", [(0, Array("WithoutFreeSpace".utf8)), (16, [2, 0, 0, 0])]),
        ("parallels", [(0, Array("WithouFreSpacExt".utf8)), (16, [2, 0, 0, 0])]),
        ("luks", [(0, [0x4c, 0x55, 0x4b, 0x53, 0xba, 0xbe])]),
        (
            "bochs",
            [
                (0, Array("Bochs Virtual HD Image\0".utf8)), (32, Array("Redolog\0".utf8)),
                (48, Array("Growing\0".utf8)),
            ]
        ),
        ("cloop", [(0, Array("#!/bin/sh\n#V2.0 Format\nmodprobe cloop".utf8))]),
    ]
    /// At the start of the last 512 bytes.
    private static let trailing: [(format: String, bytes: [UInt8])] = [
        ("vpc", Array("conectix".utf8)), ("dmg", Array("koly".utf8)),
    ]

    /// The format whose images begin like this, by the first 512 bytes at most.
    package static func format(ofStart start: UnsafeRawBufferPointer) -> String? {
        leading.first { mark in
            mark.parts.allSatisfy { start.dropFirst($0.offset).starts(with: $0.bytes) }
        }?.format
    }

    /// The format whose images end like this. A disk is no less raw for that: its last sector is anybody's.
    ///
    /// - Parameter end: the last 512 bytes.
    package static func format(ofEnd end: UnsafeRawBufferPointer) -> String? {
        trailing.first { end.starts(with: $0.bytes) }?.format
    }
}
