#!/usr/bin/env bash
# Serves the model that `make demo` trained, asks it once, and leaves it running for the playground.
set -euo pipefail
model="${1:-runs/demo/model}"
port="${PORT:-8000}"
[ -f "$model/config.json" ] || { echo "no model in $model; run: make demo" >&2; exit 1; }

log="$(mktemp)"
bridle serve "$model" --port "$port" 2> >(tee "$log" >&2) &
service=$!
trap 'kill -TERM "$service" 2>/dev/null; wait "$service"; rm -f "$log"' EXIT
until grep -q '"event": "ready"' "$log"; do  # its own word: another service may have the port
  kill -0 "$service" 2>/dev/null || { wait "$service"; exit 1; }
  sleep 0.5
done

sound="$(mktemp --suffix=.wav)"
python3 -c '
import math, struct, sys, wave
with wave.open(sys.argv[1], "wb") as out:
    out.setparams((1, 2, 16000, 0, "NONE", ""))
    out.writeframes(b"".join(struct.pack("<h", int(9000 * math.sin(i * i / 2e5))) for i in range(32000)))
' "$sound"
echo "Two seconds of a rising tone, as codes:"
curl -fsS --data-binary @"$sound" "http://127.0.0.1:$port/tokenize"
rm -f "$sound"
echo
echo "Playground: http://127.0.0.1:$port/   (Ctrl-C ends it)"
[ -n "${ONCE:-}" ] || wait "$service"
