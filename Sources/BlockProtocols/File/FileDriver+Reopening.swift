import BlockCore
import BlockGraph
import BlockIO
import QMP

/// What a file is opened with anew, until that takes effect.
struct FileReopening {
    /// The file opened anew, where its mode changes.
    var file: File?
    var status: FileStatus?
    /// The locks from then on: those there are, new ones, or none.
    var locks: ImageLocks?
}

extension FileDriver {
    /// Reading and writing, direct I/O, locking and sharing can change; the file is the same one.
    public func prepareReopening(
        _ reopening: NodeReopening
    ) async throws(BlockError) -> DriverReopening {
        try reopening.requireUnchanged("filename")
        let locking = try Self.readOptions(reopening.options, reopening.nodeOptions)
        let wantsLocks = locking != .off && !reopening.nodeOptions.sharesAll

        var prepared = FileReopening()
        let old = node.options
        if reopening.nodeOptions.isReadOnly != old.isReadOnly
            || reopening.nodeOptions.isDirect != old.isDirect
        {
            let file = try await openAgain(reopening)
            do throws(BlockError) {
                prepared.status = try await sameFile(file)
            } catch {
                await file.close()
                throw error
            }
            prepared.file = file
        }
        let (newFile, oldFile) = (prepared.file, file)
        if wantsLocks {
            prepared.locks = locks
            if locks == nil { prepared.locks = ImageLocks(newFile ?? oldFile, required: false) }
        }
        self.reopening = prepared
        var result = DriverReopening()
        result.commit = { self.takeEffect(locksAreRequired: locking == .on) }
        result.abort = {
            self.reopening = nil
            await newFile?.close()
        }
        if newFile != nil { result.finish = { await oldFile.close() } }
        return result
    }

    /// Opens the file in the new mode; read-only where `auto-read-only` allows that and writing is
    /// refused.
    private func openAgain(_ reopening: NodeReopening) async throws(BlockError) -> File {
        let options = reopening.nodeOptions
        func open(writable: Bool) async throws(BlockError) -> File {
            try await Self.openPath(
                file.path, writable: writable, direct: options.isDirect, node.graph)
        }
        do throws(BlockError) {
            return try await open(writable: !options.isReadOnly)
        } catch {
            guard options.autoReadOnly, !options.isReadOnly,
                error.code == .permissionDenied || error.code == .readOnly
            else { throw error }
        }
        reopening.nodeOptions.isReadOnly = true
        return try await open(writable: false)
    }

    /// - Throws: when `other` is another file than the one that is open: its name now is another's.
    private func sameFile(_ other: File) async throws(BlockError) -> FileStatus {
        let status = try await other.status()
        guard status.identity == (try await file.status().identity) else {
            throw BlockError(
                .invalidArgument, "'\(file.path)' is another file by now than the one that is open",
                remedy: "open it as another node")
        }
        return status
    }

    private func takeEffect(locksAreRequired: Bool) {
        guard let prepared = reopening else { return }
        reopening = nil
        if let new = prepared.file {
            // Locks of an old opening that nothing is moved from end with it.
            if let kept = prepared.locks, kept === locks { kept.move(to: new) }
            file = new
        } else if prepared.locks == nil {
            locks?.release()
        }
        locks = prepared.locks
        locks?.required = locksAreRequired
        if let status = prepared.status { setAlignment(status) }
    }
}
