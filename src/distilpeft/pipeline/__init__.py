"""One run: the chain of stages, and which process does which step."""
