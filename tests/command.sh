#!/usr/bin/env bash
# Tests a command that smolrx runs in an image of one's own: the troubles that people had with pipes instead.
#
#   tests/command.sh
#
# Needs the image smolrx, bash, nc and a Docker engine or podman. Settings: DOCKER; IMAGE, if it is not smolrx; BASE,
# something with a shell that the images are made from.
# shellcheck disable=SC2016 # the scripts that smolrx runs are meant to read "$SMOLRX_EVENT" themselves
set -uo pipefail

image=${IMAGE:-smolrx}
base=${BASE:-alpine}
docker=${DOCKER:-docker}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# No clock, and each poke an event.
poked=(-q --interval 0 --debounce 1)

work=$(mktemp -d)
tag=smolrx-test-command-$$
clean_up() {
  local file
  for file in "$work"/*.cid; do if [ -s "$file" ]; then "$docker" rm -f "$(cat "$file")"; fi; done
  for file in "$work"/*/Dockerfile; do "$docker" rmi "$tag:$(basename "$(dirname "$file")")"; done
  rm -rf "$work"
}
trap 'clean_up > /dev/null 2>&1' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# ----------------------------------------------------------------- helpers

# shellcheck source=tests/common/check.sh
. "$here/tests/common/check.sh"

# NAME OPTION...: builds an image that runs the script on stdin for each event, and is named so from then on.
own() {
  local name=$1 entrypoint='"/smolrx"' option
  shift
  for option in "$@" -- /sync.sh; do entrypoint+=", \"$option\""; done
  mkdir "$work/$name"
  (echo '#!/bin/sh'; cat) > "$work/$name/sync.sh"
  chmod +x "$work/$name/sync.sh"
  printf '%s\n' "FROM $base" "COPY --from=$image /smolrx /" 'COPY sync.sh /' 'USER 65532' \
    "ENTRYPOINT [$entrypoint]" > "$work/$name/Dockerfile"
  "$docker" build -q -t "$tag:$name" "$work/$name"
}

# NAME [DOCKER-OPTION]...: starts it, and waits until it serves.
start() {
  local name=$1
  shift
  "$docker" run -d --cidfile "$work/$name.cid" -p 127.0.0.1::8888 "$@" "$tag:$name"
  until_true serves "$name"
}

id() { cat "$work/$1.cid"; }
logs() { "$docker" logs "$(id "$1")" 2>&1 | tr -d '\r'; }
of() { "$docker" inspect --format "$2" "$(id "$1")"; }                     # NAME TEMPLATE
port() { "$docker" port "$(id "$1")" 8888 | sed -n '1s/.*://p'; }
says() { logs "$1" | grep -qx "$2"; }                                      # NAME PATTERN, of a whole line
poke() { [ "$(echo "$2" | timeout 10 nc 127.0.0.1 "$(port "$1")")" = "$2" ]; } # NAME TEXT
logs_are() { [ "$(logs "$1")" = "$(printf '%s\n' "${@:2}")" ]; }             # NAME LINE...
serves() { "$docker" exec "$(id "$1")" /smolrx --health; }
restarted() { [ "$(of "$1" '{{.RestartCount}}')" = "$2" ]; }               # NAME COUNT
has_ended() { [ "$(of "$1" '{{.State.Status}}')" = exited ]; }
ended_with() { [ "$(of "$1" '{{.State.ExitCode}}')" = "$2" ]; }            # NAME STATUS
run_count() { [ "$(logs "$1" | grep -c "$2")" = "$3" ]; }                  # NAME PATTERN COUNT

# NAME: the state of each process in there but process 1 and those of this look.
others() {
  "$docker" exec "$(id "$1")" sh -c 'for stat in /proc/[0-9]*/stat; do
    read -r pid name state parent _ < "$stat" || continue
    [ "$pid" = 1 ] || [ "$pid" = $$ ] || [ "$parent" = $$ ] || echo "$pid $name $state $parent"
  done'
}
is_alone() { [ "$(others "$1")" = "" ]; }

# ----------------------------------------------------------------- troubles

# Each run leaves two children behind: one that ends by itself, and one of a child that has ended (as ssh's
# ControlPersist and git's gc do).
no_zombies() {
  own zombies "${poked[@]}" << 'SH'
sleep 1 > /dev/null 2>&1 &
(sleep 1 > /dev/null 2>&1 &)
echo "ran $SMOLRX_EVENT"
SH
  start zombies --pids-limit 60
  for i in {1..20}; do
    poke zombies "$i"
    until_true says zombies "ran $i"
  done
  # The limit of processes is not reached by what has ended.
  until_true is_alone zombies
  for i in {21..40}; do
    poke zombies "$i"
    until_true says zombies "ran $i"
  done
  until_true is_alone zombies
}

# What a run has left behind does not delay the end.
stop_waits_for_runs_only() {
  own daemon "${poked[@]}" << 'SH'
sleep 1000 > /dev/null 2>&1 &
echo "ran $SMOLRX_EVENT"
SH
  start daemon
  poke daemon first
  until_true says daemon 'ran first'
  local before=${EPOCHREALTIME/./}
  "$docker" stop -t 20 "$(id daemon)"
  [ $((${EPOCHREALTIME/./} - before)) -lt 3000000 ]
  ended_with daemon 0
}

second_signal() {
  own second "${poked[@]}" << 'SH'
trap 'echo "got TERM"' TERM
echo "begin $SMOLRX_EVENT"
i=0
while [ $i -lt 300 ]; do sleep 0.1; i=$((i + 1)); done
SH
  start second
  poke second first
  until_true says second 'begin first'
  "$docker" kill --signal TERM "$(id second)"
  sleep 1
  [ "$(of second '{{.State.Running}}')" = true ]
  run_count second 'got TERM' 0
  "$docker" kill --signal TERM "$(id second)"
  until_true has_ended second
  ended_with second 143
}

# As many restarts as are asked for, each with the code and the message.
missing_command() {
  own missing -q --debounce 1 < /dev/null
  printf '%s\n' "FROM $tag:missing" 'ENTRYPOINT ["/smolrx", "-q", "--debounce", "1", "--", "/missing"]' > "$work/missing/Dockerfile"
  "$docker" build -q -t "$tag:missing" "$work/missing"
  status=0
  "$docker" run --rm "$tag:missing" 2> "$work/missing/stderr" || status=$?
  [ "$status" = 127 ]
  [ "$(cat "$work/missing/stderr")" = 'smolrx: cannot run /missing: not found (error 2)' ]
  "$docker" run -d --cidfile "$work/missing.cid" --restart on-failure:2 "$tag:missing"
  until_true restarted missing 2
  until_true has_ended missing
  ended_with missing 127
  run_count missing 'cannot run /missing: not found' 3
}

# The client of the engine hands its SIGHUP on, as it gets it from a terminal that closes: there is no pipe, and so
# nothing else that could go on with the port.
nothing_outlives_its_terminal() {
  own terminal "${poked[@]}" << 'SH'
echo "begin $SMOLRX_EVENT"
sleep 1
echo "end $SMOLRX_EVENT"
SH
  "$docker" run --cidfile "$work/terminal.cid" -p 127.0.0.1::8888 "$tag:terminal" > "$work/terminal/log" 2>&1 &
  client=$!
  until_true serves terminal
  poke terminal first
  until_true grep -qx 'begin first' "$work/terminal/log"
  published=$(port terminal)
  kill -HUP "$client"
  until_true has_ended terminal
  ended_with terminal 0
  wait "$client"
  if nc -z 127.0.0.1 "$published"; then false; fi
  [ "$(cat "$work/terminal/log")" = "$(printf '%s\n' 'begin first' 'end first')" ]
}

# With a stdin that is held open and one that is not there.
stdin_takes_no_event() {
  own stdin "${poked[@]}" << 'SH'
taken=$(cat)
echo "$SMOLRX_EVENT took <$taken>"
SH
  start stdin
  for i in 1 2 3; do
    poke stdin "$i"
    until_true says stdin "$i took <>"
  done
  "$docker" rm -f "$(id stdin)"
  rm "$work/stdin.cid"
  echo typed | "$docker" run -i --cidfile "$work/stdin.cid" -p 127.0.0.1::8888 "$tag:stdin" &
  client=$!
  until_true serves stdin
  poke stdin 1
  until_true says stdin '1 took <typed>'
  poke stdin 2
  until_true says stdin '2 took <>'
  "$docker" stop "$(id stdin)"
  wait "$client"
}

# ---------------------------------------------------------------- the rest

limits_are_the_containers() {
  own limits "${poked[@]}" << 'SH'
echo "$(ulimit -Sn) $(ulimit -Hn)"
ls /proc/self/fd | wc -l
grep -E 'SigBlk|SigIgn' /proc/self/status
SH
  # (Where one is given, podman does without its configured ones, and its own is more processes than root may have.)
  start limits --ulimit nofile=64:4096 --ulimit nproc=1024:4096
  poke limits first
  # (0 to 2, and the folder that ls reads.)
  until_true logs_are limits '64 4096' 4 $'SigBlk:\t0000000000000000' $'SigIgn:\t0000000000000000'
}

# -------------------------------------------------------------------- main

check 120 no_zombies                    "forty runs that each leave children behind: no zombie, in 60 tasks"
check  30 stop_waits_for_runs_only      "docker stop: in under three seconds, whatever a run has left behind"
check  30 second_signal                 "a second signal ends it with 143, in the middle of a run"
check  60 missing_command               "no such command: exit code 127, and --restart on-failure:2 restarts it twice"
check  60 nothing_outlives_its_terminal "the terminal closes: the run is finished, and the port is free"
check  60 stdin_takes_no_event          "a script that reads stdin takes no event"
check  30 limits_are_the_containers     "the script has the container's limits, its signals, and three descriptors"

summary
