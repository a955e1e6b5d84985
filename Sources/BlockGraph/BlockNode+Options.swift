import QMP

extension BlockNode {
    /// The options that reopen it as it is: what was given when it was opened, and the same of all nodes that
    /// were opened together with it. Others below it stand there by their names.
    public var presentOptions: JSONObject {
        var options = openedWith
        options["node-name"] = .string(name)
        for edge in children {
            let child = edge.node
            options[edge.name] =
                child.openedFor === edge ? .object(child.presentOptions) : .string(child.name)
        }
        return options
    }
}
