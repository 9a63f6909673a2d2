"""Golden tensors: recorded from the reference, read back as cases, run on a session and compared."""
