// The NBD protocol as codecs and state machines: pure, no I/O.
