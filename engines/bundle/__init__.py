"""Reading a bundle: its manifest, files and hashes, and the names, axes and dtypes of its tensors."""
