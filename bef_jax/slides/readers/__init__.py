"""The libraries that read slides, each behind the same interface."""
