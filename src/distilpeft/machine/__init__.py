"""This computer: processes, files, locks, artifacts, Accelerate."""
