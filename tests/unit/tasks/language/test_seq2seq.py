"""Texts out of texts: rows, the loss of every family in float64, written texts and their scores, layers taken out."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from support import tiny
from support.rows import checked
from support.tiny_tasks import encoder_decoder
from torch.nn import functional as F

from distilpeft.distillation.losses import Loss
from distilpeft.distillation.store import row_hashes
from distilpeft.errors import GateError, InputError
from distilpeft.export.generation import write_rows
from distilpeft.export.runtimes import TransformersRunner
from distilpeft.models.cutting.layers import keep_layers
from distilpeft.models.loading import Architecture, head_modules
from distilpeft.recipe.evaluate import Generate
from distilpeft.recipe.student import FromTeacher
from distilpeft.recipe.task import Seq2Seq
from distilpeft.tasks.language import next_tokens
from distilpeft.tasks.language import seq2seq as task_
from distilpeft.tasks.language.seq2seq import Seq2SeqTask
from distilpeft.tasks.rows import Tokens

TASK = Seq2Seq(kind="seq2seq", source="a", target="b")
PAIRS = [("good film", "a great story"), ("the dull actor of the scene", "music"), ("fine", "the bad script and film")]
PAD, CLS, SEP = 0, 2, 3
SMALL = {"vocab_size": len(tiny.WORDS), "pad_token_id": PAD, "eos_token_id": SEP, "decoder_start_token_id": PAD}


def t5(**changes):
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=3, num_decoder_layers=2, num_heads=2, dropout_rate=0.0,
        **(SMALL | changes),
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def marian():
    model = transformers.MarianMTModel(encoder_decoder(encoder_layers=3))
    model.final_logits_bias.copy_(torch.randn(1, len(tiny.WORDS)))
    return model


def bart():
    sizes = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 3, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0}
    more = {"max_position_embeddings": 64, "forced_eos_token_id": None, "bos_token_id": CLS}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **heads, **more, **SMALL))


def two_berts():
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        tiny.config(3, hidden_size=16), tiny.config(2, hidden_size=16)
    )
    config.update(SMALL | {"decoder_start_token_id": CLS})
    return transformers.EncoderDecoderModel(config)


FAMILIES = {
    "t5": t5, "t5_tied_and_scaled": lambda: t5(tie_word_embeddings=True, scale_decoder_outputs=True), "marian": marian,
    "bart": bart, "two_berts": two_berts,
}  # fmt: skip


@pytest.fixture(params=list(FAMILIES))
def model(request):
    torch.manual_seed(3)
    found = FAMILIES[request.param]().double().eval()
    for parameter in found.parameters():
        if parameter.requires_grad:  # Marian's sines and cosines are not saved
            parameter.data += torch.randn_like(parameter) * 0.1
    Seq2SeqTask(TASK).prepare(found)
    return found


def rows_of(pairs=PAIRS, task=TASK, max_tokens=16) -> Tokens:
    rows = datasets.Dataset.from_dict({"a": [one for one, _ in pairs], "b": [two for _, two in pairs]})
    words = tiny.tokenizer()
    rows = checked(Seq2SeqTask(task), rows)
    made = rows.map(
        lambda batch: Seq2SeqTask(task).encode(batch, words, max_tokens), batched=True,
        remove_columns=["a", "b"], features=Seq2SeqTask(task).features(),
    )  # fmt: skip
    return Tokens(Seq2SeqTask(TASK), made, words)


def batch_of(rows: Tokens, *ids: int) -> dict:
    return rows.load_batch(np.array(ids or range(len(rows.dataset))))


def test_rows_hold_source_and_target_and_both_are_cut():
    task = TASK.model_copy(update={"prefix": "the ", "max_target_tokens": 4})
    rows = rows_of(task=task, max_tokens=6)
    words = tiny.tokenizer()
    assert rows.dataset["input_ids"][0] == words("the good film")["input_ids"]
    assert rows.dataset["target_ids"][0] == [CLS, *words.convert_tokens_to_ids(["a", "great"]), SEP]
    assert rows.dataset["reference"][:] == [two for _, two in PAIRS], "scores are against the text as it was"
    assert rows.dataset["truncated"][:] == [True, True, True]
    assert rows_of().num_truncated == 0
    assert rows_of().dataset["num_bytes"][:] == [13, 5, 23]
    assert rows.dataset["num_bytes"][:] == [7, 5, 7], "of the targets that are left"
    assert list(Seq2SeqTask(task).texts(datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]}))) == ["the x"]


class Slow:
    """The tiny tokenizer without offsets, as those that are written in Python."""

    is_fast, model_max_length = False, 64

    def __call__(self, *texts, **options):
        asked = options.pop("return_offsets_mapping", False)
        assert not asked, "it gives none, or an error"
        return tiny.tokenizer()(*texts, **options)

    def decode(self, ids, **options):
        return tiny.tokenizer().decode(ids, **options)


@pytest.mark.parametrize("tokenizer", [tiny.tokenizer(), Slow()], ids=["fast", "slow"])
def test_bytes_are_those_of_the_target_tokens_that_count(tokenizer):
    """By hand: the text of [CLS] the film [SEP] has 8 bytes; é has two, and an unknown word is text as well."""
    targets = ["the film and music", "the film", "story of the superb actor", "café the film and more"]
    task = Seq2SeqTask(TASK.model_copy(update={"max_target_tokens": 4}))
    found = task.encode({"a": ["good"] * 4, "b": targets}, tokenizer, 16)
    assert [len(ids) for ids in found["target_ids"]] == [4] * 4
    # without offsets only what the tokens decode to is known: not the unknown word
    assert found["num_bytes"] == [8, 8, 8, 9 if tokenizer.is_fast else 3]
    assert found["truncated"] == [True, False, True, True]


def test_a_tokenizer_of_transformers_that_is_written_in_python_reads_targets():
    """Marian's are, and ByT5's, whose tokens are bytes: 5 of them and the end token."""
    task = Seq2SeqTask(TASK.model_copy(update={"max_target_tokens": 6}))
    found = task.encode({"a": ["x", "y"], "b": ["hello world", "hi"]}, transformers.ByT5Tokenizer(), 16)
    assert found["num_targets"] == [6, 3]
    assert found["num_bytes"] == [5, 2]


def test_bits_per_byte_of_a_cut_target_are_those_of_its_beginning(model):
    """The rest of the text is in no target, so the figure is that of rows which end there."""
    short = TASK.model_copy(update={"max_target_tokens": 5})
    cut = rows_of([("good film", "a great story and the music")], task=short)
    alone = rows_of([("good film", "a great story")], task=short)
    assert cut.dataset["target_ids"][0] == alone.dataset["target_ids"][0]
    task = Seq2SeqTask(TASK)
    found = [task.metrics(task.measure(model, batch_of(one)).detach().numpy(), one) for one in (cut, alone)]
    assert found[0] == found[1]
    assert found[0]["bits_per_byte"] == pytest.approx(found[0]["nats_per_token"] * 5 / np.log(2) / 13, rel=1e-5)


def test_another_target_is_another_row_for_soft_targets():
    one, two = rows_of([("good film", "music")]), rows_of([("good film", "actor")])
    assert row_hashes(one.dataset)[0] != row_hashes(two.dataset)[0]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [([("good", " ")], "row 1: column 'b' holds no text"), ([("", "good")], "row 1: column 'a' holds no text")],
)
def test_rows_without_a_text_are_named(pairs, message):
    with pytest.raises(InputError, match=message):
        rows_of(pairs)


def logits_alone(model, row: dict) -> torch.Tensor:
    """A row's logits as transformers gives them for its labels, by itself and unpadded."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["target_ids"]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # EncoderDecoderModel tells of its loss of years ago
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).logits[0]


def test_loss_and_gradients_are_those_of_single_unpadded_rows_in_float64(model):
    """Against transformers' own logits for `labels`, with PyTorch's KL and cross-entropy."""
    torch.manual_seed(5)
    rows, teacher = rows_of(), torch.randn(16, len(tiny.WORDS), dtype=torch.float64)
    labels = torch.tensor([token for row in rows.dataset for token in row["target_ids"]])
    teacher = teacher[: len(labels)]
    loss = Loss(alpha=0.7, temperature=2.0)
    z = torch.cat([logits_alone(model, row) for row in rows.dataset])
    soft, hard = F.log_softmax(z / 2, -1), F.cross_entropy(z, labels, reduction="sum")
    right = 0.7 * 4 * F.kl_div(soft, F.softmax(teacher / 2, -1), reduction="sum") + 0.3 * hard
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(right, weights, allow_unused=True)
    found = Seq2SeqTask(TASK).loss_sum(model, batch_of(rows), loss, teacher)
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)
    got = torch.autograd.grad(found, weights, allow_unused=True)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(
            torch.zeros(()) if one is None else one, torch.zeros(()) if two is None else two, rtol=1e-7, atol=1e-9,
            check_dtype=False,
        )  # fmt: skip
    alone = sum(Seq2SeqTask(TASK).loss_sum(model, batch_of(rows, n), Loss(0.0, 1.0), None) for n in range(3))
    torch.testing.assert_close(alone, hard, rtol=1e-9, atol=1e-9)


def test_scores_of_tokens_are_those_of_the_logits(model):
    rows = rows_of()
    values = Seq2SeqTask(TASK).measure(model, batch_of(rows), Seq2SeqTask(TASK).soft(model, batch_of(rows)))
    found = Seq2SeqTask(TASK).metrics(values.numpy(), rows)
    z = torch.cat([logits_alone(model, row) for row in rows.dataset])
    labels = torch.tensor([token for row in rows.dataset for token in row["target_ids"]])
    assert found["nats_per_token"] == pytest.approx(F.cross_entropy(z, labels).item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((z.argmax(-1) == labels).double().mean()))
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["top1_agreement"] == 1


def test_what_is_written_is_what_transformers_writes(model):
    """In a padded batch, with the runner's cache and without: the same tokens as `generate` for each row alone."""
    rows = rows_of()
    inputs = batch_of(rows)["inputs"]
    settings = Generate(max_new_tokens=6)
    right = []
    for row in rows.dataset:
        ids = torch.tensor([row["input_ids"]])
        found = model.generate(ids, generation_config=task_.settings_of(model, settings))[0]
        right.append(tiny.tokenizer().decode(found, skip_special_tokens=True))
    assert task_.write(model, inputs, tiny.tokenizer(), settings) == right
    runner = TransformersRunner(model, caching=True)
    told = write_rows(runner, {name: one.numpy() for name, one in inputs.items()}, 6, [SEP])
    assert [tiny.tokenizer().decode(ids, skip_special_tokens=True) for ids in told] == right


def test_bleu_chrf_and_rouge_are_those_of_the_whole_corpus():
    rng, words = np.random.default_rng(2), ["el", "gato", "come", "pan", "¿dónde", "está?", "la", "casa."]
    references = [" ".join(rng.choice(words, rng.integers(3, 9))) for _ in range(40)]
    texts = [" ".join(word for word in one.split() if rng.random() < 0.8) for one in references]
    values = np.zeros((40, len(next_tokens.VALUES) + task_.WRITTEN))
    values[:, : len(next_tokens.VALUES)] = 1
    with_texts = SimpleNamespace(write=lambda *_: texts)
    batch = {"inputs": {}, "references": references, "targets_BT": torch.zeros(40, 1)}
    original, task_.write = task_.write, with_texts.write
    try:
        values[:, len(next_tokens.VALUES) :] = Seq2SeqTask(TASK).written(None, batch, None, Generate()).numpy()
    finally:
        task_.write = original
    found = Seq2SeqTask(TASK).metrics(values, None)
    assert found["bleu"] == pytest.approx(BLEU().corpus_score(texts, [references]).score)
    assert found["chrf"] == pytest.approx(CHRF().corpus_score(texts, [references]).score)
    scorer = RougeScorer(["rougeL"])
    single = [scorer.score(one, two)["rougeL"].fmeasure for one, two in zip(references, texts, strict=True)]
    assert found["rougeL"] == pytest.approx(np.mean(single), rel=1e-6)
    told = Seq2SeqTask(TASK).scores(("nats_per_token", "bleu", "chrf"), values, None)
    assert told["bleu"]["low"] < told["bleu"]["value"] < told["bleu"]["high"]
    assert told["bleu"]["num_rows"] == 40
    silent = Seq2SeqTask(TASK).metrics(np.pad(values[:, : len(next_tokens.VALUES)], ((0, 0), (0, task_.WRITTEN))), None)
    assert silent["bleu"] == silent["chrf"] == silent["rougeL"] == 0
    assert "bleu" not in Seq2SeqTask(TASK).metrics(values[:, : len(next_tokens.VALUES)], None), (
        "training does not write"
    )


def test_layers_are_taken_out_of_encoder_and_decoder(model, tmp_path):
    """The student is a model of its own that reloads to the same function; embeddings and head stay."""
    keep_layers(model, FromTeacher(first=2, decoder=1))
    before = logits_alone(model, rows_of().dataset[0])
    model.save_pretrained(str(tmp_path))
    again = type(model).from_pretrained(str(tmp_path)).double().eval()
    torch.testing.assert_close(logits_alone(again, rows_of().dataset[0]), before)
    stacks = [len(m) for m in again.modules() if isinstance(m, torch.nn.ModuleList) and len(m) and "Layer" in str(m)]
    assert stacks[0] == 2
    assert 1 in stacks


def test_layers_that_hold_what_others_need_stay():
    with pytest.raises(InputError, match="layer 0 of T5Stack holds the positions of all layers; keep it"):
        keep_layers(t5(), FromTeacher(last=1))
    with pytest.raises(InputError, match="first: 3 are more than there are"):
        keep_layers(t5(), FromTeacher(first=1, decoder=3))


@pytest.mark.parametrize(
    ("family", "name"),
    [("t5", "lm_head"), ("marian", "lm_head"), ("two_berts", "decoder.cls.predictions.decoder")],
)
def test_only_the_layer_that_gives_logits_is_the_head(family, name):
    """All parts of T5 are siblings: taking the others for heads would leave it unquantized without a word."""
    heads = head_modules(
        Architecture("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", {}, train_heads=False), FAMILIES[family]().config
    )
    assert heads == [name]


def test_a_model_that_names_no_first_token_is_refused():
    model = t5()
    model.config.decoder_start_token_id = None
    with pytest.raises(GateError, match="names no decoder_start_token_id"):
        Seq2SeqTask(TASK).prepare(model)
