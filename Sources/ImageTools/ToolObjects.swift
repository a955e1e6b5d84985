import BlockCore
import BlockFilters
import BlockGraph
import QMP

// Objects that command lines make with `--object`, for the images they open and make.

extension ToolSession {
    /// Makes objects from `type,id=…,key=value…` or JSON with `qom-type`; what is there already stays.
    ///
    /// - Throws: `unsupported` for types that images do not use.
    public func add(objects texts: [String]) async throws(BlockError) {
        for text in texts where !madeObjects.contains(text) {
            let options = try OptionReader(
                try KeyValue.parse(text, impliedKey: "qom-type"), of: "--object")
            guard let type = try options.string("qom-type"),
                let identifier = try options.string("id"), !identifier.isEmpty
            else {
                throw BlockError(
                    .invalidArgument, "--object needs a type and an 'id'",
                    remedy: "as in --object secret,id=key,file=passphrase.txt")
            }
            // A secret's text stays out of messages.
            options.subject = "object '\(identifier)' (\(type))"
            let object: any GraphObject
            if let kind = GraphSecret.Kind(rawValue: type) {
                object = try await GraphSecret.read(kind, options, in: graph)
            } else if type == "throttle-group" {
                let limits = try ThrottleGroup.properties(options)
                object = try ThrottleGroup(identifier, limits, on: thread)
            } else {
                throw BlockError(
                    .unsupported, "\(options.subject): images do not use objects of this type",
                    remedy: "use secret, secret_keyring or throttle-group")
            }
            try graph.addObject(object, as: identifier)
            madeObjects.insert(text)
        }
    }
}
