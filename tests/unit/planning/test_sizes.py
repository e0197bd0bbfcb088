"""The size of static and narrower students, known before anything is loaded, is that of the model."""

from __future__ import annotations

import numpy as np
import pytest
from support import commands, tiny, tiny_tasks
from transformers import AlbertConfig, AlbertModel, AutoModel, AutoModelForSequenceClassification

from distilpeft.models import weights
from distilpeft.models.cutting.layers import keep_layers
from distilpeft.models.cutting.widths import narrow
from distilpeft.models.static import start
from distilpeft.planning.memory import Machine
from distilpeft.planning.sizes import own_ways, student_load, student_size, teacher_size
from distilpeft.recipe.yaml_file import load_recipe


def counted(recipe, teacher) -> int:
    """Weights of the student that a run would begin with."""
    auto = AutoModelForSequenceClassification if recipe.kind.has_labels else AutoModel
    options = {"num_labels": len(getattr(recipe.task, "labels", "1"))}
    made = start.new(auto, options, tiny.tokenizer(), teacher, recipe.student.static, pair=recipe.reads_pairs)
    return weights.num_parameters(made)


@pytest.mark.parametrize(
    ("kind", "static"),
    [("regression", {}), ("multi_label_classification", {"dim": 8, "hidden": 5}), ("embedding", {"dim": 8})],
)
def test_vectors_weights_and_head_are_counted(tmp_path, kind, static):
    recipe = load_recipe(tiny_tasks.workspace(tmp_path, kind, student={"static": static}))
    size = student_size(recipe)
    assert size.total == counted(recipe, tiny.classifier())


def test_a_teacher_with_narrow_embeddings_has_students_as_narrow(tmp_path):
    recipe = load_recipe(tiny_tasks.workspace(tmp_path, "regression", student={"static": {}}))
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
    teacher = AlbertModel(AlbertConfig(vocab_size=len(tiny.WORDS), embedding_size=12, **sizes))
    teacher.save_pretrained(str(tmp_path / "base"))
    assert student_size(recipe).shape.hidden == 12
    assert student_size(recipe).total == counted(recipe, teacher)


@pytest.mark.parametrize("widths", [{"hidden": 32}, {"ffn": 40}, {"hidden": 48, "heads": 3, "ffn": 64}])
def test_a_narrower_student_is_estimated_within_three_hundredths(tmp_path, widths):
    recipe = load_recipe(commands.workspace(tmp_path, student={"from_teacher": {"layers": [1], **widths}}))
    model = tiny.classifier()
    importance = {"hidden": np.arange(64), "inner": np.arange(64)}
    for layer in range(2):
        place = f"bert.encoder.layer.{layer}"
        importance |= {f"{place}.ffn": np.arange(128), f"{place}.heads": np.arange(4)}
    narrower = narrow(model, recipe.student.from_teacher, lambda axes: importance)
    keep_layers(narrower, recipe.student.from_teacher)
    assert student_size(recipe).total == pytest.approx(weights.num_parameters(narrower), rel=0.03)
    assert student_size(recipe).shape.hidden == narrower.config.hidden_size


def test_training_one_takes_its_weights_four_times_and_some_numbers_a_token(tmp_path):
    recipe = load_recipe(tiny_tasks.workspace(tmp_path, "regression", student={"static": {"dim": 16}}))
    size, way = student_size(recipe), own_ways(recipe)[-1]
    parts = student_load(recipe, size, teacher_size(recipe), "CPU").parts(way, Machine(1, 1e9, "CPU"))
    assert (parts["weights"], parts["moments"]) == (4 * size.total, 8 * size.total)
    assert parts["activations"] == 2.5 * 4 * way.micro_batch_size * recipe.data.max_tokens * 16
