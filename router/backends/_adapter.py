"""A LoRA adapter for the embedded engine: what is wrong with it before it is loaded, and how it is asked.

The engine says the same five words of any adapter that it cannot take, so each is looked at first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chainwax.router.backends._gguf import Header, fingerprint, read_header
from chainwax.router.errors import BackendRefused, ConfigError
from chainwax.router.types import Message, Query

__all__ = ["AFTER_KEY", "BASE_KEY", "BEFORE_KEY", "Bare", "bare_of", "check_adapter"]

BASE_KEY = "chainwax.base"
"""The adapter's field that tells the file that it was trained for, by its fingerprint."""
BEFORE_KEY, AFTER_KEY = "chainwax.prompt.before", "chainwax.prompt.after"
"""Its fields with the texts of :class:`Bare`."""


@dataclass(frozen=True)
class Bare:
    """How an adapter that knows its task is asked: the item's own text, and nothing around it.

    System text and examples are left out, and of the last message what all messages of the node begin and end
    with.
    """

    before: str = ""
    after: str = ""

    def text(self, messages: Sequence[Message]) -> str:
        """The item's own text. Raises :class:`BackendRefused` where the last message is not text."""
        content = messages[-1].get("content")
        if not isinstance(content, str):
            raise BackendRefused("the adapter was trained on texts, and this message is none")
        begins = self.before if content.startswith(self.before) else ""
        ends = self.after if content.endswith(self.after) else ""
        return (
            content[len(begins) : len(content) - len(ends)] if len(begins + ends) <= len(content) else content
        )

    def turn(self, messages: Sequence[Message]) -> str:
        """The same as one turn of a ChatML conversation: what the embedded engine is asked."""
        return f"<|im_start|>user\n{self.text(messages)}<|im_end|>\n<|im_start|>assistant\n"

    def as_turn(self, query: Query) -> list[Message]:
        """For a server whose completions API takes the turn as it is."""
        return [{"role": "user", "content": self.turn(query.messages)}]

    def as_message(self, query: Query) -> list[Message]:
        """For a server that makes a turn of it by itself."""
        return [{"role": "user", "content": self.text(query.messages)}]


def bare_of(adapter: Header) -> Bare | None:
    """How an adapter wants to be asked; None for one of another maker, which is asked as its base is."""
    if BASE_KEY not in adapter.values:
        return None
    # The library that writes the file leaves out texts that are empty.
    return Bare(str(adapter.values.get(BEFORE_KEY, "")), str(adapter.values.get(AFTER_KEY, "")))


def check_adapter(path: Path, base: Path) -> Header:
    """An adapter's header, where the engine can serve it on top of ``base``.

    Raises :class:`ConfigError` with what is wrong with it.
    """
    adapter, model = read_header(path), read_header(base)
    wrong = _wrong_head(adapter, model, base) or _wrong_tensors(adapter, model, base)
    if wrong is not None:
        raise ConfigError(f"{path}: {wrong}")
    return adapter


def _wrong_head(adapter: Header, model: Header, base: Path) -> str | None:
    values = adapter.values
    if values.get("general.type") != "adapter" or values.get("adapter.type") != "lora":
        return f"no LoRA adapter: its type is '{values.get('general.type', 'model')}'"
    own, wanted = values.get("general.architecture"), model.values.get("general.architecture")
    if own != wanted:
        return f"made for the architecture '{own}'; {base.name} is '{wanted}'"
    trained_for = values.get(BASE_KEY)
    if trained_for is not None and trained_for != fingerprint(base):
        return f"made for another base than {base.name}: {values.get('general.name', 'a file')}"
    alpha = values.get("adapter.lora.alpha")
    if not isinstance(alpha, float) or not 0 < alpha < float("inf"):
        return f"'adapter.lora.alpha' is {alpha}, not a number above 0"
    return None


def _wrong_tensors(adapter: Header, model: Header, base: Path) -> str | None:
    if not adapter.shapes:
        return "it has no tensors"
    for name, shape in adapter.shapes.items():
        stem, _, half = name.rpartition(".")
        if half not in ("lora_a", "lora_b"):
            peft = " is PEFT's name for it: convert it with llama.cpp's convert_lora_to_gguf.py"
            return (
                f"tensor '{name}'{peft if 'lora_A' in name or 'lora_B' in name else ' is no half of a map'}"
            )
        if stem not in model.shapes:
            return f"tensor '{name}': {base.name} has no '{stem}'"
        other = f"{stem}.{'lora_b' if half == 'lora_a' else 'lora_a'}"
        if other not in adapter.shapes:
            return f"tensor '{name}' is there, and its other half '{other}' is not"
        if half == "lora_b":
            continue
        wanted, a, b = model.shapes[stem], shape, adapter.shapes[other]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != wanted:
            turned = len(a) == len(b) == 2 and (b[1], a[0]) == wanted and a[1] == b[0]
            return (
                f"'{name}' is {a} and '{other}' is {b}"
                f"{', transposed' if turned else ''}; {base.name} wants (rank, {wanted[-1]}) and "
                f"({wanted[0]}, rank)"
            )
    return None
