"""A tokenizer cut to the tokens that a task needs: which tokens those are, and its file without the others."""
