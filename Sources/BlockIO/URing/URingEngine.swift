#if os(Linux)
import BlockCore
import CLinux
import CLiburing
import Glibc
import Synchronization

/// The engine over one io_uring.
///
/// Submissions gather in the ring and enter the kernel once a turn, with the wait for completions.
/// What the page cache or a socket buffer can serve at once goes by plain system calls
/// (`readNow` and its like): at depth 1 that saves a trip through the ring, and at depth 32 it costs
/// the same.
///
/// A short poll of the completion queue comes before sleeping: waking up dominates a round trip at
/// depth 1. The poll adapts: it grows while it pays and stops while it does not.
final class URingEngine: IOEngine {
    private static let entryCount: UInt32 = 512
    /// With more requests than this at a time, a wake-up is shared by many and waiting for it costs
    /// less than looking; what comes while the thread wakes up joins the next batch.
    private static let batchCountForPolling = 3
    /// The next entry belongs to this one.
    private static let linked = UInt8(1 << IOSQE_IO_LINK_BIT)
    /// Not tokens of operations.
    private static let wakeData: UInt64 = .max
    private static let ignoredData: UInt64 = .max - 1

    private let ring: UnsafeMutablePointer<io_uring>
    private let wakeDescriptor: Int32
    private let wakeBuffer: UnsafeMutablePointer<UInt64>
    private var completions = [UnsafeMutablePointer<io_uring_cqe>?](repeating: nil, count: 128)
    /// By token: what the kernel reads of operations in flight, where that is more than data.
    private var arguments: [OperationMemory?] = []
    private var hasRing = false
    private var isWakeArmed = false
    private var pollWindow = PollWindow()
    /// Operations since the last wait, a receive among them, and their running mean times eight: how many requests
    /// come at a time.
    private var batchCount = 0
    private var batchCountMean = 0
    private var waitCount: UInt32 = 0
    /// Entries that gather in the ring; 0 for as many as there is room for.
    private var batchCountMax: UInt32 = 0
    private let host = HostSystem()

    let name = "io_uring"
    let offloadsWork = true
    var system: any IOSystem { host }
    var now: UInt64 { MonotonicClock.now }

    /// Sets the ring up on the calling thread, which becomes its only submitter.
    ///
    /// - Throws: `unsupported` where the kernel or a sandbox refuses io_uring.
    init() throws(BlockError) {
        ring = .allocate(capacity: 1)
        wakeBuffer = .allocate(capacity: 1)
        wakeDescriptor = linux_eventfd()
        // What a failing initialiser leaves behind is the deinitialiser's.
        guard wakeDescriptor >= 0 else {
            throw .system("cannot make an eventfd", errno)
        }
        // Newest kernels first: completions run on this thread only, when it asks for them.
        let flags: [UInt32] = [
            IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
            IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
            0,
        ]
        var result: Int32 = 0
        for flag in flags {
            var parameters = io_uring_params()
            parameters.flags = flag
            result = io_uring_queue_init_params(Self.entryCount, ring, &parameters)
            if result != -EINVAL { break }
        }
        guard result == 0 else {
            throw BlockError(
                .unsupported, "io_uring is refused: \(BlockError.describe(-result))",
                remedy: "use MERINO_IO_ENGINE=threads")
        }
        hasRing = true
    }

    deinit {
        if hasRing { io_uring_queue_exit(ring) }
        if wakeDescriptor >= 0 { Glibc.close(wakeDescriptor) }
        ring.deallocate()
        wakeBuffer.deallocate()
    }

    // MARK: Submitting

    private func nextEntry() -> UnsafeMutablePointer<io_uring_sqe> {
        while true {
            if let entry = io_uring_get_sqe(ring) { return entry }
            // The ring is full: let the kernel take what is there.
            io_uring_submit(ring)
        }
    }

    func submit(_ operation: IOOperation, _ token: IOToken) {
        if case .awaitTaken(let handle, let nanosecondsMax) = operation {
            submitAwaitTaken(handle, nanosecondsMax, token)
            return
        }
        let entry = nextEntry()
        prepare(entry, operation, token)
        submitFullBatch()
    }

    /// The entries of an operation are complete.
    private func submitFullBatch() {
        guard batchCountMax > 0, io_uring_sq_ready(ring) >= batchCountMax else { return }
        io_uring_submit(ring)
    }

    func submitAside(_ operation: IOOperation, _ token: IOToken) {
        let entry = nextEntry()
        prepare(entry, operation, token)
        // Else the kernel would try it on this thread, within the submission.
        io_uring_sqe_set_flags(entry, UInt32(1 << IOSQE_ASYNC_BIT))
        submitFullBatch()
    }

    private func prepare(
        _ entry: UnsafeMutablePointer<io_uring_sqe>, _ operation: IOOperation, _ token: IOToken
    ) {
        batchCount += 1
        switch operation {
        case .read(let handle, let vector, let offset):
            if let slice = vector.single {
                io_uring_prep_read(
                    entry, handle.rawValue, slice.bytes.baseAddress, UInt32(slice.count),
                    UInt64(offset))
            } else {
                let memory = remember(token, .vectors(of: vector))
                io_uring_prep_readv(
                    entry, handle.rawValue, memory.vectors, memory.vectorCount, UInt64(offset))
            }
        case .write(let handle, let vector, let offset, let durable):
            if let slice = vector.single {
                io_uring_prep_write(
                    entry, handle.rawValue, slice.bytes.baseAddress, UInt32(slice.count),
                    UInt64(offset))
            } else {
                let memory = remember(token, .vectors(of: vector))
                io_uring_prep_writev(
                    entry, handle.rawValue, memory.vectors, memory.vectorCount, UInt64(offset))
            }
            if durable { entry.pointee.rw_flags = linux_write_durable }
        case .synchronize(let handle, let dataOnly):
            io_uring_prep_fsync(entry, handle.rawValue, dataOnly ? IORING_FSYNC_DATASYNC : 0)
        case .allocate(let handle, let mode, let range):
            io_uring_prep_fallocate(
                entry, handle.rawValue, mode.fallocateMode, off_t(range.offset), off_t(range.count))
        default:
            submitSocket(operation, token, entry)
        }
        io_uring_sqe_set_data64(entry, UInt64(token.rawValue))
    }

    /// A socket is writable again when little of what was sent waits in it for the peer.
    private func submitAwaitTaken(
        _ handle: IOHandle, _ nanosecondsMax: UInt64, _ token: IOToken
    ) {
        // The two entries must enter the kernel together.
        if io_uring_sq_space_left(ring) < 2 { io_uring_submit(ring) }
        let entry = nextEntry()
        io_uring_prep_poll_add(entry, handle.rawValue, UInt32(POLLOUT))
        entry.pointee.flags |= Self.linked
        // The kernel ends it by this value, perhaps when it has completed already and the token is
        // another operation's: so it is never used twice in a row.
        waitCount &+= 1
        let generation = UInt64(waitCount % 0x7fff_ffff + 1) << 32
        io_uring_sqe_set_data64(entry, generation | UInt64(token.rawValue))
        let memory = remember(token, .time(nanoseconds: nanosecondsMax))
        let limit = nextEntry()
        io_uring_prep_link_timeout(limit, memory.time, 0)
        io_uring_sqe_set_data64(limit, Self.ignoredData)
    }

    private func submitSocket(
        _ operation: IOOperation, _ token: IOToken, _ entry: UnsafeMutablePointer<io_uring_sqe>
    ) {
        switch operation {
        case .receive(let handle, let vector):
            if let slice = vector.single {
                io_uring_prep_recv(
                    entry, handle.rawValue, slice.bytes.baseAddress, slice.count, 0)
            } else {
                let memory = remember(token, .message(of: vector))
                io_uring_prep_recvmsg(entry, handle.rawValue, memory.message, 0)
            }
            // Nothing was there when `receiveNow` looked: wait first, then receive.
            entry.pointee.ioprio |= UInt16(IORING_RECVSEND_POLL_FIRST)
        case .send(let handle, let vector):
            if let slice = vector.single {
                io_uring_prep_send(
                    entry, handle.rawValue, slice.bytes.baseAddress, slice.count,
                    linux_no_signal)
            } else {
                let memory = remember(token, .message(of: vector))
                io_uring_prep_sendmsg(
                    entry, handle.rawValue, memory.message, UInt32(linux_no_signal))
            }
        case .accept(let handle):
            io_uring_prep_accept(
                entry, handle.rawValue, nil, nil,
                linux_accept_flags)
        case .connect(let handle, let address):
            let memory = remember(token, .address(address))
            io_uring_prep_connect(entry, handle.rawValue, memory.address, memory.addressLength)
        case .awaitReadable(let handle):
            io_uring_prep_poll_add(entry, handle.rawValue, UInt32(POLLIN))
        case .read, .write, .synchronize, .allocate, .awaitTaken:
            preconditionFailure("not an operation of the sockets' path")
        }
    }

    private func remember(_ token: IOToken, _ memory: OperationMemory) -> OperationMemory {
        let index = Int(token.rawValue)
        while arguments.count <= index { arguments.append(nil) }
        arguments[index] = memory
        return memory
    }

    func cancelAll(on handle: IOHandle) {
        let entry = nextEntry()
        io_uring_prep_cancel_fd(entry, handle.rawValue, UInt32(IORING_ASYNC_CANCEL_ALL))
        io_uring_sqe_set_data64(entry, Self.ignoredData)
    }

    // MARK: Completing

    func poll(deadline: UInt64?, complete: (IOToken, Int) -> Void) {
        armWake()
        if deadline == 0 {
            if io_uring_sq_ready(ring) > 0 || io_uring_cq_ready(ring) > 0 || needsKernel {
                io_uring_submit_and_get_events(ring)
            }
        } else if io_uring_sq_ready(ring) > 0, pollWindow.nanoseconds > 0 {
            // Submitted before looking for completions; where nobody looks, submitting and sleeping
            // are one call.
            io_uring_submit_and_get_events(ring)
            if io_uring_cq_ready(ring) == 0 { wait(until: deadline) }
        } else if io_uring_cq_ready(ring) == 0 {
            wait(until: deadline)
        }
        reap(complete)
    }

    /// Whether completions wait in the kernel for this thread to fetch them.
    private var needsKernel: Bool {
        ring.pointee.sq.kflags.pointee & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW) != 0
    }

    private func wait(until deadline: UInt64?) {
        batchCountMean += batchCount - batchCountMean / 8
        batchCount = 0
        let comesInBatches = batchCountMean > 8 * Self.batchCountForPolling
        if pollWindow.nanoseconds > 0, !comesInBatches, spin(until: deadline) { return }
        let start = now
        var time = __kernel_timespec()
        var completion: UnsafeMutablePointer<io_uring_cqe>?
        if let deadline {
            guard deadline > start else { return }
            let left = deadline - start
            time.tv_sec = Int64(left / 1_000_000_000)
            time.tv_nsec = Int64(left % 1_000_000_000)
            io_uring_submit_and_wait_timeout(ring, &completion, 1, &time, nil)
        } else {
            io_uring_submit_and_wait(ring, 1)
        }
        if !comesInBatches { pollWindow.slept(nanoseconds: now &- start) }
    }

    /// Looks for completions for the length of the poll window.
    /// - Returns: whether there are any.
    private func spin(until deadline: UInt64?) -> Bool {
        let start = now
        while true {
            for _ in 0..<16 {
                if needsKernel { io_uring_get_events(ring) }
                if io_uring_cq_ready(ring) > 0 {
                    pollWindow.found()
                    return true
                }
                linux_relax()
            }
            let time = now
            if time &- start >= pollWindow.nanoseconds { return false }
            if let deadline, time >= deadline { return false }
        }
    }

    private func reap(_ complete: (IOToken, Int) -> Void) {
        while true {
            let count = Int(io_uring_peek_batch_cqe(ring, &completions, UInt32(completions.count)))
            for index in 0..<count {
                guard let entry = completions[index]?.pointee else { continue }
                switch entry.user_data {
                case Self.wakeData: isWakeArmed = false
                case Self.ignoredData: break
                default:
                    let token = UInt32(truncatingIfNeeded: entry.user_data)
                    // Gone before the token can be used again.
                    if Int(token) < arguments.count { arguments[Int(token)] = nil }
                    complete(IOToken(token), Int(entry.res))
                }
            }
            io_uring_cq_advance(ring, UInt32(count))
            if count < completions.count { return }
        }
    }

    func tune(_ tuning: EngineTuning) {
        pollWindow = PollWindow(tuning)
        batchCountMax = UInt32(clamping: tuning.batchCountMax)
    }

    // MARK: Waking

    private func armWake() {
        if isWakeArmed { return }
        isWakeArmed = true
        let entry = nextEntry()
        io_uring_prep_read(entry, wakeDescriptor, wakeBuffer, 8, 0)
        io_uring_sqe_set_data64(entry, Self.wakeData)
    }

    func wake() {
        var one: UInt64 = 1
        _ = Glibc.write(wakeDescriptor, &one, 8)
    }

    // MARK: Without the ring

    func readNow(_ handle: IOHandle, _ vector: IOVector, offset: Int) -> Int? {
        batchCount += 1
        return HostCalls.readCached(handle, vector, offset: offset)
    }

    func writeNow(
        _ handle: IOHandle, _ vector: IOVector, offset: Int, mayWait: Bool
    ) -> Int? {
        batchCount += 1
        return mayWait
            ? HostCalls.write(handle, vector, offset: offset)
            : HostCalls.writeCached(handle, vector, offset: offset)
    }

    func receiveNow(_ handle: IOHandle, _ vector: IOVector) -> Int? {
        HostCalls.receive(handle, vector)
    }

    func sendNow(_ handle: IOHandle, _ vector: IOVector) -> Int? {
        HostCalls.send(handle, vector)
    }
}

/// How long to look for completions before sleeping.
///
/// Sleeping and being woken costs tens of microseconds; a peer that answers at once is worth a short
/// wait on the processor, one that stays away is not.
struct PollWindow {
    /// What it begins with when a poll would have been better.
    private static let nanosecondsMin: UInt64 = 8_000
    private let nanosecondsMax: UInt64
    private let growth: UInt64
    private let shrinkage: UInt64
    private(set) var nanoseconds: UInt64 = 0
    private var misses = 0

    init(_ tuning: EngineTuning = EngineTuning()) {
        nanosecondsMax = tuning.pollNanosecondsMax
        growth = tuning.pollGrowth == 0 ? 2 : tuning.pollGrowth
        shrinkage = tuning.pollShrinkage
    }

    /// A sleep lasted this long: would a poll have been better?
    mutating func slept(nanoseconds slept: UInt64) {
        if slept <= nanosecondsMax {
            misses = 0
            let grown = nanoseconds.multiplied(by: growth) ?? .max
            nanoseconds = min(max(grown, Self.nanosecondsMin), nanosecondsMax)
        } else {
            misses += 1
            if misses >= 2 { nanoseconds = shrinkage == 0 ? 0 : nanoseconds / shrinkage }
        }
    }

    mutating func found() {
        misses = 0
    }
}
#endif
