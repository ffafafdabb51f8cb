"""Refining a diffusion model with face pairs and the reward: the losses, the pipelines they work on, the tuner."""
