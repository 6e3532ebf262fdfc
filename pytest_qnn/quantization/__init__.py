"""From a float model and calibration data to a QDQ model, on onnxruntime.quantization."""
