"""From a component of the reference to its ONNX graph: tracing, weight formats, dialects and the lint."""
