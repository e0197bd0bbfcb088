"""Language models that are asked: prompts, and rows as prompts."""
