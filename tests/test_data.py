import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import byte_tokenizer, write_jsonl
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import CacheDataset, load_local_dataset
from mlx_lm.tuner.trainer import iterate_batches
from tokenizers import normalizers

import zo_mlx
from zo_mlx.batches import batch_order
from zo_mlx.data import Example
from zo_mlx.errors import UsageError
from zo_mlx.objective import collate
from zo_mlx.records import FEATURES, read_file
from zo_mlx.rows import load_dataset, tokenized

CHOICE = {"prompt": "a?", "completion": " yes", "choices": [" yes", " no"]}


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
# One that shows tools and calls, as those of models that use tools do.
TOOL_CHAT = (
    "{% if tools %}<s>tools:{{ tools | tojson }}</s>{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content or '' }}{{ m.tool_calls | tojson if m.tool_calls }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    return TokenizerWrapper(byte_tokenizer())


RECORDS: dict[str, list[dict[str, object]]] = {
    "text": [{"text": "hello there"}, {"text": "a longer text, é"}],
    "completions": [{"prompt": "hi", "completion": "yes"}, {"prompt": "how are you", "completion": ""}],
    "completions with tools": [{"prompt": "hi", "completion": "yes", "tools": [TOOL]}],
    "features": [{"prompt": "no", "q": "why", "a": "so"}, {"q": "who", "a": "he", "completion": "no"}],
    "chat": [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "prompt": "q"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "no answer"}]},
    ],
    "tools": [
        {
            "messages": [
                {"role": "user", "content": "rain?"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "no"},
                {"role": "assistant", "content": "No."},
            ],
            "tools": [TOOL],
        },
        {
            "messages": [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
            ],
            "tools": [TOOL],
        },
    ],
}


@pytest.mark.parametrize("mask_prompt", [False, True])
@pytest.mark.parametrize("kind", RECORDS)
def test_tokens_and_masks_equal_mlx_lms(kind: str, mask_prompt: bool, tmp_path: Path) -> None:
    """Rows, targets and loss mask are those of mlx-lm's trainer, but for the padding token it counts after the end."""
    if kind == "text" and mask_prompt:
        pytest.skip("mlx-lm refuses it, too")
    hf_tokenizer = byte_tokenizer()
    hf_tokenizer.chat_template = TOOL_CHAT
    tokenizer, records = TokenizerWrapper(hf_tokenizer), RECORDS[kind]
    names = {"prompt_feature": "q", "completion_feature": "a"} if kind == "features" else {}
    path = write_jsonl(tmp_path / "train.jsonl", records)
    ours = tokenized(read_file(path, {**FEATURES, **names}), tokenizer, 512, mask_prompt).examples
    config = SimpleNamespace(mask_prompt=mask_prompt, **names)
    theirs = CacheDataset(load_local_dataset(tmp_path, tokenizer, config)[0])

    for example, record in zip(ours, records, strict=True):
        number = records.index(record)
        subset = type("One", (), {"__getitem__": lambda _, i, n=number: theirs[n], "__len__": lambda _: 1})()
        batch, lengths = next(iterate_batches(subset, 1, 512))
        steps = mx.arange(1, batch.shape[1])
        mask = (steps >= lengths[:, 0:1]) & (steps <= lengths[:, 1:]) & (steps < lengths[:, 1:])
        counted = {(int(i), int(batch[0, i + 1])) for i in np.flatnonzero(np.array(mask[0]))}
        assert {(t.position, t.token) for t in example.targets[0]} == counted
        assert example.rows[0] == batch[0, : len(example.rows[0])].tolist()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TOOL_CHAT, set()),
        (TOOL_CHAT.replace("tools:{{ tools | tojson }}", ""), set()),  # that there are any still shows
        (TOOL_CHAT.replace("{% if tools %}<s>tools:{{ tools | tojson }}</s>{% endif %}", ""), {"tools"}),
        (TOOL_CHAT.replace("{{ m.tool_calls | tojson if m.tool_calls }}", ""), {"tool_calls"}),
        ("{% for m in messages %}<s>{{ m.content or '' }}</s>{% endfor %}", {"tools", "tool_calls"}),
        ("{% for m in messages %}<s>{{ m.content or m.tool_calls[0].type }}{% endfor %}", {"tools"}),  # fails without
    ],
)
def test_what_a_chat_template_leaves_out_is_known(template: str, expected: set[str], tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    path = write_jsonl(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": "q"}]}, *RECORDS["tools"]])
    assert load_dataset(path, TokenizerWrapper(tokenizer), 512).left_out == expected


def test_tokens_that_the_model_does_not_have_are_refused(tiny: Path, tmp_path: Path) -> None:
    model, tokenizer = zo_mlx.load(tiny)
    tokenizer._tokenizer.add_tokens(["<extra>"])
    bad = {"prompt": "a <extra>", "completion": "b", "choices": ["b", "c"]}
    path = write_jsonl(tmp_path / "test.jsonl", [CHOICE, bad])
    message = "test.jsonl, line 2: the tokenizer has token 258, the model only 258"
    with pytest.raises(UsageError, match=message):
        zo_mlx.evaluate(model, tokenizer, path)
    with pytest.raises(UsageError, match=message):
        zo_mlx.classify(model, tokenizer, path)
    own = shutil.copytree(tiny, tmp_path / "m")
    tokenizer._tokenizer.save_pretrained(own)
    write_jsonl(tmp_path / "train.jsonl", [CHOICE, bad] * 8)
    with pytest.raises(UsageError, match="train.jsonl, line 2: the tokenizer has token 258"):
        zo_mlx.train(model=str(own), data=str(tmp_path), adapter_path=str(tmp_path / "a"))


def test_choices_that_the_tokenizer_makes_one_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    path = write_jsonl(tmp_path / "d.jsonl", [{**CHOICE, "completion": "\u00e9", "choices": ["\u00e9", "e\u0301"]}])
    with pytest.raises(UsageError, match="line 1: two of the choices .* are the same tokens"):
        load_dataset(path, TokenizerWrapper(tokenizer), 99)


def test_single_token_choices_share_one_row_and_longer_ones_the_fewest(
    tmp_path: Path, tokenizer: TokenizerWrapper
) -> None:
    record = {"prompt": "x", "completion": "ab", "choices": ["ab", "ac", "b", "abcd"]}
    path = write_jsonl(tmp_path / "d.jsonl", [record])
    example = load_dataset(path, tokenizer, 100).examples[0]
    texts = [tokenizer.decode(row) for row in example.rows]
    assert texts == ["xabc"]  # of which "xa" (for ab, ac) and "x" (for b) are prefixes
    for choice, targets in zip(record["choices"], example.targets, strict=True):
        read = [(texts[t.row][: t.position + 1], tokenizer.decode([t.token])) for t in targets]
        assert read == [("x" + choice[:i], choice[i]) for i in range(len(choice))]
    assert (example.label, example.choices) == (0, ("ab", "ac", "b", "abcd"))


def test_a_choice_that_merges_with_the_prompt_is_scored_from_where_the_texts_differ(tmp_path: Path) -> None:
    merging = byte_tokenizer(merges=[("x", "a")])
    record = {"prompt": "yx", "completion": "a", "choices": ["a", "b"]}
    path = write_jsonl(tmp_path / "d.jsonl", [record])
    example = load_dataset(path, TokenizerWrapper(merging), 100).examples[0]
    tokens = {t: merging.convert_tokens_to_ids(t) for t in ("y", "x", "xa", "b")}
    assert [[(t.position, t.token) for t in choice] for choice in example.targets] == [
        [(0, tokens["xa"])],
        [(0, tokens["x"]), (1, tokens["b"])],
    ]
    assert example.rows == [[tokens["y"], tokens["x"]]]


def test_batches_hold_examples_of_like_lengths() -> None:
    rng = np.random.default_rng(0)
    examples = [Example([[0] * int(n)], [[]], int(n) % 2, ("a", "b")) for n in rng.integers(1, 65, 1024)]
    batches = batch_order(examples, 16, seed=0, epoch=0)
    computed = sum(16 * max(examples[i].length for i in batch) for batch in batches)
    assert computed < 1.3 * sum(e.length for e in examples)  # batches drawn at random: 1.9


def test_batches_depend_on_seed_and_epoch_alone_and_use_every_example_once() -> None:
    examples = [Example([[0] * (1 + i % 7)], [[]], i % 3, ("a", "b", "c")) for i in range(103)]
    first = batch_order(examples, 8, seed=1, epoch=0)
    assert [b.tolist() for b in first] == [b.tolist() for b in batch_order(examples, 8, 1, 0)]
    flat = np.concatenate(first)
    assert len(first) == 12
    assert len(set(flat.tolist())) == 96
    for other in (batch_order(examples, 8, 1, 1), batch_order(examples, 8, 2, 0)):
        assert [b.tolist() for b in first] != [b.tolist() for b in other]


def test_batches_have_the_labels_of_the_whole_set() -> None:
    rng = np.random.default_rng(0)
    examples = []
    for i in range(200):  # the right answer is what counts, not its place among the choices
        choices, label = (("yes", "no"), int(i < 50)) if i % 2 else (("no", "yes"), int(i >= 50))
        examples.append(Example([[0] * int(rng.integers(1, 50))], [[]], label, choices))
    for epoch in range(3):
        counts = [sum(int(i) < 50 for i in batch) for batch in batch_order(examples, 16, 0, epoch)]
        assert min(counts) >= 3  # 4 of 16 on average
        assert max(counts) <= 5


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ('{"text": "fine"}\n{"text": \n', "line 2: not JSON"),
        ('{"text": "fine"}\n[1]\n', "line 2: must be a JSON object"),
        ('{"question": "a"}\n', r"line 1: fields \['question'\] are none of the known formats"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "line 2: field 'completion' is missing"),
        (
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b", "choices": ["b", "c"]}\n',
            "line 2: has",
        ),
        ('{"prompt": "a", "completion": 3}\n', "line 1: field 'completion' must be a string"),
        ('{"text": "a\\ud800"}\n', "line 1: holds half a surrogate pair"),
        ('{"text": "a"}\n\n{"text": ""}\n', "line 3: it has no token to predict"),
        ('{"messages": []}\n', "line 1: field 'messages' must be a non-empty list"),
        ('{"messages": [{"content": "x"}]}\n', "line 1: every message must be an object with a 'role'"),
        ('{"prompt": "a", "completion": "c", "choices": ["b", "d"]}\n', "line 1: completion 'c' is not among"),
        ('{"prompt": "a", "completion": "b", "choices": ["b"]}\n', "line 1: field 'choices' must hold at least two"),
        ('{"prompt": "a", "completion": "b", "choices": ["b", "b"]}\n', "line 1: field 'choices' must hold at least"),
        ('{"prompt": "a", "completion": "b", "choices": "b"}\n', "line 1: field 'choices' must be a list"),
        ('{"prompt": "%s", "completion": "b", "choices": ["b", "c"]}\n' % ("a" * 99), "line 1: prompt and choice have"),
        (
            '{"prompt": "a", "completion": "b"}\n{"prompt": "%s", "completion": "b"}\n' % ("a" * 99),
            "line 2: the prompt",
        ),
    ],
)
def test_wrong_data_are_named_by_file_line_and_field(
    content: str, problem: str, tmp_path: Path, tokenizer: TokenizerWrapper
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=problem) as e:
        load_dataset(
            path, tokenizer, max_length=60, mask_prompt=content.startswith('{"prompt": "a", "completion": "b"}')
        )
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_missing_and_undecodable_files_are_refused(tmp_path: Path, tokenizer: TokenizerWrapper) -> None:
    with pytest.raises(UsageError, match="no such data file"):
        load_dataset(tmp_path / "none.jsonl", tokenizer, 100)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(UsageError, match="cannot be read as UTF-8"):
        load_dataset(tmp_path / "latin.jsonl", tokenizer, 100)


def test_long_texts_are_cut_and_counted(tmp_path: Path, tokenizer: TokenizerWrapper) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "abcdefghij"}, {"text": "abc"}])
    dataset = load_dataset(path, tokenizer, max_length=6)
    assert dataset.truncated == 1
    assert [e.length for e in dataset.examples] == [5, 3]


def test_branches_have_equally_many_rows(tmp_path: Path, tokenizer: TokenizerWrapper) -> None:
    path = write_jsonl(
        tmp_path / "d.jsonl", [CHOICE, {"prompt": "b", "completion": "xy", "choices": ["xy", "zw", "no"]}]
    )
    one, three = load_dataset(path, tokenizer, 100).examples
    assert (len(one.rows), len(three.rows)) == (2, 3)
    batch = collate([[one], [three]])
    assert batch.tokens.shape[0] == 6


def test_what_has_nothing_to_learn_from_is_left_out_if_the_rest_has(
    tmp_path: Path, tokenizer: TokenizerWrapper
) -> None:
    """Empty texts, as WikiText has them, and prompts that fill a sequence, which mlx-lm cuts."""
    long = {"prompt": "a" * 99, "completion": "b"}
    for rows, left in (
        ([{"text": "a"}, {"text": ""}, {"text": "bc"}], "line 2: it has no token to predict"),
        ([long, {"prompt": "a", "completion": "b"}], "line 1: the prompt has"),
    ):
        records = read_file(write_jsonl(tmp_path / "train.jsonl", rows))
        unusable: list[str] = []
        dataset = tokenized(records, tokenizer, 60, mask_prompt="prompt" in rows[0], unusable=unusable)
        assert [e.record for e in dataset.examples] == [row for row in rows if row not in (long, {"text": ""})]
        assert [left in problem for problem in unusable] == [True]
    with pytest.raises(UsageError, match="line 1: the prompt has"):
        tokenized(records[:1], tokenizer, 60, mask_prompt=True, unusable=[])


@pytest.mark.parametrize(
    ("row", "choices"),
    [
        ({"prompt": "q", "completion": "A", "choices": {"text": ["x", "y"], "label": ["A", "B"]}}, False),
        ({"text": "q", "choices": ["x", "y"], "answer": 0}, False),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "choices": []}, False),
        ({"prompt": "q", "completion": "x", "choices": ["x", "y"]}, True),
    ],
)
def test_other_choices_than_ours_are_ignored_as_mlx_lm_does(
    row: dict[str, Any], choices: bool, tmp_path: Path, tokenizer: TokenizerWrapper
) -> None:
    """As in ARC, MMLU and OpenBookQA."""
    dataset = load_dataset(write_jsonl(tmp_path / "train.jsonl", [row]), tokenizer, 200)
    assert dataset.kind == ("choices" if choices else "tokens")
