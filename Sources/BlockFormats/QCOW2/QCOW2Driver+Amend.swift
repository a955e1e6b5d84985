import BlockCore
import BlockGraph
import QMP

// Changing an image's version, refcount width, backing file, data file, size and keys (`amend`). Users'
// requests wait meanwhile.
//
// Each step leaves an image that opens: what the new header promises is durable before the header is.

extension QCOW2Driver {
    /// What was asked for; nothing where an option is not given.
    private struct Changes {
        var version: Int?
        var refcountBits: Int?
        var lazyRefcounts: Bool?
        var backingName: String?
        var backingFormat: String?
        var dataFile: String?
        var dataFileIsRaw: Bool?
        var size: Int?
        var keys: LUKSKeyChange?
    }

    /// Other methods have no keys that could change.
    private enum KeyFormat: String, CaseIterable { case luks }

    public func amend(_ amendment: ImageAmendment) async throws(BlockError) {
        try checkWritable()
        let changes = try changes(amendment.options)
        try check(changes)
        amendment.progress(0, 1)
        if changes.version == 3, image.header.version == 2 { try await upgrade() }
        if let keys = changes.keys, let area = encryption?.area {
            try await keys.apply(
                to: area, masterKey: encryption?.masterKey, isForced: amendment.isForced)
        }
        var driver = self
        if let bits = changes.refcountBits, bits != 1 << geometry.refcountOrder {
            driver = try await withRefcounts(ofOrder: bits.trailingZeroBitCount)
        }
        try await driver.carryOut(changes)
        amendment.progress(1, 1)
    }

    private func carryOut(_ changes: Changes) async throws(BlockError) {
        if changes.backingName != nil || changes.backingFormat != nil {
            try await changeBacking(changes.backingName, changes.backingFormat)
        }
        if changes.dataFile != nil || changes.dataFileIsRaw == false {
            try await changeDataFile(changes.dataFile, isRaw: changes.dataFileIsRaw)
        }
        if let isLazy = changes.lazyRefcounts { try await setLazyRefcounts(isLazy) }
        if let size = changes.size, size != node.size { try await resize(to: size, .off) }
        if changes.version == 2, image.header.version == 3 { try await downgrade() }
    }

    private func changes(_ options: OptionReader) throws(BlockError) -> Changes {
        var changes = Changes()
        if let version = try options.enumeration("version", as: QCOW2Creation.Version.self) {
            changes.version = version == .v2 ? 2 : 3
        }
        changes.refcountBits = try options.int("refcount-bits")
        changes.lazyRefcounts = try options.bool("lazy-refcounts")
        changes.backingName = try options.string("backing-file")
        changes.backingFormat = try options.string("backing-fmt")
        changes.dataFile = try options.string("data-file")
        changes.dataFileIsRaw = try options.bool("data-file-raw")
        changes.size = try options.size("size")
        if let group = try options.object("encrypt") {
            _ = try group.enumeration("format", as: KeyFormat.self)
            changes.keys = try LUKSKeyChange(group, node.graph)
            try group.finish()
        }
        try options.finish()
        return changes
    }

    /// Before anything changes.
    private func check(_ changes: Changes) throws(BlockError) {
        let header = image.header
        let version = changes.version ?? header.version
        if changes.lazyRefcounts == true, version < 3 {
            throw BlockError(
                .invalidArgument, "lazy refcounts need version 3 of qcow2", remedy: "use compat=v3")
        }
        if let bits = changes.refcountBits {
            guard bits.isPowerOfTwo, bits <= 64 else {
                throw BlockError(
                    .invalidArgument,
                    "'refcount-bits' must be a power of two up to 64, not \(bits)")
            }
            guard bits == 16 || version == 3 else {
                throw BlockError(
                    .invalidArgument, "refcounts of other than 16 bits need version 3 of qcow2",
                    remedy: "use compat=v3")
            }
            if bits != 1 << geometry.refcountOrder { try checkReaders() }
        }
        try checkDataFile(changes)
        if let size = changes.size { try Self.checkSize(size) }
        if changes.keys != nil, encryption?.area == nil {
            throw BlockError(
                .invalidArgument, "the image has no LUKS header whose keys could change")
        }
        if changes.version == 2, header.version == 3 {
            try checkDowngrade(changes.refcountBits ?? 1 << header.refcountOrder)
        }
    }

    private func checkDataFile(_ changes: Changes) throws(BlockError) {
        guard hasDataFile || changes.dataFile == nil else {
            throw BlockError(
                .invalidArgument,
                "the image has no external data file that could have another name",
                remedy: "convert the image to one that has")
        }
        guard changes.dataFileIsRaw != true || isRawDataFile else {
            throw BlockError(
                .invalidArgument,
                "'data-file-raw' cannot be set of an image that is there: its data file may lack "
                    + "what the tables say", remedy: "convert the image to one that has it")
        }
        let keepsRaw = isRawDataFile && changes.dataFileIsRaw != false
        guard !keepsRaw || (changes.backingName ?? "").isEmpty else {
            throw Self.rawDataFileOverBacking
        }
    }

    private func checkDowngrade(_ refcountBits: Int) throws(BlockError) {
        let header = image.header
        var obstacle: String?
        if refcountBits != 16 { obstacle = "refcounts of other than 16 bits" }
        if !header.incompatible.subtracting([.dirty, .corrupt]).isEmpty {
            let names = header.featureNames(header.incompatible.subtracting([.dirty, .corrupt]))
            obstacle = names.joined(separator: ", ")
        }
        if snapshots.contains(where: { diskSize(of: $0) != header.size }) {
            obstacle = "internal snapshots of other sizes"
        }
        if snapshots.contains(where: { $0.vmStateSize > UInt64(UInt32.max) }) {
            obstacle = "internal snapshots with 4 GiB of a machine's state, or more"
        }
        if header.hasBitmaps { obstacle = "persistent dirty bitmaps" }
        if let obstacle {
            throw BlockError(
                .unsupported, "the image has \(obstacle): version 2 of qcow2 does not know that",
                remedy: "convert the image")
        }
    }

    // MARK: Header

    /// Writes the header with `change` made to it, if it still fits. Durable on return.
    func rewriteHeader(
        _ change: (inout QCOW2.Header) -> Void
    ) async throws(BlockError) {
        var header = image.header
        change(&header)
        _ = try header.serialised()
        let old = image.header
        image.header = header
        do throws(BlockError) {
            try await image.writeHeader()
            try await file.flush()
        } catch {
            image.header = old
            throw error
        }
    }

    private func upgrade() async throws(BlockError) {
        try await commit()
        try await rewriteHeader { header in
            header.version = 3
            let names = QCOW2.FeatureName.serialise(QCOW2.FeatureName.all)
            header.extensions.append(
                .init(type: QCOW2.HeaderExtension.featureNames, data: names))
            header.dropNamesIfTooLong()
        }
        hasZeroFlag = true
    }

    private func changeBacking(
        _ name: String?, _ format: String?
    ) async throws(BlockError) {
        if let name, name.isEmpty, format?.isEmpty == false {
            throw BlockError(.invalidArgument, "'backing-fmt' needs 'backing-file'")
        }
        try await rewriteHeader { header in
            if let name { header.backingName = Array(name.utf8) }
            let type = QCOW2.HeaderExtension.backingFormat
            let kept = header.backingFormat
            header.extensions.removeAll { $0.type == type }
            // A new name without a format: what the old one was says nothing of the new.
            let chosen = format ?? (name == nil ? kept : nil)
            if let chosen, !chosen.isEmpty, !header.backingName.isEmpty {
                header.extensions.insert(.init(type: type, data: Array(chosen.utf8)), at: 0)
            }
        }
    }

    /// - Parameters:
    ///   - name: of the data file, empty for none in the header; `nil` as it is.
    ///   - isRaw: `false`: it need not be a raw image any more.
    private func changeDataFile(_ name: String?, isRaw: Bool?) async throws(BlockError) {
        try await rewriteHeader { header in
            if isRaw == false { header.autoclear.remove(.rawExternalData) }
            guard let name else { return }
            let type = QCOW2.HeaderExtension.externalDataName
            header.extensions.removeAll { $0.type == type }
            if !name.isEmpty {
                header.extensions.insert(.init(type: type, data: Array(name.utf8)), at: 0)
            }
            header.dropNamesIfTooLong()
        }
    }

    // MARK: Refcounts

    /// Gives the image refcounts of another width, and the node a driver that knows them.
    ///
    /// - Returns: that driver; this one is done.
    private func withRefcounts(ofOrder order: Int) async throws(BlockError) -> QCOW2Driver {
        try await writeOutForClosing()
        var hasSwitched = false
        do throws(BlockError) {
            try await QCOW2Check.changeWidth(
                of: image.header, in: file, toOrder: order, on: thread
            ) { hasSwitched = true }
            let driver = try await Self.make(
                node, file, data: hasDataFile ? data : nil, encryption,
                try await Self.readHeader(file), options, writable: true)
            cleaner?.cancel()
            node.replaceDriver(with: driver)
            handReaders(to: driver)
            driver.startCleaning()
            return driver
        } catch {
            image.forgetFreshness()
            // The header may name either: the old refcounts, which it names again, are complete.
            guard hasSwitched else { throw error }
            throw await image.corruption("refcounts of another width could not be put in place")
        }
    }

    private func setLazyRefcounts(_ isLazy: Bool) async throws(BlockError) {
        guard isLazy != image.header.compatible.contains(.lazyRefcounts) else { return }
        if !isLazy {
            try await commit()
            try await refcounts.writeBlocks()
            try await file.flush()
        }
        try await rewriteHeader { header in
            if isLazy {
                header.compatible.insert(.lazyRefcounts)
            } else {
                header.compatible.remove(.lazyRefcounts)
                header.incompatible.remove(.dirty)
            }
        }
    }

    // MARK: Version 2

    private func downgrade() async throws(BlockError) {
        if image.header.compatible.contains(.lazyRefcounts) { try await setLazyRefcounts(false) }
        hasZeroFlag = true
        try await writeOutZeroes()
        try await refcounts.writeBlocks()
        try await file.flush()
        try await rewriteHeader { header in
            header.version = 2
            header.compatible = []
            header.autoclear = []
            header.unknownFields = []
            header.extensions.removeAll { $0.type == QCOW2.HeaderExtension.featureNames }
        }
        hasZeroFlag = false
    }
}
