"""What XLA reports of a compiled program, for one device; None where it reports nothing."""

import jax


def memory_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Returns the bytes of memory that a device needs while the program runs."""
    sizes = compiled.memory_analysis()
    if sizes is None:
        return None
    # Count a donated array once, because its output aliases its argument.
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return held + sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes


def flops(compiled: jax.stages.Compiled) -> float | None:
    """Returns the floating-point operations of a call; XLA counts one turn of each loop."""
    return _cost(compiled, "flops")


def bytes_accessed(compiled: jax.stages.Compiled) -> float | None:
    """Returns the bytes that operations read and write; XLA counts one turn of each loop."""
    return _cost(compiled, "bytes accessed")


def _cost(compiled: jax.stages.Compiled, name: str) -> float | None:
    value = (compiled.cost_analysis() or {}).get(name, -1)
    return value if value > 0 else None  # some backends say -1 for unknown
