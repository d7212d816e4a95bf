"""From a source on disk to batches on the device."""
