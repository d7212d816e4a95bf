"""Turns a checkpoint into files for serving: StableHLO, ONNX and timm's format."""
