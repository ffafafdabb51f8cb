"""Pairs of a better and a worse face: their file format, and how they are made by inpainting."""
