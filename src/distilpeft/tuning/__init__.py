"""Many runs: sweep, search and the learning-rate range test."""
