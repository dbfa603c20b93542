#!/usr/bin/env bash
# Makes docker/secrets/ for compose.yaml: a key for you, one for Prometheus, and the file that admits both. Where they
# are already there, they stay. BRIDLE: the command to make keys with, if it is not the image's.
set -euo pipefail
cd "$(dirname "$0")"
bridle="${BRIDLE:-docker run --rm --read-only --tmpfs /tmp --entrypoint bridle bridle-serve:cpu}"
if [ -e secrets ]; then
  echo 'docker/secrets is there already; remove it for new keys' >&2
  exit 0
fi
[ -n "${BRIDLE:-}" ] || docker compose --file compose.yaml build service

# Only this folder is closed: containers' users must be able to read the files mounted from it.
umask 022
made="$(mktemp --directory secrets.XXXXXX)"
trap 'rm -rf "$made"' EXIT
make_key() { # FILE NAME SCOPES
  $bridle serve --new-key "$2" --scopes "$3" 2>"$made/said" >>"$made/api_keys"
  sed 's/^key, shown once: //' "$made/said" | tail -n 1 | tr -d '\n' >"$made/$1"
  rm "$made/said"
}
make_key key you use+admin
make_key metrics_key prometheus metrics
mv "$made" secrets
echo 'docker/secrets/key holds your key: curl -H "Authorization: Bearer $(cat docker/secrets/key)" localhost:8000/info'
