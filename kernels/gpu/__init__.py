"""Ops for CUDA devices, written with Triton: one file an op, named after the op. Imported as offload.kernels.gpu.

Belongs here: ops that save a pass over device memory or a trip over the link, each beside the plain torch reference
that offload.kernels holds it to. Nothing else: which op runs, and why, is said by offload.kernels.
"""
