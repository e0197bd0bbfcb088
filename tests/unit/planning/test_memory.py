"""Memory plans: by hand on small figures, what is recommended, and against the peak of a real training step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support import commands

from distilpeft.data.published import FILE, known_model
from distilpeft.data.sources import Source, num_layers, num_parameters
from distilpeft.errors import InputError
from distilpeft.planning import choose_models
from distilpeft.planning.memory import CONTEXT_BYTES, Machine, MemoryModel, Placement, Shape, best, settings

OWN = Placement("online", "ddp", "replicated", checkpointing=False, micro_batch_size=4)
SMALL = Shape(total=1000, linear=600, layers=2, hidden=10, keys=10, ffn=40, vocabulary=20, gated=False, tied=False)
BIG = Shape(
    total=10**9, linear=9 * 10**8, layers=30, hidden=2048, keys=512, ffn=8192, vocabulary=10**5, gated=True, tied=True
)


def load(shape: Shape = SMALL, **changes: object) -> MemoryModel:
    whole = MemoryModel(shape, 4.0 * shape.total, shape.total, tokens=8, batch_size=16, half=False, language=False)
    return replace(whole, **changes)


def test_the_parts_of_a_small_training_are_those_by_hand():
    parts = load().parts(OWN, Machine(1, 1e9, "CPU"))
    tokens = 4 * 8
    assert parts["weights"] == 4000
    assert (parts["moments"], parts["gradients"]) == (8000, 4000)
    assert parts["autocast"] == parts["logits"] == parts["teacher"] == parts["context"] == 0
    assert parts["activations"] == 2 * tokens * 4 * (2 * 10 + 4 * 10 + 2 * 10 + 2 * 40)


def test_without_accumulation_gradients_come_as_activations_go():
    parts = load(batch_size=4).parts(OWN, Machine(1, 1e9, "CPU"))
    assert parts["activations"] > 4000
    assert parts["gradients"] == 0


def test_shards_divide_what_is_tuned_and_keep_two_layers_and_the_rest_whole():
    parts = load().parts(replace(OWN, parallel="fsdp2"), Machine(4, 1e9))
    assert parts["moments"] == 2000
    assert parts["weights"] == 1000 + 8 * (2 * 300 + 400)
    assert parts["context"] == CONTEXT_BYTES


@pytest.mark.parametrize(("place", "kept"), [("replicated", 600), ("offloaded", 300), ("sharded", 600 / 4 + 2 * 300)])
def test_the_teacher_takes_what_its_place_leaves_on_the_device(place, kept):
    beside = load(teacher=(SMALL, 1000.0, 600.0))
    assert beside.parts(replace(OWN, mode="cached"), Machine(4, 1e9))["teacher"] == 0
    found = beside.parts(replace(OWN, place=place), Machine(4, 1e9))["teacher"]
    assert found == 400 + kept + 32 * (12 * 10 + 4 * 2 * 40)


def test_a_teacher_that_gives_soft_targets_has_no_gradients_and_a_chunk_of_logits():
    own = Placement("give", "ddp", "replicated", checkpointing=False, micro_batch_size=4)
    giving = MemoryModel(SMALL, 0.0, 0, 8, 4, half=True, language=True, teacher=(SMALL, 1000.0, 600.0))
    parts = giving.parts(own, Machine(1, 1e9))
    assert parts["weights"] == parts["moments"] == parts["gradients"] == parts["activations"] == 0
    assert parts["logits"] == 32 * 20 * (4 * 4 + 2)
    assert parts["teacher"] == 1000 + 32 * (12 * 10 + 2 * 2 * 40)
    small = replace(giving, shape=BIG, tokens=2048, teacher=(BIG, 4e9, 3.6e9))
    assert settings(own, best(own, small, Machine(1, 8e9), places=("replicated", "offloaded")), "targets")


def test_an_adapter_pays_for_its_dropout():
    tuned = load(BIG, tuned=10**7, half=True, adapted=30 * (5 * 2048 + 2 * 2048 + 8192))
    plain, dropped = (
        one.parts(OWN, Machine(1, 80e9))["activations"] for one in (tuned, replace(tuned, adapter_dropout=True))
    )
    assert dropped - plain == 4 * 8 * tuned.adapted


def test_a_large_device_keeps_the_recipes_way_and_a_small_one_pays_in_speed():
    big = load(BIG, tokens=1024, half=True, language=True, teacher=(BIG, 4e9, 3.6e9))
    places = ("replicated", "offloaded")
    roomy = best(OWN, big, Machine(1, 200e9), places=places)
    assert (roomy.mode, roomy.place, roomy.checkpointing) == ("online", "replicated", False)
    assert roomy.micro_batch_size >= OWN.micro_batch_size
    tight = best(OWN, big, Machine(1, 32e9), places=places)
    assert tight is not None
    assert big.total(tight, Machine(1, 32e9)) <= 0.9 * 32e9 < big.total(OWN, Machine(1, 32e9))
    assert settings(OWN, tight, "distil")
    assert best(OWN, big, Machine(1, 8e9), places=places) is None
    assert best(OWN, big, Machine(8, 16e9), places=places).parallel == "fsdp2", "only shards fit there"


def test_settings_name_only_what_changes():
    assert settings(OWN, OWN, "distil") == []
    other = Placement("online", "fsdp2", "offloaded", checkpointing=True, micro_batch_size=2)
    assert settings(OWN, other, "distil") == [
        "parallel=fsdp2", "teacher.place=offloaded", "student.gradient_checkpointing=true",
        "distil.fit.micro_batch_size=2",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["80GB", "8x", "0x80GB", "8x80", "x80GB", "8x0GB"])
def test_a_machine_that_cannot_be_read_is_a_mistake(text):
    with pytest.raises(InputError, match="such as 8x80GB"):
        Machine.of(text)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("distilbert/distilbert-base-uncased", 66_362_880),
    ],
)
def test_known_models_have_exactly_the_published_number_of_weights(name, count):
    _, shapes = known_model(Source(name, None))
    assert num_parameters(shapes) == count


CATALOGUE = {
    one["name"]: one
    for kind in json.loads((Path(choose_models.__file__).parent / "catalogue.json").read_text()).values()
    for one in kind
}


@pytest.mark.parametrize("name", sorted(set(json.loads(FILE.read_text())) & set(CATALOGUE)))
def test_known_models_of_the_catalogue_have_its_weights_and_layers(name):
    config, shapes = known_model(Source(name, None))
    assert round(num_parameters(shapes) / 1e6) == pytest.approx(CATALOGUE[name]["millions"], abs=1)
    assert num_layers(config) == CATALOGUE[name]["layers"]


@pytest.mark.parametrize(
    ("known", "kind"),
    [
        ("answerdotai/ModernBERT-base", "ModernBert"), ("FacebookAI/roberta-base", "Roberta"),
        ("sentence-transformers/all-MiniLM-L12-v2", "Bert"), ("HuggingFaceTB/SmolLM2-135M-Instruct", "Llama"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen2"), ("distilbert/distilbert-base-uncased", "DistilBert"),
    ],
)  # fmt: skip
def test_shapes_are_those_of_the_model_that_transformers_builds(known, kind):
    import torch
    import transformers

    config, shapes = known_model(Source(known, None))
    made = getattr(transformers, f"{kind}Config")(
        **{name: value for name, value in config.items() if name != "model_type"}
    )
    whole = "ForCausalLM" if kind in ("Llama", "Qwen2") else "Model"
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}{whole}")(made)
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert shapes == expected


@pytest.mark.parametrize("kind", ["checkpointing", "dropout", "half-adapter"])
def test_the_plan_is_near_the_peak_of_a_real_step(tmp_path, kind):
    """Within 20 %: a process that builds a model of millions of weights and takes steps, and nothing else."""
    out = tmp_path / "out.json"
    done = commands.python("-m", "support.peak", kind, str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    given = MemoryModel(**{**found["load"], "shape": Shape(**found["load"]["shape"])})
    way = Placement("cached", "ddp", "replicated", kind == "checkpointing", given.batch_size)
    planned = given.total(way, Machine(1, 1e12, "CPU"))
    assert planned == pytest.approx(found["peak_bytes"], rel=0.2), given.parts(way, Machine(1, 1e12, "CPU"))
