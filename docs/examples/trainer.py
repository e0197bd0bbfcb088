"""Distil a classifier with a transformers Trainer and distilpeft's loss.

python docs/examples/trainer.py TEACHER STUDENT ROWS.csv     # columns text and label
"""

from __future__ import annotations

import sys

import datasets
import transformers

from distilpeft.losses import DistilTrainer


def main(teacher_name: str, student_name: str, rows_file: str) -> None:
    """Train for one epoch."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(student_name)
    teacher, student = (
        transformers.AutoModelForSequenceClassification.from_pretrained(name) for name in (teacher_name, student_name)
    )
    rows = datasets.load_dataset("csv", data_files=rows_file)["train"]
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=128), remove_columns="text")
    trainer = DistilTrainer(
        model=student,
        teacher=teacher,
        alpha=0.9,
        temperature=2.0,
        args=transformers.TrainingArguments(output_dir="distilled", num_train_epochs=1, report_to=[]),
        train_dataset=rows,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:4])
