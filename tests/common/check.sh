# shellcheck shell=bash
# What the tests in shell share. A check is a function: it fails with the first command of it that does, or when
# its time is over, and what it printed is shown then. The caller has a folder $work and sets no -e.

passed=0
failed=0
skipped=0

# SECONDS FUNCTION WHAT: runs the function in a shell of its own, for so long at the most.
check() {
  local checker timer status
  (set -ex; "$2") > "$work/log" 2>&1 &
  checker=$!
  sleep "$1" &
  timer=$!
  wait -n "$checker" "$timer"
  status=$?
  if kill "$timer" 2> /dev/null; then wait "$timer"; else kill "$checker"; wait "$checker"; status=1; fi 2> /dev/null
  if [ "$status" = 0 ]; then
    echo "ok - $3"
    passed=$((passed + 1))
  else
    echo "not ok - $3"
    sed 's/^/#   /' "$work/log" | tail -n 25
    failed=$((failed + 1))
  fi
}

# IMAGE: what build.sh calls its builder.
builder_of() {
  case ${1##*/} in *:*) echo "${1%:*}-builder:${1##*:}" ;; *) echo "$1-builder" ;; esac
}

# WHY: what was not checked.
skip() {
  echo "skipped - $1"
  skipped=$((skipped + 1))
}

# Tries until it succeeds; the check's time is the limit.
until_true() {
  { set +x; } 2> /dev/null
  until "$@" > /dev/null 2>&1; do sleep 0.1; done
  set -x
}

# The last line; it succeeds if no check has failed.
summary() {
  echo "$passed passed, $failed failed, $skipped skipped"
  [ "$failed" = 0 ]
}
