"""The real client against a real server: `transformers serve` on loopback with the bundled model (make serve-test)."""
