"""The plan: the fold of the effects, whether it fits, and the machines it can be for."""
