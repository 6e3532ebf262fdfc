"""Sets of encodings: AIMET's and QNN's files, QDQ models; checked, compared, applied to a float model."""
