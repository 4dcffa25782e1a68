"""The trainer ``peft``: its script and data, what its command may do, and its adapter in a server like vLLM.

The server here speaks vLLM's endpoints for adapters, in its words; it answers with the adapter's name.
"""

from __future__ import annotations

import ast
import asyncio
import json
import shlex
import sys
import time
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from chainwax.router.answers import FreeText
from chainwax.router.backends.base import Request
from chainwax.router.custom import Dataset, Example, Limits, Trained, TrainerFailed, make_trainer
from chainwax.router.custom.lora.peft import PeftOptions, peft_script
from chainwax.router.errors import BackendDown, BackendRefused, ConfigError
from chainwax.router.prompt import Prompt
from chainwax.router.types import Arm, NodeSpec, Query

BASE = "Qwen/Qwen3-0.6B"
OPTIONS = {"base": BASE, "url": "http://127.0.0.1:9/v1"}
FILES = ("adapter_config.json", "adapter_model.safetensors")


def dataset(count=30):
    rows = [
        Example(({"role": "user", "content": f"Summarise this. ticket {n} Answer:"},), f"sum {n}")
        for n in range(count)
    ]
    return Dataset("desk", "say", rows, rows[:3])


def command(tmp_path, code):
    """A command that stands for the GPU's machine."""
    script = tmp_path / "there.py"
    script.write_text("import sys, time\nfrom pathlib import Path\nfolder = Path(sys.argv[2])\n" + code)
    return f"{shlex.quote(sys.executable)} {script} {{script}} {{folder}}"


LEAVES = "(folder / 'adapter').mkdir()\n" + "".join(
    f"(folder / 'adapter' / '{name}').write_text('{{}}')\n" for name in FILES
)


def fit(tmp_path, code=LEAVES, data=None, minutes=1.0):
    folder = tmp_path / "say-1"
    folder.mkdir()
    trainer = make_trainer("peft", OPTIONS | {"command": command(tmp_path, code)})
    return trainer.fit(data or dataset(), folder, lambda *_: None, Limits(minutes=minutes))


# -- script and data -------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [BASE, 'a"""b\nimport os', "C:\\models\\x", "$rank {rank} ''' \\"])
def test_the_script_is_python_whatever_the_base_is_called(base):
    script = peft_script(PeftOptions(base=base, url="u", rank=4), base, 100)
    tree = ast.parse(script)
    calls = {
        node.func.id: node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and hasattr(node.func, "id")
    }
    told = {word.arg: word.value for word in calls["SFTTrainer"].keywords}
    assert ast.literal_eval(told["model"]) == base
    lora = {word.arg: ast.literal_eval(word.value) for word in calls["LoraConfig"].keywords}
    assert lora["r"] == 4
    assert lora["lora_alpha"] == 8
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"pathlib", "datasets", "peft", "transformers", "trl"}


def test_it_writes_conversations_runs_the_command_and_keeps_what_it_left(tmp_path):
    trained = fit(tmp_path)
    rows = [json.loads(line) for line in (trained.folder / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 27
    assert rows[0] == {
        "prompt": [{"role": "user", "content": "0"}],
        "completion": [{"role": "assistant", "content": "sum 0"}],
    }
    assert len((trained.folder / "stop.jsonl").read_text().splitlines()) == 3
    ast.parse((trained.folder / "train_lora.py").read_text())
    assert trained.figures["examples"] == 27
    assert trained.detail == {"base": BASE, "before": "Summarise this. ticket ", "after": " Answer:"}


@pytest.mark.parametrize(
    ("code", "minutes", "why"),
    [
        ("sys.exit('no such GPU')", 1.0, r"ended with 1: no such GPU \(in .*train_lora\.log\)"),
        ("time.sleep(60)", 0.02, "not done within the minutes"),
        ("", 1.0, r"adapter_config\.json is not there"),
        (LEAVES + f"(folder / 'adapter' / '{FILES[1]}').unlink()", 1.0, "safetensors is not there"),
    ],
)  # fmt: skip
def test_a_command_that_goes_wrong_says_why(tmp_path, code, minutes, why):
    begun = time.monotonic()
    with pytest.raises(TrainerFailed, match=why):
        fit(tmp_path, code, minutes=minutes)
    assert time.monotonic() - begun < 30


def test_too_little_and_a_command_that_is_not_there_are_told(tmp_path):
    with pytest.raises(TrainerFailed, match="node 'say': 1 questions can be trained on"):
        fit(tmp_path, data=dataset(1))
    trainer = make_trainer("peft", OPTIONS | {"command": "no-such-program {script}"})
    with pytest.raises(TrainerFailed, match="no-such-program: No such file"):
        trainer.fit(dataset(), tmp_path / "say-1", lambda *_: None, Limits())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"url": "u"}, r"trainers\.peft\.base: Field required"),
        (OPTIONS | {"rnak": 3}, r"trainers\.peft\.rnak: .*did you mean 'rank'"),
        (OPTIONS | {"rank": 0}, r"trainers\.peft\.rank: "),
    ],
)
def test_options_that_are_wrong_are_told(options, why):
    with pytest.raises(ConfigError, match=why):
        make_trainer("peft", options)


def test_an_adapter_of_another_base_or_without_its_files_is_not_served(tmp_path):
    trained = fit(tmp_path)
    other = make_trainer("peft", OPTIONS | {"base": "another"})
    with pytest.raises(TrainerFailed, match=f"made for the base '{BASE}'; the server has 'another'"):
        other.serve("say-1", trained, {})
    (trained.folder / "adapter" / FILES[1]).unlink()
    with pytest.raises(TrainerFailed, match="safetensors is missing"):
        make_trainer("peft", OPTIONS).serve("say-1", trained, {})


# -- the server ------------------------------------------------------------------------------------


class Vllm:
    """vLLM's endpoints for adapters, started with ``--enable-lora`` or ``without``."""

    def __init__(self, *, without: bool = False, status: int = 0, key: str = "") -> None:
        self.adapters: dict[str, str] = {}
        self.loads = 0
        self.asked: list[dict] = []
        self._status, self._key = status, key
        self.app = web.Application()
        if not without:
            self.app.router.add_post("/v1/load_lora_adapter", self.load)
            self.app.router.add_post("/v1/unload_lora_adapter", self.unload)
        self.app.router.add_post("/v1/chat/completions", self.chat)

    def _error(self, status: int, kind: str, message: str) -> web.Response:
        return web.json_response(
            {"error": {"message": message, "type": kind, "param": None, "code": status}}, status=status
        )

    async def load(self, incoming: web.Request) -> web.Response:
        body = await incoming.json()
        if self._key and incoming.headers.get("Authorization") != f"Bearer {self._key}":
            return self._error(401, "Unauthorized", "Unauthorized")
        if self._status:
            return self._error(self._status, "NotFoundError", f"No adapter found for {body['lora_path']}")
        name = body["lora_name"]
        if name in self.adapters:
            message = (
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place"
            )
            return self._error(400, "InvalidUserInput", message)
        self.loads += 1
        self.adapters[name] = body["lora_path"]
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, incoming: web.Request) -> web.Response:
        name = (await incoming.json())["lora_name"]
        if self.adapters.pop(name, None) is None:
            return self._error(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def chat(self, incoming: web.Request) -> web.Response:
        body = await incoming.json()
        self.asked.append(body)
        if body["model"] not in self.adapters:
            return self._error(404, "NotFoundError", f"The model `{body['model']}` does not exist.")
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": body["model"]},
            "finish_reason": "stop",
        }
        usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
        return web.json_response(
            {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}
        )


@asynccontextmanager
async def served(tmp_path, vllm, **options):
    """The trained model's backend, at a server."""
    runner = web.AppRunner(vllm.app, access_log=None, shutdown_timeout=0.05)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    folder = tmp_path / "say-1"
    (folder / "adapter").mkdir(parents=True)
    for name in FILES:
        (folder / "adapter" / name).write_text("{}")
    options = OPTIONS | {"url": f"http://127.0.0.1:{runner.addresses[0][1]}/v1"} | options
    detail = {"base": BASE, "before": "Summarise this. ", "after": " Answer:"}
    served = make_trainer("peft", options).serve("say-1", Trained("peft", folder, detail=detail), {})
    assert served.config.tier == "custom"
    try:
        yield served.backend
    finally:
        await served.backend.close()
        await runner.cleanup()


def request():
    node = NodeSpec(id="say", prompt=Prompt("{x}"), answer=FreeText())
    messages = [
        {"role": "system", "content": "long"},
        {"role": "user", "content": "Summarise this. t 7 Answer:"},
    ]
    return Request(Query(node, "c", messages), Arm("say-1"), 10.0, None)


def test_it_is_loaded_asked_bare_loaded_again_after_a_restart_and_taken_out(tmp_path):
    vllm = Vllm()

    async def go():
        async with served(tmp_path, vllm, seen_as="/there{folder}/adapter") as backend:
            await backend.start()
            assert vllm.adapters == {"say-1": f"/there{(tmp_path / 'say-1').resolve()}/adapter"}
            assert (await backend.generate(request())).text == "say-1"
            assert vllm.asked[0]["messages"] == [{"role": "user", "content": "t 7"}]
            vllm.adapters.clear()  # the server was started anew
            replies = await asyncio.gather(*(backend.generate(request()) for _ in range(5)))
            assert [reply.text for reply in replies] == ["say-1"] * 5
            assert vllm.loads == 2  # one of the calls did it for all
        assert vllm.adapters == {}

    asyncio.run(go())


def test_another_process_may_have_loaded_it(tmp_path):
    vllm = Vllm()
    vllm.adapters["say-1"] = "by another"

    async def go():
        async with served(tmp_path, vllm) as backend:
            await backend.start()
            assert (await backend.generate(request())).text == "say-1"
            assert vllm.loads == 0

    asyncio.run(go())


def test_the_servers_key_is_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_KEY", "sk-here")
    vllm = Vllm(key="sk-here")

    async def go():
        async with served(tmp_path, vllm, key_env="VLLM_KEY") as backend:
            await backend.start()
            assert vllm.loads == 1

    asyncio.run(go())


@pytest.mark.parametrize(
    ("vllm", "kind", "why"),
    [
        (lambda: Vllm(without=True), BackendRefused, "HTTP 404.*--enable-lora"),
        (lambda: Vllm(status=404), BackendRefused, "No adapter found for"),
        (lambda: Vllm(status=500), BackendDown, "HTTP 500"),
    ],
)
def test_an_adapter_that_cannot_be_loaded_fails_each_call_with_the_reason(tmp_path, vllm, kind, why):
    async def go():
        async with served(tmp_path, vllm()) as backend:
            await backend.start()
            assert not (await backend.health()).ok
            with pytest.raises(kind, match=why):
                await backend.generate(request())

    asyncio.run(go())
