"""A function of JAX as an ONNX graph, for inference by other runtimes."""
