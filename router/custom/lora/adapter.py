"""An adapter as a GGUF file: what the engine loads, and what it has to know to be asked as it was trained."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from chainwax.router.backends._adapter import AFTER_KEY, BASE_KEY, BEFORE_KEY, Bare
from chainwax.router.backends._gguf import fingerprint

__all__ = ["write_adapter"]


def write_adapter(
    path: Path,
    pairs: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
    *,
    alpha: float,
    base: Path,
    bare: Bare,
) -> None:
    """Write an adapter, whole or not at all.

    ``pairs`` are by linear map: a (layers, rank, n_in) and b (layers, n_out, rank). Its effect is
    b · a · alpha / rank.
    """
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_name(f"adapter for {base.name}")
    writer.add_string(BASE_KEY, fingerprint(base))
    writer.add_string(BEFORE_KEY, bare.before)
    writer.add_string(AFTER_KEY, bare.after)
    for name, (a, b) in pairs.items():
        for layer in range(len(a)):
            writer.add_tensor(f"blk.{layer}.{name}.weight.lora_a", np.ascontiguousarray(a[layer], np.float32))
            writer.add_tensor(f"blk.{layer}.{name}.weight.lora_b", np.ascontiguousarray(b[layer], np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    os.replace(part, path)
