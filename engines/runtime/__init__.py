"""Running STAR on a device: the decode loops, the KV cache, the sampler, and `Star`, which combines them."""
