"""Models as agents see them: a kind, a prompt, a text that comes back."""

from __future__ import annotations

import base64
import io
import json
import mimetypes
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import json_repair

from chainwax.flows.chainstream._world import invoked, world
from chainwax.flows.chainstream.context import Buffer

__all__ = ["Model", "get_model", "make_prompt", "parse_response"]

_KINDS = ("text", "image", "audio")
_IMAGES = ("jpg", "png", "jpeg")
_AUDIO = ("wav", "flac", "mp3")
_SAID = (int, float, list, tuple, type(None))
"""What a list in a prompt may hold besides: said as Python writes it."""
_FENCED = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)


class Model:
    """A model of a kind; which one it is, the router says for each question."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        """``text``, ``text+image``, ``text+audio`` or ``text+image+audio``."""

    def __repr__(self) -> str:
        return f"<Model {self.kind}>"

    def query(self, prompt_message: Any) -> str:
        """The answer to a prompt, as :func:`make_prompt` makes it; a text is one too.

        Raises what went wrong; RuntimeError outside of a listener.
        """
        invocation = invoked()
        if invocation is None:
            raise RuntimeError(
                "a model was asked outside of a listener, or on a thread that a listener began: "
                "ask it in the listener itself, where other items go on meanwhile"
            )
        return invocation.ask(self.kind, prompt_message, sys._getframe(1))


_models: dict[str, Model] = {}


def get_model(llm_type: str | Sequence[str] = ("text",)) -> Model:
    """A model for a kind: ``text``, ``image``, ``audio``, in any case, or a list of them.

    Raises ValueError for anything else.
    """
    if isinstance(llm_type, str):
        wanted = [llm_type.lower()]
    elif isinstance(llm_type, list | tuple) and llm_type:
        wanted = [str(one).lower() for one in llm_type]
    else:
        raise ValueError(f"a model's kind is a text or a list of texts, not {llm_type!r}")
    for one in wanted:
        if one not in _KINDS:
            raise ValueError(f"a model's kind is one of {', '.join(_KINDS)}, not {one!r}")
    kind = "+".join(("text", *(one for one in _KINDS[1:] if one in wanted)))
    return _models.setdefault(kind, Model(kind))


def make_prompt(*args: Any, system_prompt: str | None = None) -> list[dict[str, Any]]:
    """One message of parts, in OpenAI's shape.

    A text is a text; a dict is ``str(dict)``; the path of a picture and a PIL image are pictures; the path
    of a recording is a recording; a list or a :class:`Buffer` is each of its items, numbers and lists among
    them as their text. Raises ValueError for all else, a number by itself too, and for a list of several
    kinds, with ChainStream's own words.
    """
    messages: list[dict[str, Any]] = []
    if system_prompt is not None:
        if not isinstance(system_prompt, str):
            raise ValueError(f"system_prompt must be a string, got {type(system_prompt)}")
        messages.append({"role": "system", "content": system_prompt})
    parts: list[dict[str, Any]] = []
    for arg in args:
        if isinstance(arg, Buffer):
            arg = arg.get_all()
        if isinstance(arg, list):
            parts += _parts_of_list(arg)
        else:
            parts.append(_part(arg))
    messages.append({"role": "user", "content": parts})
    return messages


def _parts_of_list(several: list[Any]) -> list[dict[str, Any]]:
    if not several:
        warnings.warn("an empty list adds nothing to a prompt", stacklevel=3)
        return []
    first = several[0]
    if not all(isinstance(one, type(first)) for one in several):
        raise ValueError(f"all elements must be of the same type, got {type(first)}")
    if world().strict and not _is_picture(first) and not _is_path(first):
        return []  # upstream sends pictures and recordings of a list, and drops all else
    return [_part(str(one) if isinstance(one, _SAID) else one) for one in several]


def _part(arg: Any) -> dict[str, Any]:
    if isinstance(arg, str):
        suffix = _suffix(arg)
        if suffix in _IMAGES and _is_file(arg):
            return _picture(Path(arg).read_bytes(), mimetypes.guess_type(arg)[0] or "image/jpeg")
        if suffix in _AUDIO and _is_file(arg):
            data = base64.b64encode(Path(arg).read_bytes()).decode()
            return {"type": "input_audio", "input_audio": {"data": data, "format": suffix}}
        return {"type": "text", "text": arg}
    if isinstance(arg, dict):
        return {"type": "text", "text": str(arg)}
    if _is_picture(arg):
        raw = io.BytesIO()
        form = (getattr(arg, "format", None) or "jpeg").lower()
        if form not in ("png", "jpeg", "gif", "webp"):
            form = "jpeg"
        (arg.convert("RGB") if form == "jpeg" else arg).save(raw, format=form)
        return _picture(raw.getvalue(), f"image/{form}")
    raise ValueError(f"unsupported type: {type(arg)}")


def _is_picture(arg: Any) -> bool:
    """Whether it is a PIL image, by what it can do."""
    return callable(getattr(arg, "save", None)) and hasattr(arg, "size")


def _is_path(arg: Any) -> bool:
    """Whether it names a picture or a recording, there or not."""
    return isinstance(arg, str) and _suffix(arg) in (*_IMAGES, *_AUDIO)


def _suffix(text: str) -> str:
    """What a text ends in, where it may be a path."""
    return text.rpartition(".")[2].lower() if len(text) < 4096 and "\n" not in text else ""


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def _picture(data: bytes, mime: str) -> dict[str, Any]:
    return {
        "type": "image_url",
        "image_url": {"url": f"data:{mime};base64,{base64.b64encode(data).decode()}"},
    }


def parse_response(response: str, target: type | Sequence[str] | Callable[[str], Any] | None = None) -> Any:
    """What a model's text stands for.

    Without a ``target`` it is JSON where the text holds some, else the text without its spaces. A target
    may be a type (``bool``, ``int``, ``float``, ``list``, ``dict``, ``str``), a list of choices, or a
    function of the text. Raises ValueError where the text does not hold it.

    >>> parse_response("Yes.", bool), parse_response("about 7 of them", int)
    (True, 7)
    """
    text = str(response).strip()
    if target is None:
        found = _json_in(text)
        return text if found is None else found
    if target is str:
        return text
    if target is bool:
        word = re.sub(r"[^a-z]", "", text.lower().split()[0]) if text else ""
        if word in ("y", "yes", "true"):
            return True
        if word in ("n", "no", "false"):
            return False
        raise ValueError(f"neither yes nor no: {text[:80]!r}")
    if target in (int, float):
        number = re.search(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
        if number is None:
            raise ValueError(f"no number in {text[:80]!r}")
        return int(float(number[0])) if target is int else float(number[0])
    if target in (list, dict):
        found = _json_in(text)
        if not isinstance(found, target):
            raise ValueError(f"no JSON {target.__name__} in {text[:80]!r}")
        return found
    if callable(target):
        return target(text)
    named = [
        choice for choice in target if re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", text, re.IGNORECASE)
    ]
    if len(named) != 1:
        raise ValueError(f"{text[:80]!r} names {'none' if not named else 'several'} of {list(target)}")
    return named[0]


def _json_in(text: str) -> Any:
    fenced = _FENCED.search(text)
    body = fenced[1] if fenced else text
    start = min((place for place in (body.find("{"), body.find("[")) if place >= 0), default=-1)
    if start < 0:
        return None
    try:
        return json.loads(body[start:])
    except ValueError:
        found = json_repair.loads(body[start:])
        return found if isinstance(found, dict | list) and found else None
