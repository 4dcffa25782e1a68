"""The trainer ``lora``: rows, prompts, files that are refused, and a training of a tiny model."""

from __future__ import annotations

import struct
import threading
import time

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_llama import FFN, LAYERS, WIDTH, write_tiny

from chainwax.router.backends._adapter import Bare, bare_of, check_adapter
from chainwax.router.custom import Dataset, Example, Limits, Trained, TrainerFailed, make_trainer
from chainwax.router.custom.lora.adapter import write_adapter
from chainwax.router.custom.lora.base import read_base
from chainwax.router.custom.lora.fit import pack
from chainwax.router.custom.lora.forward import as_weights, hidden, new_adapter, score
from chainwax.router.custom.lora.trainer import ADAPTER, LoraTrainer, bare_of_examples
from chainwax.router.custom.work import train_apart
from chainwax.router.errors import BackendRefused, ConfigError

LIMITS = Limits(minutes=5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("base") / "tiny.gguf")


def examples(count, answers=("yes", "no")):
    return [
        Example(({"role": "user", "content": f"Is it so? case {n}. Answer:"},), answers[n % len(answers)])
        for n in range(count)
    ]


def dataset(count=24, **more):
    return Dataset("desk", "say", examples(count, **more), examples(4))


# -- rows ------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 16)), min_size=1, max_size=30),
    st.integers(1, 4),
)
def test_each_example_stands_whole_in_one_row_and_counts_by_its_answer_alone(sizes, rows):
    given_, next_id = [], 1
    for prompt, answer in sizes:
        numbers = list(range(next_id, next_id + prompt + answer))
        next_id += len(numbers)
        given_.append((numbers[:prompt], numbers[prompt:]))
    found = {}
    for packed in pack(given_, rows, 32):
        assert packed.tokens.shape == packed.segments.shape == (rows, 32)
        for row in range(rows):
            for segment in range(1, packed.segments[row].max() + 1):
                here = packed.tokens[row][packed.segments[row] == segment].tolist()
                assert here not in found.values()
                found[here[0]] = here
            counts = packed.weight[row] > 0
            for place, wanted in zip(packed.places[row][counts], packed.wanted[row][counts], strict=True):
                assert packed.tokens[row, place + 1] == wanted
                assert packed.segments[row, place] == packed.segments[row, place + 1]
    assert sorted(found.values()) == sorted([*p, *a] for p, a in given_)
    weights = sum(packed.weight.sum() for packed in pack(given_, rows, 32))
    assert weights == sum(len(answer) for _, answer in given_)


# -- what it is asked ------------------------------------------------------------------------------


def test_what_all_questions_have_in_common_is_left_out_up_to_whole_words():
    bare = bare_of_examples(examples(20))
    assert bare == Bare("Is it so? case ", " Answer:")
    messages = [
        {"role": "system", "content": "long"},
        {"role": "user", "content": "Is it so? case 7. Answer:"},
    ]
    assert bare.text(messages) == "7."
    assert bare.turn(messages) == "<|im_start|>user\n7.<|im_end|>\n<|im_start|>assistant\n"
    assert bare.text([{"role": "user", "content": "Something else"}]) == "Something else"
    assert bare_of_examples(examples(1)) == Bare()
    with pytest.raises(BackendRefused, match="this message is none"):
        bare.text([{"role": "user", "content": [{"type": "image_url"}]}])


@given(st.lists(st.text(alphabet="ab \n", max_size=8), min_size=1, max_size=6))
def test_an_items_own_text_never_loses_what_differs(texts):
    asked = [Example(({"role": "user", "content": text},), "x") for text in texts]
    bare = bare_of_examples(asked)
    left = [bare.text(example.messages) for example in asked]
    assert len(set(left)) == len(set(texts))
    for text, own in zip(texts, left, strict=True):
        assert text in (own, bare.before + own + bare.after)


# -- adapters that are refused ---------------------------------------------------------------------


def pairs(rng=None):
    rng = rng or np.random.default_rng(0)
    return {
        "attn_q": (
            rng.normal(size=(LAYERS, 4, WIDTH)).astype(np.float32),
            rng.normal(size=(LAYERS, WIDTH, 4)).astype(np.float32),
        )
    }


def written(path, tensors=None, **fields):
    """An adapter as somebody else might have written it."""
    told = {"type": "adapter", "adapter": "lora", "architecture": "llama", "alpha": 8.0} | fields
    writer = gguf.GGUFWriter(path, told["architecture"])
    writer.add_type(told["type"])
    writer.add_string("adapter.type", told["adapter"])
    if told["alpha"] is not None:
        writer.add_float32("adapter.lora.alpha", told["alpha"])
    good = {"blk.0.attn_q.weight.lora_a": (4, WIDTH), "blk.0.attn_q.weight.lora_b": (WIDTH, 4)}
    for name, shape in (good if tensors is None else tensors).items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


A, B = "blk.0.ffn_up.weight.lora_a", "blk.0.ffn_up.weight.lora_b"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"type": "model"}, "no LoRA adapter: its type is 'model'"),
        ({"adapter": "control"}, "no LoRA adapter"),
        ({"architecture": "qwen2"}, "made for the architecture 'qwen2'; tiny.gguf is 'llama'"),
        ({"alpha": None}, "'adapter.lora.alpha' is None"),
        ({"alpha": float("nan")}, "'adapter.lora.alpha' is nan"),
        ({"alpha": -1.0}, "'adapter.lora.alpha' is -1.0"),
        ({"tensors": {}}, "it has no tensors"),
        ({"tensors": {A: (4, WIDTH)}}, "its other half .* is not"),
        ({"tensors": {A: (WIDTH, 4), B: (4, FFN)}}, "transposed; tiny.gguf wants"),
        ({"tensors": {A: (4, WIDTH), B: (FFN, 5)}}, r"wants \(rank, 64\) and \(96, rank\)"),
        ({"tensors": {"blk.9.attn_q.weight.lora_a": (4, WIDTH)}}, "tiny.gguf has no 'blk.9.attn_q.weight'"),
        ({"tensors": {"layers.0.q_proj.lora_A.weight": (4, WIDTH)}}, "PEFT's name for it: convert it"),
        ({"tensors": {"blk.0.attn_q.weight": (WIDTH, WIDTH)}}, "is no half of a map"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_the_reason(base, tmp_path, changes, why):
    assert check_adapter(written(tmp_path / "good.gguf"), base)
    with pytest.raises(ConfigError, match=why):
        check_adapter(written(tmp_path / "bad.gguf", **changes), base)


def test_an_adapter_of_another_base_and_files_that_are_none_are_refused(base, tmp_path):
    path = tmp_path / "adapter.gguf"
    other = write_tiny(tmp_path / "other.gguf", seed=1)
    write_adapter(path, pairs(), alpha=8.0, base=other, bare=Bare("a ", " z"))
    assert bare_of(check_adapter(path, other)) == Bare("a ", " z")
    write_adapter(tmp_path / "all.gguf", pairs(), alpha=8.0, base=base, bare=Bare())
    assert bare_of(check_adapter(tmp_path / "all.gguf", base)) == Bare()
    assert bare_of(check_adapter(written(tmp_path / "foreign.gguf"), base)) is None
    with pytest.raises(ConfigError, match=r"made for another base than tiny.gguf: adapter for other.gguf"):
        check_adapter(path, base)
    whole = path.read_bytes()
    for name, content in {
        "empty": b"",
        "text": b"hello there, I am text",
        "short": whole[:200],
        "huge": whole[:8] + struct.pack("<QQ", 1 << 60, 1 << 60) + whole[24:],
        "version": b"GGUF" + struct.pack("<I", 99) + whole[8:],
    }.items():
        bad = tmp_path / name
        bad.write_bytes(content)
        with pytest.raises(ConfigError, match=str(bad)):
            check_adapter(bad, base)
    with pytest.raises(ConfigError, match="No such file"):
        check_adapter(tmp_path / "nowhere", base)


# -- bases that cannot be trained ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"general__architecture": "qwen2"}, "the architecture is 'qwen2'"),
        ({"tokenizer__ggml__model": "llama"}, "the tokenizer is 'llama', 'smollm'"),
        ({"tokenizer__ggml__pre": "qwen2"}, "the tokenizer is 'gpt2', 'qwen2'"),
        ({"without": "blk.1.ffn_up"}, "has no tensor 'blk.1.ffn_up.weight'"),
    ],
)
def test_a_base_that_cannot_be_trained_is_told_of(tmp_path, changes, why):
    with pytest.raises(ConfigError, match=why):
        read_base(write_tiny(tmp_path / "odd.gguf", **changes))


def test_a_base_that_is_cut_off_is_told_of(base, tmp_path):
    cut = tmp_path / "cut.gguf"
    for size in (10, 3000, 60_000):
        cut.write_bytes(base.read_bytes()[:size])
        with pytest.raises(ConfigError, match=r"cut\.gguf"):
            read_base(cut)


# -- the training ----------------------------------------------------------------------------------


def test_texts_in_one_row_do_not_see_each_other(base):
    model = read_base(base)
    weights = as_weights(model)
    adapter = new_adapter(model, ("attn_q",), 4, 0)
    one, two = model.encode("the first"), model.encode("another thing")
    alone = hidden(weights, adapter, model.shape, [two], [[1] * len(two)], 2.0)
    both = hidden(weights, adapter, model.shape, [one + two], [[1] * len(one) + [2] * len(two)], 2.0)
    assert np.allclose(both[:, len(one) :], alone, atol=1e-4)
    assert np.allclose(np.exp(score(weights, alone)).sum(-1), 1, atol=1e-4)


def test_an_adapter_is_trained_written_and_the_same_for_the_same_seed(base, tmp_path):
    said, made = [], []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        trainer = make_trainer("lora", {"path": str(base), "steps": 10, "rate": 0.02, "look_every": 5})
        made.append(trainer.fit(dataset(), folder, lambda share, what: said.append((share, what)), LIMITS))
    figures = made[0].figures
    assert figures["loss"] < figures["loss_before"] * 0.9
    assert 0 < figures["steps"] <= 10
    assert figures["examples"] == 22  # the newest tenth says when to stop
    assert said[0][0] == 0.0
    assert any("held_out" in what for _, what in said)
    assert (tmp_path / "a" / ADAPTER).read_bytes() == (tmp_path / "b" / ADAPTER).read_bytes()
    header = check_adapter(tmp_path / "a" / ADAPTER, base)
    assert bare_of(header) == Bare("Is it so? case ", " Answer:")
    assert len(header.shapes) == LAYERS * 7 * 2
    served = LoraTrainer({"path": str(base)}).serve("say-1", made[0], {})
    assert served.config.tier == "custom"
    assert served.config.engine.adapter == tmp_path / "a" / ADAPTER


def test_an_adapter_is_not_served_on_another_base_nor_when_it_is_gone(base, tmp_path):
    write_adapter(tmp_path / ADAPTER, pairs(), alpha=8.0, base=base, bare=Bare())
    other = write_tiny(tmp_path / "other.gguf", seed=1)
    made = Trained("lora", tmp_path)
    with pytest.raises(TrainerFailed, match=r"model 'say-1': .*made for another base"):
        LoraTrainer({"path": str(other)}).serve("say-1", made, {})
    (tmp_path / ADAPTER).unlink()
    with pytest.raises(TrainerFailed, match="No such file"):
        LoraTrainer({"path": str(base)}).serve("say-1", made, {})


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"step": 3}, r"trainers\.lora\.step: .*did you mean 'steps'"),
        ({"steps": 0}, r"trainers\.lora\.steps: "),
        ({"rate": 7}, r"trainers\.lora\.rate: "),
        ({"targets": ["attn_qq"]}, "'attn_qq': did you mean 'attn_q'"),
    ],
)
def test_options_that_are_wrong_are_told(options, why):
    with pytest.raises(ConfigError, match=why):
        make_trainer("lora", options)


def test_nothing_to_train_on_is_told(base, tmp_path):
    trainer = LoraTrainer({"path": str(base), "steps": 1})
    long = [Example(({"role": "user", "content": "x" * 9000},), "yes")]
    image = [Example(({"role": "user", "content": [{"type": "image_url"}]},), "yes")]
    for some in (long, image, examples(1)):
        with pytest.raises(TrainerFailed, match="can be trained on"):
            trainer.fit(Dataset("f", "say", some, []), tmp_path, lambda *_: None, LIMITS)


# -- in a process of its own -----------------------------------------------------------------------


def apart(folder, options, limits=LIMITS, progress=lambda *_: None, stop=None):
    return train_apart(
        "lora", LoraTrainer, options, dataset(), folder, limits, progress, stop or threading.Event()
    )


def test_it_trains_in_a_process_of_its_own(base, tmp_path):
    said = []
    options = {"path": str(base), "steps": 6, "rate": 0.02, "look_every": 3}
    made = apart(tmp_path / "made", options, progress=lambda *one: said.append(one))
    assert (made.folder / ADAPTER).exists()
    assert made.figures["cpu_minutes"] > 0
    assert [share for share, _ in said] == sorted(share for share, _ in said)
    assert LoraTrainer(options).serve("say-1", made, {}).config.engine.adapter == made.folder / ADAPTER


@pytest.mark.parametrize(
    ("changes", "limits", "why"),
    [
        ({"path": "nowhere.gguf"}, {}, r"trainers\.lora.*nowhere\.gguf: No such file"),
        ({"path": "damaged"}, {}, "cannot be read as GGUF"),
        # It learns for ever, or hangs: who runs it ends it.
        ({"steps": 10_000, "patience": 10_000, "rate": 1e-9}, {"minutes": 0.05}, "longer than its 0.05 min"),
        ({}, {"memory_mb": 64}, "MB of"),
        # So small a step changes nothing at all.
        ({"rate": 1e-30, "steps": 2, "look_every": 1}, {}, "no step made the adapter better"),
    ],
)  # fmt: skip
def test_a_training_that_goes_wrong_says_why_and_leaves_no_process(base, tmp_path, changes, limits, why):
    if changes.get("path") == "damaged":
        changes = {"path": str(tmp_path / "damaged.gguf")}
        (tmp_path / "damaged.gguf").write_bytes(base.read_bytes()[:5000])
    begun = time.monotonic()
    with pytest.raises(TrainerFailed, match=why):
        apart(tmp_path / "made", {"path": str(base)} | changes, Limits(**{"minutes": 1.0} | limits))
    assert time.monotonic() - begun < 60
    assert not (tmp_path / "made" / "trained.json").exists()


def test_a_training_that_is_stopped_ends_at_once(base, tmp_path):
    stop = threading.Event()
    threading.Timer(1.0, stop.set).start()
    begun = time.monotonic()
    with pytest.raises(TrainerFailed, match="was stopped"):
        apart(tmp_path / "made", {"path": str(base), "steps": 10_000, "patience": 10_000}, stop=stop)
    assert time.monotonic() - begun < 10
