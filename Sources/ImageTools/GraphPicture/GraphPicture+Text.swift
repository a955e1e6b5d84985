extension GraphPicture {
    /// The graph as an indented tree: a node that several use is drawn whole once, then named.
    ///
    ///     export guest
    ///     └─ root: cbw  copy-before-write, 1 GiB
    ///        ├─ file: disk  qcow2, 1 GiB
    ///        …
    public var text: String {
        var drawing = TextDrawing(picture: self)
        for top in tops { drawing.draw(top, name: nil, indent: "", isLast: true) }
        return drawing.output
    }

    private struct TextDrawing {
        let picture: GraphPicture
        var output = ""
        private var drawn = Set<Int>()

        init(picture: GraphPicture) {
            self.picture = picture
        }

        mutating func draw(_ box: Int, name: String?, indent: String, isLast: Bool) {
            let isAgain = drawn.contains(box)
            drawn.insert(box)
            var line = indent
            if let name { line += (isLast ? "└─ " : "├─ ") + name + ": " }
            line += picture.boxes[box].title
            let details = picture.boxes[box].details
            if isAgain {
                line += "  (above)"
            } else if !details.isEmpty {
                line += "  " + details.joined(separator: ", ")
            }
            output += line + "\n"
            guard !isAgain else { return }
            let below = picture.lines(below: box)
            let inner = name == nil ? indent : indent + (isLast ? "   " : "│  ")
            for (index, edge) in below.enumerated() {
                draw(
                    edge.child, name: edge.name, indent: inner, isLast: index == below.count - 1)
            }
        }
    }

    /// The graph in the language of Graphviz.
    public var dot: String {
        var output = "digraph blocks {\n    node [shape=box, fontname=\"sans-serif\"];\n"
        for (index, box) in boxes.enumerated() {
            let label = ([box.title] + box.details).map(Self.quoted).joined(separator: "\\n")
            let style = box.isUser ? ", style=rounded" : ""
            output += "    n\(index) [label=\"\(label)\"\(style)];\n"
        }
        for line in lines {
            output +=
                "    n\(line.parent) -> n\(line.child) [label=\"\(Self.quoted(line.name))\"];\n"
        }
        return output + "}\n"
    }

    private static func quoted(_ text: String) -> String {
        text.map { character in
            switch character {
            case "\"", "\\": "\\\(character)"
            case "\n": " "
            default: String(character)
            }
        }.joined()
    }
}
