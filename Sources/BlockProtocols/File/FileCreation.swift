import BlockCore
import BlockGraph
import BlockIO
import QMP

/// Makes a file of a given size, as `blockdev-create` with driver `file` does.
enum FileCreation {
    static func create(_ creation: ImageCreation) async throws(BlockError) {
        let options = creation.options
        guard let path = try options.string("filename") else {
            throw BlockError(.invalidArgument, "option 'filename' is missing")
        }
        guard let size = try options.size("size"), size >= 0, size <= Limits.nodeSizeMax else {
            throw BlockError(.invalidArgument, "option 'size' is missing or out of bounds")
        }
        let preallocation =
            try options.enumeration("preallocation", as: Preallocation.self) ?? .off
        guard preallocation != .metadata else {
            throw BlockError(
                .invalidArgument, "preallocation=metadata is for formats, not for files",
                remedy: "use off, falloc or full")
        }
        if try options.bool("nocow") == true {
            throw BlockError(.unsupported, "option 'nocow' is not supported")
        }
        // A hint for file systems that lay extents out by it.
        _ = try options.size("extent-size-hint")
        try options.finish()

        let thread = creation.thread
        let file = try await File.open(
            path, FileOptions(writable: true, create: true, truncate: false), on: thread)
        do throws(BlockError) {
            try await fill(file, size, preallocation)
        } catch {
            await file.close()
            throw error
        }
        await file.close()
    }

    private static func fill(
        _ file: File, _ size: Int, _ preallocation: Preallocation
    ) async throws(BlockError) {
        // An image that another process uses is not cut to nothing.
        let locks = ImageLocks(file, required: false, isForCreation: true)
        await locks.waitForEndedHolders(writing: true)
        try locks.prepare(Access(uses: [.write, .resize], shares: []))
        defer { locks.abort() }
        try await file.setSize(0)
        switch preallocation {
        case .off, .metadata:
            try await file.setSize(size)
        case .falloc:
            if size > 0 { try await file.allocate(.allocate, ByteRange(0, size)) }
        case .full:
            let zeroes = try IOVector(allocating: 1 << 20)
            zeroes.fill(0)
            var offset = 0
            while offset < size {
                let count = min(zeroes.count, size - offset)
                try await file.write(zeroes.slice(0, count), at: offset)
                offset += count
            }
            try await file.synchronize()
        }
    }
}
