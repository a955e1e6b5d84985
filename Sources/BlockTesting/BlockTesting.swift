// Simulated disk, shadow model, conformance suite.
