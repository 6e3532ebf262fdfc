"""Programs that execute a model: onnxruntime with the QNN execution provider, and the onnxruntime reference."""
