import QMP
import Testing

@Suite struct DottedKeysTests {
    @Test(arguments: [
        (
            #"{"file.filename": "x", "driver": "raw"}"#,
            #"{"file": {"filename": "x"}, "driver": "raw"}"#
        ),
        (#"{"a.b": 1, "a": {"c.d": 2}}"#, #"{"a": {"b": 1, "c": {"d": 2}}}"#),
        (#"{"a": {"b.c": null}}"#, #"{"a": {"b": {"c": null}}}"#),
        (#"{"a.1": 2, "a.0": 1}"#, #"{"a": [1, 2]}"#),
        (#"{"a.0.b": 1}"#, #"{"a": [{"b": 1}]}"#),
        (#"{"a": {}, "b": [{"c.d": 1}]}"#, #"{"a": {}, "b": [{"c": {"d": 1}}]}"#),
        (#"{}"#, #"{}"#),
    ]) func nest(text: String, expected: String) throws {
        let nested = try JSONParser.parse(text).nestingDottedKeys()
        #expect(try nested == JSONParser.parse(expected))
    }

    @Test(arguments: [
        #"{"a.b": 1, "a": 2}"#, #"{"a": 2, "a.b": 1}"#, #"{"a.b": 1, "a": {"b": 2}}"#,
        #"{"a..b": 1}"#, #"{".a": 1}"#, #"{"a.1": 1}"#, #"{"a.0": 1, "a.b": 2}"#,
        "{\"" + String(repeating: "a.", count: 5000) + "a\": 1}",
    ]) func contradictionsAreRefused(text: String) throws {
        let value = try JSONParser.parse(text)
        #expect(throws: (any Error).self) { try value.nestingDottedKeys() }
    }
}
