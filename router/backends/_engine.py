"""The child process that holds the llama.cpp engine; run as a script, never imported.

It takes its parameters as JSON in its only argument, prints one line of JSON, ``{"address": …}`` or
``{"error": …}``, and serves until its standard input ends, which it does when the parent is gone,
however the parent went.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any


def serve(parameters: dict[str, Any]) -> None:
    """Load the model and serve it on a free loopback port."""
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the engine's own chatter must not be taken for the report
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C lets the parent drain what is under way
    import xllamacpp

    p = xllamacpp.CommonParams()
    p.model.path = parameters["path"]
    p.model_alias = [parameters["alias"]]
    p.n_ctx = parameters["slots"] * parameters["context"]
    p.n_parallel = parameters["slots"]
    p.kv_unified = False  # each slot has its own context: one long prompt cannot starve the others
    p.cache_ram_mib = 0  # the host prompt cache would take up to 8 GiB
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = parameters["threads"]
    p.n_gpu_layers = parameters["gpu_layers"]
    p.n_threads_http = 2 * parameters["slots"] + 8  # a connection that is kept alive holds a thread
    p.hostnames = ["127.0.0.1"]
    p.port = 0
    p.verbosity = -1
    # Each changes nothing unless a request says so by its number here.
    p.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in parameters["adapters"]]
    try:
        server = xllamacpp.Server(p)
        said = {"address": server.listening_address}
    except RuntimeError as error:
        said = {"error": str(error)}
    print(json.dumps(said), file=report, flush=True)
    if "address" in said:
        sys.stdin.buffer.read()
    # The engine's own ending waits for calls under way, and for ever for some: nobody waits for them now.
    os._exit(0)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
