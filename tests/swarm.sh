#!/usr/bin/env bash
# Tests that replicas roll without losing a line: three of them in Swarm, eight clients in another container that
# never pause, and every replica replaced meanwhile.
#
#   tests/swarm.sh
#
# Needs a Docker engine that is in no swarm, or manages one, and leaves it as it was. Settings: DOCKER; IMAGE, if it is
# not smolrx; CLIENTS, the clients' image with a bash in it, if it is not the builder.
set -uo pipefail

image=${IMAGE:-smolrx}
docker=${DOCKER:-docker}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name=smolrx-test-$$ # of the service, its network and the clients' container
initialized=
bridge=$("$docker" network ls --quiet --filter name=docker_gwbridge) # a swarm's way out, which it leaves behind
work=$(mktemp -d)
clean_up() {
  "$docker" rm -f "$name"
  "$docker" service rm "$name"
  kill "$witness"
  until [ -z "$(replicas)" ]; do sleep 0.2; done
  until "$docker" network rm "$name" || ! "$docker" network inspect "$name"; do sleep 0.2; done
  [ ! "$initialized" ] || "$docker" swarm leave --force
  [ "$bridge" ] || "$docker" network rm docker_gwbridge
  rm -rf "$work"
}
trap 'clean_up > /dev/null 2>&1' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# ----------------------------------------------------------------- helpers

# shellcheck source=tests/common/check.sh
. "$here/tests/common/check.sh"

clients=${CLIENTS:-$(builder_of "$image")}

replicas() { "$docker" ps --all --quiet --filter "label=com.docker.swarm.service.name=$name"; }
echoed() { "$docker" exec "$name" sh -c 'cat /results/echoed.*'; }
have_gone_on() { [ "$(echoed | wc -l)" -gt "$1" ]; }

# What a client does: a connection a line, for as long as nobody tells it to stop. Where a connection fails
# or its echo does, it says so and goes on.
# shellcheck disable=SC2016 # it is expanded over there
client='
mkdir /results
one() {
  for ((i = 0; ; i++)); do
    [ ! -e /stop ] || return 0
    line="client $1 line $i"
    { echo "$line" >&3 && read -r -t 10 answer <&3 && [ "$answer" = "$line" ] && echo "$line" >> "/results/echoed.$1"; } \
      3<> "/dev/tcp/$0/8888" || echo "$line" >> /results/failed
  done
}
for number in 1 2 3 4 5 6 7 8; do one "$number" & done
wait'

# ------------------------------------------------------------------ the run

start() {
  "$docker" network create --driver overlay --attachable "$name"
  "$docker" service create --name "$name" --network "$name" --endpoint-mode dnsrr --replicas 3 \
    --update-order start-first --no-resolve-image --quiet "$image" --interval 600000
  "$docker" run -d --name "$name" --network "$name" "$clients" bash -c "$client" "$name"
  until_true have_gone_on 1000
}

roll() {
  before=$(replicas)
  "$docker" service update --force --no-resolve-image --quiet "$name"
  until_true have_gone_on $(($(echoed | wc -l) + 1000))
  [ "$(replicas | wc -l)" = 6 ]
  for replica in $before; do
    [ "$("$docker" inspect --format '{{.State.Status}} {{.State.ExitCode}}' "$replica")" = 'exited 0' ]
  done
}

nothing_is_lost() {
  "$docker" exec "$name" touch /stop
  "$docker" wait "$name"
  "$docker" logs "$name" # what went wrong, if anything
  "$docker" cp "$name:/results" "$work"
  [ ! -e "$work/results/failed" ]
  for replica in $(replicas); do
    "$docker" logs "$replica" > "$work/$replica.log"
    grep -q '^Send: ' "$work/$replica.log"
  done
  set +x
  sort "$work"/results/echoed.* > "$work/echoed"
  sed -n 's/^Send: //p' "$work"/*.log | sort > "$work/sent"
  comm -23 "$work/echoed" "$work/sent" > "$work/lost"
  [ ! -s "$work/lost" ]
  wc -l < "$work/echoed" > "$work/count"
}

# The engine removes what it scales down, so that its events have to tell how a replica ended.
all_end_well() {
  "$docker" service scale "$name=0"
  until_true six_have_ended
  ! grep -vx 0 "$work/ends"
}
six_have_ended() { [ "$(wc -l < "$work/ends")" -ge 6 ]; }

# -------------------------------------------------------------------- main

case $("$docker" info --format '{{.Swarm.LocalNodeState}} {{.Swarm.ControlAvailable}}') in
  'active true') ;;
  inactive*) "$docker" swarm init --advertise-addr 127.0.0.1 > /dev/null && initialized=yes || exit 1 ;;
  *) skip "replicas: this engine is in a swarm that it does not manage"; summary; exit ;;
esac
"$docker" events --filter event=die --filter "label=com.docker.swarm.service.name=$name" \
  --format '{{.Actor.Attributes.exitCode}}' > "$work/ends" &
witness=$!

check 120 start           "three replicas serve eight clients in another container"
check 180 roll            "docker service update --force replaces all of them, and they exit with 0"
check  60 nothing_is_lost "no client saw an error, and every line echoed is in a replica's log"
check  60 all_end_well    "all six containers end with exit code 0"
[ ! -s "$work/count" ] || echo "# $(cat "$work/count") lines echoed"
summary
