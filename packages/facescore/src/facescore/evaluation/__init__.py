"""How well a score agrees with preferences: the statistics, scores that need no training, and scorers side by side."""
