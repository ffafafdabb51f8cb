"""Any diffusers pipeline, stopped after any denoising step and gone on with, with another text when wanted."""

from lcmis_align.sampling.sampler import Sampler, Snapshot, Warehouse

__all__ = ["Sampler", "Snapshot", "Warehouse"]
