"""The services of docker-compose.yml as processes: its commands, environments and health checks.

What stands there is taken as it stands, but for the places (addresses, folders) and the producer's pace. A
local broker with the file's settings stands for the service ``kafka``, redis-server, where there is one, for
``redis``. Then the metrics that alerts and dashboard name are looked for in what the flow tells Prometheus.
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
import urllib.request
from pathlib import Path

import promql_parser
import pytest
import yaml
from dockerfile_parse import DockerfileParser
from prometheus_client.parser import text_string_to_metric_families

from chainwax.connectors.kafka import KafkaSource

ROOT = Path(__file__).parents[2]
TICKETS = 60
PLACES = ("listeners", "advertised.listeners", "log.dirs", "controller.quorum.voters")
"""Of the broker's settings those that say where it is."""


def free_ports(count):
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


class Compose:
    """The compose file, with its places on this machine."""

    def __init__(self, folder):
        self.services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
        self.folder = folder
        self.ports = dict(zip(("model", "flow", "redis"), free_ports(3), strict=True))
        self.servers = ""
        self.processes = {}
        image = DockerfileParser(str(ROOT / "Dockerfile"))
        self._env = {k: v for k, v in image.envs.items() if k != "PATH"}
        entries = [s["value"] for s in image.structure if s["instruction"] in ("ENTRYPOINT", "CMD")]
        self._entrypoint, self._cmd = map(json.loads, entries)

    def here(self, text):
        """A text of the file, with what it names where it is on this machine."""
        for old, new in {
            "kafka:9092": self.servers,
            "redis:6379": f"127.0.0.1:{self.ports['redis']}",
            "model:8000": f"127.0.0.1:{self.ports['model']}",
            "127.0.0.1:8000": f"127.0.0.1:{self.ports['model']}",
            "127.0.0.1:8080": f"127.0.0.1:{self.ports['flow']}",
            "/demo/": f"{ROOT / 'flows' / 'demo'}/",
            "/data": str(self.folder),
            "speed=60x": f"speed=max&limit={TICKETS}",
        }.items():
            text = text.replace(old, new)
        return re.sub(r"\$\{(\w+):-(.*?)\}", r"\2", text)

    def environment(self, name):
        given = {"CHAINWAX_SERVE__HOST": "127.0.0.1"}
        said = self._env | self.services[name].get("environment", {})
        clean = {k: v for k, v in os.environ.items() if not k.startswith("CHAINWAX_")}
        environment = clean | {key: self.here(value) for key, value in said.items()} | given
        if environment["PORT"]:
            environment["PORT"] = str(self.ports.get(name, 0))
        return environment

    def words(self, name):
        service = self.services[name]
        ours = "build" in service
        entrypoint = service.get("entrypoint", self._entrypoint if ours else [])
        words = [*entrypoint, *service.get("command", self._cmd)]
        return self.on_this_machine([self.here(word) for word in words])

    def on_this_machine(self, words):
        own = {"python": [sys.executable], "chainwax": [sys.executable, "-m", "chainwax.flows.cli"]}
        return [*own.get(words[0], words[:1]), *words[1:]]

    def start(self, name, *more):
        log = self.folder / f"{name}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*self.words(name), *more],
                env=self.environment(name),
                cwd=self.folder,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.processes[name] = process
        return process

    def log(self, name):
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def healthy(self, name, *more):
        kind, *words = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        words = self.on_this_machine([self.here(word) for word in words])
        environment = self.environment(name)
        return not subprocess.run(
            [words[0], *more, *words[1:]], env=environment, capture_output=True, timeout=30
        ).returncode

    def wait(self, condition, name):
        end = time.monotonic() + 90
        while not condition():
            assert self.processes[name].poll() is None, self.log(name)
            assert time.monotonic() < end, self.log(name)
            time.sleep(0.2)

    def metrics(self):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['flow']}/metrics", timeout=10) as answer:
            return list(text_string_to_metric_families(answer.read().decode()))

    def value(self, name, **labels):
        return sum(s.value for f in self.metrics() for s in f.samples if matches(s, name, labels))


def matches(sample, name, labels):
    return sample.name == name and labels.items() <= sample.labels.items()


@pytest.fixture(scope="module")
def compose(tmp_path_factory, broker):
    """The services up to the flow, healthy one after the other."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not there: make system")
    compose = Compose(tmp_path_factory.mktemp("compose"))
    kafka = compose.services["kafka"]["environment"]
    settings = {key.removeprefix("KAFKA_").lower().replace("_", "."): value for key, value in kafka.items()}
    settings = {key: value for key, value in settings.items() if key not in PLACES}
    own = type(broker)(compose.folder / "kafka", **{k.replace(".", "_"): v for k, v in settings.items()})
    compose.servers = own.servers
    try:
        own.start()
        topics = compose.start("topics")
        assert topics.wait(60) == 0, compose.log("topics")
        compose.start("redis", "--port", str(compose.ports["redis"]), "--bind", "127.0.0.1")
        compose.wait(lambda: compose.healthy("redis", "-p", str(compose.ports["redis"])), "redis")
        compose.start("model")
        compose.wait(lambda: compose.healthy("model"), "model")
        compose.start("flow")
        compose.wait(lambda: compose.healthy("flow"), "flow")
        yield compose
    finally:
        for process in compose.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in compose.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        own.stop()


def test_tickets_go_through_all_services_and_the_flow_drains(compose):
    assert compose.start("topics").wait(60) == 0  # a second start finds its topics
    producer = compose.start("producer")
    assert producer.wait(90) == 0, compose.log("producer")
    compose.wait(lambda: compose.value("chainwax_scores", node="team") == TICKETS, "flow")
    compose.wait(lambda: compose.value("chainwax_dead_letters_total") == 0, "flow")
    assert compose.value("chainwax_processes") == 2
    calls = compose.value("chainwax_calls_total", node="team")
    assert calls == TICKETS == compose.value("chainwax_calls_total", node="team", simulated="true")
    # Scores crossed the processes over the topic: both know all of them.
    assert compose.value("chainwax_feedback_received_total") >= 4 * TICKETS
    know_the_metrics(compose)

    flow = compose.processes["flow"]
    assert compose.services["flow"]["stop_signal"] == "SIGTERM"
    begun = time.monotonic()
    flow.send_signal(signal.SIGTERM)
    assert flow.wait(60) == 143, compose.log("flow")
    assert time.monotonic() - begun < float(compose.services["flow"]["stop_grace_period"].rstrip("s"))
    lines = values(compose, "sorted")
    assert len({line["id"] for line in lines}) == TICKETS
    right = sum(line["team"] == line["answers"]["team"] for line in lines) / len(lines)
    assert right > 0.7  # the model's server knows what is right
    assert not compose.healthy("flow")
    # The same container, started again, goes on with the run.
    compose.start("flow")
    compose.wait(lambda: compose.healthy("flow"), "flow")
    assert "going on with run" in compose.log("flow")


def values(compose, topic):
    source = KafkaSource(topic, servers=compose.servers, from_="earliest", to="latest")
    found = []
    for part in source.list_parts():
        partition = source.build_part("read", part, None)
        try:
            while True:
                found += [record.value for record in partition.next_batch()]
        except StopIteration:
            partition.close()
    return found


# -- alerts and dashboard ----------------------------------------------------------------------------------


def expressions():
    """Every PromQL expression of alerts and dashboard, with where it stands."""
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
    for group in rules["groups"]:
        for rule in group["rules"]:
            assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
            yield rule["alert"], rule["expr"]
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$instance", ".*")


def dashboard():
    return json.loads(
        (ROOT / "deploy" / "grafana" / "dashboards" / "chainwax.json").read_text(encoding="utf-8")
    )


def asked_for(expression):
    """The metrics of an expression, each with the labels that are compared; and the labels that are kept."""
    metrics, kept = [], set()

    def look(node):
        if isinstance(node, promql_parser.VectorSelector):
            metrics.append((node.name, {(m.name, m.value, str(m.op)) for m in node.matchers.matchers}))
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            kept.update(node.modifier.labels)
        return True

    promql_parser.walk(promql_parser.parse(expression), pre_visit=look)
    return metrics, kept


def know_the_metrics(compose):
    families = compose.metrics()
    told = {}
    for family in families:
        suffix = {
            "counter": ("_total",),
            "histogram": ("_bucket", "_sum", "_count"),
            "summary": ("_sum", "_count"),
        }
        for ending in suffix.get(family.type, ("",)):
            told.setdefault(family.name + ending, set())
        for sample in family.samples:
            told.setdefault(sample.name, set()).update(sample.labels)
    # Of what did not happen there is no sample that could show its labels.
    told["chainwax_attempt_errors_total"] |= {"model", "tier", "simulated", "error_type"}
    told["chainwax_budget_spent_dollars"] |= {"node", "simulated"}
    told["chainwax_budget_dollars"] |= {"node", "simulated"}
    told["up"] = {"job"}
    for where, expression in expressions():
        metrics, kept = asked_for(expression)
        assert metrics, where
        for name, compared in metrics:
            assert name in told, f"{where}: nothing tells of {name}"
            labels = told[name] | {"instance"}
            assert {label for label, _, _ in compared} <= labels, f"{where}: {name}"
            assert kept - {"le"} <= labels, f"{where}: {name}"
    # Whoever reads a figure sees whether it is a simulated model's.
    for name in ("chainwax_cost_dollars_total", "chainwax_quality", "gen_ai_client_token_usage_sum"):
        assert "simulated" in told[name]


def test_prometheus_and_grafana_find_their_files():
    prometheus = yaml.safe_load(
        (ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    )
    services = Compose(Path()).services
    mounts = dict(
        volume.split(":")[:2] for s in ("prometheus", "grafana") for volume in services[s]["volumes"]
    )
    inside = {inner: ROOT / outer for outer, inner in mounts.items()}

    def there(path):
        return any(
            path.startswith(at) and (f / path.removeprefix(at).lstrip("/")).exists()
            for at, f in inside.items()
        )

    assert all(map(there, prometheus["rule_files"]))
    assert there(services["prometheus"]["command"][0].partition("=")[2])
    (scrape,) = prometheus["scrape_configs"]
    (target,) = scrape["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert services[name]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert there(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "chainwax.yml").read_text())["providers"]
    assert there(provider["options"]["path"])
    uids = set(re.findall(r'"uid": "(\w+)"', json.dumps(dashboard()["panels"])))
    assert uids == {source["uid"]}
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))
    scope = {panel["gridPos"]["x"] + panel["gridPos"]["w"] for panel in dashboard()["panels"]}
    assert max(scope) <= 24


def test_a_metric_that_nothing_tells_of_is_noticed():
    metrics, kept = asked_for('sum by (node, le) (rate(chainwax_call_second_bucket{node="a"}[5m])) > 2')
    assert metrics == [("chainwax_call_second_bucket", {("node", "a", "MatchOp.Equal")})]
    assert kept == {"node", "le"}
    with pytest.raises(ValueError, match=r".+"):
        promql_parser.parse("sum by (node (chainwax_calls_total)")
