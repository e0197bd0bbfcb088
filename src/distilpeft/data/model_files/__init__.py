"""What a model's files say before any weight is loaded: classes, quantization, adapters, tokens, positions."""
