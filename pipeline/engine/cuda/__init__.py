"""Running on CUDA: the driver, the sampler's kernel, and the loop that decodes on the device."""
