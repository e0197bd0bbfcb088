"""Sources, rows, their order, pictures and token ids."""
