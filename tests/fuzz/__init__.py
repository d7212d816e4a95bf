"""A fuzzer for everything that comes from outside.

    python -m tests.fuzz --count=10000 --seed=0

This prints how many inputs each entry point accepted and refused. It keeps those that failed under
tests/fuzz/corpus, and test_fuzz.py reads them again.
"""
