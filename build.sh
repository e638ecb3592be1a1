#!/usr/bin/env bash
# Builds the images; `./build.sh --help` says how.
set -euo pipefail

usage() {
  cat <<HELP
Usage: ./build.sh [COMMAND]
Builds smolrx's image. It needs Docker alone and works from any directory.

  (none)     build the builder, and the image from the stream that it writes
  compare    build the Python baseline as well, print a table of the sizes, and draw benches/sizes.svg
  push       build the image for amd64 and arm64, and push both under one name
  ladder     rebuild the binary switch by switch, and print what each saves (a while)
  bill       print where the bytes of the binary come from
  --help     print this

Settings are environment variables, here with their values:

  DOCKER             $DOCKER; podman is another
  IMAGE              $IMAGE; the others are called $builder, $python_builder and $python_image
  ARCH               ${ARCH:-of the engine}; or amd64 or arm64, compiled on either
  RUST_IMAGE         $RUST_IMAGE
  PYTHON_IMAGE       $PYTHON_IMAGE
  PYTHON_SLIM_IMAGE  $PYTHON_SLIM_IMAGE
HELP
}

# ---------------------------------------------------------------- settings

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# What a Dockerfile says an argument is when nobody sets it.
default() { sed -n "s/^ARG $1=//p" "$here/$2"; }

export DOCKER=${DOCKER:-docker}
export ARCH=${ARCH-}
export IMAGE=${IMAGE:-smolrx${ARCH:+:$ARCH}}
export RUST_IMAGE=${RUST_IMAGE:-$(default RUST_IMAGE Dockerfile)}
export PYTHON_IMAGE=${PYTHON_IMAGE:-$(default PYTHON_IMAGE baseline/Dockerfile)}
export PYTHON_SLIM_IMAGE=${PYTHON_SLIM_IMAGE:-$(default PYTHON_SLIM_IMAGE baseline/Dockerfile)}
export BUILDAH_FORMAT=docker # podman's own format has no HEALTHCHECK

# NAME SUFFIX: an image's name with a suffix, before the tag if there is one (a colon behind the last slash).
beside() {
  case ${1##*/} in *:*) echo "${1%:*}-$2:${1##*:}" ;; *) echo "$1-$2" ;; esac
}

builder=$(beside "$IMAGE" builder)
python_builder=$(beside "$IMAGE" python-builder)
python_image=$(beside "$IMAGE" python)
other= # the architecture, if it is not the engine's own

# ---------------------------------------------------------------- commands

build_builder() {
  "$DOCKER" build --target builder --build-arg RUST_IMAGE ${other:+--build-arg "TARGETARCH=$other"} -t "$builder" "$here"
}

# The image, for the architecture in ARCH. The classic builder's cache does not know one from the other.
build() {
  other=$ARCH
  [ "$other" != "$(engine_arch)" ] || other=
  builder=$(beside "$IMAGE" builder)
  build_builder
  from_stream "$builder" ${other:+--no-cache --platform "linux/$other"} -t "$IMAGE"
}

build_baseline() {
  "$DOCKER" build --target builder --build-arg PYTHON_IMAGE -t "$python_builder" "$here/baseline"
  from_stream "$python_builder" --build-arg PYTHON_SLIM_IMAGE -t "$python_image"
}

# BUILDER [OPTION]...: builds what the builder streams. It is stored on the way: where the builder does not
# run, there is nothing to build.
from_stream() {
  "$DOCKER" run --rm "$1" > "$work/context"
  "$DOCKER" build "${@:2}" - < "$work/context"
}

# Each architecture under a tag of its own, and a list of both under the image's name.
push() {
  local name=$IMAGE images=() insecure='' destination=''
  for ARCH in amd64 arm64; do
    case ${name##*/} in *:*) IMAGE=$name-$ARCH ;; *) IMAGE=$name:$ARCH ;; esac
    build
    "$DOCKER" push "$IMAGE"
    images+=("$IMAGE")
  done
  # To a registry on this machine the engine speaks HTTP; its client has to be told. podman wants to know where to.
  case $name in localhost:* | 127.*) insecure=--insecure ;; esac
  case $("$DOCKER" --version) in podman*) destination=docker://$name ;; esac
  "$DOCKER" manifest create $insecure --amend "$name" "${images[@]}"
  "$DOCKER" manifest push $insecure --purge "$name" ${destination:+"$destination"}
}

how_to_run() {
  printf '\n%s: %s bytes\n' "$IMAGE" "$(bytes "$IMAGE")"
  [ -z "$other" ] || return 0
  printf 'Try it:  %s run --rm -it -p 8888:8888 %s --interval 2000\n' "$DOCKER" "$IMAGE"
  printf '         echo foo | nc localhost 8888\n'
}

# One row an image, largest first: bytes, the same for people, how many times smaller, a bar.
compare() {
  local image sizes
  sizes=$(for image in "$python_builder" "$builder" "$python_image" "$IMAGE"; do
    printf '%s\t%s\n' "$image" "$(bytes "$image")"
  done | sort -t $'\t' -k 2,2nr)
  awk -F '\t' -v reference="$python_builder" -v pex="$python_image" "$human"'
    { name[NR] = $1; size[NR] = $2; of[$1] = $2; if (length($1) > width) width = length($1) }

    function times(n) { return n > 1 ? sprintf(n < 10 ? "%.1f" : "%.0f", n) : "" }
    function bar(n,  text) {
      for (n = 30 * n / size[1]; n >= 1; n--) text = text "█"
      return text (text == "" ? "▏" : "")
    }

    END {
      width++
      row = "%-" width "s %13s  %7s  %14s  %9s  %s\n"
      print ""
      printf "%" width + 49 "s\n", "times smaller than"
      printf row, "image", "bytes", "size", "Python builder", "pex image", ""
      for (i = 1; i <= NR; i++)
        printf row, name[i], size[i], human(size[i]), times(of[reference] / size[i]), times(of[pex] / size[i]), bar(size[i])
    }' <<< "$sizes"
  printf '\nBytes: of the files in the layers.\n'
  printf 'Base images: %s for %s,\n%s for %s, %s for %s; nothing for %s.\n' \
    "$RUST_IMAGE" "$builder" "$PYTHON_IMAGE" "$python_builder" "$PYTHON_SLIM_IMAGE" "$python_image" "$IMAGE"
  picture > "$here/benches/sizes.svg" <<< "$sizes"
}

# The images as squares on one line, their areas to scale.
picture() {
  awk -F '\t' -v builder="$python_builder" -v pex="$python_image" -v ours="$IMAGE" "$human"'
    { size[$1] = $2 }

    function square(image, class, title,  side) {
      side = 240 * sqrt(size[image] / size[builder])
      printf "<rect class=\"%s\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\"/>\n", class, x, 250 - side, side, side
      printf "<text x=\"%.1f\" y=\"270\">%s</text><text class=\"t\" x=\"%.1f\" y=\"288\">%s</text>\n", x, title, x, human(size[image])
      x += (side > 130 ? side : 130) + 30
    }

    END {
      print "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"610\" height=\"300\" viewBox=\"0 0 610 300\" font-family=\"system-ui,sans-serif\" font-size=\"13\">"
      print "<title>The images, their areas to scale</title>"
      print "<style>text{fill:#57606a}.t{font-weight:600}.a{fill:#1f7ae0}.b{fill:#b9c1ca}@media(prefers-color-scheme:dark){text{fill:#adb5be}.b{fill:#57606a}}</style>"
      x = 10
      square(builder, "b", "Python builder")
      square(pex, "b", "Python, slim with pex")
      square(ours, "a", "smolrx")
      print "</svg>"
    }'
}

# What each size switch saves: the builder climbs, this draws. The bars start anew where the image's own target does.
ladder() {
  local bytes name bar first='' before=''
  printf '%-58s %9s %9s\n' switch bytes saved
  "$DOCKER" run --rm "$builder" sh benches/ladder.sh | while IFS=$'\t' read -r bytes name; do
    [[ $name != static* ]] || first=$bytes
    : "${first:=$bytes}" "${before:=$bytes}"
    printf -v bar '%*s' $((30 * bytes / first)) ''
    printf '%-58s %9d %9d  %s\n' "$name" "$bytes" $((before - bytes)) "${bar// /█}▏"
    before=$bytes
  done
}

# Where the bytes come from, largest first.
bill() {
  "$DOCKER" run --rm "$builder" sh benches/bill.sh | sort -k 1,1nr
}

# ---------------------------------------------------------------- helpers

# For awk: bytes as people say them.
# shellcheck disable=SC2034 # the commands above use it
human='
    function human(n,  unit) {
      for (unit = 1; n >= 1000 && unit < 4; unit++) n /= 1000
      return sprintf(n < 10 && unit > 1 ? "%.1f %s" : "%.0f %s", n, substr("B kBMBGB", 2 * unit - 1, 2))
    }'

# The files in an image's layers, in bytes. Engines call other things an image's size, so they are counted in what
# `save` writes: layers as tar files, which some engines compress, and files that are none.
bytes() {
  "$DOCKER" save "$("$DOCKER" image inspect --format '{{.Id}}' "$1")" |
    "$DOCKER" run --rm -i "$builder" tar -x --to-command="gzip -cdf | tar -tv 2> /dev/null || true" |
    awk '/^-/ { sum += $3 } END { print sum + 0 }'
}

die() { echo "build.sh: $*" >&2; exit 1; }

need_docker() {
  command -v "$DOCKER" >/dev/null || die "there is no $DOCKER here; install it, or set DOCKER to another client, such as podman"
  "$DOCKER" info >/dev/null 2>&1 || die "$DOCKER is installed, but its engine does not answer; is it started, may you use it?"
}

# amd64 or arm64, as docker says it, or podman.
engine_arch() {
  "$DOCKER" version --format '{{.Server.Arch}}' 2> /dev/null || "$DOCKER" info --format '{{.Host.Arch}}'
}

# -------------------------------------------------------------------- main

[ $# -le 1 ] || die "one command at most; see ./build.sh --help"
case $ARCH in
  '') ;;
  amd64 | arm64) [ -z "${1-}" ] || [[ $1 = -* ]] || die "ARCH is for the image alone; unset it for $1" ;;
  *) die "ARCH is amd64 or arm64, not $ARCH" ;;
esac
case ${1-}:$IMAGE in
  push:*/*) ;;
  push:*) die "push needs a name with a registry or a user, such as IMAGE=you/smolrx, not $IMAGE" ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
case ${1-} in
  '')          need_docker; build; how_to_run ;;
  compare)     need_docker; { build; build_baseline; } >&2; compare ;;
  push)        need_docker; push ;;
  ladder)      need_docker; build_builder >&2; ladder ;;
  bill)        need_docker; build_builder >&2; bill ;;
  -h | --help) usage ;;
  *)           die "there is no command $1; see ./build.sh --help" ;;
esac
