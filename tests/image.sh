#!/usr/bin/env bash
# Tests the image as people run it.
#
#   tests/image.sh [--rebuild]
#
# --rebuild builds it anew in other ways, minutes each: all must give the same binary.
# Needs bash, nc, script (of util-linux) and a Docker engine or podman. Settings: DOCKER; IMAGE, if it is not smolrx;
# RUST_IMAGE; BUDGET, the most bytes that the image may have; ROUNDS of the attack on its memory, of each kind.
set -uo pipefail

rebuild=
if [ "${1-}" = --rebuild ]; then rebuild=yes; fi
image=${IMAGE:-smolrx}
docker=${DOCKER:-docker}
budget=${BUDGET:-130000}
rounds=${ROUNDS:-10}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# A clock and a debounce so slow that only the flush at the end is observed.
calm=(--interval 600000)

# Containers are taken away by the ids that Docker leaves in files; images by tags of our own, as an id may well
# be that of an image which was here before.
work=$(mktemp -d)
tag=smolrx-test-$$
clean_up() {
  local file
  for file in "$work"/*.cid; do if [ -s "$file" ]; then "$docker" rm -f "$(cat "$file")"; fi; done
  "$docker" rmi "$tag:stream" "$tag:classic" "$tag:clean" "$tag:cross" "$tag:cross-stream" \
    "$(builder_of "$tag:cross-stream")"
  rm -rf "$work"
}
trap 'clean_up > /dev/null 2>&1' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# ----------------------------------------------------------------- helpers

# shellcheck source=tests/common/check.sh
. "$here/tests/common/check.sh"

builder=$(builder_of "$image")

# NAME [DOCKER-OPTION]... [-- OPTION...]: starts a container, known by this name from then on, and waits until it serves.
start() {
  local name=$1 of_docker=()
  shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do of_docker+=("$1"); shift; done
  "$docker" run -d --cidfile "$work/$name.cid" "${of_docker[@]}" "$image" "${calm[@]}" "${@:2}"
  until_true says "$name" 'Serving on 0.0.0.0:[0-9]*'
}

id() { cat "$work/$1.cid"; }
logs() { "$docker" logs "$(id "$1")" 2>&1; }
of() { "$docker" inspect --format "$2" "$(id "$1")"; }                     # NAME TEMPLATE
port() { "$docker" port "$(id "$1")" 8888 | sed -n '1s/.*://p'; }
says() { logs "$1" | tr -d '\r' | grep -x "$2"; }                          # NAME PATTERN, of a whole line
echoes() { [ "$(echo "$2" | timeout 10 nc 127.0.0.1 "$(port "$1")")" = "$2" ]; } # NAME TEXT
# NAME: it has not been killed, for its memory or otherwise.
is_alive() { [ "$(of "$1" '{{.State.Running}} {{.State.OOMKilled}} {{.RestartCount}}')" = 'true false 0' ]; }
has_ended() { [ "$(of "$1" '{{.State.Status}}')" = exited ]; }

# NAME STATUS. podman lets systemd run the probes: where there is none, this does.
is_healthy() {
  [ -d /run/systemd/system ] || "$docker" healthcheck run "$(id "$1")" || true
  [ "$(of "$1" '{{.State.Health.Status}}')" = "$2" ]
}

# NAME IMAGE PATH: the checksum of a file in an image.
binary() {
  rm -f "$work/$1.cid"
  "$docker" create --cidfile "$work/$1.cid" "$2" > /dev/null
  "$docker" cp "$(id "$1"):$3" - | tar -xO | sha256sum
  "$docker" rm "$(id "$1")" > /dev/null
}

# NAME EVENT [COMMAND...]: stops the container, by `docker stop` or this command: it must end well, in under two
# seconds, and print the event that is pending.
stops() {
  local before=${EPOCHREALTIME/./} event=$2 how=("${@:3}")
  [ ${#how[@]} -gt 0 ] || how=("$docker" stop)
  "${how[@]}" "$(id "$1")"
  until_true has_ended "$1"
  [ $((${EPOCHREALTIME/./} - before)) -lt 2000000 ]
  [ "$(of "$1" '{{.State.ExitCode}}')" = 0 ]
  [ "$(logs "$1" | tail -n 1)" = "Observing $event" ]
}

# ------------------------------------------------------------ what it holds

# Whatever way an engine saves an image, its layers are tar files and the rest of it is not.
layers() {
  rm -rf "$work/saved"
  mkdir "$work/saved"
  "$docker" save "$("$docker" image inspect --format '{{.Id}}' "$image")" | tar -x -C "$work/saved"
  find "$work/saved" -type f -exec sh -c 'tar -tvf "$1" 2> /dev/null || true' - {} \;
}

fits() {
  bytes=$(layers | awk '{ sum += $3 } END { print sum }')
  [ "$bytes" -gt 0 ]
  [ "$bytes" -le "$budget" ]
}

one_file() { [ "$(layers | awk '{ print $1, $6 }')" = "-rwxr-xr-x smolrx" ]; }

# An ELF file of type DYN that runs where there is no other file is a static-pie; without section headers it
# has no symbols.
static_pie() {
  "$docker" run --rm "$builder" cat /image/smolrx > "$work/smolrx"
  half_word() { od -A n -t u2 -j "$1" -N 2 "$work/smolrx" | tr -d ' '; }
  [ "$(half_word 16)" = 3 ]
  [ "$(half_word 60)" = 0 ]
}

declares() {
  config() { "$docker" image inspect --format "{{json .Config.$1}}" "$image"; }
  config User | grep -E '^"[1-9][0-9]*(:[0-9]+)?"$'
  [ "$(config ExposedPorts)" = '{"8888/tcp":{}}' ]
  [ "$(config StopSignal)" = '"SIGTERM"' ]
  [ "$(config Entrypoint)" = '["/smolrx"]' ]
  config Healthcheck.Test | grep -F '"CMD","/smolrx","--health"'
  config Labels | grep -F org.opencontainers.image.title
}

takes_options() {
  "$docker" run --rm "$image" --version | grep '^smolrx '
  status=0
  "$docker" run --rm "$image" --nonsense || status=$?
  [ "$status" = 2 ]
}

# ------------------------------------------------------------- how it runs

echoes_a_line() {
  start echo -p 127.0.0.1::8888
  echoes echo foo
  until_true says echo 'Close the client socket'
  says echo 'Received foo from [0-9.]*:[0-9]*'
  says echo 'Send: foo'
}

stops_in_time() {
  start stop -p 127.0.0.1::8888
  echoes stop foo
  stops stop foo
}

# As a terminal that is closed sends it.
hangup() {
  start hangup -p 127.0.0.1::8888
  echoes hangup foo
  stops hangup foo "$docker" kill --signal HUP
}

ctrl_c() {
  exec 3> >(timeout 60 script -qec "$docker run -it --cidfile $work/tty.cid $image ${calm[*]}" /dev/null)
  until_true says tty 'Serving on 0.0.0.0:8888'
  printf '\003' >&3
  until_true has_ended tty
  [ "$(of tty '{{.State.ExitCode}}')" = 0 ]
  says tty '\(\^C\)\?Observing 0' # the terminal echoes the key
}

health() {
  start health --health-interval 1s --health-retries 1
  until_true is_healthy health healthy
  "$docker" kill --signal STOP "$(id health)"
  until_true is_healthy health unhealthy
  "$docker" kill --signal CONT "$(id health)"
  until_true is_healthy health healthy
  [ "$(logs health)" = 'Serving on 0.0.0.0:8888' ] # a probe leaves no trace
}

other_port() {
  start other --health-interval 1s --health-retries 1 -- --tcp-port 9999
  until_true is_healthy other healthy
  "$docker" kill --signal STOP "$(id other)"
  until_true is_healthy other unhealthy
}

# From outside of the container's network there is TCP only.
health_from_outside() {
  start outside -p 127.0.0.1::8888
  "$docker" cp "$(id outside):/smolrx" "$work/probe"
  port=$(port outside)
  "$work/probe" --health --bind 127.0.0.1 --tcp-port "$port"
  "$docker" kill "$(id outside)"
  status=0
  "$work/probe" --health --bind 127.0.0.1 --tcp-port "$port" || status=$?
  [ "$status" = 1 ]
}

hardened() {
  start hardened --read-only --cap-drop ALL --security-opt no-new-privileges --user 12345 --network none
  "$docker" exec "$(id hardened)" /smolrx --health
  stops hardened 0
}

small=(--memory 6m --memory-swap 6m --pids-limit 8 -p 127.0.0.1::8888)

# All of them are connected before the first one sends.
thousand_clients() {
  local clients=1000 socket sockets=() i=0
  start small "${small[@]}"
  port=$(port small)
  set +x
  ulimit -n 2048
  while [ "${#sockets[@]}" -lt "$clients" ]; do
    exec {socket}<> "/dev/tcp/127.0.0.1/$port"
    sockets+=("$socket")
  done
  for socket in "${sockets[@]}"; do
    echo "line $((++i))" >&"$socket"
  done
  i=0
  for socket in "${sockets[@]}"; do
    read -r line <&"$socket"
    [ "$line" = "line $((++i))" ]
  done
  set -x
  [ "$(logs small | grep -c '^Received line [0-9]* from ')" = "$clients" ]
  is_alive small
}

# NAME [OPTION]...: all seats but one are taken by clients that each hold a line as long as may be, all but its end.
hostile_clients() {
  local name=$1 unfinished socket sockets=()
  start "$name" "${small[@]}" -- "${@:2}"
  port=$(port "$name")
  set +x
  unfinished=$(printf '%2047s' '')
  ulimit -S -n 2048
  while [ "${#sockets[@]}" -lt 511 ]; do
    exec {socket}<> "/dev/tcp/127.0.0.1/$port"
    printf %s "$unfinished" >&"$socket"
    sockets+=("$socket")
  done
  set -x
  for i in 1 2 3 4 5; do
    exec {socket}<> "/dev/tcp/127.0.0.1/$port"
    echo "short $i" >&"$socket"
    read -r -t 1 line <&"$socket"
    [ "$line" = "short $i" ]
    exec {socket}>&-
    is_alive "$name"
    sleep 0.2
  done
  probe_says_healthy "$name"
  is_alive "$name"
}

# NAME. What podman itself needs to start a probe in there, some 2 MB, is that probe's end now and then, by the limit (137, or
# runc's 255; smolrx itself says 0 or 1): then a container beside it asks, in the same network namespace.
probe_says_healthy() {
  local status=0
  "$docker" exec "$(id "$1")" /smolrx --health || status=$?
  if [ "$status" -gt 1 ]; then "$docker" run --rm --network "container:$(id "$1")" "$image" --health; else [ "$status" = 0 ]; fi
}

unfinished_lines() { hostile_clients unfinished; }
unfinished_lines_keep_open() { hostile_clients unfinished-keep-open --keep-open; }

# COUNT: so many clients, each with an unfinished line of one of twelve lengths. They leave by leave.
unfinished() {
  local socket length lengths=(1 17 40 90 150 256 300 520 900 1030 1500 2047)
  for ((i = 0; i < $1; i++)); do
    exec {socket}<> "/dev/tcp/127.0.0.1/$port"
    length=${lengths[i % 12]}
    printf '%*s' "$length" '' >&"$socket"
    sockets+=("$socket")
  done
}
leave() {
  local socket
  for socket in "${sockets[@]}"; do exec {socket}>&-; done
  sockets=()
}
dels() { printf "%$1s" '' | tr ' ' '\177'; } # COUNT

# NAME [DOCKER-OPTION]...: an attack on the allocator and on what text takes, which is six bytes for a DEL when it is
# shown. Unfinished lines take nearly all seats, and whole lines of DEL come; then unfinished lines take all seats and
# more, and lines come that are far too long.
attack() {
  local name=$1 socket line short long sockets=()
  start "$name" "${small[@]}" "${@:2}"
  port=$(port "$name")
  set +x
  ulimit -S -n 2048
  short=$(dels 2047)
  long=$(dels 65535)
  for ((round = 0; round < rounds; round++)); do
    unfinished 500
    for ((n = 0; n < 100; n++)); do
      exec {socket}<> "/dev/tcp/127.0.0.1/$port"
      echo "$short" >&"$socket"
      read -r -t 10 line <&"$socket"
      [ "$line" = "$short" ]
      exec {socket}>&-
    done
    (set -x; is_alive "$name")
    leave
    unfinished 1020
    long_ones=()
    for ((n = 0; n < 12; n++)); do
      exec {socket}<> "/dev/tcp/127.0.0.1/$port"
      echo "$long" >&"$socket"
      long_ones+=("$socket")
    done
    sleep 0.3
    (set -x; is_alive "$name")
    leave
    sockets=("${long_ones[@]}")
    for socket in "${sockets[@]}"; do read -r -t 10 line <&"$socket" || true; done
    leave
    (set -x; is_alive "$name")
  done
  set -x
  probe_says_healthy "$name"
  is_alive "$name"
}

attacked() { attack attacked --no-healthcheck; }
attacked_while_probed() { attack probed --health-interval 1s; }

# What it shows of a DEL is six bytes, twice, and nobody reads it. (In the builder, for its shell and its pipe: an
# engine whose own client does not read may get stuck itself.)
stalled_text() {
  local socket line
  "$docker" run -d --cidfile "$work/stalled.cid" "${small[@]}" "$builder" \
    sh -c '/image/smolrx --interval 600000 | sleep 1000'
  # Not by a probe inside, which takes more of the memory than is left.
  runs() { "$docker" top "$(id stalled)" | grep -v 'sh -c' | grep '/image/smolrx '; }
  until_true runs
  port=$(port stalled)
  set +x
  line=$(printf '%2047s' '' | tr ' ' '\177')
  ulimit -S -n 2048
  for i in {1..511}; do
    exec {socket}<> "/dev/tcp/127.0.0.1/$port"
    echo "$line" >&"$socket"
  done
  set -x
  for i in {1..5}; do
    sleep 0.5
    runs
    is_alive stalled
  done
}

# ---------------------------------------------------- how it is transported

stream() { "$docker" run --rm "$builder"; }

stream_is_deterministic() { [ "$(stream | sha256sum)" = "$(stream | sha256sum)" ]; }

stream_is_in_order() {
  stream | tar -tv --numeric-owner --utc | awk '{ print $1, $2, $4, $6 }' | diff - <(
    echo '-rw-r--r-- 0/0 1970-01-01 Dockerfile'
    echo '-rwxr-xr-x 0/0 1970-01-01 smolrx'
  )
}

# The image has the builder's binary, and the two Dockerfiles say the same of it.
stream_is_the_image() {
  stream | "$docker" build -t "$tag:stream" -
  is_the_same stream
}

# NAME: the image built under this tag has the binary and the declarations of the one under test.
is_the_same() {
  [ "$(binary "$1" "$tag:$1" /smolrx)" = "$(binary shipped "$image" /smolrx)" ]
  [ "$(declared "$tag:$1")" = "$(declared "$image")" ]
}

declared() {
  "$docker" image inspect --format '{{with .Config}}{{json .User}} {{json .ExposedPorts}} {{json .StopSignal}}
    {{json .Entrypoint}} {{json .Cmd}} {{json .Healthcheck}} {{json .Labels}}{{end}}' "$1"
}

# -------------------------------------------------------- built once more

classic_build() {
  DOCKER_BUILDKIT=0 "$docker" build --build-arg RUST_IMAGE -t "$tag:classic" "$here"
  is_the_same classic
}

clean_build() {
  DOCKER_BUILDKIT=0 "$docker" build --no-cache --target builder --build-arg RUST_IMAGE -t "$tag:clean" "$here"
  [ "$(binary clean "$tag:clean" /image/smolrx)" = "$(binary shipped "$image" /smolrx)" ]
}

# The first client here that can build with BuildKit.
buildkit_client() {
  local client
  for client in $(type -ap "$docker"); do
    if echo 'FROM scratch' | DOCKER_BUILDKIT=1 "$client" build -q - > /dev/null 2>&1; then echo "$client"; return; fi
  done
}

# For the architecture that this machine is not of: cross-compiled by BuildKit's --platform, and by the stream.
cross_build() {
  case $("$docker" image inspect --format '{{.Architecture}}' "$image") in amd64) other=arm64 ;; *) other=amd64 ;; esac
  DOCKER_BUILDKIT=1 "$(buildkit_client)" build --platform "linux/$other" --build-arg RUST_IMAGE -t "$tag:cross" "$here"
  ARCH=$other IMAGE=$tag:cross-stream "$here/build.sh"
  [ "$(binary cross "$tag:cross" /smolrx)" = "$(binary cross-stream "$tag:cross-stream" /smolrx)" ]
  [ "$(declared "$tag:cross")" = "$(declared "$image")" ]
  [ "$(declared "$tag:cross-stream")" = "$(declared "$image")" ]
  for name in cross cross-stream; do
    [ "$("$docker" image inspect --format '{{.Architecture}}' "$tag:$name")" = "$other" ]
  done
}

# -------------------------------------------------------------------- main

check  20 fits                    "the image has at most $budget bytes"
check  30 one_file                "the image holds exactly one file"
check  20 static_pie              "which is a static-pie, stripped"
check  10 declares                "user, port, stop signal, health check, labels and entry point"
check  20 takes_options           "options follow the image's name"
check  30 echoes_a_line           "docker run -p, and nc"
check  30 stops_in_time           "docker stop: in under two seconds, exit code 0, the pending event observed"
check  30 hangup                  "SIGHUP, as of a terminal that is closed, stops it as well"
check  30 ctrl_c                  "Ctrl-C on docker run -it"
check  60 health                  "healthy; unhealthy when wedged; healthy again"
check  60 other_port              "healthy at another port, without further options"
check  30 health_from_outside     "healthy at the published port, asked from outside; not when it has gone"
check  30 hardened                "hardened: read-only, no capabilities, any user, no network"
check 120 thousand_clients        "a thousand clients at once in 6 MB and 8 tasks"
check 120 unfinished_lines        "511 unfinished lines of 2 KiB in 6 MB, and short ones served within a second"
check 120 unfinished_lines_keep_open "so with --keep-open"
check 300 attacked                "unfinished lines of twelve lengths, then lines of DEL, $rounds times in 6 MB"
check 300 attacked_while_probed   "so with a health check each second"
check  60 stalled_text            "511 lines of 2 KiB of DEL in 6 MB, and nobody reads stdout"
check  30 stream_is_deterministic "the builder's stream is the same each time"
check  20 stream_is_in_order      "the stream's files: sorted, nobody's, without a time"
check  60 stream_is_the_image     "the image is what the stream builds"

if [ "$rebuild" ]; then
  check 1200 classic_build        "docker build . gives the same binary"
  if [ "$(buildkit_client)" ]; then
    check 1200 cross_build        "for the other architecture BuildKit and the stream give the same binary, too"
  else
    check 1200 clean_build        "so does a clean build"
    skip "BuildKit: no $docker here builds with it"
  fi
fi

summary
