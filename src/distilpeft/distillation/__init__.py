"""The loss, and soft targets as tensors, bytes and files."""
