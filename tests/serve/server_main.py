"""Calls `serve` as the command line does; the options are one JSON argument."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from powertrain.config import EngineConfig, ServerConfig
from powertrain.serve.bridge import WORKER_COMMAND
from powertrain.serve.run import serve
from powertrain.types import PowertrainError

if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    command = (sys.executable, str(Path(__file__).parent / "fake_worker.py")) if options["fake"] else WORKER_COMMAND
    server = options["server"]
    server["api_keys"] = tuple(server.get("api_keys", ()))
    try:
        status = serve(
            Path(options["model"]),
            EngineConfig.from_options(**options["engine"]),
            ServerConfig(**server),
            worker_command=command,
        )
    except PowertrainError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    sys.exit(status)
