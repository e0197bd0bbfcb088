"""Rows of a language model by hand: which tokens are targets, what a cut or packed row is, and what is measured."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from support import tiny_lm
from support.rows import checked
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig

from distilpeft.distillation.losses import Loss
from distilpeft.errors import GateError, InputError
from distilpeft.recipe.task import CausalLM
from distilpeft.tasks.language import next_tokens
from distilpeft.tasks.language.causal_lm import CausalLMTask

PAIRS = CausalLM(kind="causal_lm", prompt="prompt", completion="completion")
CHAT = CausalLM(kind="causal_lm", messages="messages")
TEXT = CausalLM(kind="causal_lm", text="text")


def encode(task: CausalLM, rows: list[dict], max_tokens: int = 64) -> dict:
    batch = {name: [row[name] for row in rows] for name in rows[0]}
    return CausalLMTask(task).encode(batch, tiny_lm.tokenizer(), max_tokens)


def targets(found: dict, row: int = 0) -> str:
    """The text of a row's targets."""
    picked = [t for t, flag in zip(found["input_ids"][row], found["target"][row], strict=True) if flag]
    return tiny_lm.tokenizer().decode(picked)


def spoken(found: dict, row: int = 0) -> str:
    return tiny_lm.tokenizer().decode(found["input_ids"][row])


def collated(found: dict) -> dict:
    return CausalLMTask(TEXT).collate(found, tiny_lm.tokenizer())


def prepared(task: CausalLM = PAIRS, **changes):
    model = tiny_lm.model(initializer_range=0.3, **changes).eval()
    CausalLMTask(task).prepare(model)
    return model


def test_only_the_completion_and_its_end_are_targets_unless_all_is_asked_for():
    row = [{"prompt": "ab", "completion": " cd"}]
    found = encode(PAIRS, row)
    assert spoken(found) == "ab cd<|end|>"
    assert targets(found) == " cd<|end|>"
    assert (found["num_tokens"], found["num_targets"], found["num_bytes"]) == ([6], [4], [3])
    everything = encode(PAIRS.model_copy(update={"loss_on": "all"}), row)
    assert targets(everything) == "b cd<|end|>", "nothing stands before a row's first token"


def test_an_empty_prompt_leaves_the_completion_to_itself():
    found = encode(PAIRS, [{"prompt": "", "completion": "abc"}])
    assert targets(found) == "bc<|end|>", "nothing stands before a row's first token"


def test_an_empty_completion_has_no_target_and_gives_neither_nan_nor_weight():
    """Trap 19."""
    found = encode(PAIRS, [{"prompt": "ab", "completion": ""}])
    assert found["num_targets"] == [0]
    model = prepared()
    loss = CausalLMTask(TEXT).loss_sum(model, collated(found), Loss(), None)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    values = CausalLMTask(TEXT).measure(model, collated(found))
    assert values.tolist() == [[0] * len(next_tokens.VALUES)]


def test_a_row_is_cut_at_its_end_and_says_so():
    found = encode(PAIRS, [{"prompt": "abcd", "completion": "efgh"}, {"prompt": "a", "completion": "b"}], max_tokens=6)
    assert spoken(found) == "abcdef"
    assert targets(found) == "ef"
    assert found["truncated"] == [True, False]


def test_the_targets_of_a_chat_are_what_the_assistant_says_with_the_end_of_its_turn():
    chat = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "so long"},
    ]
    found = encode(CHAT, [{"messages": chat}], 200)
    assert spoken(found).startswith("<|system|>be kind<|end|>\n<|user|>hi<|end|>\n<|assistant|>hello<|end|>\n")
    assert targets(found) == "hello<|end|>so long<|end|>"
    assert found["num_bytes"] == [len("hello") + len("so long")], "special tokens are worth no bytes"
    all_of_it = encode(CHAT.model_copy(update={"loss_on": "all"}), [{"messages": chat}], 200)
    assert all_of_it["num_targets"][0] == all_of_it["num_tokens"][0] - 1


def test_pairs_can_be_rendered_as_chats():
    as_chat = encode(PAIRS.model_copy(update={"chat": True}), [{"prompt": "hi", "completion": "hello"}])
    assert spoken(as_chat) == "<|user|>hi<|end|>\n<|assistant|>hello<|end|>\n"
    assert targets(as_chat) == "hello<|end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(monkeypatch):
    template = tiny_lm.TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] if loop.last else '...' }}")
    monkeypatch.setattr(tiny_lm.tokenizer(), "chat_template", template)
    with pytest.raises(InputError, match="renders earlier turns differently"):
        encode(CHAT, [tiny_lm.chats(2)[1]], 200)


def test_a_tokenizer_without_a_template_cannot_render_chats(monkeypatch):
    monkeypatch.setattr(tiny_lm.tokenizer(), "chat_template", None)
    with pytest.raises(InputError, match=r"task: the tokenizer .* has no chat template"):
        encode(CHAT, tiny_lm.chats(1))


@pytest.mark.parametrize("size", [2, 3, 5, 8, 64])
def test_every_token_of_a_text_but_its_first_is_a_target_exactly_once(size):
    text = "wörter & bytes"
    found = encode(TEXT, [{"text": text}], size)
    assert max(found["num_tokens"]) <= size
    ids = [t for row, flags in zip(found["input_ids"], found["target"], strict=True)
           for t, flag in zip(row, flags, strict=True) if flag]  # fmt: skip
    whole = tiny_lm.tokenizer()(text)["input_ids"]
    assert ids == [*whole[1:], tiny_lm.tokenizer().eos_token_id]
    assert sum(found["num_bytes"]) == len(text.encode()) - 1


def test_packing_keeps_every_piece_whole_and_fills_rows_best():
    rows = [{"prompt": "a" * n, "completion": "b"} for n in (5, 3, 1, 7, 2)]  # 7, 5, 3, 9, 4 tokens
    found = encode(PAIRS.model_copy(update={"pack": True}), rows, 10)
    assert sorted(map(tuple, found["segments"])) == [(5, 4), (7, 3), (9,)]
    assert sum(found["num_targets"]) == 10
    starts = [sum(part[:i]) for part in found["segments"] for i in range(len(part))]
    assert len(starts) == 5


def test_no_target_is_the_first_token_of_a_packed_document():
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "de", "completion": "f"}]
    task = PAIRS.model_copy(update={"pack": True, "loss_on": "all"})
    found = encode(task, rows, 20)
    assert found["segments"] == [[4, 4]]
    assert found["target"][0] == [False, True, True, True] * 2


def reference_nats(model, rows: list[dict]) -> list[float]:
    """Negative log-likelihood of every target, one document at a time, by transformers alone."""
    words, found = tiny_lm.tokenizer(), []
    for row in rows:
        prompt, completion = words(row["prompt"])["input_ids"], words(row["completion"])["input_ids"]
        ids = torch.tensor([[*prompt, *completion, words.eos_token_id]])
        with torch.no_grad():
            log_q = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
        found += [-log_q[j - 1, ids[0, j]].item() for j in range(len(prompt), ids.shape[1])]
    return found


ROWS = [
    {"prompt": "ab c", "completion": " de"},
    {"prompt": "f", "completion": "ghijk"},
    {"prompt": "lmn", "completion": "o"},
]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_loss_and_figures_are_those_of_single_unpadded_documents(pack, size):
    """Traps 7, 10: the mask is shifted with the labels, padding and packed neighbours change nothing."""
    model = prepared()
    found = encode(PAIRS.model_copy(update={"pack": pack}), ROWS, 64)
    batches = [
        collated({name: column[i : i + size] for name, column in found.items()})
        for i in range(0, len(found["input_ids"]), size)
    ]
    expected = reference_nats(model, ROWS)
    total = sum(CausalLMTask(TEXT).loss_sum(model, batch, Loss(), None).item() for batch in batches)
    assert total == pytest.approx(sum(expected), rel=1e-5)
    values = torch.cat([CausalLMTask(TEXT).measure(model, batch) for batch in batches]).sum(0)
    assert values[0] == len(expected) == sum(CausalLMTask(TEXT).count_rows(batch) for batch in batches)
    assert values[1].item() == pytest.approx(sum(expected), rel=1e-5)
    assert values[3] == sum(len(row["completion"]) for row in ROWS)


def test_metrics_follow_from_the_sums_by_hand():
    gaps = np.zeros((2, next_tokens.BINS))
    gaps[0, 3], gaps[1, 3], gaps[1, 9] = 0.3, -0.1, -0.4  # gaps of one bin cancel, those of two do not
    values = np.concatenate([np.array([[2, 3.0, 1, 4, 0.5, 2], [2, 1.0, 1, 4, 0.1, 1]]), gaps], -1)
    found = CausalLMTask(TEXT).metrics(values, None)
    assert found["nats_per_token"] == 1.0
    assert found["perplexity"] == pytest.approx(np.e)
    assert found["bits_per_byte"] == pytest.approx(4 / np.log(2) / 8)
    assert found["accuracy"] == 0.5
    assert found["ece"] == pytest.approx(0.6 / 4)
    assert CausalLMTask(TEXT).against_teacher(values, values, None) == {
        "kl": pytest.approx(0.15),
        "top1_agreement": 0.75,
    }
    scored = CausalLMTask(TEXT).scores(("nats_per_token", "accuracy"), values, None)
    assert scored["nats_per_token"]["num_rows"] == 4
    assert scored["nats_per_token"]["low"] <= 1.0 <= scored["nats_per_token"]["high"]


def test_the_calibration_error_is_the_classifiers_over_all_tokens():
    from distilpeft.metrics import classification

    model, words = tiny_lm.model(), tiny_lm.tokenizer()
    rows = CausalLMTask(PAIRS).encode({"prompt": ["one :", "two"], "completion": [" three", " four five"]}, words, 64)
    batch = CausalLMTask(TEXT).collate(rows, words)
    CausalLMTask(PAIRS).prepare(model)
    with torch.no_grad():
        values = CausalLMTask(TEXT).measure(model.eval(), batch).numpy()
        states = CausalLMTask(TEXT).target_states(model, batch)
        p = torch.softmax(next_tokens.head_of(model).logits(states), -1).numpy()
    assert CausalLMTask(TEXT).metrics(values, None)["ece"] == pytest.approx(
        classification.ece(p, batch["labels_N"].numpy()), abs=1e-6
    )


def test_the_answer_as_often_as_in_training_is_scored_by_counts():
    class Rows:
        def __init__(self, ids):
            columns = {"input_ids": ids, "target": [[False] + [True] * (len(row) - 1) for row in ids]}
            self.dataset = datasets.Dataset.from_dict({**columns, "num_bytes": [1] * len(ids)})

        def column(self, name):
            return np.asarray(self.dataset[name])

    found = CausalLMTask(TEXT).majority_values(Rows([[9, 1, 1, 2], [9, 1, 3, 3]]), Rows([[9, 1, 2]]))
    counts = {0: 1, 1: 4, 2: 2, 3: 3}  # one added to each of the ids 0..3
    expected = -np.log(counts[1] / 10) - np.log(counts[2] / 10)
    assert found[0][:4] == pytest.approx([2, expected, 1, 1])
    assert CausalLMTask(TEXT).against_teacher(found, found, None) is None


FAMILIES = {
    "Gemma2": {"final_logit_softcapping": 2.0},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "Llama": {},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fused_path_knows_the_scale_and_cap_of_each_family(name):
    """Trap 18: against the model's own logits."""
    import transformers

    torch.manual_seed(0)
    shape = {"vocab_size": 261, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    more = {"num_key_value_heads": 2, "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = getattr(transformers, f"{name}Config")(**shape, **more, initializer_range=0.5, **FAMILIES[name])
    model = AutoModelForCausalLM.from_config(config).eval()
    CausalLMTask(PAIRS).prepare(model)
    batch = collated(encode(PAIRS, ROWS))
    logits = model(**batch["inputs"]).logits.reshape(-1, 261)[batch["at_N"]]
    expected = F.cross_entropy(logits, batch["labels_N"], reduction="sum")
    found = CausalLMTask(TEXT).loss_sum(model, batch, Loss(), None)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, two in zip(
        torch.autograd.grad(found, list(model.parameters())),
        torch.autograd.grad(expected, list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_an_architecture_whose_logits_are_shaped_otherwise_is_refused(monkeypatch):
    model = tiny_lm.model(initializer_range=0.3)
    plain = type(model).forward

    def bent(self, *arguments, **options):
        out = plain(self, *arguments, **options)
        out.logits = out.logits**3
        return out

    monkeypatch.setattr(type(model), "forward", bent)
    with pytest.raises(GateError, match="not a scaled or capped linear function"):
        CausalLMTask(PAIRS).prepare(model)


def test_packing_is_refused_where_the_model_looks_into_the_neighbour_document():
    packed = PAIRS.model_copy(update={"pack": True})
    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
    opt = AutoModelForCausalLM.from_config(OPTConfig(**shape, word_embed_proj_dim=32, init_std=0.3))
    CausalLMTask(PAIRS).prepare(opt)
    with pytest.raises(GateError, match=r"task\.pack: OPTForCausalLM attends across packed documents"):
        CausalLMTask(packed).prepare(opt)
    CausalLMTask(packed).prepare(
        AutoModelForCausalLM.from_config(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4))
    )


def test_samples_continue_the_prompt_of_the_first_rows():
    class Rows:
        dataset = datasets.Dataset.from_dict(encode(PAIRS, ROWS))

    (found,) = CausalLMTask(TEXT).samples(prepared(), tiny_lm.tokenizer(), Rows, 1, 5)
    assert found["prompt"] == "ab c"
    assert found["completion"]


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (PAIRS, {"prompt": ["a"]}, r"task\.completion: rows\.jsonl has no column 'completion'; its columns are prompt"),
        (TEXT, {"text": ["a", " "]}, r"rows\.jsonl: row 2: column 'text' holds no text \(1 bad rows of 2: 2\)"),
        (PAIRS, {"prompt": ["a"], "completion": [None]}, r"row 1: column 'completion' holds no text but NoneType"),
        (CHAT, {"messages": [[]]}, r"row 1: column 'messages' holds no list of messages"),
        (CHAT, {"messages": [[{"role": "user", "content": "a"}]]}, "no message of the role assistant"),
        (CHAT, {"messages": [[{"role": "user", "text": "a"}]]}, "a message without the texts role and content"),
    ],
)
def test_rows_that_cannot_be_used_are_named(task, rows, message):
    with pytest.raises(InputError, match=message):
        checked(CausalLMTask(task), datasets.Dataset.from_dict(rows), "rows.jsonl")
