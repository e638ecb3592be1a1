#!/usr/bin/env bash
# Runs the README's recipes as they are printed there.
#
#   tests/recipes.sh
#
# Needs the image smolrx, bash, nc, curl, python3, a free port 8888 and a Docker engine; docker compose for the
# sidecar, and check-jsonschema and PyYAML (of PyPI) for two files, are used where they are. Settings: DOCKER; IMAGE,
# the image under test instead of the one printed; BASE, what the recipes take for a base instead of the one printed:
# something with a shell and nc.
# shellcheck disable=SC2016 # the scripts that a recipe runs are meant to read their variables themselves
set -uo pipefail

docker=${DOCKER:-docker}
image=${IMAGE:-smolrx}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
project=smolrx-recipes-$$
work=$(mktemp -d)
clean_up() {
  stop_server
  "$docker" rm -f "$project" "$project-file"
  if [ -f "$work/compose.yaml" ]; then in_work compose -p "$project" down --rmi local --timeout 1; fi
  "$docker" rmi "$project" "$project:broken"
  rm -rf "$work"
}
trap 'clean_up > /dev/null 2>&1' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# ----------------------------------------------------------------- helpers

# shellcheck source=tests/common/check.sh
. "$here/tests/common/check.sh"

# WORDS: the first block of the README behind these words at the start of a line, as it is printed. (But for the
# image's name, if another one is under test.)
recipe() {
  awk -v words="$1" 'index($0, words) == 1 { found = 1 } !found { next }
    /^```$/ { exit } inside { print } /^```[a-z]/ { inside = 1 }' "$here/README.md" > "$work/block"
  [ -s "$work/block" ]
  sed "s|--from=smolrx |--from=$image |; s|docker create smolrx)|$docker create $image)|; s|docker cp|$docker cp|
       s|docker rm|$docker rm|" "$work/block"
}

compose() { if "$docker" compose version; then "$docker" compose "$@"; else docker-compose "$@"; fi; }
in_work() { (cd "$work" && "$@"); }
poke() { [ "$(echo "$1" | timeout 10 nc localhost 8888)" = "$1" ]; }
is_serving() { poke ready; }
runs() { cat "$work/runs" 2> /dev/null; }
last_run() { [ "$(runs | tail -n 1)" = "$1" ]; }

# Stdin becomes sync.sh.
script() { cat > "$work/sync.sh"; chmod +x "$work/sync.sh"; : > "$work/runs"; }

# A smolrx in the PATH that notes its process id.
install_server() {
  mkdir -p "$work/bin"
  printf '#!/bin/sh\necho $$ > "%s/pid"\nexec "%s/smolrx" "$@"\n' "$work" "$work" > "$work/bin/smolrx"
  chmod +x "$work/bin/smolrx"
}
stop_server() { if [ -f "$work/pid" ]; then kill "$(cat "$work/pid")"; rm "$work/pid"; fi; }

# RECIPE: starts the command that it prints, in the folder that has a sync.sh; what it says is in $work/said.
start() {
  printf '%s\n' "$1" > "$work/recipe"
  (cd "$work" && PATH=$work/bin:$PATH exec bash recipe > said 2>&1) &
  recipe_runs=$!
  until_true is_serving
}
said() { grep -qx "$1" "$work/said"; }

# ------------------------------------------------------- with the program

static_file() {
  recipe '**Any script.**' | sed -n '/docker create/p; /podman create/p' > "$work/take-it-out"
  [ -s "$work/take-it-out" ]
  in_work bash take-it-out
  "$work/smolrx" --version
  install_server
}

any_script() {
  script <<< $'#!/bin/sh\necho "$SMOLRX_EVENT" >> runs'
  start "$(recipe '# smolrx')"
  until_true last_run ready
  for i in 1 2 3 4 5; do poke "burst $i"; done
  until_true last_run 'burst 5'
  poke last # and what is pending at the end is run as well
  stop_server
  wait "$recipe_runs"
  [ "$(runs | grep -vx 0)" = "$(printf '%s\n' ready 'burst 5' last)" ]
}

slow_script() {
  script <<< $'#!/bin/sh\necho "$SMOLRX_EVENT" >> runs\n[ "$SMOLRX_EVENT" != slow ] || until [ -e go ]; do sleep 0.1; done'
  start "$(recipe '# smolrx')"
  until_true last_run ready
  poke slow
  until_true last_run slow # it is at work now, until it may go on
  long=$(printf 'change %1500s.' '')
  for i in 1 2 3 4 5 6; do poke "change $i"; sleep 0.6; done
  poke "$long"
  sleep 0.6
  touch "$work/go"
  until_true last_run "$long"
  stop_server
  wait "$recipe_runs"
  [ "$(runs | tail -n 2)" = "$(printf '%s\n' slow "$long")" ]
}

failing_script() {
  script <<< $'#!/bin/sh\nexit 3'
  start "$(recipe '# smolrx')"
  until_true said 'smolrx: the command exited with 3'
  poke again
  stop_server
  wait "$recipe_runs"
}

missing_script() {
  rm -f "$work/sync.sh"
  status=0
  recipe '# smolrx' > "$work/recipe"
  in_work env PATH="$work/bin:$PATH" bash recipe > "$work/said" 2>&1 || status=$?
  [ "$status" = 127 ]
  said 'smolrx: cannot run ./sync.sh: not found (error 2)'
}

# Each line of the recipe prints its echo and leaves an event.
pokes() {
  script <<< $'#!/bin/sh\necho "$SMOLRX_EVENT" >> runs'
  start "$(recipe '# smolrx')"
  until_true last_run ready
  recipe '**Poke it**' > "$work/pokes"
  [ "$(wc -l < "$work/pokes")" -ge 4 ]
  while read -r line; do
    timeout 20 sh -c "$line" < /dev/null | tr -d '\r' | grep -x deployed
    until_true last_run deployed
    poke ready
    until_true last_run ready
  done < "$work/pokes"
  curl --silent --max-time 10 http://localhost:8888 | grep .
  [ "$(curl --silent --max-time 10 --output /dev/null --write-out '%{http_code}' http://localhost:8888)" = 400 ]
  stop_server
  wait "$recipe_runs"
  [ "$(runs | grep -vx 0 | sort -u)" = "$(printf '%s\n' deployed ready)" ]
}

# A loop that ends takes the server with it, at once.
pipe() {
  script <<< $'#!/bin/sh\necho run >> runs'
  line=$(sed -n 's/^\*\*In a pipe\*\*, `\(smolrx -q [^`]*\)`.*/\1/p' "$here/README.md")
  [ "$line" ]
  start "$line"
  until_true last_run run
  stop_server
  wait "$recipe_runs"
  status=0
  in_work env PATH="$work/bin:$PATH" bash -o pipefail -c 'smolrx --interval 600000 | head -n 1' || status=$?
  [ "$status" = 141 ]
}

# ------------------------------------------------------------ by containers

container_script() {
  mkdir -p "$work/image"
  cat > "$work/image/sync.sh"
  chmod +x "$work/image/sync.sh"
  recipe '**In your own image**' > "$work/image/Dockerfile"
  "$docker" build ${BASE:+--build-arg BASE="$BASE"} -t "${1:-$project}" "$work/image"
}
health_is() { [ "$("$docker" inspect --format '{{.State.Health.Status}}' "$project")" = "$1" ]; }
logs() { "$docker" logs "$project" 2>&1; }
logs_say() { logs | grep -qx "$1"; }
ended_with() { [ "$("$docker" inspect --format '{{.State.Status}} {{.State.ExitCode}}' "$project")" = "exited $1" ]; }
run_it() { "$docker" rm -f "$project" > /dev/null 2>&1; "$docker" run -d --name "$project" -p 8888:8888 "$@"; }

own_image() {
  container_script <<< $'#!/bin/sh\necho "begin $SMOLRX_EVENT"\n[ "$SMOLRX_EVENT" != slow ] || sleep 3\necho "end $SMOLRX_EVENT"'
  run_it --health-interval 1s "$project"
  until_true health_is healthy
  until_true is_serving
  until_true logs_say 'end ready'
}

# A run under way and an event that is pending.
finishes_at_stop() {
  poke slow
  until_true logs_say 'begin slow'
  poke pending
  "$docker" stop -t 60 "$project"
  ended_with 0
  [ "$(logs | tail -n 4)" = "$(printf '%s\n' 'begin slow' 'end slow' 'begin pending' 'end pending')" ]
}

cannot_be_started() {
  container_script "$project:broken" <<< '#!/bin/sh'
  chmod -x "$work/image/sync.sh"
  "$docker" build ${BASE:+--build-arg BASE="$BASE"} -t "$project:broken" "$work/image"
  run_it "$project:broken"
  until_true ended_with 126
  logs | grep 'smolrx: cannot run /sync.sh: '
}

# The pod's command, as its container's security context has it.
kubernetes() {
  container_script <<< $'#!/bin/sh\necho "sync: $SMOLRX_EVENT"'
  python3 -c 'import sys, yaml
for word in next(yaml.safe_load_all(open(sys.argv[1])))["spec"]["template"]["spec"]["containers"][0]["command"]: print(word)' \
    "$here/deploy/kubernetes.yaml" > "$work/command"
  mapfile -t command < "$work/command"
  run_it --read-only --cap-drop ALL --security-opt no-new-privileges --user 65532:65532 --memory 64m \
    --entrypoint "${command[0]}" "$project" "${command[@]:1}"
  until_true is_serving
  until_true logs_say 'sync: ready'
  "$docker" exec "$project" /smolrx --health
}

sidecar_is_valid() {
  recipe '**As a sidecar**' > "$work/compose.yaml"
  check-jsonschema --builtin-schema vendor.compose-spec "$work/compose.yaml"
}

sidecar() {
  "$docker" rm -f "$project"
  container_script <<< $'#!/bin/sh\necho "begin $SMOLRX_EVENT"\n[ "$SMOLRX_EVENT" != changed ] || sleep 15\necho "end $SMOLRX_EVENT"'
  cp "$work"/image/* "$work/"
  recipe '**As a sidecar**' > "$work/compose.yaml"
  in_work compose -p "$project" up -d --build
  until_true compose_says 'begin changed'
  in_work compose -p "$project" stop # longer than Docker's own ten seconds
  compose_says 'end changed'
  in_work compose -p "$project" down --rmi local
}
compose_says() { in_work compose -p "$project" logs --no-color sync | grep -q "$1"; }

# -------------------------------------------------------------------- main

if "$docker" ps --quiet --filter publish=8888 | grep -q . || nc -z localhost 8888; then echo "port 8888 is taken"; exit 1; fi

check  60 static_file       "the static file, out of the image"
check  60 any_script        "any script: a burst of pokes is one run, and what is pending at the end is run"
check  60 slow_script       "a slow script: seven pokes during a run are one more run, of the last line, whole"
check  60 failing_script    "a script that fails is reported, and runs again"
check  60 missing_script    "a script that is not there ends the server, with 127"
check  90 pokes             "poke it: nc, bash, curl and Python; HTTP gets a 400"
check  60 pipe              "in a pipe: the script runs, and a reader that leaves ends the server"
check 300 own_image         "in your own image: healthy, poked"
check  90 finishes_at_stop  "docker stop: the run under way is finished, and the pending event run"
check  60 cannot_be_started "a script that is not executable ends the container with 126"
if python3 -c 'import yaml' 2> /dev/null; then
  check 60 kubernetes       "on Kubernetes: the pod's command serves in its sandbox"
else
  skip "the pod's command: there is no PyYAML"
fi
if command -v check-jsonschema > /dev/null; then
  check 60 sidecar_is_valid "as a sidecar: the file is valid"
else
  skip "the sidecar's schema: there is no check-jsonschema"
fi
if compose version > /dev/null 2>&1; then
  check 300 sidecar         "as a sidecar: poked from another container, and a run finished at the stop"
else
  skip "the sidecar: there is no docker compose"
fi

summary
