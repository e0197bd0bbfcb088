"""Latency, throughput and memory, model by model, in turns."""
