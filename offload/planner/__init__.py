"""Decides what lives where and in which order it moves. Sees numbers only: never a tensor or a file."""
