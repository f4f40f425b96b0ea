"""Benchmarks that ship with the package: `offload bench plan` holds predictions to what is measured afterwards."""
