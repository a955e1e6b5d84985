import BlockCore
import QMP
import Testing

@Suite struct SessionTests {
    static let schema = Schema(
        commands: [
            CommandSchema(
                "qmp_capabilities", .optional("enable", .array(.named("QMPCapability")))),
            CommandSchema("ask", .required("what", .string), .optional("times", .integer)),
            CommandSchema("look", allowsOutOfBand: true),
            CommandSchema("open", argumentsOf: "Shape"),
            CommandSchema("find", absence: .deviceNotFound),
        ],
        events: [EventSchema("HAPPENED", .required("id", .string))],
        definitions: [
            "QMPCapability": .enumeration(["oob"]),
            "Shape": .object(
                ObjectSchema(
                    [.required("kind", .named("Kind"))], tag: "kind",
                    variants: [.init("circle", "Circle")])),
            "Kind": .enumeration(["circle", "point"]),
            "Circle": .object(
                ObjectSchema([.required("radius", .integer), .optional("in", .named("ShapeRef"))])),
            "ShapeRef": .alternate([.named("Shape"), .string]),
        ])

    private var session = QMPSession(Self.schema)

    /// What the session does with `text`: replies as text, commands as `run NAME`.
    private mutating func answers(_ text: String) -> [String] {
        session.receive(Array(text.utf8))
        var result: [String] = []
        while let step = session.next() { result.append(describe(step)) }
        return result
    }

    private func describe(_ step: QMPSession.Step) -> String {
        switch step {
        case .send(let bytes): String(decoding: bytes.dropLast(2), as: UTF8.self)
        case .run(let request): "run \(request.command.name)"
        }
    }

    private mutating func negotiate(_ arguments: String = "{}") {
        _ = answers("{\"execute\": \"qmp_capabilities\", \"arguments\": \(arguments)}")
    }

    @Test func theGreetingNamesTheVersionOfTheInterface() throws {
        let greeting = try JSONParser.parse(session.greeting)
        #expect(greeting["QMP"]?["version"]?["qemu"]?["major"] == 10)
        #expect(greeting["QMP"]?["capabilities"] == ["oob"])
    }

    @Test mutating func commandsNeedNegotiationFirst() {
        let early = answers("{\"execute\": \"look\", \"id\": 7}")
        #expect(early.count == 1 && early[0].contains("CommandNotFound"))
        #expect(early[0].contains("\"id\": 7"))
        #expect(
            answers("{\"execute\": \"qmp_capabilities\", \"id\": [1]}") == [
                #"{"return": {}, "id": [1]}"#
            ])
        #expect(answers("{\"execute\": \"look\"}") == ["run look"])
        #expect(answers("{\"execute\": \"qmp_capabilities\"}")[0].contains("CommandNotFound"))
    }

    @Test mutating func eventsWaitForNegotiation() {
        #expect(session.event("HAPPENED", ["id": "x"], microseconds: 1) == nil)
        negotiate()
        let bytes = session.event("HAPPENED", ["id": "x"], microseconds: 2_000_003)
        #expect(
            bytes.map { String(decoding: $0, as: UTF8.self) } == """
                {"timestamp": {"seconds": 2, "microseconds": 3}, "event": "HAPPENED", \
                "data": {"id": "x"}}\r\n
                """)
    }

    @Test(arguments: [
        ("{\"execute\": \"nothing\"}", "CommandNotFound"),
        ("{\"execute\": 1}", "GenericError"), ("{\"id\": 1}", "GenericError"),
        ("[1]", "GenericError"), ("{\"execute\": \"look\", \"more\": 1}", "more"),
        ("{\"execute\": \"look\", \"arguments\": []}", "arguments"),
        ("{\"execute\": \"ask\"}", "'what' is missing"),
        ("{\"execute\": \"ask\", \"arguments\": {\"what\": 1}}", "expects a string"),
        ("{\"execute\": \"ask\", \"arguments\": {\"what\": \"\", \"time\": 1}}", "'times'"),
        ("{\"execute\": \"open\", \"arguments\": {\"kind\": \"line\"}}", "circle, point"),
        ("{\"execute\": \"open\", \"arguments\": {\"kind\": \"circle\"}}", "'radius' is missing"),
        (
            "{\"execute\": \"open\", \"arguments\": {\"kind\": \"circle\", \"radius\": 1, \"in\": 2}}",
            "'in'"
        ),
        (
            "{\"execute\": \"open\", \"arguments\": {\"kind\": \"point\", \"radius\": 1}}",
            "unexpected"
        ),
        ("{\"exec-oob\": \"look\"}", "oob"),
        ("{\"execute\": \"look\", \"exec-oob\": \"look\"}", "exclude"),
    ])
    mutating func aWrongRequestGetsAnErrorThatSaysWhy(text: String, part: String) {
        negotiate()
        let replies = answers(text)
        #expect(replies.count == 1 && replies[0].contains(part), "\(text) gave \(replies)")
        #expect(answers("{\"execute\": \"look\"}") == ["run look"])
    }

    @Test(arguments: [
        ("find", BlockError.Code.notFound, "DeviceNotFound"), ("find", .busy, "GenericError"),
        ("look", .notFound, "GenericError"),
    ])
    mutating func whatIsAbsentHasTheClassThatItsCommandSays(
        command: String, code: BlockError.Code, kind: String
    ) throws {
        negotiate()
        session.receive(Array("{\"execute\": \"\(command)\"}".utf8))
        guard case .run(let request)? = session.next() else {
            Issue.record("the command is not run")
            return
        }
        let reply = try JSONParser.parse(
            session.reply(to: request, .failure(BlockError(code, "reason"))))
        #expect(reply["error"]?["class"] == .string(kind))
        #expect(reply["error"]?["desc"] == "reason")
    }

    @Test mutating func nestedObjectsAreCheckedThroughAlternates() {
        negotiate()
        for inner in ["\"name\"", "{\"kind\": \"point\"}"] {
            #expect(
                answers(
                    """
                    {"execute": "open", "arguments": {"kind": "circle", "radius": 1, "in": \(inner)}}
                    """) == ["run open"])
        }
    }

    @Test mutating func outOfBandOvertakesWhatWaits() {
        negotiate("{\"enable\": [\"oob\"]}")
        session.receive(
            Array(
                """
                {"execute": "ask", "arguments": {"what": "a"}}{"exec-oob": "look"}{"exec-oob": "ask"}
                """.utf8))
        #expect(session.nextOutOfBand().map(describe) == "run look")
        #expect(session.next().map(describe) == "run ask")
    }

    @Test mutating func whatWaitsIsBounded() {
        negotiate()
        let one = "{\"execute\": \"look\"}"
        session.receive(Array(String(repeating: one, count: 1000).utf8))
        #expect(!session.wantsBytes)
        var count = 0
        while session.next() != nil { count += 1 }
        #expect(count == 1000)
        #expect(session.wantsBytes)
    }

    @Test func introspectionNamesEveryTypeItUses() throws {
        guard case .array(let entities) = Self.schema.introspection else {
            Issue.record("no list")
            return
        }
        let names = Set(entities.map { $0["name"]?.text() ?? "" })
        #expect(names.count == entities.count)
        for entity in entities {
            for key in ["arg-type", "ret-type", "element-type"] {
                if let used = entity[key] { #expect(names.contains(used.text())) }
            }
            for list in ["members", "variants"] {
                guard case .array(let members)? = entity[list] else { continue }
                for member in members {
                    if let used = member["type"] { #expect(names.contains(used.text())) }
                }
            }
        }
        #expect(entities.contains { $0["name"] == "look" && $0["allow-oob"] == true })
        #expect(entities.contains { $0["tag"] == "kind" && $0["variants"] != nil })
    }
}
