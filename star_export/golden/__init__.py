"""Golden tensors: recorded from the reference, read as cases, run on a session and compared."""
