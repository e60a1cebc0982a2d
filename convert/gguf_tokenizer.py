"""Rebuild a fast tokenizer from the vocabulary, merges and scores inside a GGUF file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..errors import UsageError

if TYPE_CHECKING:
    from .gguf_file import GgufFile

# tokenizer.ggml.token_type
_CONTROL, _USER_DEFINED = 3, 4

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT_RUNS_OF_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SINGLE_DIGITS = _DIGIT_RUNS_OF_3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class _Words:
    """How text is cut into words before merging: what llama.cpp knows by the name in `tokenizer.ggml.pre`.

    Attributes:
        pattern: of words.
        digits: they are split off one by one first.
        nfc: text is normalized first (by Hugging Face's tokenizers; llama.cpp leaves it out).
        whole: a word that is in the vocabulary is one token, whether merges lead to it or not.
        bos: the text begins with the BOS token unless the file says otherwise.
    """

    pattern: str
    digits: bool = False
    nfc: bool = False
    whole: bool = False
    bos: bool = False


_PRE_TOKENIZERS = {
    **dict.fromkeys(("default", "gpt-2"), _Words(_GPT2)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _Words(_GPT2, digits=True)),
    **dict.fromkeys(("llama-bpe", "llama3"), _Words(_DIGIT_RUNS_OF_3, whole=True, bos=True)),
    "dbrx": _Words(_DIGIT_RUNS_OF_3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _Words(_SINGLE_DIGITS, nfc=True)),
}


def build_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, with its special tokens and chat template.

    Raises:
        UsageError: an unknown kind of tokenizer, or one that does not give the file's own token ids back.
    """
    tokens = file.get("tokenizer.ggml.tokens", list)
    kind = file.get("tokenizer.ggml.model", str)
    try:
        if kind == "gpt2":
            tokenizer = _byte_level_bpe(file, tokens)
        elif kind == "llama":
            tokenizer = _sentencepiece_bpe(file, tokens)
        else:
            raise UsageError(f"{file.path}: tokenizer model {kind} is not supported")
        tokenizer.add_special_tokens(_added(file, tokens, _CONTROL, special=True))
        tokenizer.add_tokens(_added(file, tokens, _USER_DEFINED, special=False))
    except UsageError:
        raise
    except Exception as e:  # tokenizers raises bare Exception
        raise UsageError(f"{file.path}: the tokenizer cannot be rebuilt: {e}") from None
    _check(file, tokenizer, tokens)

    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            special[f"{name}_token"] = tokens[index]
    words = _PRE_TOKENIZERS.get(file.get("tokenizer.ggml.pre", str, "default"))
    _add_bos_and_eos(file, tokenizer, special, default_bos=kind == "llama" or (words is not None and words.bos))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        model_max_length=file.get(f"{file.get('general.architecture', str)}.context_length", int),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level_bpe(file: GgufFile, tokens: list[str]) -> Tokenizer:
    pre = file.get("tokenizer.ggml.pre", str, "default")
    if pre not in _PRE_TOKENIZERS:
        raise UsageError(f"{file.path}: pre-tokenizer {pre} is not supported; known: {', '.join(_PRE_TOKENIZERS)}")
    words = _PRE_TOKENIZERS[pre]
    merges = [tuple(m.split(" ", 1)) for m in file.get("tokenizer.ggml.merges", list)]
    vocabulary = {t: i for i, t in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=words.whole))
    if words.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *([pre_tokenizers.Digits(individual_digits=True)] if words.digits else []),
            pre_tokenizers.Split(Regex(words.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(file: GgufFile, tokens: list[str]) -> Tokenizer:
    """A SentencePiece BPE model: the merges are all splits of a piece into two pieces, best score first."""
    scores = file.get("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise UsageError(f"{file.path}: {len(scores)} scores for {len(tokens)} tokens")
    vocabulary = {t: i for i, t in enumerate(tokens)}
    splits = [
        (-scores[i], vocabulary[piece[:n]], vocabulary[piece[n:]], piece[:n], piece[n:])
        for piece, i in vocabulary.items()
        for n in range(1, len(piece))
        if piece[:n] in vocabulary and piece[n:] in vocabulary
    ]
    merges = [(left, right) for *_, left, right in sorted(splits)]
    unknown = file.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return tokenizer


def _added(file: GgufFile, tokens: list[str], kind: int, special: bool) -> list[AddedToken]:
    types = file.get("tokenizer.ggml.token_type", list, [])
    return [AddedToken(t, special=special, normalized=False) for t, k in zip(tokens, types, strict=False) if k == kind]


def _add_bos_and_eos(file: GgufFile, tokenizer: Tokenizer, special: dict[str, str], default_bos: bool) -> None:
    from tokenizers import processors

    wanted = {
        "bos": file.get("tokenizer.ggml.add_bos_token", bool, default_bos) and "bos_token" in special,
        "eos": file.get("tokenizer.ggml.add_eos_token", bool, False) and "eos_token" in special,
    }
    if any(wanted.values()):
        bos, eos = ([special[f"{n}_token"]] if wanted[n] else [] for n in ("bos", "eos"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            special_tokens=[(t, tokenizer.token_to_id(t)) for t in dict.fromkeys([*bos, *eos])],
        )


def _check(file: GgufFile, tokenizer: Tokenizer, tokens: list[str]) -> None:
    """Every id must give the file's token back, and the file's tokens must survive a round trip through the model."""
    wrong = [i for i, t in enumerate(tokens) if tokenizer.id_to_token(i) != t]
    if wrong or tokenizer.get_vocab_size() != len(tokens):
        raise UsageError(
            f"{file.path}: the rebuilt tokenizer disagrees with the file's own token ids "
            f"({len(wrong)} of {len(tokens)}, first {json.dumps(tokens[wrong[0]]) if wrong else 'beyond the end'})"
        )
