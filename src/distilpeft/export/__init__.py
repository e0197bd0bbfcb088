"""Deployable files: formats, the gate, runtimes, bundles and the model card."""
