import BlockCore
import BlockGraph
import BlockIO

// Commands that move data.

extension Exerciser {
    static let dataCommands: [Command] = [
        Command(
            name: "read", alias: "r", arguments: 2...Int.max,
            synopsis: "[-abCpqv] [-P pattern [-s off] [-l len]] off len",
            summary: "reads bytes at an offset",
            details: """
                 -b  read saved state of a machine, not the disk
                 -C  report in one line of numbers
                 -P  check that the bytes are this one; -s and -l check a part only
                 -q  no report
                 -v  show the bytes
                """
        ) { exerciser, words throws(BlockError) in
            try await exerciser.read("read", words, known: "abCl:pP:qs:v", vectored: false)
        },
        Command(
            name: "readv", arguments: 2...Int.max,
            synopsis: "[-Cqv] [-P pattern] off len [len..]",
            summary: "reads bytes at an offset into several buffers",
            details: " -C, -P, -q, -v as for read"
        ) { exerciser, words throws(BlockError) in
            try await exerciser.read("readv", words, known: "CP:qv", vectored: true)
        },
        Command(
            name: "aio_read", arguments: 2...Int.max,
            synopsis: "[-Ciqv] [-P pattern] off len [len..]",
            summary: "reads while the next commands run; aio_flush waits for it",
            details: " -C, -P, -q, -v as for read; -i reads nothing"
        ) { exerciser, words throws(BlockError) in
            let request = try await ReadRequest(words, known: "CP:iqv", "aio_read", vectored: true)
            if request.isInvalid {
                exerciser.output("injecting invalid read request\n")
                return
            }
            exerciser.start {
                await exerciser.perform(request, named: "readv", isBeside: true)
            }
        },
        Command(
            name: "write", alias: "w", arguments: 2...Int.max,
            synopsis: "[-bcCfnpquz] [-P pattern | -s source_file] off len",
            summary: "writes bytes at an offset",
            details: """
                 -b  write saved state of a machine, not the disk
                 -c  write compressed data: whole clusters
                 -C  report in one line of numbers
                 -f  on stable storage before it completes
                 -P  fill with this byte; 0xcd when not given
                 -q  no report
                 -s  fill with what a file has, again and again
                 -z  write zeroes; with -u space may be given back, with -n only if that is fast
                """
        ) { exerciser, words throws(BlockError) in
            try await exerciser.write("write", words, known: "bcCfnpP:qs:uz", vectored: false)
        },
        Command(
            name: "writev", arguments: 2...Int.max, synopsis: "[-Cfq] [-P pattern] off len [len..]",
            summary: "writes bytes at an offset from several buffers",
            details: " -C, -f, -P, -q as for write"
        ) { exerciser, words throws(BlockError) in
            try await exerciser.write("writev", words, known: "CfP:q", vectored: true)
        },
        Command(
            name: "aio_write", arguments: 2...Int.max,
            synopsis: "[-Cfiquz] [-P pattern] off len [len..]",
            summary: "writes while the next commands run; aio_flush waits for it",
            details: " -C, -f, -P, -q, -u, -z as for write; -i writes nothing"
        ) { exerciser, words throws(BlockError) in
            let request = try await WriteRequest(
                words, known: "CfiP:quz", "aio_write", vectored: true, exerciser)
            if request.isInvalid {
                exerciser.output("injecting invalid write request\n")
                return
            }
            exerciser.start {
                await exerciser.perform(request, named: "aio_write", isBeside: true)
            }
        },
        Command(
            name: "aio_flush", arguments: 0...0, synopsis: "",
            summary: "waits for all requests that are on their way"
        ) { exerciser, _ throws(BlockError) in
            await exerciser.settle()
        },
        Command(
            name: "flush", alias: "f", arguments: 0...0, synopsis: "",
            summary: "puts everything written so far on stable storage"
        ) { exerciser, _ throws(BlockError) in
            try await exerciser.image().flush()
        },
        Command(
            name: "discard", alias: "d", arguments: 2...Int.max, synopsis: "[-Cq] off len",
            summary: "says that bytes are not needed any more",
            details: " -C, -q as for read"
        ) { exerciser, words throws(BlockError) in
            try await exerciser.discard(words)
        },
    ]

    // MARK: Reading

    struct ReadRequest: Sendable {
        let offset: Int
        let vector: IOVector
        var pattern: UInt8?
        /// What of the bytes is checked.
        var checked: ByteRange
        let isQuiet: Bool
        let forPrograms: Bool
        let isShown: Bool
        let isInvalid: Bool
        /// Of saved state of a machine, not of the disk.
        let isMachineState: Bool

        init(
            _ words: [String], known: String, _ name: String, vectored: Bool
        ) async throws(BlockError) {
            let arguments = try ExerciserArguments(words, known: known, command: name)
            isMachineState = arguments.has("b")
            pattern = try arguments.pattern()
            if pattern == nil, arguments.value("s") != nil || arguments.value("l") != nil {
                throw ExerciserArguments.misuse("-s and -l are of use with -P only")
            }
            let counts: [Int]
            (offset, counts) = try Exerciser.place(arguments, name, vectored: vectored)
            if isMachineState { try Exerciser.checkSectors(offset, counts) }
            vector = try Exerciser.memory(counts)
            let start = try arguments.value("s").map(ExerciserArguments.bytes) ?? 0
            let length =
                try arguments.value("l").map(ExerciserArguments.bytes)
                ?? max(0, vector.count - start)
            guard let part = ByteRange(checking: start, count: length), part.end <= vector.count
            else {
                throw ExerciserArguments.misuse(
                    "pattern verification range exceeds end of read data")
            }
            checked = part
            isQuiet = arguments.has("q")
            forPrograms = arguments.has("C")
            isShown = arguments.has("v")
            isInvalid = arguments.has("i")
        }
    }

    private func read(
        _ name: String, _ words: [String], known: String, vectored: Bool
    ) async throws(BlockError) {
        let request = try await ReadRequest(words, known: known, name, vectored: vectored)
        await perform(request, named: name)
    }

    /// - Parameter isBeside: other commands run meanwhile, which its failure is none of.
    private func perform(
        _ request: ReadRequest, named name: String, isBeside: Bool = false
    ) async {
        let thread = session.thread
        let start = thread.now
        do throws(BlockError) {
            let edge = try image()
            if request.isMachineState {
                try await edge.readMachineState(request.offset, into: request.vector)
            } else {
                try await edge.read(request.offset, into: request.vector)
            }
        } catch {
            report(name, failed: error, isBeside: isBeside)
            return
        }
        let elapsed = thread.now &- start
        if let pattern = request.pattern {
            let part = request.checked
            if !request.vector.slice(part.offset, part.count).array.allSatisfy({ $0 == pattern }) {
                output(
                    "Pattern verification failed at offset \(request.offset + part.offset), "
                        + "\(part.count) bytes\n")
                if !isBeside { hasFailed = true }
            }
        }
        if request.isQuiet { return }
        if request.isShown {
            output(ExerciserReport.dump(request.vector, offset: request.offset))
        }
        output(
            ExerciserReport.operation(
                "read", offset: request.offset, count: request.vector.count, nanoseconds: elapsed,
                forPrograms: request.forPrograms))
    }

    // MARK: Writing

    struct WriteRequest: Sendable {
        let offset: Int
        let count: Int
        /// `nil`: zeroes.
        var vector: IOVector?
        let flags: WriteFlags
        let isQuiet: Bool
        let forPrograms: Bool
        let isInvalid: Bool
        /// Of saved state of a machine, not of the disk.
        let isMachineState: Bool

        init(
            _ words: [String], known: String, _ name: String, vectored: Bool,
            _ exerciser: Exerciser
        ) async throws(BlockError) {
            let arguments = try ExerciserArguments(words, known: known, command: name)
            try Self.check(arguments)
            let isZero = arguments.has("z")
            let counts: [Int]
            (offset, counts) = try Exerciser.place(
                arguments, name, vectored: vectored, isUnlimited: isZero)
            count = counts.reduce(0, +)
            var flags: WriteFlags = []
            if arguments.has("f") { flags.insert(.fua) }
            if arguments.has("u") { flags.insert(.mayUnmap) }
            if arguments.has("n") { flags.insert(.noFallback) }
            if arguments.has("c") { flags.insert(.compressed) }
            isMachineState = arguments.has("b")
            self.flags = flags
            isQuiet = arguments.has("q")
            forPrograms = arguments.has("C")
            isInvalid = arguments.has("i")
            guard !isZero else {
                guard counts.count == 1 || isInvalid else {
                    throw ExerciserArguments.misuse("-z supports only a single length parameter")
                }
                return
            }
            if isMachineState { try Exerciser.checkSectors(offset, counts) }
            let pattern = try arguments.pattern() ?? 0xcd
            let memory = try Exerciser.memory(counts)
            if let path = arguments.value("s") {
                try await exerciser.fill(memory, from: path)
            } else {
                memory.fill(pattern)
            }
            vector = memory
        }

        private static func check(_ arguments: ExerciserArguments) throws(BlockError) {
            let isZero = arguments.has("z")
            if arguments.has("b"), isZero {
                throw ExerciserArguments.misuse("-b and -z cannot be specified at the same time")
            }
            if arguments.has("f"), arguments.has("b") || arguments.has("c") {
                throw ExerciserArguments.misuse(
                    "-f and -b or -c cannot be specified at the same time")
            }
            for flag: Character in ["n", "u"] where arguments.has(flag) && !isZero {
                throw ExerciserArguments.misuse("-\(flag) requires -z to be specified")
            }
            let fillings = [isZero, arguments.value("P") != nil, arguments.value("s") != nil]
            if fillings.filter({ $0 }).count > 1 {
                throw ExerciserArguments.misuse(
                    "Only one of -z, -P, and -s can be specified at the same time")
            }
        }
    }

    private func write(
        _ name: String, _ words: [String], known: String, vectored: Bool
    ) async throws(BlockError) {
        let request = try await WriteRequest(
            words, known: known, name, vectored: vectored, self)
        await perform(request, named: name)
    }

    private func perform(
        _ request: WriteRequest, named name: String, isBeside: Bool = false
    ) async {
        let thread = session.thread
        let start = thread.now
        do throws(BlockError) {
            let edge = try image()
            if let vector = request.vector, request.isMachineState {
                try await edge.writeMachineState(request.offset, from: vector)
            } else if let vector = request.vector {
                try await edge.write(request.offset, from: vector, request.flags)
            } else {
                try await edge.writeZeroes(
                    ByteRange(request.offset, request.count), request.flags)
            }
        } catch {
            report(name, failed: error, isBeside: isBeside)
            return
        }
        let elapsed = thread.now &- start
        if request.isQuiet { return }
        output(
            ExerciserReport.operation(
                "wrote", offset: request.offset, count: request.count, nanoseconds: elapsed,
                forPrograms: request.forPrograms))
    }

    /// Fills `memory` with the bytes of a file, from its beginning again where it ends.
    private func fill(_ memory: IOVector, from path: String) async throws(BlockError) {
        let file = try await File.open(path, FileOptions(writable: false), on: session.thread)
        let content = try IOVector(allocating: max(1, min(memory.count, Self.sourceBytesMax)))
        let result: Result<Int, BlockError>
        do throws(BlockError) {
            result = .success(try await file.read(content, at: 0))
        } catch { result = .failure(error) }
        await file.close()
        let count = try result.get()
        guard count > 0 else {
            throw BlockError(.invalidArgument, "'\(path)' is empty: there is nothing to write")
        }
        var done = 0
        while done < memory.count {
            let part = min(count, memory.count - done)
            memory.slice(done, part).copy(from: content.slice(0, part))
            done += part
        }
    }

    /// The most that is read of a file of `write -s`.
    private static let sourceBytesMax = 1 << 30

    // MARK: Discarding

    private func discard(_ words: [String]) async throws(BlockError) {
        let arguments = try ExerciserArguments(words, known: "Cq", command: "discard")
        let (offset, counts) = try Self.place(
            arguments, "discard", vectored: false, isUnlimited: true)
        let start = session.thread.now
        do throws(BlockError) {
            try await image().discard(ByteRange(offset, counts[0]))
        } catch {
            report("discard", failed: error)
            return
        }
        if arguments.has("q") { return }
        output(
            ExerciserReport.operation(
                "discard", offset: offset, count: counts[0],
                nanoseconds: session.thread.now &- start, forPrograms: arguments.has("C")))
    }

    // MARK: Places and memory

    /// The offset and the lengths among a command's arguments; their sum with the offset is sound.
    private static func place(
        _ arguments: ExerciserArguments, _ name: String, vectored: Bool, isUnlimited: Bool = false
    ) throws(BlockError) -> (offset: Int, counts: [Int]) {
        let words = arguments.rest
        guard words.count == 2 || vectored && words.count > 2 else {
            throw ExerciserArguments.misuse(
                "\(name) needs an offset and " + (vectored ? "lengths" : "one length"))
        }
        let offset = try ExerciserArguments.bytes(words[0])
        var counts: [Int] = []
        var total = 0
        for word in words.dropFirst() {
            let count = try ExerciserArguments.bytes(word)
            guard let sum = total.adding(count), isUnlimited || sum <= Limits.requestBytesMax
            else {
                // Of one that may be zeroed the longer way, scripts know these words.
                let unless = name == "write" ? " without -n" : ""
                throw ExerciserArguments.misuse(
                    "length cannot exceed \(Limits.requestBytesMax)\(unless), given \(word)")
            }
            total = sum
            counts.append(count)
        }
        guard offset.adding(total) != nil else {
            throw BlockError(.invalidArgument, "the request ends past every size")
        }
        return (offset, counts)
    }

    /// Saved state goes in whole sectors.
    private static func checkSectors(_ offset: Int, _ counts: [Int]) throws(BlockError) {
        for (value, name) in [(offset, "offset")] + counts.map({ ($0, "count") })
        where !value.isAligned(to: 512) {
            throw ExerciserArguments.misuse(
                "\(value) is not a sector-aligned value for '\(name)'")
        }
    }

    /// One buffer for each length.
    private static func memory(_ counts: [Int]) throws(BlockError) -> IOVector {
        var vector = IOVector()
        for count in counts { vector.append(try IOVector(allocating: count)) }
        return vector
    }
}
