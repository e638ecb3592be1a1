#!/bin/sh
# Lists the C functions that the Rust code of the shipped binary calls, in the builder image: a line each, and
# behind those that .cargo/image.toml redirects the number of places that do so.
#
#   docker run --rm smolrx-builder sh benches/imports.sh | diff benches/imports.txt -
#
# A redirected function does what the known callers need and nothing else. Where a dependency's new version adds
# a caller, or this program does, it would misbehave in the image alone: so that shows here first.
set -eu
redirected=$(sed -n 's/.*--defsym=\([a-z_]*\)=.*/\1/p' .cargo/image.toml)

readelf --syms --wide /smolrx.o | awk '$7 == "UND" && $8 != "" { print $8 }' | sort -u | while read -r name; do
  if echo "$redirected" | grep -qx "$name"; then
    places=$(readelf --relocs --wide /smolrx.o | awk -v name="$name" '$5 == name' | wc -l)
    echo "$name $places"
  else
    echo "$name"
  fi
done
