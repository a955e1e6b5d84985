import BlockCore
import BlockGraph
import BlockIO
import QMP

// Commands on the image as a whole.

extension Exerciser {
    static let imageCommands: [Command] = [
        Command(
            name: "open", alias: "o", arguments: 0...Int.max, needsImage: false,
            synopsis: "[-rsCnkU] [-i aio] [-t cache] [-d discard] [-o options] [path]",
            summary: "opens an image for the commands that follow",
            details: """
                 -C  keep what is read from a backing image
                 -d  ignore or unmap discards
                 -i  threads, native or io_uring
                 -n  the same as -t none
                 -o  node options: driver=qcow2,…
                 -r  only for reading
                 -s  write to a temporary file, which is gone at the end
                 -t  cache mode: none, writeback, writethrough, directsync or unsafe
                 -U  while others write it
                """
        ) { exerciser, words throws(BlockError) in
            try await exerciser.open(words)
        },
        Command(
            name: "close", alias: "c", arguments: 0...0, synopsis: "",
            summary: "closes the image"
        ) { exerciser, _ throws(BlockError) in
            try await exerciser.close()
        },
        Command(
            name: "truncate", alias: "t", arguments: 1...3, synopsis: "[-m prealloc_mode] off",
            summary: "changes the image's size",
            details: " -m  how space is reserved when it grows: off, metadata, falloc, full"
        ) { exerciser, words throws(BlockError) in
            try await exerciser.truncate(words)
        },
        Command(
            name: "length", alias: "l", arguments: 0...0, synopsis: "",
            summary: "says how large the image is"
        ) { exerciser, _ throws(BlockError) in
            exerciser.output(ExerciserReport.bytes(try exerciser.image().size) + "\n")
        },
        Command(
            name: "info", alias: "i", arguments: 0...0, synopsis: "",
            summary: "says what the image is"
        ) { exerciser, _ throws(BlockError) in
            try await exerciser.info()
        },
        Command(
            name: "alloc", alias: "a", arguments: 1...2, synopsis: "offset [count]",
            summary: "says how many bytes the image itself has, not a backing image"
        ) { exerciser, words throws(BlockError) in
            try await exerciser.alloc(words)
        },
        Command(
            name: "map", arguments: 0...0, synopsis: "",
            summary: "says which parts the image itself has, not a backing image"
        ) { exerciser, _ throws(BlockError) in
            try await exerciser.map()
        },
    ]

    // MARK: Opening

    private func open(_ words: [String]) async throws(BlockError) {
        guard edge == nil else {
            throw BlockError(.busy, "an image is open already", remedy: "try 'help close'")
        }
        let arguments = try ExerciserArguments(words, known: "Cd:i:kno:rst:U", command: "open")
        guard arguments.rest.count <= 1 else {
            throw BlockError(.invalidArgument, "open takes one path")
        }
        var source = standard
        if arguments.has("n") { source.cache = .none }
        if let mode = arguments.value("t") { source.cache = try CacheMode(named: mode) }
        if let mode = arguments.value("d") {
            source.discards = try ImageSource.discards(mode: mode)
        }
        if arguments.has("k") { source.asynchronousIO = "native" }
        if let mode = arguments.value("i") { source.asynchronousIO = mode }
        if arguments.has("r") { source.isWritable = false }
        if arguments.has("C") { source.copiesOnRead = source.isWritable }
        if arguments.has("s") { source.isTemporary = source.isWritable }
        if arguments.has("U") { source.sharesAll = true }
        switch (arguments.rest.first, arguments.value("o")) {
        case (nil, nil):
            throw BlockError(.invalidArgument, "open needs a path, or options with -o")
        case (let path?, nil):
            source.name = path
        case (let path, let options?):
            try source.take(options: options, path: path)
        }
        try await open(source)
    }

    // MARK: Size and state

    private func truncate(_ words: [String]) async throws(BlockError) {
        let arguments = try ExerciserArguments(words, known: "m:", command: "truncate")
        guard arguments.rest.count == 1 else {
            throw BlockError(.invalidArgument, "truncate needs one size")
        }
        let size = try ExerciserArguments.bytes(arguments.rest[0])
        var preallocation = Preallocation.off
        if let mode = arguments.value("m") {
            guard let known = Preallocation(rawValue: mode) else {
                throw BlockError(
                    .invalidArgument, "there is no preallocation '\(mode)'",
                    remedy: "use off, metadata, falloc or full")
            }
            preallocation = known
        }
        try await image().resize(to: size, preallocation)
    }

    private func info() async throws(BlockError) {
        var node = try image().node
        // What stands above the image for -C is no part of it.
        if node.description.name == "copy-on-read", let child = node.filteredChild {
            node = child.node
        }
        let information = try await node.driver.information
        var text = "format name: \(node.description.name)\n"
        text += "cluster size: \(ExerciserReport.bytes(information.clusterSize))\n"
        text += "vm state offset: \(ExerciserReport.bytes(vmStateOffset(node, information)))\n"
        if let data = information.formatSpecific?["data"] {
            text += ImageInfo.specificText(data)
        }
        output(text)
    }

    /// Where saved state of a machine begins: what one L1 entry covers, past the guest's disk.
    private func vmStateOffset(_ node: BlockNode, _ information: NodeInformation) -> Int {
        guard node.description.name == "qcow2", information.clusterSize > 0 else { return 0 }
        let isExtended = information.formatSpecific?["data"]?["extended-l2"] == true
        let entries = information.clusterSize / (isExtended ? 16 : 8)
        let covered = information.clusterSize.multiplied(by: entries) ?? .max
        return node.size.roundedUp(to: covered) ?? 0
    }

    // MARK: Allocation

    private func alloc(_ words: [String]) async throws(BlockError) {
        let offset = try ExerciserArguments.bytes(words[0])
        let wanted = words.count > 1 ? try ExerciserArguments.bytes(words[1]) : 512
        let edge = try image()
        let count = min(wanted, max(0, edge.size - offset))
        var allocated = 0
        let walk = StatusWalk(edge, .top)
        var done = 0
        while done < count {
            let status = try await walk.run(at: offset + done, limit: offset + count)
            if status.flags.contains(.allocated) { allocated += status.count }
            done += status.count
        }
        output(
            "\(allocated)/\(count) bytes allocated at offset \(ExerciserReport.bytes(offset))\n")
    }

    private func map() async throws(BlockError) {
        let edge = try image()
        var start = 0
        var offset = 0
        var isAllocated: Bool?
        func show() {
            guard let isAllocated, offset > start else { return }
            let count = offset - start
            output(
                "\(ExerciserReport.bytes(count)) (0x\(String(count, radix: 16))) bytes "
                    + "\(isAllocated ? "    allocated" : "not allocated") at offset "
                    + "\(ExerciserReport.bytes(start)) (0x\(String(start, radix: 16)))\n")
        }
        let walk = StatusWalk(edge, .top)
        while offset < edge.size {
            let status = try await walk.run(at: offset, limit: edge.size)
            let next = status.flags.contains(.allocated)
            if next != isAllocated {
                show()
                start = offset
                isAllocated = next
            }
            offset += status.count
        }
        show()
    }
}

extension ImageSource {
    /// Reads node options as `-o` takes them, nested.
    static func nodeOptions(_ text: String) throws(BlockError) -> JSONObject {
        guard case .object(let options) = try KeyValue.parse(text).nestingDottedKeys() else {
            throw BlockError(.invalidArgument, "'\(text)' are no options")
        }
        return options
    }

    /// Opens by node options from here on, or by a name with node options beside it.
    mutating func take(options text: String, path: String?) throws(BlockError) {
        var options = try Self.nodeOptions(text)
        guard !isOptions else {
            throw ExerciserArguments.misuse("--image-opts and 'open -o' are mutually exclusive")
        }
        guard let path else {
            if let format, options["driver"] == nil { options["driver"] = .string(format) }
            return take(options)
        }
        guard case .path(let file) = ImageName.kind(path) else {
            // What such a name stands for has a file of its own.
            guard options["file"] == nil else { throw Self.twoFiles(path) }
            if case .string(let driver)? = options["driver"] { format = driver }
            options["driver"] = nil
            name = path
            more = options
            return
        }
        if let format, options["driver"] == nil { options["driver"] = .string(format) }
        if case .string(let driver)? = options["driver"],
            try ToolSession.registry.driver(named: driver).kind == .storage
        {
            guard options["filename"] == nil else { throw Self.twoFiles(path) }
            options["filename"] = .string(file)
            return take(options)
        }
        var storage = JSONObject()
        if let given = options["file"] {
            guard case .object(let object) = given, object["filename"] == nil else {
                throw Self.twoFiles(path)
            }
            storage = object
        }
        storage["filename"] = .string(file)
        options["file"] = .object(storage)
        take(options)
    }

    private mutating func take(_ options: JSONObject) {
        format = nil
        isOptions = true
        name = JSONValue.object(options).text()
    }

    private static func twoFiles(_ path: String) -> BlockError {
        BlockError(
            .invalidArgument, "the options name a file already: '\(path)' cannot be it too",
            remedy: "give one of them")
    }
}
