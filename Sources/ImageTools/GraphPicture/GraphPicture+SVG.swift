// Layers from the top: each box below all that use it, beside the others of its layer in the order in
// which its users come.

extension GraphPicture {
    private static let boxHeight = 74
    private static let gap = (x: 30, y: 56)
    private static let characterWidth = 8
    private static let boxWidthMin = 120

    /// The graph as a picture that stands alone.
    public var svg: String {
        let places = layout()
        let width = places.map { $0.x + $0.width }.max() ?? 0
        let height = places.map { $0.y + Self.boxHeight }.max() ?? 0
        let margin = 20
        var output = """
            <svg xmlns="http://www.w3.org/2000/svg" viewBox="\(-margin) \(-margin) \
            \(width + 2 * margin) \(height + 2 * margin)" font-family="sans-serif" font-size="13">
            <defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" \
            markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>

            """
        for line in lines { output += Self.drawn(line, places[line.parent], places[line.child]) }
        for (box, place) in zip(boxes, places) { output += Self.drawn(box, place) }
        return output + "</svg>\n"
    }

    private struct Place {
        var x = 0
        var y = 0
        var width = 0
        var centre: Int { x + width / 2 }
    }

    private func layout() -> [Place] {
        let layers = layerNumbers()
        var places = boxes.map { box in
            let longest = ([box.title] + box.details).map(\.count).max() ?? 0
            return Place(width: max(Self.boxWidthMin, longest * Self.characterWidth + 16))
        }
        let order = visitOrder()
        for layer in 0...(layers.max() ?? 0) {
            var x = 0
            for box in order where layers[box] == layer {
                // Not left of its first user, where there is room.
                let users = lines.filter { $0.child == box }.map { places[$0.parent].centre }
                let wanted = (users.min() ?? 0) - places[box].width / 2
                places[box].x = max(x, wanted)
                places[box].y = layer * (Self.boxHeight + Self.gap.y)
                x = places[box].x + places[box].width + Self.gap.x
            }
        }
        return places
    }

    /// The longest way from a top to each box. Block graphs have no cycles.
    private func layerNumbers() -> [Int] {
        var result = [Int](repeating: 0, count: boxes.count)
        var isSettled = false
        var rounds = 0
        while !isSettled, rounds <= boxes.count {
            isSettled = true
            rounds += 1
            for line in lines where result[line.child] <= result[line.parent] {
                result[line.child] = result[line.parent] + 1
                isSettled = false
            }
        }
        return result
    }

    /// Boxes as the text names them first.
    private func visitOrder() -> [Int] {
        var order: [Int] = []
        var seen = Set<Int>()
        var rest = Array(tops.reversed())
        while let box = rest.popLast() {
            guard seen.insert(box).inserted else { continue }
            order.append(box)
            rest += lines(below: box).map(\.child).reversed()
        }
        return order + boxes.indices.filter { !seen.contains($0) }
    }

    private static func drawn(_ line: Line, _ parent: Place, _ child: Place) -> String {
        let (x1, y1) = (parent.centre, parent.y + boxHeight)
        let (x2, y2) = (child.centre, child.y)
        return """
            <path d="M\(x1) \(y1)L\(x2) \(y2)" stroke="#555" fill="none" marker-end="url(#tip)"/>
            <text x="\((x1 + x2) / 2 + 6)" y="\((y1 + y2) / 2)" fill="#555">\(escaped(line.name))</text>

            """
    }

    private static func drawn(_ box: Box, _ place: Place) -> String {
        var output = """
            <rect x="\(place.x)" y="\(place.y)" width="\(place.width)" height="\(boxHeight)" \
            rx="\(box.isUser ? 14 : 3)" fill="\(box.isUser ? "#eef6ff" : "#fffdf5")" \
            stroke="#333"/>

            """
        for (index, text) in ([box.title] + box.details).enumerated() {
            let weight = index == 0 ? " font-weight=\"bold\"" : ""
            output += """
                <text x="\(place.centre)" y="\(place.y + 20 + index * 16)" \
                text-anchor="middle"\(weight)>\(escaped(text))</text>

                """
        }
        return output
    }

    private static func escaped(_ text: String) -> String {
        text.unicodeScalars.map { scalar in
            switch scalar {
            case "<": return "&lt;"
            case ">": return "&gt;"
            case "&": return "&amp;"
            case "\"": return "&quot;"
            // What XML 1.0 has no way to say.
            case _ where scalar.value < 0x20: return " "
            default: return String(scalar)
            }
        }.joined()
    }
}
