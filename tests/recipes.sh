#!/usr/bin/env bash
# Runs the README's recipes as they are printed there.
#
#   tests/recipes.sh
#
# Needs the image smolrx, bash, nc, a free port 8888 and a Docker engine; docker compose for the sidecar, and
# check-jsonschema (of PyPI) for its schema, are used where they are. BASE is the image that the recipes
# take for a base instead of the one printed: something with a shell and nc.
# shellcheck disable=SC2016 # the scripts that a recipe runs are meant to read "$1" themselves
set -uo pipefail

docker=${DOCKER:-docker}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
project=smolrx-recipes-$$
work=$(mktemp -d)
clean_up() {
  stop_published
  "$docker" rm -f "$project"
  if [ -f "$work/compose.yaml" ]; then in_work compose -p "$project" down --rmi local; fi
  "$docker" rmi "$project"
  rm -rf "$work"
}
trap 'clean_up > /dev/null 2>&1' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# ----------------------------------------------------------------- helpers

# shellcheck source=tests/common/check.sh
. "$here/tests/common/check.sh"

# LANGUAGE: the recipe as it is printed, the block of that language in the README's section.
recipe() {
  awk -v fence="\`\`\`$1" '/^## /{ section = $2 } section != "Recipes" { next }
    /^```$/ { inside = 0 } inside { print } $0 == fence { inside = 1 }' "$here/README.md"
}

compose() { if "$docker" compose version; then "$docker" compose "$@"; else docker-compose "$@"; fi; }
in_work() { (cd "$work" && "$@"); }
poke() { [ "$(echo "$1" | timeout 10 nc localhost 8888)" = "$1" ]; }
runs() { cat "$work/runs" 2> /dev/null; }
runs_have() { [ "$(runs | wc -l)" = "$1" ]; }
last_run() { [ "$(runs | tail -n 1)" = "$1" ]; }
published() { "$docker" ps --quiet --filter publish=8888; }
stop_published() { for container in $(published); do "$docker" stop "$container"; done; }

# LANGUAGE: starts a recipe of the shell in a folder with its sync.sh.
start() {
  recipe "$1" > "$work/recipe"
  [ -s "$work/recipe" ]
  : > "$work/runs"
  chmod +x "$work/sync.sh"
  (cd "$work" && exec "$1" recipe) &
  until_true poke first
}

# ----------------------------------------------------------------- recipes

resync() {
  printf '#!/bin/sh\necho "$1" >> runs\n' > "$work/sync.sh"
  start sh
  until_true last_run first
  for i in 1 2 3 4 5; do poke "burst $i"; done
  until_true last_run 'burst 5'
  poke last # and what is pending at the end is run as well
  stop_published
  wait
  [ "$(runs | grep -vx 0)" = "$(printf '%s\n' first 'burst 5' last)" ]
}

latest() {
  printf '#!/bin/sh\necho "$1" >> runs\nuntil [ -e go ]; do sleep 0.1; done\n' > "$work/sync.sh"
  start bash
  until_true runs_have 1 # it is at work now, until it may go on
  for i in 1 2 3 4 5 6 7 8 9 10; do poke "change $i"; sleep 0.7; done
  touch "$work/go"
  until_true last_run 'change 10'
  stop_published
  wait
  runs_have 2
}

own_image() {
  mkdir -p "$work/image"
  printf '#!/bin/sh\necho "sync: $1"\n' > "$work/image/sync.sh"
  chmod +x "$work/image/sync.sh"
  recipe dockerfile > "$work/image/Dockerfile"
  "$docker" build ${BASE:+--build-arg BASE="$BASE"} -t "$project" "$work/image"
  "$docker" run -d --name "$project" -p 8888:8888 --health-interval 1s "$project"
  until_true health_is healthy
  poke foo
  until_true logs_say 'sync: foo'
  local before=${EPOCHREALTIME/./}
  "$docker" stop "$project"
  [ $((${EPOCHREALTIME/./} - before)) -lt 2000000 ]
  [ "$("$docker" inspect --format '{{.State.ExitCode}}' "$project")" = 0 ]
}
health_is() { [ "$("$docker" inspect --format '{{.State.Health.Status}}' "$project")" = "$1" ]; }
logs_say() { "$docker" logs "$project" 2>&1 | grep -qx "$1"; }

sidecar_is_valid() {
  recipe yaml > "$work/compose.yaml"
  check-jsonschema --builtin-schema vendor.compose-spec "$work/compose.yaml"
}

sidecar() {
  cp "$work"/image/* "$work/"
  recipe yaml > "$work/compose.yaml"
  in_work compose -p "$project" build
  in_work compose -p "$project" up -d
  until_true compose_says 'sync: changed'
  in_work compose -p "$project" down --rmi local
}
compose_says() { in_work compose -p "$project" logs --no-color sync | grep -q "$1"; }

# -------------------------------------------------------------------- main

if "$docker" ps --quiet --filter publish=8888 | grep -q .; then echo "port 8888 is taken"; exit 1; fi

check  60 resync           "resync: a burst of pokes is one run"
check  60 latest           "only the latest: ten triggers during a run are one more run"
check 300 own_image        "in your own image: healthy, triggered, stopped at once"
if command -v check-jsonschema > /dev/null; then
  check 60 sidecar_is_valid "as a sidecar: the file is valid"
else
  skip "the sidecar's schema: there is no check-jsonschema"
fi
if compose version > /dev/null 2>&1; then
  check 300 sidecar         "as a sidecar: poked from another container"
else
  skip "the sidecar: there is no docker compose"
fi

summary
