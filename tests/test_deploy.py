"""Dockerfile, docker-compose.yml and Kubernetes manifests, as far as they can be tried without Docker.

The Dockerfile's steps run in an empty folder that stands for the image's root, with this machine's Python for
the base image. The services of docker-compose.yml run in tests/real/test_compose.py.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from dockerfile_parse import DockerfileParser

from chainwax.router import load_settings

ROOT = Path(__file__).parents[1]
AS_ROOT = ("groupadd", "useradd", "chown")
"""What of a step needs to be root, and is left out here."""


@pytest.fixture
def compose():
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))


def test_the_compose_file_is_what_its_schema_wants(compose):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, ROOT / "docker-compose.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_compose_file_with_a_fault_is_refused(compose, tmp_path):
    compose["services"]["flow"]["depends_on"]["kafka"] = {"condition": "service_is_fine"}
    (tmp_path / "docker-compose.yml").write_text(yaml.safe_dump(compose))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, tmp_path / "docker-compose.yml"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "service_is_fine" in done.stdout


def test_services_wait_for_what_they_need_and_tell_how_they_are(compose):
    services = compose["services"]
    for name, service in services.items():
        assert re.search(r":v?\d[\w.-]*$", service["image"]), f"{name}: an image has a version"
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name}: {port}"
        for other, how in service.get("depends_on", {}).items():
            check = services[other].get("healthcheck", {})
            once = check.get("disable") or services[other]["restart"] == "on-failure"
            assert (how["condition"] == "service_completed_successfully") == bool(once), f"{name}: {other}"
            assert how["condition"] != "service_healthy" or "test" in check, f"{name}: {other}"
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in compose["volumes"]


def test_no_secret_stands_in_any_file(compose):
    text = "".join(path.read_text() for path in deployed())
    assert not re.search(r"sk-[\w-]{8,}|password\s*[:=]\s*[^\s$]", text, re.IGNORECASE)
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            assert not name.endswith(("_API_KEY", "_PASSWORD", "_TOKEN")) or value.startswith("${"), name


def deployed():
    files = [ROOT / "Dockerfile", ROOT / "docker-compose.yml"]
    return [*files, *(path for path in (ROOT / "deploy").rglob("*") if path.is_file())]


# -- Kubernetes ------------------------------------------------------------------------------------------


@pytest.fixture
def manifests():
    found = []
    for path in sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml")):
        found += list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("version", ["1.28", "1.33"])
def test_the_manifests_are_what_kubernetes_wants(manifests, version):
    assert {m["kind"] for m in manifests} >= {"StatefulSet", "Service", "ConfigMap", "PodDisruptionBudget"}
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_a_manifest_with_a_fault_is_refused(manifests):
    (stateful,) = (m for m in manifests if m["kind"] == "StatefulSet")
    stateful["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(stateful, "1.33", strict=True)


def test_the_manifests_fit_together_and_the_settings_are_known(manifests, monkeypatch, tmp_path):
    by_kind = {m["kind"]: m for m in manifests}
    spec = by_kind["StatefulSet"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == labels
    assert by_kind["Service"]["spec"]["selector"] == labels
    assert by_kind["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert spec["serviceName"] == by_kind["Service"]["metadata"]["name"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    names = [source.get("configMapRef", {}).get("name") for source in container["envFrom"]]
    assert by_kind["ConfigMap"]["metadata"]["name"] in names
    (port,) = container["ports"]
    assert port["containerPort"] == int(DockerfileParser(str(ROOT / "Dockerfile")).envs["PORT"])
    for probe, path in (
        ("startupProbe", "/readyz"),
        ("readinessProbe", "/readyz"),
        ("livenessProbe", "/healthz"),
    ):
        assert container[probe]["httpGet"] == {"path": path, "port": port["name"]}
    volumes = {
        volume["name"] for volume in (*pod["volumes"], *(m["metadata"] for m in spec["volumeClaimTemplates"]))
    }
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    monkeypatch.chdir(tmp_path)
    for name, value in by_kind["ConfigMap"]["data"].items():
        monkeypatch.setenv(name, value)
    assert load_settings().models["standard"].model == "gpt-4o-mini"


# -- the Dockerfile ---------------------------------------------------------------------------------------


def instructions():
    found = DockerfileParser(str(ROOT / "Dockerfile")).structure
    return [(step["instruction"], step["value"]) for step in found if step["instruction"] != "COMMENT"]


def test_the_image_runs_as_nobody_in_particular_and_holds_no_more_than_is_named():
    steps = instructions()
    last = {name: value for name, value in steps if name in ("USER", "STOPSIGNAL", "ENTRYPOINT")}
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last["USER"])
    assert last["STOPSIGNAL"] == "SIGTERM"
    json.loads(last["ENTRYPOINT"])  # no shell that would keep the signal to itself
    assert "ADD" not in dict(steps)
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        word
        for name, value in steps
        if name == "COPY" and "--from" not in value
        for word in value.split()[:-1]
    ]
    assert sorted(copied) == sorted(allowed)


class Image:
    """A folder that stands for the root of a file system, on which steps of a Dockerfile are done."""

    def __init__(self, root):
        self.root = root
        self.variables = {}
        self.workdir = "/"
        self.left_out = []
        self.config = {}
        bin = root.parent / "bin"
        bin.mkdir()
        # The base image's Python.
        base = getattr(sys, "_base_executable", sys.executable)
        (bin / "python").write_text(f'#!/bin/sh\nexec "{base}" "$@"\n')
        (bin / "python").chmod(0o755)
        self.environment = {"PATH": f"{bin}:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
        self.environment["PIP_NO_COMPILE"] = "1"  # half of the time, for files that this test never imports
        for name, value in os.environ.items():  # how this machine reaches the packages
            if name.startswith("PIP_") or name.lower().endswith("_proxy"):
                self.environment[name] = value

    def place(self, path):
        """Where a path of the image is."""
        return self.root / (path if path.startswith("/") else f"{self.workdir}/{path}").lstrip("/")

    def mapped(self, text):
        """A text with the image's folders where they are."""
        return re.sub(r"(?<![\w./])/(src|opt|data)\b", rf"{self.root}/\1", text)

    def build(self):
        steps = {
            "FROM": self.begin,
            "ARG": self.arg,
            "ENV": self.env,
            "WORKDIR": self.go_to,
            "COPY": self.copy,
            "RUN": self.run,
        }
        for name, value in instructions():
            if name in steps:
                steps[name](value)
            else:
                self.config[name] = value

    def arg(self, value):
        name, _, default = value.partition("=")
        self.variables[name] = default.strip('"')

    def begin(self, value):
        """A stage begins empty; what the one before made lies beside it."""
        if self.root.exists():
            self.root.rename(self.root.with_name("build"))
        self.root.mkdir()
        self.workdir = "/"

    def go_to(self, value):
        self.workdir = value
        self.place(value).mkdir(parents=True, exist_ok=True)

    def copy(self, value):
        *sources, target = value.split()
        folder = ROOT
        if sources[0].startswith("--from="):
            folder = self.root.with_name(sources.pop(0).removeprefix("--from="))
        for source in sources:
            origin = folder / source.lstrip("/")
            to = self.place(target)
            if origin.is_dir():
                # Links from stage to stage: nothing is changed in a copy.
                how = os.link if folder is not ROOT else shutil.copy2
                skip = shutil.ignore_patterns("__pycache__")
                shutil.copytree(origin, to, symlinks=True, ignore=skip, copy_function=how)
            else:
                shutil.copy(origin, to / source)

    def run(self, value):
        for command in value.split("&&"):
            if command.split()[0] in AS_ROOT:
                self.left_out.append(command.strip())
                continue
            command = self.mapped(command).replace(
                "--no-cache-dir", ""
            )  # in the image nobody needs the cache
            done = subprocess.run(
                ["sh", "-c", command],
                cwd=self.place("."),
                env=self.environment | self.variables,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    def env(self, value):
        for word in value.split():
            name, _, text = word.partition("=")
            self.environment[name] = self.mapped(text).replace("$PATH", self.environment["PATH"])

    def start(self, **more):
        words = json.loads(self.config["ENTRYPOINT"]) + json.loads(self.config["CMD"])
        environment = {name: text for name, text in self.environment.items() if not name.startswith("PIP_")}
        return subprocess.Popen(
            words,
            executable=shutil.which(words[0], path=environment["PATH"]),
            cwd=self.place("."),
            env=environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def healthy(self, **more):
        words = json.loads(self.config["HEALTHCHECK"].partition("CMD ")[2])
        executable = shutil.which(words[0], path=self.environment["PATH"])
        return not subprocess.run(
            [executable, *words[1:]], env=self.environment | more, capture_output=True
        ).returncode


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def test_the_steps_of_the_dockerfile_give_an_image_that_runs(tmp_path):
    image = Image(tmp_path / "root")
    image.build()
    # Nothing but what needs root was left out.
    assert [command.split()[0] for command in image.left_out] == ["groupadd", "useradd", "chown"]
    assert not (image.root / "src").exists()
    python = image.root / "opt" / "chainwax" / "bin" / "python"
    installed = subprocess.run(
        [python, "-m", "pip", "list"], capture_output=True, text=True, check=True
    ).stdout
    assert "chainwax" in installed
    assert "pytest" not in installed

    settings = {
        "CHAINWAX_FLOW": "chainwax.flows.demo.tickets",
        "CHAINWAX_SOURCES": f"tickets={ROOT}/flows/demo/tickets.jsonl?speed=60x",
        "CHAINWAX_SINKS": "copy=out.jsonl",
        "CHAINWAX_SERVE__HOST": "127.0.0.1",  # in the image: 0.0.0.0
        "PORT": free_port(),
    }
    assert not image.healthy(**settings)
    process = image.start(**settings)
    try:
        end = time.monotonic() + 60
        while not image.healthy(**settings):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < end, "never healthy"
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=30)
        assert process.returncode == 143, told
    finally:
        process.kill()
        process.communicate()
    assert (image.root / "data" / "chainwax.db").exists()
