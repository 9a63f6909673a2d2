"""What is on the device: bundles, engines, sessions, runtime. Never imports torch, transformers, onnx or star_export."""
