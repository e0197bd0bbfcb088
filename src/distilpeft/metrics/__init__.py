"""Scores, intervals and paired tests in plain numpy."""
