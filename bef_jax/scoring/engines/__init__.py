"""Scoring on a CPU by an inference engine, in place of JAX, where one is installed and faster."""
