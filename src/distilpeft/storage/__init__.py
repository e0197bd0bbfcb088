"""What runs leave on disk: lists of them, and clearing away what nothing refers to any more."""
