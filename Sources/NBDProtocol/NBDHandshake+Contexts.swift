import BlockCore

// Metadata contexts (proto.md, "Metadata querying").

extension NBDHandshake {
    /// proto.md, `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`: 32-bit name length,
    /// name, 32-bit count of queries, and each query with its 32-bit length.
    mutating func answerMetaContext(
        _ option: NBDOption, _ data: ArraySlice<UInt8>, _ catalogue: some NBDExportCatalogue
    ) -> Action {
        // Whatever comes of it, an earlier selection ends here.
        if option == .setMetaContext { selection = nil }
        guard mode >= .structured else {
            return invalid(option, "metadata contexts need structured replies")
        }
        let request: MetaContextRequest
        switch MetaContextRequest.parse(data) {
        case .success(let parsed): request = parsed
        case .failure(let refusal):
            return reply(to: option.rawValue, refusal.type, refusal.text)
        }
        guard let name = name(request.name) else {
            return invalid(option, "the export's name is not UTF-8")
        }
        guard let export = catalogue.export(named: name) else {
            return reply(to: option.rawValue, .unknown, "export '\(name)' does not exist")
        }
        let contexts = matches(option, request.queries, export)
        var writer = NBDWriter()
        for (index, context) in contexts {
            let text = context.name
            writer.appendReply(to: option.rawValue, .metaContext, count: 4 + text.utf8.count)
            // A list gives names only: ids exist once contexts are selected.
            writer.append(option == .setMetaContext ? UInt32(index) : 0)
            writer.append(text)
        }
        writer.appendReply(to: option.rawValue, .acknowledge)
        if option == .setMetaContext {
            selection = (export.name, contexts.map(\.element))
        }
        return .send(writer.bytes)
    }

    /// The export's contexts that the queries ask for. A list without queries asks for all.
    private func matches(
        _ option: NBDOption, _ queries: Set<[UInt8]>, _ export: NBDExportInfo
    ) -> [(offset: Int, element: NBDContext)] {
        let lists = option == .listMetaContext
        return export.contexts.enumerated().filter { _, context in
            if lists, queries.isEmpty { return true }
            let names = lists ? context.listQueries : [context.name]
            return names.contains { queries.contains(Array($0.utf8)) }
        }
    }
}

/// The data of a metadata context option.
private struct MetaContextRequest {
    struct Refusal: Error {
        let type: NBDOptionReply
        let text: String
    }

    let name: ArraySlice<UInt8>
    /// Queries that could name a context here; the protocol asks to ignore all others.
    let queries: Set<[UInt8]>

    static func parse(_ data: ArraySlice<UInt8>) -> Result<MetaContextRequest, Refusal> {
        let tooShort = Result<MetaContextRequest, Refusal>
            .failure(Refusal(type: .invalid, text: "the data is too short"))
        var reader = NBDReader(data)
        guard let nameCount: UInt32 = reader.integer() else { return tooShort }
        guard nameCount <= NBDLimits.stringBytesMax else {
            return .failure(Refusal(type: .tooBig, text: "the export's name is too long"))
        }
        guard let name = reader.bytes(nameCount), let queryCount: UInt32 = reader.integer() else {
            return tooShort
        }
        var queries: Set<[UInt8]> = []
        for _ in 0..<queryCount {
            guard let count: UInt32 = reader.integer(), let query = reader.bytes(count) else {
                return tooShort
            }
            guard count <= NBDLimits.stringBytesMax else {
                return .failure(Refusal(type: .tooBig, text: "a query is too long"))
            }
            if query.starts(with: "base:".utf8) || query.starts(with: "qemu:".utf8) {
                queries.insert(Array(query))
            } else if queries.isEmpty {
                // Keeps "no queries at all" apart from "none that is known".
                queries.insert([])
            }
        }
        guard reader.isAtEnd else {
            return .failure(Refusal(type: .invalid, text: "the data is too long"))
        }
        return .success(MetaContextRequest(name: name, queries: queries))
    }
}
