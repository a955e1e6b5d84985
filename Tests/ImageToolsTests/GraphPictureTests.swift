import BlockCore
import Testing

@testable import ImageTools

@Suite struct GraphPictureTests {
    /// Two users over a filter and a disk; the disk's file has a name that every form must quote.
    private static let fleecing = GraphPicture(
        boxes: [
            .init(title: "cbw", details: ["copy-before-write", "1 GiB"]),
            .init(title: "disk", details: ["file", "1 GiB", "a<b>\"c\\d&"]),
            .init(title: "temp", details: ["file"]),
            .init(title: "access", details: ["snapshot-access"]),
            .init(title: "export guest", isUser: true),
            .init(title: "export frozen", isUser: true),
        ],
        lines: [
            .init(parent: 0, child: 1, name: "file"), .init(parent: 0, child: 2, name: "target"),
            .init(parent: 3, child: 0, name: "file"), .init(parent: 4, child: 0, name: "root"),
            .init(parent: 5, child: 3, name: "root"),
        ])

    @Test func textDrawsSharedNodesOnce() {
        #expect(
            Self.fleecing.text == """
                export guest
                └─ root: cbw  copy-before-write, 1 GiB
                   ├─ file: disk  file, 1 GiB, a<b>"c\\d&
                   └─ target: temp  file
                export frozen
                └─ root: access  snapshot-access
                   └─ file: cbw  (above)

                """)
    }

    @Test func dotNamesAllBoxesAndLines() {
        let dot = Self.fleecing.dot
        #expect(dot.contains("n1 [label=\"disk\\nfile\\n1 GiB\\na<b>\\\"c\\\\d&\"];"))
        #expect(dot.contains("n5 [label=\"export frozen\", style=rounded];"))
        #expect(dot.contains("n3 -> n0 [label=\"file\"];"))
        #expect(dot.split(separator: "\n").filter { $0.contains("->") }.count == 5)
    }

    @Test func svgDrawsEachBoxBelowItsUsersAndBesideTheOthers() throws {
        let svg = Self.fleecing.svg
        #expect(svg.contains("a&lt;b&gt;&quot;c\\d&amp;"))
        let boxes = svg.matches(of: /<rect x="(\d+)" y="(\d+)" width="(\d+)"/).compactMap { match in
            rectangle(Int(match.1), Int(match.2), Int(match.3))
        }
        try #require(boxes.count == 6)
        for line in Self.fleecing.lines {
            #expect(boxes[line.child].y > boxes[line.parent].y)
        }
        for (index, box) in boxes.enumerated() {
            for other in boxes[(index + 1)...] where other.y == box.y {
                #expect(other.x >= box.x + box.width || box.x >= other.x + other.width)
            }
        }
    }

    private func rectangle(_ x: Int?, _ y: Int?, _ width: Int?) -> (x: Int, y: Int, width: Int)? {
        guard let x, let y, let width else { return nil }
        return (x, y, width)
    }

    @Test func aDaemonsAnswersBecomeAPicture() throws {
        let picture = try GraphPicture(
            graph: [
                "nodes": [
                    ["id": 1, "type": "block-backend", "name": "guest"],
                    ["id": 2, "type": "block-driver", "name": "disk"],
                ],
                "edges": [
                    ["parent": 1, "child": 2, "name": "root", "perm": [], "shared-perm": []]
                ],
            ],
            nodes: [
                [
                    "node-name": "disk", "drv": "file", "ro": true, "file": "/disk",
                    "children": [], "image": ["virtual-size": 1048576],
                ]
            ])
        #expect(
            picture.text == """
                export guest
                └─ root: disk  file, 1 MiB, read-only, /disk

                """)
    }

    @Test func anAnswerThatIsNoGraphIsAnError() {
        #expect(throws: BlockError.self) { try GraphPicture(graph: ["nodes": []], nodes: []) }
        #expect(throws: BlockError.self) {
            try GraphPicture(graph: ["nodes": [["id": "x"]], "edges": []], nodes: [])
        }
        #expect(throws: BlockError.self) {
            try GraphPicture(
                graph: ["nodes": [], "edges": [["parent": 1, "child": 2, "name": "x"]]], nodes: [])
        }
    }
}
