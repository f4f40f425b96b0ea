"""Ops for the CPU, written with numba: one file an op, named after the op. Imported as offload.kernels.cpu.

Belongs here: loops over weights that read memory faster than torch's own op does, each beside the plain torch
reference that offload.kernels holds it to. Nothing else: which op runs, and why, is said by offload.kernels.
"""
