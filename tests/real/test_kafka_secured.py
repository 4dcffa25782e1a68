"""A real broker that lets in only who has the right credentials, over TLS too."""

import json
import logging
import os
import socket
import subprocess
import sys
import time

import pytest
from kafka.admin import ScramMechanism, UserScramCredentialUpsertion

from chainwax.connectors import open_bus
from chainwax.connectors.kafka import KafkaServers, KafkaSink, KafkaSource
from chainwax.router import ConfigError, LLMManager, load_settings

RIGHT, WRONG = "right-word", "wrong-word"
# Name of the listener, its protocol.
LISTENERS = {"PASSWORD": "SASL_PLAINTEXT", "TLS": "SSL", "BOTH": "SASL_SSL"}


@pytest.fixture(scope="module")
def secured(broker, tmp_path_factory):
    """A second broker: its addresses by protocol, the file with its certificate, a topic."""
    folder = tmp_path_factory.mktemp("secured")
    keys, certificate = folder / "keys.p12", folder / "ca.pem"
    store = ["-alias", "broker", "-keystore", str(keys), "-storetype", "PKCS12", "-storepass", "changeit"]
    names = ["-dname", "CN=broker", "-ext", "SAN=ip:127.0.0.1", "-validity", "2"]
    subprocess.run(["keytool", "-genkeypair", "-keyalg", "RSA", *store, *names], check=True, timeout=60)
    export = ["keytool", "-exportcert", "-rfc", *store, "-file", str(certificate)]
    subprocess.run(export, check=True, timeout=60, stderr=subprocess.DEVNULL)
    held = [socket.create_server(("127.0.0.1", 0)) for _ in LISTENERS]
    addresses = {name: f"127.0.0.1:{s.getsockname()[1]}" for name, s in zip(LISTENERS, held, strict=True)}
    for server in held:
        server.close()
    made = type(broker)(folder / "broker")
    path = folder / "broker" / "server.properties"
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        name = line.partition("=")[0]
        if name in ("listeners", "advertised.listeners"):
            lines[number] += "".join(f",{one}://{address}" for one, address in addresses.items())
        elif name == "listener.security.protocol.map":
            lines[number] += "".join(f",{one}:{protocol}" for one, protocol in LISTENERS.items())
    jaas = "org.apache.kafka.common.security"
    lines += [
        "sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-512",
        "ssl.keystore.type=PKCS12",
        f"ssl.keystore.location={keys}",
        "ssl.keystore.password=changeit",
    ]
    for name in ("password", "both"):
        plain, scram = (
            f"listener.name.{name}.{kind}.sasl.jaas.config" for kind in ("plain", "scram-sha-512")
        )
        lines.append(f'{plain}={jaas}.plain.PlainLoginModule required user_me="{RIGHT}";')
        lines.append(f"{scram}={jaas}.scram.ScramLoginModule required;")
    path.write_text("\n".join(lines) + "\n")
    try:
        made.start()
        with made.admin() as admin:
            mechanism = ScramMechanism.SCRAM_SHA_512
            admin.alter_user_scram_credentials([UserScramCredentialUpsertion("me", mechanism, RIGHT)])
        made.topic("guarded", 2)
        protocols = {protocol: addresses[name] for name, protocol in LISTENERS.items()}
        yield protocols, str(certificate)
    finally:
        made.stop()


def servers(secured, protocol, mechanism, **more):
    addresses, certificate = secured
    given = {"security_protocol": protocol}
    if "SASL" in protocol:
        given |= {"sasl_mechanism": mechanism, "sasl_username": "me"}
    if "SSL" in protocol:
        given["ssl_cafile"] = certificate
    return KafkaServers(addresses[protocol], **(given | more))


ALL = [
    ("SASL_PLAINTEXT", "PLAIN"),
    ("SASL_PLAINTEXT", "SCRAM-SHA-512"),
    ("SSL", None),
    ("SASL_SSL", "PLAIN"),
    ("SASL_SSL", "SCRAM-SHA-512"),
]


@pytest.mark.parametrize(("protocol", "mechanism"), ALL)
def test_the_right_credentials_write_and_read(secured, protocol, mechanism, monkeypatch):
    monkeypatch.setenv("CHAINWAX_KAFKA_SASL_PASSWORD", RIGHT)
    place = servers(secured, protocol, mechanism)
    value = {"by": f"{protocol} {mechanism}"}
    sink = KafkaSink("guarded", servers=place)
    parts = [sink.build_part("out", name, None) for name in sink.list_parts()]
    parts[0].write_batch([value])
    for part in parts:
        part.snapshot()
        part.close()
    source = KafkaSource("guarded", servers=place, from_="earliest", to="latest")
    part = source.build_part("in", source.list_parts()[0], None)
    found = []
    try:
        while True:
            found += [record.value for record in part.next_batch()]
    except StopIteration:
        part.close()
    assert value in found


@pytest.mark.parametrize("kind", [KafkaSource, KafkaSink])
@pytest.mark.parametrize(("protocol", "mechanism"), [one for one in ALL if one[1]])
def test_wrong_credentials_are_told_quickly_and_not_shown(
    secured, protocol, mechanism, kind, monkeypatch, caplog
):
    monkeypatch.setenv("CHAINWAX_KAFKA_SASL_PASSWORD", WRONG)
    place = servers(secured, protocol, mechanism)
    begun = time.monotonic()
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(ConfigError, match="refuses the credentials of 'me': ") as refused,
    ):
        kind("guarded", servers=place)
    assert time.monotonic() - begun < 8
    assert place.addresses in str(refused.value)
    shown = f"{refused.value} {refused.value.__cause__!r} {place}"
    assert WRONG not in shown
    assert not [r for r in caplog.records if r.levelno >= logging.INFO and WRONG in r.getMessage()]


def test_an_unknown_user_a_wrong_mechanism_and_a_strange_certificate(secured, monkeypatch, tmp_path):
    monkeypatch.setenv("CHAINWAX_KAFKA_SASL_PASSWORD", RIGHT)
    monkeypatch.setattr("chainwax.connectors.kafka.servers.CONNECT_SECONDS", 3.0)
    for mechanism in ("PLAIN", "SCRAM-SHA-512"):
        stranger = servers(secured, "SASL_PLAINTEXT", mechanism, sasl_username="you")
        with pytest.raises(ConfigError, match=r"(?i)authentication"):
            KafkaSource("guarded", servers=stranger)
    with pytest.raises(ConfigError, match=r"does not take sasl_mechanism SCRAM-SHA-256"):
        KafkaSource("guarded", servers=servers(secured, "SASL_PLAINTEXT", "SCRAM-SHA-256"))
    # Without its file the certificate is nobody's that we trust.
    with pytest.raises(ConfigError, match=r"(?i)certificate"):
        KafkaSource("guarded", servers=servers(secured, "SSL", None, ssl_cafile=None))
    with pytest.raises(ConfigError, match=r"(?i)none\.pem"):
        KafkaSource("guarded", servers=servers(secured, "SSL", None, ssl_cafile=str(tmp_path / "none.pem")))


def test_the_bus_with_right_and_wrong_credentials(secured, monkeypatch):
    addresses, certificate = secured
    bus = {
        "kind": "kafka",
        "servers": addresses["SASL_SSL"],
        "prefix": "guarded-bus",
        "catch_up_seconds": 20,
    }
    monkeypatch.setenv("CHAINWAX_KAFKA_SECURITY_PROTOCOL", "SASL_SSL")
    monkeypatch.setenv("CHAINWAX_KAFKA_SASL_MECHANISM", "SCRAM-SHA-512")
    monkeypatch.setenv("CHAINWAX_KAFKA_SASL_USERNAME", "me")
    monkeypatch.setenv("CHAINWAX_KAFKA_SSL_CAFILE", certificate)
    settings = load_settings(run={"recording": None}, bus=bus)
    monkeypatch.setenv("CHAINWAX_KAFKA_SASL_PASSWORD", WRONG)
    begun = time.monotonic()
    with (
        LLMManager(settings, bus=open_bus(settings.bus, "triage")) as manager,
        pytest.raises(ConfigError, match=r"(?i)authentication") as refused,
    ):
        manager.begin_run("triage")
    assert WRONG not in str(refused.value)
    assert time.monotonic() - begun < 30
    monkeypatch.setenv("CHAINWAX_KAFKA_SASL_PASSWORD", RIGHT)
    with LLMManager(settings, bus=open_bus(settings.bus, "triage")) as manager:
        manager.begin_run("triage")


def test_the_command_line_with_right_and_wrong_credentials(secured, tmp_path):
    addresses, _ = secured
    (tmp_path / "copy_it.py").write_text(
        "from chainwax.flows import Flow\nflow = Flow('copy')\nflow.source('in').sink('out')\n"
    )
    base = {key: value for key, value in os.environ.items() if not key.startswith("CHAINWAX_")}
    uri = f"in=kafka://guarded?servers={addresses['SASL_PLAINTEXT']}&security_protocol=SASL_PLAINTEXT"
    uri += "&sasl_mechanism=PLAIN&sasl_username=me&sasl_password_env=MINE&to=latest"
    command = [sys.executable, "-m", "chainwax.flows.cli", "run", "copy_it.py", "--json"]
    command += ["--source", uri, "--sink", "out=out.jsonl"]
    for word, code in ((RIGHT, 0), (WRONG, 2)):
        begun = time.monotonic()
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=base | {"MINE": word},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert word not in done.stdout + done.stderr
        assert time.monotonic() - begun < 25
    assert "uthentication" in done.stderr
    assert "Traceback" not in done.stderr
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
