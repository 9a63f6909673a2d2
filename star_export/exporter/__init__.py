"""Export of a checkpoint to a bundle: the pipeline, the model's description, and publishing."""
