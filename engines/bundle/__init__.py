"""The bundle on a device: its manifest, its files and their hashes, and the names, axes and types of tensors."""
