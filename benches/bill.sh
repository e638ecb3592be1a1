#!/bin/sh
# Attributes the bytes of the shipped binary, in the builder image: each instruction to the crate that its
# source line is in (what the compiler has inlined counts for where it was written), the rest to its section.
# Prints a line an item: bytes, what. `./build.sh bill` calls it.
set -eu
target=$(uname -m)-unknown-linux-musl
binary=target/$target/release/smolrx
RUSTC_BOOTSTRAP=1 cargo build --quiet --release --locked --config .cargo/image.toml --target "$target" \
  --config 'profile.release.strip=false' --config 'profile.release.debug="line-tables-only"'

# Some awks know no hexadecimal numbers.
hex='function hex(text,  n, i) {
  for (i = 1; i <= length(text); i++) n = 16 * n + index("0123456789abcdef", substr(text, i, 1)) - 1
  return n
}'

objdump --disassemble --line-numbers --no-show-raw-insn "$binary" | awk "$hex"'
  function owner(path) {
    if (path ~ /\/main\.rs:/) return "main.rs"
    if (sub(/.*\/registry\/src\/[^\/]*\//, "", path)) { sub(/-[0-9][^\/]*\/.*/, "", path); return path }
    if (sub(/.*\/library\/vendor\//, "", path)) { sub(/-[0-9].*/, "", path); return path }
    if (sub(/.*\/library\//, "", path)) { sub(/\/.*/, "", path); return "standard library, " path }
    return "musl, and what has no line"
  }
  /^[0-9a-f]+ <.*>:$/ { path = ""; next }
  /^[^ ].*:[0-9]+/ { path = $1; next }
  /^ *[0-9a-f]+:\t/ {
    sub(/:.*/, "", $1)
    at = hex($1)
    if (last && at > last && at - last < 64) bytes[who] += at - last
    last = at
    who = owner(path)
  }
  END { for (who in bytes) printf "%7d  code: %s\n", bytes[who], who }'

readelf --sections --wide "$binary" | sed 's/^ *\[ *[0-9]*\] *//' | awk "$hex"'
  $1 ~ /^\./ && $2 != "NOBITS" && $7 ~ /A/ && $1 !~ /^\.(text|init|fini)$/ {
    printf "%7d  data: %s\n", hex($5), $1
  }'
