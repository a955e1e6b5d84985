import BlockCore

#if os(Linux)
import CLinux
#endif

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

// The three primitives that the engines stand on: a thread, a monitor, a latch.

/// A detached thread with all signals blocked: signals are taken by ``SignalSource``.
struct ThreadBody {
    private final class Box: Sendable {
        let body: @Sendable () -> Void
        let name: String
        init(_ body: @escaping @Sendable () -> Void, _ name: String) {
            self.body = body
            self.name = name
        }
    }
    private let body: @Sendable () -> Void

    init(_ body: @escaping @Sendable () -> Void) {
        self.body = body
    }

    func start(name: String) throws(BlockError) {
        var attributes = pthread_attr_t()
        pthread_attr_init(&attributes)
        pthread_attr_setdetachstate(&attributes, Int32(PTHREAD_CREATE_DETACHED))
        defer { pthread_attr_destroy(&attributes) }
        var all = sigset_t()
        var previous = sigset_t()
        sigfillset(&all)
        pthread_sigmask(SIG_BLOCK, &all, &previous)
        defer { pthread_sigmask(SIG_SETMASK, &previous, nil) }

        let box = Unmanaged.passRetained(Box(body, name))
        #if canImport(Darwin)
        var thread: pthread_t?
        #else
        var thread = pthread_t()
        #endif
        let failure = pthread_create(
            &thread, &attributes,
            { argument in
                // The pointer is the box that was retained for this call.
                #if canImport(Darwin)
                let box = Unmanaged<Box>.fromOpaque(argument).takeRetainedValue()
                pthread_setname_np(box.name)
                #else
                guard let argument else { return nil }
                let box = Unmanaged<Box>.fromOpaque(argument).takeRetainedValue()
                linux_name_thread(box.name)
                #endif
                box.body()
                return nil
            }, box.toOpaque())
        if failure != 0 {
            box.release()
            throw .system("cannot start a thread", failure)
        }
    }
}

/// A mutex with a condition, guarding a value.
package final class Monitor<Value>: @unchecked Sendable {
    private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
    private let condition = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
    private var value: Value

    package init(_ value: sending Value) {
        self.value = value
        pthread_mutex_init(mutex, nil)
        #if canImport(Darwin)
        pthread_cond_init(condition, nil)
        #else
        var attributes = pthread_condattr_t()
        pthread_condattr_init(&attributes)
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)
        pthread_cond_init(condition, &attributes)
        pthread_condattr_destroy(&attributes)
        #endif
    }

    deinit {
        pthread_cond_destroy(condition)
        pthread_mutex_destroy(mutex)
        condition.deallocate()
        mutex.deallocate()
    }

    package func withLock<T>(_ body: (inout Value) -> T) -> T {
        pthread_mutex_lock(mutex)
        defer { pthread_mutex_unlock(mutex) }
        return body(&value)
    }

    /// Calls `attempt` under the lock until it returns something, waiting for a signal between calls.
    ///
    /// - Parameter seconds: give up when no signal came for that long; `nil` never gives up.
    /// - Returns: what `attempt` returned, or `nil` when it gave up.
    package func wait<T>(seconds: Int? = nil, until attempt: (inout Value) -> T?) -> T? {
        pthread_mutex_lock(mutex)
        defer { pthread_mutex_unlock(mutex) }
        while true {
            // The access to `value` ends before the wait, in which other threads change it.
            if let result = attempt(&value) { return result }
            guard let seconds else {
                pthread_cond_wait(condition, mutex)
                continue
            }
            if !timedWait(seconds: seconds) { return attempt(&value) }
        }
    }

    private func timedWait(seconds: Int) -> Bool {
        #if canImport(Darwin)
        var interval = timespec(tv_sec: seconds, tv_nsec: 0)
        return pthread_cond_timedwait_relative_np(condition, mutex, &interval) == 0
        #else
        var deadline = timespec()
        clock_gettime(CLOCK_MONOTONIC, &deadline)
        deadline.tv_sec += seconds
        return pthread_cond_timedwait(condition, mutex, &deadline) == 0
        #endif
    }

    package func signal() {
        pthread_cond_signal(condition)
    }

    package func broadcast() {
        pthread_cond_broadcast(condition)
    }
}

/// A value that one thread waits for and another delivers, once.
final class Latch<Value>: @unchecked Sendable {
    private let monitor = Monitor<Value?>(nil)

    func open(_ value: Value) {
        monitor.withLock { $0 = value }
        monitor.broadcast()
    }

    func wait() -> Value {
        while true {
            if let value = monitor.wait(until: { $0 }) { return value }
        }
    }
}

/// The monotonic clock, in nanoseconds.
enum MonotonicClock {
    @inline(__always)
    static var now: UInt64 {
        var time = timespec()
        clock_gettime(CLOCK_MONOTONIC, &time)
        return UInt64(time.tv_sec) &* 1_000_000_000 &+ UInt64(time.tv_nsec)
    }
}
