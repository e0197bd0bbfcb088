"""What a base may bring besides plain weights: a finished head, quantized weights, a PEFT adapter."""
