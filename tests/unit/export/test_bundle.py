"""Text in, ids to the model, text out: with padding, truncation and chat templates as in training."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support import tiny, tiny_lm

from distilpeft.errors import InputError
from distilpeft.export.bundle import Bundle, answer
from distilpeft.machine.files import sealed


class Recorder:
    """Remembers what it was given; its likeliest token is always `token`."""

    start = None

    def __init__(self, width, token=0):
        self.width, self.token, self.seen = width, token, []

    def run(self, inputs, cache=None, *, last=False):
        self.seen.append({name: array.tolist() for name, array in inputs.items()})
        logits = np.zeros((*inputs["input_ids"].shape, self.width), np.float32)
        logits[..., self.token] = 1
        return (logits, cache) if self.width > 2 else (logits[:, 0], None)


def deployed(folder, words, runner, **manifest):
    words.save_pretrained(str(folder))
    told = {"format": "onnx", "pad_token_id": words.pad_token_id, "eos_token_ids": [], **manifest}
    (folder / "manifest.json").write_text(json.dumps(sealed(told)))
    found = Bundle(folder)
    found._runner = runner
    return found


def test_texts_of_a_classifier_are_cut_and_padded_on_the_right(tmp_path):
    words, runner = tiny.tokenizer(), Recorder(2)
    model = deployed(tmp_path, words, runner, task="text_classification", max_tokens=6, labels=["bad", "good"])
    texts = ["the film", "the film and a superb story and a dull script"]
    found = model.answers(texts)
    right = [words(text, truncation=True, max_length=6)["input_ids"] for text in texts]
    padding = 6 - len(right[0])
    assert runner.seen[0]["input_ids"] == [right[0] + [words.pad_token_id] * padding, right[1]]
    assert runner.seen[0]["attention_mask"] == [[1] * len(right[0]) + [0] * padding, [1] * 6]
    assert [sum(one["probabilities"].values()) for one in found] == pytest.approx([1, 1])


def test_an_answer_is_one_class_or_several_or_a_number():
    logits = np.array([-1.0, 2.0, 0.5])
    told = {"task": "text_classification", "labels": ["a", "b", "c"]}
    assert answer(told, logits)["label"] == "b"
    found = answer({**told, "task": "multi_label_classification"}, logits)
    assert found["labels"] == ["b", "c"]
    assert found["probabilities"] == pytest.approx({"a": 0.268941, "b": 0.880797, "c": 0.622459})
    assert answer({"task": "regression"}, logits[1:2]) == {"value": 2.0}


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_goes_in_as_in_training_with_its_template_if_it_is_a_chat(tmp_path, chat):
    words = tiny_lm.tokenizer()
    letter = words("x")["input_ids"][0]
    runner = Recorder(len(words), letter)
    model = deployed(tmp_path, words, runner, task="causal_lm", chat=chat)
    assert model.complete("hello", 3) == "xxx"
    turn = [{"role": "user", "content": "hello"}]
    template = words.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert runner.seen[0]["input_ids"] == [template if chat else words("hello")["input_ids"]]


def test_a_folder_without_a_tokenizer_file_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(sealed({"format": "onnx", "task": "regression"})))
    for folder in (tmp_path, str(tmp_path)):
        with pytest.raises(InputError, match=r"has no tokenizer\.json"):
            Bundle(folder)


class Tagger(Recorder):
    """Says `B-X` of the word `good`, else `O`; of a pair, that the answer is the word `superb` if it is there."""

    def __init__(self, words, pairs=False):
        super().__init__(2)
        self.good, self.superb, self.pairs = (*(words.convert_tokens_to_ids(w) for w in ("good", "superb")), pairs)

    def run(self, inputs, cache=None, *, last=False):
        ids = np.asarray(inputs["input_ids"])
        if not self.pairs:
            return np.stack([np.zeros(ids.shape), np.where(ids == self.good, 3.0, -3.0)], -1), None
        logits = np.where(ids == self.superb, 9.0, -1.0)
        logits[:, 0] = 2.0
        return np.stack([logits, logits], 1), None


def test_words_beyond_what_a_tagger_reads_have_no_tag(tmp_path):
    words = tiny.tokenizer()
    told = {"task": "token_classification", "max_tokens": 5, "labels": ["O", "B-X"]}
    model = deployed(tmp_path, words, Tagger(words), **told)
    (found,) = model.answers(["the  good film good"])
    assert [one["tag"] for one in found["words"]] == ["O", "B-X", "O", None]
    assert found["entities"] == [{"type": "X", "text": "good", "start": 5, "end": 9}]


def test_an_answer_is_looked_for_in_every_window_and_may_be_missing(tmp_path):
    words = tiny.tokenizer()
    told = {"task": "question_answering", "max_tokens": 10, "stride": 2, "longest_answer": 3, "no_answer": True}
    model = deployed(tmp_path, words, Tagger(words, pairs=True), **told)
    text = "the film and a story of the actor and superb music"
    found, none = model.answers([("film", text), (" film ", text.replace("superb", "good"))])
    assert (found["answer"], text[found["start"] : found["end"]]) == ("superb", "superb")
    assert 0.9 < found["score"] <= 1
    assert none == {"answer": None, "start": None, "end": None, "score": None}
