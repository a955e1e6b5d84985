import BlockCore
import QMP
import Testing

@Suite struct KeyValueTests {
    @Test(arguments: [
        ("driver=qcow2,node-name=x", #"{"driver": "qcow2", "node-name": "x"}"#),
        (
            "qcow2,file.driver=file,file.filename=a,,b",
            #"{"driver": "qcow2", "file": {"driver": "file", "filename": "a,b"}}"#
        ),
        ("children.0=a,children.1.driver=b", #"{"children": ["a", {"driver": "b"}]}"#),
        ("a=x=y", #"{"a": "x=y"}"#),
        ("a=", #"{"a": ""}"#),
        ("a=1,a=2", #"{"a": "2"}"#),
        (#"{"a": [1, true]}"#, #"{"a": [1, true]}"#),
        ("", "{}"),
    ])
    func textBecomesAnObject(text: String, expected: String) throws {
        #expect(try KeyValue.parse(text, impliedKey: "driver").text() == expected)
    }

    @Test(arguments: [
        "a=1,b", "a=1,,", "a..b=1", "a=1,a.b=2", "a.b=1,a=2", "l.0=a,l.2=b", "l.0=a,l.x=b", "=1",
        "{", "a b=1", ",a=1",
    ])
    func whatMakesNoSenseIsRefused(text: String) {
        if text == "a=1,," {
            // Two commas are one, in the value.
            #expect(throws: Never.self) { try KeyValue.parse(text) }
        } else {
            #expect(throws: BlockError.self) { try KeyValue.parse(text) }
        }
    }

    @Test func flagsAreSwitchedOnOrOff() throws {
        let value = try KeyValue.parse(
            "socket,id=a,server,nowait", impliedKey: "backend", allowsFlags: true)
        #expect(value == ["backend": "socket", "id": "a", "server": "on", "wait": "off"])
    }

    @Test(
        arguments: [
            ("help", true, nil), ("?,id=x", true, nil), ("socket,help", true, "socket"),
            ("id=x,backend=socket,?", true, "socket"), ("socket,id=help", false, nil),
            ("backend=help", false, nil), ("socket,path=a,,help", false, nil),
            ("{help", false, nil),
            ("", false, nil),
        ] as [(String, Bool, String?)])
    func helpIsAskedForByAWordByItself(text: String, isAsked: Bool, subject: String?) {
        let request = KeyValue.helpRequest(in: text, impliedKey: "backend")
        #expect((request != nil) == isAsked)
        #expect(request?.subject == subject)
    }
}
