"""The training loop, one step of it, checkpoints, and scores of frozen models."""
