"""The reward: the model, its checkpoints, scoring with it, and training it."""
