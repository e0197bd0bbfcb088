"""The HTML page, one file with everything in it."""
