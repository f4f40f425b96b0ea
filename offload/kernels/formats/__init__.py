"""Matrices in fewer bits: what their planes mean, and how they are made and undone in plain torch. One file each."""
