import BlockCore
import BlockIO

// Room for compressed clusters, which share host clusters: byte behind byte, with one reference from
// each to every host cluster that it touches.
//
// Invariants:
// 1. `open` names a cluster that compressed data alone uses, and of it the bytes that nothing uses.
// 2. It is forgotten when its last reference goes, and before anything in it is discarded below:
//    from then on the cluster may become something else's.
// 3. One task at a time packs (`packing`), so that what one request writes stays together.

extension QCOW2Refcounts {
    /// The room of one compressed cluster.
    struct Place {
        /// In the file, in bytes.
        let offset: Int
        /// Bytes.
        let count: Int
        /// The host clusters that it touches.
        let firstCluster: Int
        let clusterCount: Int

        init(_ offset: Int, _ count: Int, clusterBits: Int) {
            self.offset = offset
            self.count = count
            firstCluster = offset >> clusterBits
            clusterCount = (offset + count - 1) >> clusterBits - firstCluster + 1
        }
    }

    /// Free room at the end of a cluster.
    struct OpenCluster: Equatable {
        let cluster: Int
        /// In the file, in bytes.
        var next: Int
    }

    /// Takes room for pieces of `counts` bytes, each smaller than a cluster. The file reaches past
    /// them on return.
    func pack(_ counts: [Int]) async throws(BlockError) -> [Place] {
        while let packing { await packing.wait() }
        let queue = WaitQueue()
        packing = queue
        defer {
            packing = nil
            queue.wakeAll()
        }
        var places: [Place] = []
        places.reserveCapacity(counts.count)
        do throws(BlockError) {
            for count in counts {
                let offset = try await room(for: count)
                places.append(Place(offset, count, clusterBits: geometry.clusterBits))
            }
        } catch {
            // Nothing names them yet.
            for place in places { try? await release(place.firstCluster, place.clusterCount) }
            throw error
        }
        return places
    }

    private func room(for count: Int) async throws(BlockError) -> Int {
        if let open, open.next + count <= end(of: open.cluster), try await share(open, count) {
            return open.next
        }
        let new = try await allocate(upTo: 1)
        let cluster = new.offset >> geometry.clusterBits
        // What a descriptor can name (§Compressed clusters descriptor).
        guard new.offset + geometry.clusterSize <= 1 << (62 - (geometry.clusterBits - 8)) else {
            try await release(cluster, 1)
            throw BlockError(.noSpace, "the image is too large for another compressed cluster")
        }
        if let open, open.cluster + 1 == cluster,
            try await share(open, end(of: open.cluster) - open.next)
        {
            let next = open.next + count
            self.open = OpenCluster(cluster: cluster, next: next)
            return open.next
        }
        open = OpenCluster(cluster: cluster, next: new.offset + count)
        return new.offset
    }

    private func end(of cluster: Int) -> Int { (cluster + 1) << geometry.clusterBits }

    /// Takes `count` bytes of the open cluster.
    ///
    /// - Returns: `false` when that cannot be: it was given up, or its count is as high as it gets.
    private func share(_ wanted: OpenCluster, _ count: Int) async throws(BlockError) -> Bool {
        guard let slice = try await slice(for: wanted.cluster) else { return false }
        // It may have lost its last user while the slice was loading.
        guard open == wanted else { return false }
        let references = get(slice, wanted.cluster)
        guard references > 0, references < geometry.refcountMax else {
            open = nil
            return false
        }
        set(slice, wanted.cluster, references + 1)
        let next = wanted.next + count
        open =
            next < end(of: wanted.cluster)
            ? OpenCluster(cluster: wanted.cluster, next: next) : nil
        return true
    }

    /// No more is packed into any of `count` clusters from `first` on.
    func closeOpenCluster(in first: Int, _ count: Int) {
        if let open, open.cluster >= first, open.cluster - first < count { self.open = nil }
    }
}
