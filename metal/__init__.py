"""Kernel sources: one per kernel, and what an NVIDIA GPU needs to read them."""
