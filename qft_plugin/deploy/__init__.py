"""From a quantized model to a file that a runtime reads, and the proof that it computes the same."""
