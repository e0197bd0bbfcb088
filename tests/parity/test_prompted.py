"""Scores of whole answers behind a prompt, against loops over tokens in float64."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support import tiny_lm
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from distilpeft.errors import InputError
from distilpeft.models import prompted
from distilpeft.models.prompted import Answers
from distilpeft.tasks.prompts.prompt import Prompt, Shot
from distilpeft.tasks.prompts.reader import CONTENT_FREE, Branch, PromptReader

ANSWERS = (" bad", " good", " so so", " !")
TEXTS = ["a fine film", "dull", "a story of the actor and the music", "x"]


def reader(**changes) -> PromptReader:
    settings = {"template": "Review: {text}\nSentiment:", "answers": ANSWERS} | changes
    return PromptReader(tiny_lm.tokenizer(), Prompt(**settings))


def ids_of(asked: PromptReader) -> list[tuple[int, ...]]:
    return [branch.ids[branch.start :] for branch in asked.branches]


def llama():
    return tiny_lm.model(seed=3).double().eval()


def gpt2():
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=len(tiny_lm.tokenizer()), n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


def neox():
    torch.manual_seed(3)
    config = GPTNeoXConfig(
        vocab_size=len(tiny_lm.tokenizer()), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=128, attn_implementation="eager",
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).double().eval()


def by_loops(model, prompt: list[int], answers, *, per_token: bool = False) -> torch.Tensor:
    """log p of each answer, a call for every token."""
    scores = []
    for ids in answers:
        logs = [
            model(input_ids=torch.tensor([[*prompt, *ids[:place]]])).logits[0, -1].log_softmax(-1)[token]
            for place, token in enumerate(ids)
        ]
        scores.append(sum(logs) / (len(logs) if per_token else 1))
    return torch.stack(scores)


def batch_of(asked: PromptReader, side: str) -> dict[str, torch.Tensor]:
    rows = asked.encode([TEXTS], 64)["input_ids"]
    words = tiny_lm.tokenizer()
    return dict(words.pad({"input_ids": rows}, padding_side=side, return_tensors="pt"))


@pytest.mark.parametrize("make", [llama, gpt2, neox])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("per_token", [False, True])
def test_a_class_has_the_log_probability_of_its_whole_answer(make, side, per_token):
    plain, asked = make(), reader()
    model = copy.deepcopy(plain)
    prompted.attach(model, asked, per_token=per_token, calibrate=False)
    with torch.no_grad():
        found_BC = model(**batch_of(asked, side)).logits
        rows = asked.encode([TEXTS], 64)["input_ids"]
        expected_BC = torch.stack([by_loops(plain, row, ids_of(asked), per_token=per_token) for row in rows])
    assert {len(ids) for ids in ids_of(asked)} > {2}, "answers of several lengths"
    torch.testing.assert_close(found_BC.double(), expected_BC, rtol=1e-6, atol=1e-6)


def test_the_gradient_is_that_of_the_loops():
    plain, asked = llama(), reader()
    model = copy.deepcopy(plain)
    prompted.attach(model, asked, per_token=False, calibrate=False)
    labels = torch.tensor([0, 1, 2, 3])
    torch.nn.functional.cross_entropy(model(**batch_of(asked, "left")).logits, labels, reduction="sum").backward()
    rows = asked.encode([TEXTS], 64)["input_ids"]
    logits = torch.stack([by_loops(plain, row, ids_of(asked)) for row in rows])
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_calibrating_divides_by_the_mean_probability_where_the_text_says_nothing():
    plain, asked = llama(), reader()
    model = copy.deepcopy(plain)
    prompted.attach(model, asked, per_token=False, calibrate=True)
    with torch.no_grad():
        found_BC = model(**batch_of(asked, "left")).logits.double().softmax(-1)
        raw_BC = torch.stack([by_loops(plain, row, ids_of(asked)) for row in asked.encode([TEXTS], 64)["input_ids"]])
        free_FC = torch.stack([by_loops(plain, row, ids_of(asked)) for row in asked.content_free()]).softmax(-1)
    weighted_BC = raw_BC.softmax(-1) / free_FC.mean(0)
    torch.testing.assert_close(found_BC, weighted_BC / weighted_BC.sum(-1, keepdim=True), rtol=1e-5, atol=1e-7)
    assert len(free_FC) == 3


LABELS = ("sport", "the arts", "a")


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(("calibrate", "labels"), [(False, LABELS), (True, LABELS), (False, LABELS[:1])])
def test_each_of_several_classes_is_asked_for_by_yes_and_no(chat, calibrate, labels):
    plain = llama()
    answers = ("yes", "not at all") if chat else (" yes", " not at all")
    asked = reader(template="Text: {text}\nIs it about {label}?", answers=answers, labels=labels, chat=chat)
    model = copy.deepcopy(plain)
    prompted.attach(model, asked, per_token=False, calibrate=calibrate)
    words = tiny_lm.tokenizer()

    def alone(text: str) -> torch.Tensor:
        """Yes and no to each class, every question by itself, [C, 2]."""
        found = []
        for label in labels:
            question = f"Text: {text}\nIs it about {label}?"
            whole = f"<|user|>{question}<|end|>\n<|assistant|>" if chat else question
            ids = words(whole)["input_ids"]
            found.append(by_loops(plain, ids, [words(answer)["input_ids"] for answer in answers]))
        return torch.stack(found)

    with torch.no_grad():
        found_BC = model(**batch_of(asked, "left")).logits.double()
        raw_BC2 = torch.stack([alone(text) for text in TEXTS])
        free_C2 = torch.stack([alone(text) for text in CONTENT_FREE]).softmax(-1).mean(0)
    expected_BC = raw_BC2[..., 0] - raw_BC2[..., 1]
    if calibrate:
        expected_BC -= free_C2[:, 0].log() - free_C2[:, 1].log()
    torch.testing.assert_close(found_BC, expected_BC, rtol=1e-5, atol=1e-5)


def test_a_number_is_the_mean_of_the_answers_by_their_probabilities():
    plain, asked = llama(), reader(answers=(" 1", " 2", " 10"), numbers=(1.0, 2.0, 10.0))
    model = copy.deepcopy(plain)
    prompted.attach(model, asked, per_token=False, calibrate=False)
    with torch.no_grad():
        found_B1 = model(**batch_of(asked, "right")).logits.double()
        rows = asked.encode([TEXTS], 64)["input_ids"]
        chances_BA = torch.stack([by_loops(plain, row, ids_of(asked)) for row in rows]).softmax(-1)
    expected_B1 = (chances_BA * torch.tensor([1.0, 2.0, 10.0])).sum(-1, keepdim=True)
    torch.testing.assert_close(found_B1, expected_B1, rtol=1e-5, atol=1e-6)


def test_an_adapter_on_it_is_trained_through_its_own_head_and_merges():
    asked = reader()
    model = llama().float()
    prompted.attach(model, asked, per_token=False, calibrate=False)
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    tuned = peft.get_peft_model(model, config)
    batch = batch_of(asked, "left")
    logits_BC = tuned(**batch).logits
    assert logits_BC.shape == (len(TEXTS), len(ANSWERS))
    logits_BC.sum().backward()
    trained = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    merged = copy.deepcopy(tuned).merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, logits_BC, rtol=1e-4, atol=1e-4)


def test_a_model_that_ignores_which_tokens_see_each_other_is_refused():
    model, asked = llama(), reader()
    kind = type(model)

    class Blind(kind):
        def forward(self, input_ids, attention_mask=None, position_ids=None, **options):
            del attention_mask
            return super().forward(input_ids=input_ids, position_ids=position_ids, **options)

    model.__class__ = Blind
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # so that what is seen matters
    with pytest.raises(InputError, match="does not read several answers behind one prompt"):
        prompted.attach(model, asked, per_token=False, calibrate=False)
    single = reader(answers=("a", "b"), template="{text} is:")
    prompted.attach(llama(), single, per_token=False, calibrate=False)


def test_places_of_answers_are_those_behind_the_tokens_before_them():
    answers = Answers((Branch((5,)), Branch((6, 7, 8)), Branch((6, 9, 4), 1)), 3)
    assert answers.read == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert answers.scored == [(0, 5, 0), (1, 6, 0), (1, 7, 1), (1, 8, 2), (2, 9, 3), (2, 4, 4)]
    assert answers.counts == [1, 3, 2]


class TestPrompts:
    def test_a_text_may_hold_braces_and_the_names_of_places(self):
        prompt = Prompt("{text} | {pair}?", (" yes", " no"))
        assert prompt.of(["{pair} {0}", "{text}"]) == "{pair} {0} | {text}?"

    def test_shots_go_before_the_row_but_for_the_row_itself(self):
        shots = (Shot(("one",), ("one",), " good"), Shot(("two",), ("tw",), " bad"))
        prompt = Prompt("R: {text}\nS:", (" bad", " good"), shots=shots)
        assert prompt.of(["three"]) == "R: one\nS: good\n\nR: tw\nS: bad\n\nR: three\nS:"
        assert prompt.of(["tw"], ["two"]) == "R: one\nS: good\n\nR: tw\nS:"

    def test_a_chat_is_one_turn_of_a_user(self):
        asked = reader(chat=True, answers=("bad", "good"))
        ids = asked.encode([["fine"]], 8)["input_ids"][0]
        text = tiny_lm.tokenizer().decode(ids)
        assert text == "<|user|>Review: fine\nSentiment:<|end|>\n<|assistant|>"

    def test_long_texts_are_cut_at_a_token_and_of_a_pair_the_longer_one(self):
        asked = reader(template="{text} / {pair} :", answers=(" a", " b"))
        found = asked.encode([["abcdefgh", "ab"], ["xyz", "xy"]], 5)
        shown = [tiny_lm.tokenizer().decode(ids) for ids in found["input_ids"]]
        assert shown == ["abc / xy :", "ab / xy :"] or shown == ["ab / xyz :", "ab / xy :"]
        assert found["truncated"] == [True, False]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"answers": (" good", " good")}, "two answers become the same tokens"),
            ({"answers": ("", " good")}, "makes no token of ''"),
        ],
    )
    def test_answers_that_cannot_be_told_apart_are_refused(self, changes, message):
        with pytest.raises(InputError, match=message):
            reader(**changes)

    def test_a_tokenizer_that_joins_prompt_and_answer_is_refused(self):
        words = tiny_lm.tokenizer(("s", "x"))
        with pytest.raises(InputError, match="the tokenizer joins 'x' with what stands before it"):
            PromptReader(words, Prompt("{text} is", ("x", "y")))
