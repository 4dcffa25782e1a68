"""A node's own model: made, proved, promoted and taken back while calls are made, and after a restart."""

from __future__ import annotations

import json
import random
import re
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from chainwax.router import (
    Choice,
    Feedback,
    FeedbackKind,
    LLMManager,
    ModelConfig,
    NodeSpec,
    Prompt,
    Tier,
    Usage,
    load_settings,
)
from chainwax.router.backends import Health, Reply, make_backend
from chainwax.router.custom import TRAINERS, Card, TrainerFailed
from chainwax.router.custom.byhand import promote, roll_back
from chainwax.router.custom.card import file_hashes
from chainwax.router.custom.head import Doubt, Head
from chainwax.router.custom.proof import Tally, Watch
from chainwax.router.custom.store import Models, Standing
from chainwax.router.errors import ConfigError

pytest.importorskip("sklearn")
TOPICS = {"bill": ["invoice", "refund", "charge", "payment"], "bug": ["crash", "error", "freeze", "broken"]}
TRAINER = """
import os, sys, time
from pathlib import Path
from chainwax.router import ModelConfig
from chainwax.router.custom import HERE, Place, Served, Trained, TrainerFailed
from chainwax.router.backends import Health, Reply
from chainwax.router.errors import Abstains

class Said:
    simulated = False
    batch_max = 1
    def __init__(self, what): self.what = what
    async def start(self): return 4
    async def generate(self, request):
        text = request.query.messages[-1]["content"]
        if self.what == "shy": raise Abstains("ask another")
        return Reply(self.right(text) if self.what == "good" else self.what)
    def right(self, text):
        return "bug" if any(w in text for w in ("crash", "error", "freeze", "broken")) else "bill"
    def weigh(self, query, said):
        text = query.messages[-1]["content"]
        # Without another's word it is wrong now and then.
        return self.right(text) if said or "7" not in text else "bill"
    async def health(self): return Health(True)
    async def close(self): pass

class Trainer:
    name = "mine"
    def __init__(self, options):
        self.options = options
        self.place = Place(options["provider"]) if "provider" in options else HERE
    def fit(self, dataset, folder, progress, limits):
        do = self.options.get("do", "good")
        print("noise on standard output")
        progress(0.5, "half")
        if do == "crash": raise RuntimeError("boom")
        if do == "die": os._exit(7)
        if do == "fail": raise TrainerFailed("no room in the oven")
        if do == "hang": time.sleep(600)
        if do == "eat": hog = bytearray(800_000_000); time.sleep(60)
        if do == "lie": return None
        (folder / "weights").write_text(do)
        return Trained("mine", folder, cost_usd=0.25)
    def serve(self, name, trained, models):
        if self.options.get("serve") == "crash": raise RuntimeError("no such plate")
        said = (trained.folder / "weights").read_text()
        config = ModelConfig(tier="custom", url="http://127.0.0.1:9/v1", model=name)
        if said in ("shy", "worse") and name == "kind-1": said = "good"
        return Served(config, Said("bill" if said == "worse" else said))
"""


class Cheap:
    """Right three times in four."""

    simulated = False
    batch_max = 1

    def __init__(self):
        self.asked = 0

    async def start(self):
        return 8

    async def generate(self, request):
        self.asked += 1
        text = request.query.messages[-1]["content"]
        right = label(text)
        wrong = "bug" if right == "bill" else "bill"
        return Reply(wrong if self.asked % 4 == 0 else right, Usage(10, 1))

    async def health(self):
        return Health(True)

    async def close(self):
        pass


def label(text):
    return next(name for name, words in TOPICS.items() if any(word in text for word in words))


def text_of(n):
    topic = ("bill", "bug")[n % 2]
    return f"ticket {n}: there is a {TOPICS[topic][n // 2 % 4]} with number {n * 7919 % 1000}"


class Bench:
    """One node over a recording, whose right answers come at once."""

    def __init__(self, folder, monkeypatch, trainer=None, node=None, mode="auto", **custom):
        module = folder / "my_trainer.py"
        module.write_text(TRAINER, encoding="utf-8")
        monkeypatch.syspath_prepend(str(folder))
        sys.modules.pop("my_trainer", None)
        import my_trainer

        monkeypatch.setitem(TRAINERS, "mine", my_trainer.Trainer)
        own = {"custom": mode, "target": 0.9}
        if trainer is not None:
            own["trainer"] = "mine"
        self.settings = load_settings(
            None,
            run={"recording": str(folder / "run.db"), "seed": 1},
            nodes={"kind": own | (node or {})},
            models={
                "big": {"tier": "strongest", "url": "http://127.0.0.1:9/v1", "model": "-"}
                | {"input_cost_per_token": 1e-6, "output_cost_per_token": 1e-6}
            },
            custom={"folder": str(folder / "models"), "least": 60, "proofs": 20} | custom,
            trainers={"mine": trainer or {}},
        )
        self.folder = folder
        self.spec = NodeSpec("kind", Prompt("{text}"), Choice(["bill", "bug"]), flow="desk")
        self.models = Models(folder / "models", "desk", "kind")
        self.decided = []
        self.n = 0

    def __enter__(self):
        self.manager = LLMManager(self.settings, backends={"big": Cheap()})
        announce = self.manager.announce
        self.manager.announce = lambda d: (self.decided.append(d), announce(d))
        self.manager.begin_run("desk", nodes=[self.spec])
        self.face = self.manager.register(self.spec)
        return self

    def __exit__(self, *exc):
        self.manager.close()

    def feed(self, count, right=label, correct=True):
        """Ask and tell what was right; returns the results."""
        results, ready = [], threading.Event()

        def done(_, result):
            results.append(result)
            if len(results) == count:
                ready.set()

        texts = [text_of(self.n + i) for i in range(count)]
        keys = {str(self.n + i): text for i, text in enumerate(texts)}
        queries = [
            self.face.bind({"text": text}, item_key=key, position=f"p:{key}") for key, text in keys.items()
        ]
        text_by_call = {q.call_id: t for q, t in zip(queries, texts, strict=True)}
        self.n += count
        self.face.submit(queries, done)
        assert ready.wait(20)
        assert [r.error for r in results if r.error] == []
        self.manager.run(self.manager.custom.settled())
        told = []
        for result in results:
            wanted = right(text_by_call[result.call_id])
            told.append(
                Feedback(
                    "kind", float(result.value == wanted), result.call_id, arm=result.arm.key,
                    kind=FeedbackKind.label, source="me", correction=wanted if correct else None,
                )
            )  # fmt: skip
        self.manager.feedback(told)
        self.manager.settle()
        return results

    def until(self, kind, *, feed=20, seconds=40, right=label):
        """Go on until a decision of a kind is there."""
        ends = time.monotonic() + seconds
        while not self.of(kind):
            assert time.monotonic() < ends, [(d.kind, d.detail) for d in self.decided]
            if feed:
                self.feed(feed, right)
            time.sleep(0.1)
        return self.of(kind)[-1]

    def of(self, kind):
        return [d for d in self.decided if d.kind == kind]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return lambda **more: Bench(tmp_path, monkeypatch, **more)


def test_a_head_is_made_proved_and_promoted_by_itself_and_is_there_after_a_restart(bench):
    with bench() as b:
        b.feed(70)
        trained = b.until("custom_trained")
        assert trained.detail["held_out"]["accuracy"] > 0.9
        promoted = b.until("custom_promoted")
        name = promoted.detail["model"]
        assert name == "kind-1"
        assert promoted.detail["proof"]["low"] >= promoted.detail["bar"]
        results = b.feed(60)
        own = [r for r in results if r.arm.model == name]
        assert len(own) > 20
        assert sum(r.cost_usd == 0 for r in own) > 10
    card = Card.read(b.models.path(name))
    assert card.trainer == "head"
    assert set(card.figures) == {"training", "held_out", "shadow"}
    assert card.data["train"] > 40
    assert card.data["until"] > card.data["since"]
    assert card.parent is None
    card.verify(b.models.path(name))
    with closing(sqlite3.connect(b.folder / "run.db")) as db:
        kinds = {kind for (kind,) in db.execute("SELECT decision_kind FROM decisions WHERE node = 'kind'")}
    assert {"custom_trained", "custom_promoted"} <= kinds
    with bench() as again:
        assert name in again.manager.instances
        assert any(r.arm.model == name for r in again.feed(20))


def test_what_was_rolled_back_by_hand_is_not_there_after_a_restart_nor_now(bench):
    with bench() as b:
        b.feed(70)
        name = b.until("custom_promoted").detail["model"]
        decision = roll_back(b.models, "as a test", 1.0)
        assert decision.detail["parent"] is None
        ends = time.monotonic() + 5
        while name in b.manager.instances:
            assert time.monotonic() < ends
            time.sleep(0.05)
        assert {r.arm.model for r in b.feed(10)} == {"big"}
    with bench() as again:
        assert name not in again.manager.instances


def test_a_better_child_takes_the_parents_place_and_rollback_brings_the_parent_back(bench):
    with bench(again_after=0.2) as b:
        b.feed(70)
        first = b.until("custom_promoted").detail["model"]
        b.decided.clear()
        second = b.until("custom_promoted")
        assert second.detail["parent"] == first
        child = second.detail["model"]
        assert first not in b.manager.instances
        assert child in b.manager.instances
        roll_back(b.models, "", 1.0)
        ends = time.monotonic() + 5
        while child in b.manager.instances or first not in b.manager.instances:
            assert time.monotonic() < ends
            time.sleep(0.05)
        results = b.feed(10)
        assert {r.arm.model for r in results} <= {first, "big"}
        # By hand once more: the parent's own parent stays what it was.
        promote(b.models, child, 0.0, 2.0)
        assert Card.read(b.models.path(child)).parent == first
        assert Card.read(b.models.path(first)).parent is None


def test_a_child_is_not_held_back_by_what_it_could_not_ask_in_the_shadow(bench):
    with bench(trainer={"do": "shy"}, again_after=0.2, node={"target": 0.5}) as b:
        b.feed(70)
        b.until("custom_promoted")
        b.decided.clear()
        second = b.until("custom_promoted")
        assert second.detail["proof"]["accuracy"] < 1  # its parent got all of them right
        assert second.detail["parent"] == "kind-1"


def test_a_worse_child_makes_room_for_the_next_when_there_is_more_to_learn_from(bench):
    with bench(trainer={"do": "worse"}, again_after=0.2, node={"target": 0.3}, proofs=20) as b:
        b.feed(70)
        b.until("custom_promoted")
        rejected = b.until("custom_rejected")
        assert rejected.detail["why"] == "no better than what serves, and there is more to learn from"
        assert rejected.detail["shadow_n"] < 400
        assert b.models.read().serving == "kind-1"


def test_a_model_that_drifts_is_taken_back(bench):
    with bench(trainer={}, again_after=50) as b:
        b.feed(70)
        name = b.until("custom_promoted").detail["model"]
        b.feed(20)
        taken = b.until("custom_taken_back", right=lambda text: "bill" if label(text) == "bug" else "bug")
        assert taken.detail["model"] == name
        assert name not in b.manager.instances
        assert b.models.read().serving is None
        assert {r.arm.model for r in b.feed(10)} == {"big"}


@pytest.mark.parametrize(
    ("options", "limits", "why"),
    [
        ({"do": "crash"}, {}, "boom"),
        ({"do": "die"}, {}, "ended with code 7: it said nothing|ended with code 7: noise"),
        ({"do": "fail"}, {}, "no room in the oven"),
        ({"do": "hang"}, {"minutes": 0.02}, "took longer than its 0.02 minutes"),
        ({"do": "eat"}, {"memory_mb": 500}, "MB of memory, and may take 500"),
        ({"do": "lie"}, {}, "ended with code 1"),
    ],
)
def test_a_trainer_that_goes_wrong_is_told_of_and_all_goes_on(bench, options, limits, why):
    with bench(trainer=options, **limits) as b:
        b.feed(70)
        said = b.until("custom_not_trained", feed=0)
        assert re.search(why, said.detail["why"])
        assert {r.arm.model for r in b.feed(10)} == {"big"}
        assert b.models.read().serving is None


@pytest.mark.parametrize("answer", ["bill", "neither"])
def test_a_worse_model_is_not_promoted(bench, answer):
    with bench(trainer={"do": answer}) as b:
        b.feed(70)
        b.until("custom_rejected")
        assert not b.of("custom_promoted")
        assert {r.arm.model for r in b.feed(10)} == {"big"}


def test_training_never_holds_up_the_loop_nor_the_end(bench):
    with bench(trainer={"do": "hang"}) as b:
        b.feed(70)
        own = b.manager.custom.nodes["kind"]
        ends = time.monotonic() + 10
        while own.progress is None:
            assert time.monotonic() < ends
            time.sleep(0.05)
        begun = time.monotonic()
        b.feed(20)
        assert time.monotonic() - begun < 2
        begun = time.monotonic()
    assert time.monotonic() - begun < 5
    assert b.models.read().trained_on == 0  # the next run tries again


@pytest.mark.parametrize(
    ("trainer", "rules"),
    [({"provider": "openai"}, {"deny": ["provider:openai"]}), ({}, {"deny": ["custom"]})],
)
def test_a_nodes_text_never_goes_to_a_trainer_that_its_rules_forbid(bench, trainer, rules):
    with bench(trainer=trainer, node=rules) as b:
        b.feed(70)
        said = b.until("custom_not_trained", feed=0)
        assert "its allow and deny do not let a custom model be trained on" in said.detail["why"]
    assert not list((b.folder / "models").rglob("*.jsonl"))


def test_a_model_in_the_shadow_is_no_longer_asked_where_the_rules_have_become_stricter(bench):
    with bench(trainer={"do": "good"}, proofs=10_000) as b:
        b.feed(70)
        name = b.until("custom_trained").detail["model"]
        b.feed(20)
    asked = shadows(b)
    assert asked > 0
    with bench(trainer={"do": "good"}, node={"deny": ["custom"]}) as again:
        again.feed(20)
        (lost,) = again.of("custom_lost")
        assert lost.detail["model"] == name
        assert f"its allow and deny do not let it ask '{name}'" in lost.detail["why"]
    assert shadows(b) == asked


def shadows(bench):
    with closing(sqlite3.connect(bench.folder / "run.db")) as db:
        return db.execute("SELECT count(*) FROM attempts WHERE arm LIKE 'kind-%'").fetchone()[0]


def test_too_little_and_one_answer_are_told_of(bench):
    with bench() as b:
        b.feed(70, right=lambda _: "bug")
        said = b.until("custom_not_trained", feed=0)
        assert "have the same right answer 'bug'" in said.detail["why"]


def test_a_damaged_model_is_not_served_after_a_restart(bench):
    with bench() as b:
        b.feed(70)
        name = b.until("custom_promoted").detail["model"]
    (b.models.path(name) / "head.npz").write_bytes(b"something else")
    with bench() as again:
        lost = again.of("custom_lost")
        assert "is not the file that was proved" in lost[0].detail["why"]
        assert name not in again.manager.instances
        assert {r.arm.model for r in again.feed(10)} == {"big"}


def test_a_trainer_that_cannot_serve_what_it_made_is_told_of_and_all_goes_on(bench):
    with bench(trainer={}) as b:
        b.feed(70)
        b.until("custom_promoted")
    with bench(trainer={"serve": "crash"}) as again:
        (lost,) = again.of("custom_lost")
        assert "cannot serve 'kind-1': RuntimeError: no such plate" in lost.detail["why"]
        assert {r.arm.model for r in again.feed(10)} == {"big"}


def test_a_damaged_file_of_how_things_stand_is_told_of(bench):
    b = bench()
    b.models.folder.mkdir(parents=True)
    (b.models.folder / "models.json").write_text("{", encoding="utf-8")
    with b:
        assert "cannot be read" in b.of("custom_refused")[0].detail["why"]
        b.feed(5)


def test_off_serves_none_and_unset_makes_none(bench):
    with bench() as b:
        b.feed(70)
        name = b.until("custom_promoted").detail["model"]
    with bench(mode="off") as b:
        assert name not in b.manager.instances
    with bench(mode=None) as b:
        assert name in b.manager.instances
        b.decided.clear()
        b.feed(200)
        time.sleep(1)
        assert not [d for d in b.decided if d.kind == "custom_trained"]


def test_nothing_is_promoted_by_hand_that_is_not_proved(bench):
    b = bench()
    with pytest.raises(ConfigError, match="has no model of its own"):
        promote(b.models, None, 0.5, 1.0)
    folder = b.models.path("kind-1")
    folder.mkdir(parents=True)
    (folder / "weights").write_text("good")
    Card("kind-1", "desk", "kind", "mine", 1.0, files=file_hashes(folder)).write(folder)
    with pytest.raises(ConfigError, match="'kind-1' is not proved"):
        promote(b.models, None, 0.5, 1.0)
    with pytest.raises(ConfigError, match="did you mean 'kind-1'"):
        promote(b.models, "kind-2", 0.5, 1.0)
    with pytest.raises(ConfigError, match="no model of its own serves"):
        roll_back(b.models, "", 1.0)
    (folder / "weights").write_text("evil")
    with pytest.raises(TrainerFailed, match="is not the file that was proved"):
        promote(b.models, "kind-1", 0.0, 1.0)


def test_a_trainer_that_no_other_process_can_import_is_refused(bench, monkeypatch):
    class Local:
        name, place = "mine", None

    with bench(trainer={}) as b:
        monkeypatch.setitem(TRAINERS, "mine", lambda options: __import__("my_trainer").Trainer(options))
        b.feed(70)
        assert "another process cannot import" in b.until("custom_not_trained", feed=0).detail["why"]


def test_old_models_are_tidied_and_those_that_could_come_back_stay(tmp_path):
    models = Models(tmp_path, "f", "n/../x")
    assert tmp_path in models.folder.parents
    for i in range(8):
        models.path(f"m{i}").mkdir(parents=True)
        Card(f"m{i}", "f", "n", "head", float(i), parent="m0" if i == 7 else None).write(models.path(f"m{i}"))
    models.tidy(Standing(serving="m7"), keep=2)
    assert [card.name for card in models.cards()] == ["m0", "m5", "m6", "m7"]


def test_bounds_and_the_watch():
    assert Tally().bounds(0.95) == (0.0, 1.0)
    low, high = Tally(90, 100).bounds(0.95)
    assert 0.83 < low < 0.9 < high < 0.95
    watch = Watch()
    for _ in range(24):
        watch.add(0.0)
    assert not watch.fell(0.5)
    watch.add(0.0)
    assert watch.fell(0.5)


def test_a_head_is_saved_to_the_last_number_and_learns(tmp_path):
    texts = [text_of(n) for n in range(100)]
    head = Head.fit(["bill", "bug", "other"], texts, [label(t) for t in texts], 8.0)
    head.sharpness, head.doubt = 1.5, Doubt([(0.6, 0.3, 1.0)])
    head.save(tmp_path)
    again = Head.load(tmp_path)
    rows = head.texts.rows(texts)
    assert (again.scores(again.texts.rows(texts)) == head.scores(rows)).all()
    assert list(again.doubt.pairs) == [(0.6, 0.3, 1.0)]
    odd = "zyx zyx zyx wvu"
    for _ in range(20):
        again.learn(odd, "other")
    assert again.choices[again.guess(odd).top] == "other"
    again.learn(odd, "no choice")
    (tmp_path / "head.json").write_text(json.dumps({"choices": 3}))
    with pytest.raises(TrainerFailed, match="no head can be read"):
        Head.load(tmp_path)


@pytest.mark.parametrize("text", ["", " ", "\ud800", "x" * 200_000, "\x00", "ü" * 10])
def test_a_head_takes_any_text(text):
    texts = [text_of(n) for n in range(40)]
    head = Head.fit(["bill", "bug"], texts, [label(t) for t in texts], 8.0)
    guess = head.guess(text)
    assert abs(guess.chances.sum() - 1) < 1e-6
    head.learn(text, "bug", ["bill", "what"])


@pytest.mark.parametrize("choices", [["bill", "bug"], ["bill", "bug", "never", "even"]])
def test_a_head_that_begins_from_another_ends_at_the_same(choices):
    texts = [text_of(n) for n in range(90)]
    answers = ["even" if "even" in choices and n % 10 == 0 else label(text) for n, text in enumerate(texts)]
    early = Head.fit(choices, texts[:60], answers[:60], 4.0)
    cold = Head.fit(choices, texts, answers, 16.0)
    warm = Head.fit(choices, texts, answers, 16.0, start=early)
    rows = cold.texts.rows(texts)
    assert abs(cold.chances(cold.scores(rows)) - warm.chances(warm.scores(rows))).max() < 0.02


def test_a_head_of_few_texts_looks_at_the_words_that_tell(monkeypatch):
    rng = random.Random(1)
    fillers = ["".join(rng.choices("aeioubdfgklmnprst", k=6)) for _ in range(200)]

    def made(n):
        text = [*rng.choices(fillers, k=8), rng.choice(TOPICS["bug" if n % 2 else "bill"])]
        return " ".join(rng.sample(text, len(text)))

    def loss(few, many):
        head = Head.fit(["bill", "bug"], few, [label(t) for t in few], 16.0)
        right = np.array([("bill", "bug").index(label(t)) for t in many])
        return head.calibrate(head.scores(head.texts.rows(many)), right)

    streams = [([made(n) for n in range(40)], [made(n) for n in range(200)]) for _ in range(5)]
    telling = sum(loss(*stream) for stream in streams)
    monkeypatch.setattr(
        "chainwax.router.custom.head._telling", lambda rows, _: np.ones(rows.shape[1], np.float32)
    )
    assert telling < 0.9 * sum(loss(*stream) for stream in streams)


def test_doubt_learns_whom_to_trust_and_forgets():
    doubt = Doubt()
    assert doubt.trust(0.95, 0.02) > 0.6 > doubt.trust(0.5, 0.45)
    for _ in range(100):
        doubt.learn(0.6, 0.3, right=False)
    assert doubt.trust(0.6, 0.3) < 0.2
    for _ in range(400):
        doubt.learn(0.6, 0.3, right=True)
    assert doubt.trust(0.6, 0.3) > 0.8


def test_a_models_own_tier_and_rules_count(bench):
    config = ModelConfig(tier=Tier.custom, backend="head", artefact="x")
    assert config.tier is Tier.custom
    with pytest.raises(ConfigError, match=r"models.mine.artefact"):
        make_backend("mine", ModelConfig(tier=Tier.custom, backend="head"))


ALONE = """
import sys, threading
from pathlib import Path
import my_trainer
from chainwax.router.custom import Dataset, Example, Limits
from chainwax.router.custom.work import train_apart

asked = [Example(({"role": "user", "content": f"case {n}"},), "yes") for n in range(4)]
dataset = Dataset("desk", "kind", asked, asked)
options = {"do": "hang"}
told = lambda share, what: print("training", flush=True)
train_apart("mine", my_trainer.Trainer, options, dataset, Path("made"), Limits(), told, threading.Event())
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
def test_a_training_ends_when_the_process_that_watches_it_is_killed(tmp_path):
    (tmp_path / "my_trainer.py").write_text(TRAINER, encoding="utf-8")
    (tmp_path / "alone.py").write_text(ALONE, encoding="utf-8")
    with subprocess.Popen([sys.executable, "alone.py"], cwd=tmp_path, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"training\n"
        child = child_of(parent.pid)
        parent.kill()
    ends = time.monotonic() + 20
    while runs(child):
        assert time.monotonic() < ends
        time.sleep(0.1)


def child_of(pid):
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                return int(stat.parent.name)
    raise AssertionError("it has no child")


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
