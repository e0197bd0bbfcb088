"""Write scikit-learn's handwritten digits as pictures, and two image models with random weights to be taught on them.

    python recipes/make_digit_pictures.py

The digits are 1,797 grey pictures of 8 x 8 points (UCI, BSD). Leaves {train,validation,test}.parquet in
~/.cache/distilpeft/data/digits, and ResNets, a larger and a smaller one, in ~/.cache/distilpeft/models/digits_teacher
and digits_student. No pretrained image model comes as a package: both know nothing yet.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ResNetConfig, ResNetForImageClassification

ROWS = Path("~/.cache/distilpeft/data/digits").expanduser()
MODELS = Path("~/.cache/distilpeft/models").expanduser()
PARTS = {"train": slice(0, 1097), "validation": slice(1097, 1297), "test": slice(1297, None)}
SIZE = 32
READER = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": SIZE, "width": SIZE},
    "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}  # fmt: skip
SIZES = {
    "digits_teacher": {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1]},
    "digits_student": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
}


def png(points: np.ndarray) -> bytes:
    """A picture of 8 x 8 points from 0 to 16."""
    file = io.BytesIO()
    Image.fromarray((points * 255 / 16).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def main() -> None:
    """Write rows and models."""
    digits = load_digits()
    order = np.random.default_rng(7).permutation(len(digits.target))
    ROWS.mkdir(parents=True, exist_ok=True)
    for name, part in PARTS.items():
        rows = {
            "image": [{"bytes": png(digits.images[at]), "path": None} for at in order[part]],
            "digit": [str(digits.target[at]) for at in order[part]],
        }
        features = datasets.Features({"image": datasets.Image(), "digit": datasets.Value("string")})
        datasets.Dataset.from_dict(rows, features).to_parquet(str(ROWS / f"{name}.parquet"))
        print(f"{ROWS / name}.parquet: {len(rows['digit'])} pictures")
    for name, sizes in SIZES.items():
        torch.manual_seed(17)
        model = ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic", num_labels=10))
        model.save_pretrained(str(MODELS / name))
        (MODELS / name / "preprocessor_config.json").write_text(json.dumps(READER, indent=1), encoding="utf-8")
        print(f"{MODELS / name}: {model.num_parameters() / 1e3:.0f} thousand weights, random")


if __name__ == "__main__":
    main()
