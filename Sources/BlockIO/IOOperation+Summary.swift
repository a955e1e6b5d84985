/// What an operation does, for trace points.
extension IOOperation {
    var summary: String {
        switch self {
        case .read(let handle, let vector, let offset):
            "read handle \(handle.rawValue) offset \(offset) bytes \(vector.count)"
        case .write(let handle, let vector, let offset, let durable):
            "write handle \(handle.rawValue) offset \(offset) bytes \(vector.count)"
                + (durable ? " durable" : "")
        case .synchronize(let handle, let dataOnly):
            "synchronize handle \(handle.rawValue)" + (dataOnly ? " data" : "")
        case .allocate(let handle, let mode, let range):
            "allocate handle \(handle.rawValue) mode \(mode) offset \(range.offset) "
                + "bytes \(range.count)"
        case .receive(let handle, let vector):
            "receive handle \(handle.rawValue) bytes \(vector.count)"
        case .send(let handle, let vector):
            "send handle \(handle.rawValue) bytes \(vector.count)"
        case .accept(let handle): "accept handle \(handle.rawValue)"
        case .connect(let handle, let address):
            "connect handle \(handle.rawValue) address \(address)"
        case .awaitReadable(let handle): "await_readable handle \(handle.rawValue)"
        case .awaitTaken(let handle, let time):
            "await_taken handle \(handle.rawValue) nanoseconds \(time)"
        }
    }
}
