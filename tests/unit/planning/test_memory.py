"""Memory plans: by hand on small figures, what is recommended, and against the peak of a real training step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support import commands

from distilpeft.data.published import FILE, known_model, shapes_of
from distilpeft.data.sources import Source, num_layers, num_parameters, resolve
from distilpeft.errors import InputError
from distilpeft.machine.host import cpu_has_bf16
from distilpeft.planning import choose_models
from distilpeft.planning.memory import CONTEXT_BYTES, Machine, MemoryModel, Placement, Shape, best, settings
from distilpeft.planning.sizes import size_of

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
    assert (num_layers(config) or 0) == CATALOGUE[name]["layers"], "convolutions have none"


def test_every_model_that_init_can_choose_is_planned_without_a_download():
    """Those in packages where they are installed; their files say it."""
    unknown = []
    for name in CATALOGUE:
        try:
            source = resolve(name, "teacher.model")
        except InputError as missing:
            assert "is not installed" in str(missing)  # noqa: PT017
            assert name.startswith("package:")
            continue
        size = size_of(source)
        if size is None or size.total / 1e6 != pytest.approx(CATALOGUE[name]["millions"], abs=1):
            unknown.append(name)
    assert not unknown


SMALLER = {
    "microsoft/resnet-18": {"depths": [1, 1, 1, 1], "embedding_size": 16, "hidden_sizes": [16, 32, 64, 128]},
    "facebook/deit-tiny-patch16-224": {"num_hidden_layers": 2},
    "google/flan-t5-small": {"num_layers": 2, "vocab_size": 99},
    "facebook/bart-base": {"encoder_layers": 2, "decoder_layers": 2, "vocab_size": 99},
}


@pytest.mark.parametrize("name", list(SMALLER))
def test_activations_are_about_what_torch_keeps_for_the_backward_pass(name):
    """Of two rows, within a third: attention of T5 and cross-attention keep more than the rule has."""
    import torch
    import transformers

    config = known_model(Source(name, None))[0] | SMALLER[name]
    kind = {"resnet": "ResNet", "vit": "ViT", "t5": "T5", "bart": "Bart"}[config["model_type"]]
    made = getattr(transformers, f"{kind}Config")(**{key: one for key, one in config.items() if key != "model_type"})
    model = getattr(transformers, f"{kind}Model")(made).train()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(5, 99, (2, 128))
    texts = {"input_ids": ids, "decoder_input_ids": ids}
    inputs = texts if made.is_encoder_decoder else {"pixel_values": torch.rand(2, 3, 224, 224)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs)
    real = sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in weights)
    shapes = shapes_of(config)
    size = Shape.of(config, num_parameters(shapes), 0, num_layers(config) or 0)
    tokens = 128 if made.is_encoder_decoder else 197 if kind == "ViT" else 1
    training = MemoryModel(size, 0.0, size.total, tokens, 2, half=False, language=False)
    own = Placement("tune", "ddp", "replicated", checkpointing=False, micro_batch_size=2)
    assert training.parts(own, Machine(1, 80e9, "CPU"))["activations"] == pytest.approx(real, rel=0.34)


@pytest.mark.parametrize(
    ("known", "kind"),
    [
        ("answerdotai/ModernBERT-base", "ModernBert"), ("FacebookAI/roberta-base", "Roberta"),
        ("sentence-transformers/all-MiniLM-L12-v2", "Bert"), ("HuggingFaceTB/SmolLM2-135M-Instruct", "Llama"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen2"), ("distilbert/distilbert-base-uncased", "DistilBert"),
        ("google/flan-t5-small", "T5"), ("google/mt5-small", "MT5"), ("facebook/bart-base", "Bart"),
        ("facebook/m2m100_418M", "M2M100"), ("facebook/deit-tiny-patch16-224", "ViT"),
        ("microsoft/resnet-18", "ResNet"), ("microsoft/Multilingual-MiniLM-L12-H384", "Bert"),
    ],
)  # fmt: skip
def test_shapes_are_those_of_the_model_that_transformers_builds(known, kind):
    import torch
    import transformers

    config, shapes = known_model(Source(known, None))
    made = getattr(transformers, f"{kind}Config")(
        **{name: value for name, value in config.items() if name != "model_type"}
    )
    heads = {"ForCausalLM": ("Llama", "Qwen2"), "ForConditionalGeneration": ("T5", "MT5", "Bart", "M2M100")}
    whole = next((head for head, kinds in heads.items() if kind in kinds), "Model")
    options = {"add_pooling_layer": False} if kind == "ViT" else {}
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}{whole}")(made, **options)
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    if kind in ("T5", "MT5"):  # the files have an output layer of their own, which transformers ties
        assert shapes.pop("lm_head.weight") == shapes["shared.weight"]
    assert shapes == expected


@pytest.mark.parametrize("kind", ["checkpointing", "dropout", "half-adapter"])
@pytest.mark.thorough
def test_the_plan_is_near_the_peak_of_a_real_step(tmp_path, kind):
    """Within 20 %: a process that builds a model of millions of weights and takes steps, and nothing else."""
    if kind == "half-adapter" and not cpu_has_bf16():
        pytest.skip("this processor multiplies bf16 in float32, of which it makes copies")
    out = tmp_path / "out.json"
    done = commands.python("-m", "support.peak", kind, str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    given = MemoryModel(**{**found["load"], "shape": Shape(**found["load"]["shape"])})
    way = Placement("cached", "ddp", "replicated", kind == "checkpointing", given.batch_size)
    planned = given.total(way, Machine(1, 1e12, "CPU"))
    assert planned == pytest.approx(found["peak_bytes"], rel=0.2), given.parts(way, Machine(1, 1e12, "CPU"))
