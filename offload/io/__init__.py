"""Files and aligned buffers: what moves bytes between disk and host memory, and knows nothing of models."""
