"""A real Apache Kafka broker on loopback, without Docker: Java 17 and Maven are enough.

``python tests/real/broker.py`` starts one, prints its address and keeps it until Ctrl-C. With a command
behind it, in which ``{servers}`` stands for the address, it keeps it until that has ended.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kafka import KafkaAdminClient

from chainwax.connectors.kafka import KafkaServers

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "kafka"
START_SECONDS = 90.0

PROPERTIES = """\
process.roles=broker,controller
node.id=1
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
controller.quorum.voters=1@127.0.0.1:{controller}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={data}
num.partitions=1
num.network.threads=2
num.io.threads=2
auto.create.topics.enable=false
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
"""


def lacking() -> str | None:
    """What is not there of the programs that a broker needs; None where all of it is."""
    absent = [name for name in ("java", "mvn") if shutil.which(name) is None]
    return f"a real broker needs {' and '.join(absent)} (Java 17, Maven)" if absent else None


def jars() -> Path:
    """The folder with the broker's jars, fetched once; a lock keeps two runs from doing it at once."""
    folder = BUILD / "libs"
    BUILD.mkdir(parents=True, exist_ok=True)
    with _locked(BUILD / "fetch.lock"):
        if not folder.is_dir():
            half = BUILD / "libs.part"
            shutil.rmtree(half, ignore_errors=True)
            command = ["mvn", "-q", "-B", "-f", str(HERE / "kafka" / "pom.xml")]
            command += ["dependency:copy-dependencies", f"-DoutputDirectory={half}"]
            subprocess.run(command, check=True, stdout=sys.stderr, timeout=600)
            half.rename(folder)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Broker:
    """One broker with its data in ``folder``. Its ports stay the same when it is started again.

    ``overrides`` are further lines of its properties, by name.
    """

    def __init__(self, folder: Path, **overrides: str) -> None:
        self._folder = folder
        self._log = folder / "broker.log"
        self._properties = folder / "server.properties"
        self._process: subprocess.Popen[bytes] | None = None
        self._classpath = f"{jars()}/*"
        folder.mkdir(parents=True, exist_ok=True)
        port, controller = _free_ports(2)
        self.servers = f"127.0.0.1:{port}"
        text = PROPERTIES.format(port=port, controller=controller, data=folder / "data")
        text += "".join(f"{name.replace('_', '.')}={value}\n" for name, value in overrides.items())
        self._properties.write_text(text)
        cluster = self._java("kafka.tools.StorageTool", "random-uuid").stdout.decode().split()[-1]
        self._java("kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(self._properties))

    def _java(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        command = ["java", "-Xmx128m", "-cp", self._classpath, *arguments]
        return subprocess.run(command, check=True, capture_output=True, timeout=60)

    def start(self) -> None:
        """Start it and wait until it answers. Raises RuntimeError with its log where it does not."""
        # Where the tests die, it dies with them.
        bound = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        command = [*bound, "java", "-Xms256m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        command += ["-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", self._classpath]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "kafka.Kafka", str(self._properties)],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in a test run must not reach it before its tests end
            )
        self._wait()

    def _wait(self) -> None:
        assert self._process is not None
        end = time.monotonic() + START_SECONDS
        host, _, port = self.servers.partition(":")
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            try:
                socket.create_connection((host, int(port)), 1).close()
            except OSError:
                time.sleep(0.1)
                continue
            try:
                with self.admin() as admin:
                    if admin.describe_cluster()["brokers"]:
                        return
            except Exception:
                time.sleep(0.1)
        text = self._log.read_text(errors="replace")[-3000:]
        self.stop()
        raise RuntimeError(f"the broker did not start:\n{text}")

    def kill(self) -> None:
        """End it at once, as kill -9 does."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in an orderly way, or at once after 10 seconds."""
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @contextmanager
    def admin(self) -> Iterator[KafkaAdminClient]:
        """A client to create and change topics with."""
        with KafkaServers(self.servers).admin() as admin:
            yield admin

    def topic(self, name: str, partitions: int = 1, **configs: str) -> str:
        """Create a topic and give back its name."""
        options = {
            "num_partitions": partitions,
            "replication_factor": 1,
            "configs": {key.replace("_", "."): value for key, value in configs.items()},
        }
        with self.admin() as admin:
            admin.create_topics({name: options}, wait_for_metadata=True)
        return name


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


def main(command: list[str]) -> int:
    """Run a broker until Ctrl-C, or until the command has ended; its exit code."""
    absent = lacking()
    if absent:
        sys.exit(absent)
    folder = BUILD / f"run-{os.getpid()}"
    broker = None
    try:
        broker = Broker(folder)
        broker.start()
        if command:
            return _with(broker, command)
        print(broker.servers, flush=True)
        signal.pause()
    except KeyboardInterrupt:
        return 130
    finally:
        if broker is not None:
            broker.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _with(broker: Broker, command: list[str]) -> int:
    process = subprocess.Popen([word.replace("{servers}", broker.servers) for word in command])
    # Ctrl-C reaches it too, and it needs the broker to end well. An exception in the midst of a wait could
    # lose its exit code.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    return process.wait()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
