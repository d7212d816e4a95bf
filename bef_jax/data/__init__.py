"""From a source on disk to batches on the devices: source, store, batch, augmentation."""
