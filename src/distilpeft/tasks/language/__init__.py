"""What language models share, and their two tasks."""
