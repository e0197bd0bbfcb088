"""distilpeft: one recipe in; a small, fast, proven model out.

A large quantized teacher is tuned with LoRA, its soft logits are distilled into a compact student, both are
measured, and the student is exported. Start at `distilpeft.pipeline`; settings live in `distilpeft.recipe`.
Importing this package imports nothing heavy.
"""

__version__ = "0.1.0"
