#!/bin/sh
# Rebuilds the binary switch by switch, in the builder image: first the profile of Cargo.toml, dynamic
# on the toolchain's own standard library, then static on musl by .cargo/image.toml in its order. Prints
# a line a rung: bytes, a tab, the switch. `./build.sh ladder` calls it and draws the table.
set -eu
cargo="cargo build --quiet --locked"
binary=target/release/smolrx
profile=

# NAME [SETTING]...: builds with these settings of the profile and those of the rungs before.
rung() {
  name=$1
  shift
  for setting; do profile="$profile --config profile.release.$setting"; done
  # shellcheck disable=SC2086 # the words of $cargo and $profile are meant
  $cargo --release $profile
  printf '%s\t%s\n' "$(stat -c %s "$binary")" "$name"
}

$cargo
printf '%s\t%s\n' "$(stat -c %s target/debug/smolrx)" "debug"
rung "release, as cargo has it" opt-level=3 lto=false codegen-units=16 'panic="unwind"' strip=false
rung "opt-level z" 'opt-level="z"'
rung "LTO, one codegen unit" 'lto="fat"' codegen-units=1
rung "panic abort" 'panic="abort"'
rung "strip" strip=true

export RUSTC_BOOTSTRAP=1
target=$(uname -m)-unknown-linux-musl
binary=target/$target/release/smolrx
plain="$cargo --target $target"
cargo="$plain -Zbuild-std=std,panic_abort"
rung "static on musl, standard library rebuilt"
cargo="$plain -Zbuild-std=std,panic_abort -Zbuild-std-features=optimize_for_size"
rung "standard library optimized for size"
cargo="$plain -Zbuild-std=std -Zbuild-std-features=optimize_for_size -Zpanic-immediate-abort"
rung "panic immediate-abort" 'panic="immediate-abort"'
export RUSTFLAGS="-Clinker=rust-lld"
rung "rust-lld"
# shellcheck disable=SC2013 # a switch is a word
for switch in $(sed -n 's/^  "\(-[^"]*\)".*/\1/p' .cargo/image.toml); do
  RUSTFLAGS="$RUSTFLAGS $switch"
  rung "${switch#-Clink-arg=}"
done
strip --strip-section-headers "$binary"
printf '%s\t%s\n' "$(stat -c %s "$binary")" "no section headers"
