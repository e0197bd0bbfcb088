"""Distil a causal language model in a loop of one's own, without ever holding all logits.

python docs/examples/own_loop.py TEACHER STUDENT TEXT_FILE
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distilpeft.losses import fused_distil_loss


def main(teacher_name: str, student_name: str, text_file: str) -> None:
    """Train for one pass over the lines of a file."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_name)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_name).eval()
    student = AutoModelForCausalLM.from_pretrained(student_name).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    lines = [line for line in Path(text_file).read_text(encoding="utf-8").splitlines() if line.strip()]
    for start in range(0, len(lines), 8):
        batch = tokenizer(lines[start : start + 8], return_tensors="pt", padding=True, truncation=True, max_length=256)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with torch.no_grad():
            known = teacher.get_decoder()(**batch).last_hidden_state
        hidden = student.get_decoder()(**batch).last_hidden_state
        loss = fused_distil_loss(
            hidden, student.lm_head, (known, teacher.lm_head), labels, alpha=0.9, temperature=2.0, shift=True
        )
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        print(f"{start + 8}/{len(lines)} lines, loss {loss.item():.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
