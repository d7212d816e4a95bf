"""The stages of gpu_check.py. A stage prints its record again whenever the record has grown."""

import json


def emit(record: dict) -> None:
    """Prints the record as it is so far, as a line of JSON."""
    print(json.dumps(record), flush=True)
