"""From a bundle's ONNX to TensorRT plans, and plans checked before they are used. Imports without TensorRT."""
