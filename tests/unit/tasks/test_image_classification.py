"""Pictures into numbers, against transformers' processors on Pillow; views; and files that are no pictures."""

from __future__ import annotations

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image
from support.rows import checked
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from distilpeft.data import pictures
from distilpeft.errors import InputError
from distilpeft.export.card_code import snippet
from distilpeft.recipe.task import ImageClassification
from distilpeft.tasks.image_classification import ImageClassificationTask

RNG = np.random.default_rng(3)
TASK = ImageClassification(kind="image_classification", image="image", label="kind", labels=("cat", "dog"))
PROCESSORS = {
    "vit": ViTImageProcessorPil(size={"height": 24, "width": 32}),
    "bicubic": ViTImageProcessorPil(size={"height": 24, "width": 24}, resample=3, image_mean=[0.4, 0.5, 0.6]),
    "unnormalised": ViTImageProcessorPil(size={"height": 20, "width": 20}, do_normalize=False),
    "convnext": ConvNextImageProcessorPil(size={"shortest_edge": 28}, crop_pct=0.875),
    "convnext_large": ConvNextImageProcessorPil(size={"shortest_edge": 384}),
}


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    colours = RNG.integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(colours).convert(mode)


def reader(tmp_path, processor) -> pictures.Reader:
    processor.save_pretrained(str(tmp_path))
    return pictures.Reader.of(tmp_path / pictures.FILE, "model")


@pytest.mark.parametrize("name", list(PROCESSORS))
@pytest.mark.parametrize("size", [(50, 40), (33, 70), (24, 24)])
def test_a_picture_is_read_as_transformers_reads_it(tmp_path, name, size):
    processor, image = PROCESSORS[name], picture(*size)
    right = processor(image, return_tensors="np")["pixel_values"]
    ours = reader(tmp_path, processor)
    pixels = ours.pixels(image)
    assert pixels.shape == ours.shape == right.shape[1:]
    # resizing rounds to whole colours; ours does so once, on the whole picture
    np.testing.assert_allclose(ours.values(pixels[None]), right, atol=1e-5)


@pytest.mark.parametrize("name", list(PROCESSORS))
def test_the_code_of_a_graphs_card_reads_it_so_too(tmp_path, name):
    ours, image = reader(tmp_path, PROCESSORS[name]), picture(60, 44)
    image.save(tmp_path / "a.png")
    told = {"format": "onnx", "file": "onnx/model.onnx", "task": "image_classification", "labels": ["cat"],
            "pictures": ours.settings, "shape": ours.shape}  # fmt: skip
    code = snippet(told).split("```python\n")[1].partition("session =")[0]
    code = code.replace('["a.png", "b.png"]', repr([str(tmp_path / "a.png")]))
    space: dict = {}
    exec(code, space)
    np.testing.assert_allclose(
        np.array(space["inputs"]["pixel_values"]), ours.values(ours.pixels(image)[None]), atol=1e-5
    )


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_any_colours_become_red_green_and_blue(tmp_path, mode):
    image = picture(30, 30, mode)
    found = reader(tmp_path, PROCESSORS["vit"]).pixels(image)
    assert found.shape == (3, 24, 32)
    image.save(tmp_path / ("a.tiff" if mode == "CMYK" else "a.png"))
    file = next(tmp_path.glob("a.*"))
    for given in (str(file), file.read_bytes(), {"bytes": file.read_bytes(), "path": None}, {"path": str(file)}):
        np.testing.assert_array_equal(reader(tmp_path, PROCESSORS["vit"]).pixels(given), found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"shortest_edge": 20}}, "gives pictures no fixed size"),
        ({"size": {"height": 8, "width": 8}, "do_pad": True}, "asks for do_pad, which is not supported"),
        (None, "cannot read its preprocessor_config.json"),
    ],
)
def test_what_a_model_asks_for_and_is_not_known_is_refused(tmp_path, settings, message):
    file = tmp_path / pictures.FILE
    file.write_text("{" if settings is None else json.dumps(settings))
    with pytest.raises(InputError, match=message):
        pictures.Reader.of(file, "some/model")


def test_views_are_a_function_of_row_and_epoch(tmp_path):
    ours = reader(tmp_path, PROCESSORS["vit"])
    task = TASK.model_copy(update={"augment": SimpleNamespace(flip=True, shift=0.3)})
    cells = [ours.pixels(picture(40, 40)).tobytes() for _ in range(6)]
    rows = {"pixels": cells, "label": [0] * 6}
    together = ImageClassificationTask(task).vary(rows, list(range(6)), 2, ours)["pixels"]
    alone = [ImageClassificationTask(task).vary({"pixels": [cells[n]]}, [n], 2, ours)["pixels"][0] for n in range(6)]
    assert together == alone
    assert ImageClassificationTask(task).vary(rows, list(range(6)), 3, ours)["pixels"] != together
    assert ImageClassificationTask(TASK).vary(rows, list(range(6)), 3, ours) is rows


def test_moving_repeats_the_edge_and_mirroring_turns_left_and_right():
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 3, 4)
    moved = pictures.varied(pixels, [0.9, 0.5, 1.0], flip=True, shift=0.25)
    assert moved[0, 0].tolist() == [0, 0, 1, 2]
    turned = pictures.varied(pixels, [0.1, 0.5, 0.5], flip=True, shift=0.25)
    assert turned[0, 0].tolist() == [3, 2, 1, 0]


def rows_of(cells, labels):
    rows = datasets.Dataset.from_dict({"image": cells, "kind": labels})
    return checked(ImageClassificationTask(TASK), rows)


def test_rows_that_cannot_be_used_are_named(tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    picture(8, 8).save(good)
    bad.write_bytes(b"not a picture")
    rows = rows_of([str(good)], ["dog"])
    assert list(ImageClassificationTask(TASK).texts(rows)) == [str(good)]
    with pytest.raises(InputError, match=r"rows.csv: row 2: column 'image': .*bad.png: not a picture that can be read"):
        rows_of([str(good), str(bad)], ["dog", "cat"])
    with pytest.raises(InputError, match=r"row 1: column 'image': .*none.png: not a picture .*No such file"):
        rows_of([str(tmp_path / "none.png")], ["dog"])
    with pytest.raises(InputError, match="row 1: label 'bird' is none of"):
        rows_of([str(good)], ["bird"])
