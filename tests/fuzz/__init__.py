"""A fuzzer over everything that comes from outside.

    python -m tests.fuzz --count=10000 --seed=0

prints how many inputs each entry point accepted and refused, and keeps those that failed under
tests/fuzz/corpus, which test_fuzz.py runs.
"""
