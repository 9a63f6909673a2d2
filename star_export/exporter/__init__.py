"""A checkpoint becomes a bundle: the pipeline, what a device must know of the model, and publishing."""
