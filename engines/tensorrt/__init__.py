"""Compile a bundle's ONNX files to TensorRT plans, and check plans before use. Imports without TensorRT."""
