import json
from pathlib import Path

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import sentencepiece
from conftest import byte_tokenizer, write_hf_llama
from transformers import AutoTokenizer
from zo_mlx.convert.gguf import write_hf_directory
from zo_mlx.convert.gguf_file import GgufFile

import zo_mlx
from zo_mlx.errors import UsageError, ZoError

Q = gguf.GGMLQuantizationType
# Those that the gguf package can encode; the other types differ in its decoder alone.
ENCODED = [Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0]


# The tiny model's 256 bytes and two special tokens, and two merged tokens.
TOKENS = [*byte_tokenizer().convert_ids_to_tokens(list(range(258))), "he", "ll"]


def _hf(path: Path, dtype: mx.Dtype = mx.bfloat16) -> Path:
    return write_hf_llama(path, dtype, vocab_size=len(TOKENS))


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows, from its definition: row 2i of a head is row i, row 2i + 1 is row d/2 + i."""
    out = np.empty_like(weight)
    d = len(weight) // heads
    for h in range(heads):
        for i in range(d // 2):
            out[h * d + 2 * i] = weight[h * d + i]
            out[h * d + 2 * i + 1] = weight[h * d + d // 2 + i]
    return out


def write_gguf(
    hf: Path, path: Path, kind: Q = Q.F32, family: str = "llama", **metadata: object
) -> dict[str, np.ndarray]:
    """Write a tiny Hugging Face directory as GGUF; return its tensors as stored, by Hugging Face name."""
    config = json.loads((hf / "config.json").read_text())
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    tokenizer = byte_tokenizer()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 256 + [3, 3, 1, 1])
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template(tokenizer.chat_template)
    for key, value in metadata.items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(key.replace("__", "."), value)
        else:
            writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config["num_hidden_layers"])
    stored = {}
    for name, array in mx.load(str(hf / "model.safetensors")).items():
        weight = np.array(array.astype(mx.float32))
        stays_float = weight.ndim == 1
        data = weight if stays_float or kind == Q.F32 else gguf.quants.quantize(weight, kind)
        stored[name] = weight if data is weight else gguf.quants.dequantize(data, kind)
        stem, _, end = name.rpartition(".")
        if family == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config["num_attention_heads" if stem.endswith("q_proj") else "num_key_value_heads"]
            permuted = _permuted(weight, heads)
            data = permuted if kind == Q.F32 else gguf.quants.quantize(permuted, kind)
        if family == "gemma3" and stem.endswith("norm"):
            data = weight + 1
        target = f"{names.get_name(stem)}.{end}"
        writer.add_tensor(target, data, raw_dtype=None if stays_float or kind == Q.F32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.mark.parametrize("kind", ENCODED)
def test_tensors_come_back_in_hugging_face_order(kind: Q, tmp_path: Path) -> None:
    stored = write_gguf(_hf(tmp_path / "hf"), tmp_path / "m.gguf", kind)
    (tmp_path / "out").mkdir()
    write_hf_directory(tmp_path / "m.gguf", tmp_path / "out", "float32")
    got = mx.load(str(tmp_path / "out/model-00001.safetensors"))
    assert set(got) == set(stored)
    for name, expected in stored.items():
        assert np.array_equal(np.array(got[name]), expected), name


@pytest.mark.parametrize(("kind", "dtype"), [(Q.F32, "float32"), (Q.F16, "float16"), (Q.Q4_1, "bfloat16")])
def test_dtype_is_the_files_own_unless_quantized(kind: Q, dtype: str, tmp_path: Path) -> None:
    write_gguf(_hf(tmp_path / "hf"), tmp_path / "m.gguf", kind)
    (tmp_path / "out").mkdir()
    write_hf_directory(tmp_path / "m.gguf", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == dtype


def test_the_gguf_route_gives_the_model_of_the_hugging_face_route(tmp_path: Path) -> None:
    hf = _hf(tmp_path / "hf", mx.float32)
    write_gguf(hf, tmp_path / "m.gguf")
    small = {"num_samples": 2, "sequence_length": 16, "q_group_size": 32, "progress": False}
    zo_mlx.convert(str(tmp_path / "m.gguf"), str(tmp_path / "a"), **small)
    mlx_lm.convert(str(hf), str(tmp_path / "b"), quantize=True, q_group_size=32)
    ours, stock = (mx.load(str(tmp_path / d / "model.safetensors")) for d in "ab")
    assert set(ours) == set(stock)
    assert all(mx.array_equal(ours[name], stock[name]) for name in stock)
    model, tokenizer = mlx_lm.load(str(tmp_path / "a"))
    reference, _ = mlx_lm.load(str(tmp_path / "b"))
    tokens = mx.array([[1, 2, 3, 4]])
    assert mx.array_equal(model(tokens), reference(tokens))
    assert tokenizer.decode(tokenizer.encode("hello, 2nd try")) == "hello, 2nd try"


def test_the_real_tokenizer_is_rebuilt(smollm2_gguf: Path, tmp_path: Path) -> None:
    """SmolLM2's own ids, as published with the model: <|im_start|> 1, <|im_end|> 2, single digits, byte-level words."""
    zo_file = GgufFile(smollm2_gguf)
    tokens = zo_file.metadata["tokenizer.ggml.tokens"]
    from zo_mlx.convert.gguf_tokenizer import build_tokenizer

    build_tokenizer(zo_file).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == tokens
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.tokenize("In 2024, it's\n  <|im_end|>") == [
        *("In", "Ġ", "2", "0", "2", "4", ",", "Ġit", "'s", "ĊĠĠ", "<|im_end|>")
    ]
    text = "Ünïcode — 漢字 🎉\ttabs\n\n\nand   spaces"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_gives_the_ids_of_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    """With a space put before the text, as llama's, or without, as gemma's, which has pieces of its own for runs."""
    text = (Path(zo_mlx.__file__).parents[1] / "convert" / "calibration.txt").read_text()
    (tmp_path / "text.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.999,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        user_defined_symbols=[] if prefix else ["\n\n", "<tag>"],
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    size = reference.get_piece_size()
    kinds = [6 if reference.is_byte(i) else 3 if reference.is_control(i) else 1 for i in range(size)]
    if not prefix:
        kinds = [4 if reference.id_to_piece(i) in ("\n\n", "<tag>") else k for i, k in enumerate(kinds)]
    hf = write_hf_llama(tmp_path / "hf", vocab_size=size)
    write_gguf(
        hf,
        tmp_path / "m.gguf",
        **{
            "tokenizer__ggml__model": "llama",
            "tokenizer__ggml__tokens": [reference.id_to_piece(i) for i in range(size)],
            "tokenizer__ggml__scores": [float(reference.get_score(i)) for i in range(size)],
            "tokenizer__ggml__token_type": kinds,
            "tokenizer__ggml__add_space_prefix": prefix,
            "tokenizer__ggml__bos_token_id": 1,
            "tokenizer__ggml__eos_token_id": 2,
            "tokenizer__ggml__unknown_token_id": 0,
        },
    )
    (tmp_path / "out").mkdir()
    write_hf_directory(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for sample in (*text.split("\n")[:40], "  two  spaces", "naïve 漢字 🎉", "one\n\ntwo <tag>x"):
        if sample:
            assert tokenizer.encode(sample, add_special_tokens=False) == reference.encode(sample), sample
    assert tokenizer.encode("hello")[0] == 1, "llama files add <s> unless they say otherwise"
    assert tokenizer.decode(tokenizer.encode("hello world"), skip_special_tokens=True) == "hello world"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_truncated_files_are_refused(share: float, tmp_path: Path) -> None:
    write_gguf(_hf(tmp_path / "hf"), tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(share * len(content))])
    with pytest.raises(UsageError, match=r"cut\.gguf is truncated or not a GGUF file") as e:
        zo_mlx.convert(str(tmp_path / "cut.gguf"), str(tmp_path / "out"), progress=False)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"general__architecture": "mamba"}, "architecture mamba is not supported"),
        ({"llama__expert_count": 8}, "mixtures of experts"),
        ({"llama__rope__scaling__type": "yarn"}, "rope.scaling.factor is missing"),
        ({"llama__rope__scaling__type": "x", "llama__rope__scaling__factor": 2.0}, "scaled by x are not"),
        ({"llama__attention__key_length": 1}, "heads of 1 do not fit"),
        ({"llama__attention__head_count": 0}, "does not fit the tensors"),
        ({"llama__block_count": 10**9}, "does not fit the tensors"),
        ({"llama__block_count": 2}, "is not part of a llama model"),
        ({"llama__embedding_length": 65}, "does not fit the tensors"),
        ({"llama__rope__freq_base": float("nan")}, "rope.freq_base is nan"),
        ({"llama__context_length": "long"}, "context_length is 'long'"),
        ({"tokenizer__ggml__model": "t5"}, "tokenizer model t5"),
        ({"tokenizer__ggml__pre": "unheard-of"}, "pre-tokenizer unheard-of"),
        ({"tokenizer__ggml__merges": ["x"]}, "tokenizer cannot be rebuilt"),
        ({"tokenizer__ggml__tokens": [*TOKENS[:-3], "h", "he", "ll"]}, "disagrees with the file's own token ids"),
    ],
)
def test_files_that_are_not_supported_are_one_clear_line(
    metadata: dict[str, object], problem: str, tmp_path: Path
) -> None:
    write_gguf(_hf(tmp_path / "hf"), tmp_path / "m.gguf", **metadata)
    with pytest.raises(ZoError, match=problem) as e:
        zo_mlx.convert(str(tmp_path / "m.gguf"), str(tmp_path / "out"), progress=False)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()
