"""What each task makes of rows and logits: one file per task."""
