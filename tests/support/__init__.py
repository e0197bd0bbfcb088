"""What tests share: tiny models and data, and ways to run commands."""
