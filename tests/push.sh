#!/usr/bin/env bash
# Tests `./build.sh push` against a registry of its own, on this machine's loopback.
#
#   tests/push.sh
#
# Needs docker-registry, curl, python3 and a Docker engine or podman; DOCKER and RUST_IMAGE are settings.
set -uo pipefail

docker=${DOCKER:-docker}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
clean_up() {
  kill "$registry"
  "$docker" rmi -f "$name" "$name-amd64" "$name-arm64" "$(builder_of "$name-amd64")" "$(builder_of "$name-arm64")"
  rm -rf "$work"
}
trap 'clean_up > /dev/null 2>&1' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# ----------------------------------------------------------------- helpers

# shellcheck source=tests/common/check.sh
. "$here/tests/common/check.sh"

# TAG: what the registry answers when asked for its manifest.
types=application/vnd.docker.distribution.manifest.v2+json
types+=,application/vnd.docker.distribution.manifest.list.v2+json,application/vnd.oci.image.index.v1+json
manifest() { curl --silent --fail --header "Accept: $types" "http://$host/v2/you/smolrx/manifests/$1" "${@:2}"; }

# The list's architectures and their digests.
listed() {
  manifest test | python3 -c 'if True:
    import json, sys
    for manifest in json.load(sys.stdin)["manifests"]:
        print(manifest["platform"]["os"], manifest["platform"]["architecture"], manifest["digest"])'
}

digest() { manifest "$1" --head | tr -d '\r' | sed -n 's/^Docker-Content-Digest: //p'; } # TAG

# ARCHITECTURE IMAGE: the checksum of the binary in it.
binary() {
  local container
  container=$("$docker" create --platform "linux/$1" "$2")
  "$docker" cp "$container:/smolrx" - | tar -xO | sha256sum
  "$docker" rm "$container" > /dev/null
}

# ------------------------------------------------------------------ checks

refuses() {
  status=0
  IMAGE=smolrx "$here/build.sh" push 2> "$work/refusal" || status=$?
  cat "$work/refusal"
  [ "$status" = 1 ]
  [ "$(wc -l < "$work/refusal")" = 1 ]
  grep 'needs a name with a registry or a user' "$work/refusal"
}

pushes() {
  IMAGE=$name "$here/build.sh" push
  [ "$(listed)" = "linux amd64 $(digest test-amd64)
linux arm64 $(digest test-arm64)" ]
}

# Whoever pulls the name gets the binary of the machine that asks.
pulls() {
  for arch in amd64 arm64; do
    pushed=$(binary "$arch" "$name-$arch")
    "$docker" rmi -f "$name-$arch"
    "$docker" pull --platform "linux/$arch" "$name"
    [ "$("$docker" image inspect --format '{{.Architecture}}' "$name")" = "$arch" ]
    [ "$(binary "$arch" "$name")" = "$pushed" ]
    "$docker" image inspect --format '{{json .RepoDigests}}' "$name"
    "$docker" rmi -f "$name"
  done
}

# -------------------------------------------------------------------- main

# A port that nobody has: where one is taken, the registry ends at once.
until
  host=127.0.0.1:$((RANDOM % 20000 + 10000))
  printf '%s\n' 'version: 0.1' 'log: {level: error}' "storage: {filesystem: {rootdirectory: $work/registry}}" \
    "http: {addr: '$host'}" > "$work/registry.yml"
  docker-registry serve "$work/registry.yml" > "$work/registry.log" 2>&1 &
  registry=$!
  while kill -0 "$registry" 2> /dev/null && ! curl --silent --fail "http://$host/v2/" > /dev/null; do sleep 0.1; done
  kill -0 "$registry" 2> /dev/null
do
  [ -n "$(type -P docker-registry)" ] || { echo "there is no docker-registry here"; exit 1; }
done
name=$host/you/smolrx:test
# Docker speaks HTTP to its own machine; podman has to be told.
printf '[[registry]]\nlocation = "%s"\ninsecure = true\n' "$host" > "$work/registries.conf"
export CONTAINERS_REGISTRIES_CONF=$work/registries.conf

check   30 refuses "push refuses a name without a registry or a user, in one sentence"
check 1800 pushes  "push: both architectures, and a list of both under one name"
check   60 pulls   "pull: for each architecture its own binary"
summary
