"""A checkpoint becomes files for serving: StableHLO, ONNX and the format of timm."""
