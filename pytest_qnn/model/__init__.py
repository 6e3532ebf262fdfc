"""The ONNX file as data: tensors, encodings, digests."""
