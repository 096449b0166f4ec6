#!/usr/bin/env bash
# The whole tool in four commands: fetch a model, choose its fastest faithful form on this machine, serve it, talk to it.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-demo-out}
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
server=

run() {
    printf '\n\033[1m$ %s\033[0m\n' "$*"
    "$@"
}

stop_server() {
    if [[ -n $server ]]; then
        kill -TERM "$server" 2>/dev/null || true
        wait "$server"
        server=
    fi
}
trap stop_server EXIT

run powertrain pull smollm2

run powertrain optimize smollm2 "$out" --tpot-ms 50 --max-kl 0.05 --batch 4

printf '\n\033[1m$ powertrain serve %s --port %s &\033[0m\n' "$out" "$port"
powertrain serve "$out" --port "$port" &
server=$!

run python examples/chat_stream.py "http://127.0.0.1:$port" "Explain in two sentences why the sky is blue."

stop_server
printf '\nThe server has stopped. The report of what was measured: %s/report.html\n' "$out"
