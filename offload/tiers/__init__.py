"""Where tensors live: the accelerator's memory, main memory, files. A tier knows nothing of schedules."""
