#!/usr/bin/env bash
# The whole tool in four commands: fetch a model, choose its fastest faithful form on this machine, serve it, talk to it.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-demo-out}
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
server=

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

stop_server() {
    if [[ -n $server ]]; then
        kill -TERM "$server"
        wait "$server"
        server=
    fi
}
trap stop_server EXIT

run powertrain pull smollm2

run powertrain optimize smollm2 "$out" --tpot-ms 120 --max-kl 0.05 --batch 4

# The record holds the line that serves the winner. `exec` makes the server the process that is stopped below.
serve="$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["serve"])' "$out/record.json") --port $port"
printf '\n$ %s &\n' "$serve"
eval "exec $serve" &
server=$!

run python examples/chat_stream.py "http://127.0.0.1:$port" "Explain in two sentences why the sky is blue."

stop_server
printf '\nThe server has stopped. The report of what was measured: %s/report.html\n' "$out"
