import BlockCore
import BlockFilters
import BlockGraph

#if canImport(Glibc)
import Glibc
#elseif canImport(Musl)
import Musl
#elseif canImport(Darwin)
import Darwin
#endif

// Commands that hold requests up (by a blkdebug node below the image) and that end the program.

extension Exerciser {
    static let debugCommands: [Command] = [
        Command(
            name: "break", arguments: 2...2, synopsis: "event tag",
            summary: "holds up the next request that gets to an event, under a tag",
            details: " Needs a blkdebug node below the image, which knows the events."
        ) { exerciser, words throws(BlockError) in
            try exerciser.setBreakpoint(words[0], tag: words[1])
        },
        Command(
            name: "remove_break", arguments: 1...1, synopsis: "tag",
            summary: "removes a breakpoint, and lets what it holds up go on"
        ) { exerciser, words throws(BlockError) in
            try exerciser.debug("remove breakpoint \(words[0])") { debug in
                debug.removeBreakpoints(tag: words[0])
            }
        },
        Command(
            name: "resume", arguments: 1...1, synopsis: "tag",
            summary: "lets a request that is held up go on"
        ) { exerciser, words throws(BlockError) in
            try exerciser.debug("resume request") { debug in debug.resume(tag: words[0]) }
            // It runs now, before the next command.
            await exerciser.session.thread.yield()
        },
        Command(
            name: "wait_break", arguments: 1...1, synopsis: "tag",
            summary: "waits until a request is held up"
        ) { exerciser, words throws(BlockError) in
            try await exerciser.waitForBreakpoint(words[0])
        },
        Command(
            name: "abort", arguments: 0...0, needsImage: false, synopsis: "",
            summary: "ends the program as a crash does, by abort(3)"
        ) { _, _ throws(BlockError) in
            Exerciser.setDefault(SIGABRT)
            abort()
        },
        Command(
            name: "sigraise", arguments: 1...1, needsImage: false, synopsis: "signal",
            summary: "sends the program a signal, by its number",
            details: " 'sigraise 15' raises SIGTERM"
        ) { _, words throws(BlockError) in
            let value = try ExerciserArguments.bytes(words[0])
            guard value < 65, let number = Int32(exactly: value) else {
                throw ExerciserArguments.misuse(
                    "signal argument '\(words[0])' is too large to be a valid signal")
            }
            if number > 0 { Exerciser.setDefault(number) }
            _ = raise(number)
        },
    ]

    /// The signal does what it does by default, whoever started the program: past the handler that would
    /// report a crash of the program itself, and not held back.
    private static func setDefault(_ number: Int32) {
        _ = signal(number, SIG_DFL)
        var set = sigset_t()
        sigemptyset(&set)
        sigaddset(&set, number)
        pthread_sigmask(SIG_UNBLOCK, &set, nil)
    }

    private func setBreakpoint(_ name: String, tag: String) throws(BlockError) {
        try debug("set breakpoint") { debug in
            guard let event = DebugEvent(rawValue: name), event != .none else { return false }
            debug.setBreakpoint(at: event, tag: tag, notify: self.output)
            return true
        }
    }

    /// Does something with the blkdebug below the image, and says in QEMU's words why it did not work.
    ///
    /// - Parameter body: `false` where it finds nothing of that name.
    private func debug(
        _ what: String, _ body: (BlockDebugFilter) -> Bool
    ) throws(BlockError) {
        var failure: Int32?
        if let debug = BlockDebugFilter.nearest(to: try image().node) {
            if !body(debug) { failure = ENOENT }
        } else {
            failure = ENOTSUP
        }
        guard let failure else { return }
        output("Could not \(what): \(BlockError.describe(failure))\n")
        hasFailed = true
    }

    private func waitForBreakpoint(_ tag: String) async throws(BlockError) {
        guard let debug = BlockDebugFilter.nearest(to: try image().node) else {
            throw BlockError(
                .unsupported, "there is no blkdebug node below the image",
                remedy: "open it as blkdebug::IMAGE")
        }
        guard debug.isSuspended(tag: tag) || isBusy else {
            throw BlockError(
                .notFound, "no request is on its way that could be held up as '\(tag)'",
                remedy: "start one with aio_read or aio_write")
        }
        await debug.untilSuspended(tag: tag)
    }
}
