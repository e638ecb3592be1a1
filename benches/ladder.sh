#!/bin/sh
# Rebuilds the binary switch by switch, in the builder image: first the profile of Cargo.toml, then the
# standard library with it, then static on musl by .cargo/image.toml in its order. Prints a line a rung:
# bytes, a tab, the switch. `./build.sh ladder` calls it and draws the table.
set -eu
export RUSTC_BOOTSTRAP=1
target=$(uname -m)-unknown-linux-gnu
options=
link=

# NAME [OPTION]...: builds with these options of cargo and those of the rungs before.
rung() {
  name=$1
  shift
  for option; do options="$options $option"; done
  # shellcheck disable=SC2086 # the words of $options and $link are meant
  cargo rustc --quiet --locked --release --bin smolrx --target "$target" $options -- $link
  printf '%s\t%s\n' "$(stat -c %s "target/$target/release/smolrx")" "$name"
}

set_to() { for setting; do printf -- '--config profile.release.%s ' "$setting"; done; }

cargo build --quiet --locked
printf '%s\t%s\n' "$(stat -c %s target/debug/smolrx)" "debug"
rung "release, as cargo has it" "$(set_to opt-level=3 lto=false codegen-units=16 'panic="unwind"' strip=false)"
rung "opt-level z" "$(set_to 'opt-level="z"')"
rung "LTO, one codegen unit" "$(set_to 'lto="fat"' codegen-units=1)"
rung "panic abort" "$(set_to 'panic="abort"')"
rung "strip" "$(set_to strip=true)"
rung "standard library rebuilt" -Zbuild-std=std,panic_abort
rung "standard library optimized for size" -Zbuild-std-features=optimize_for_size
rung "panic immediate-abort" -Zpanic-immediate-abort "$(set_to 'panic="immediate-abort"')"
rung "standard library at opt-level 2" "$(set_to package.std.opt-level=2)"
target=$(uname -m)-unknown-linux-musl
rung "static on musl"

# A switch of the linker concerns the last step alone, one of the compiler every crate.
export RUSTFLAGS="-Clinker=rust-lld"
with="rust-lld, "
# shellcheck disable=SC2013 # a switch is a word
for switch in $(sed -n 's/^  "\(-[^"]*\)".*/\1/p' .cargo/image.toml); do
  case $switch in
    -Clink-arg=*) link="$link $switch" ;;
    *) RUSTFLAGS="$RUSTFLAGS $switch" ;;
  esac
  rung "$with${switch#-C*-arg*=}"
  with=
done
host=$(rustc -vV | sed -n 's/^host: //p')
"$(rustc --print sysroot)/lib/rustlib/$host/bin/rust-objcopy" --strip-sections "target/$target/release/smolrx"
printf '%s\t%s\n' "$(stat -c %s "target/$target/release/smolrx")" "no section headers"
