// JSON values, options and the QMP wire protocol: pure, no I/O.
