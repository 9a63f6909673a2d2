"""The compiler and the command line: the only package that knows both the reference and the device."""
