# The image: one static binary and nothing else.
#
#   docker build -t smolrx .                # the finished image
#   ./build.sh                              # the same, by way of the builder's stream
#
# The first stage is a good image by itself, `smolrx-builder`:
#
#   docker run --rm smolrx-builder | tar tv                 # a build context: the binary, a Dockerfile
#   docker run --rm smolrx-builder | docker build -t smolrx -
#   docker run --rm -it smolrx-builder /image/smolrx --help # or the program, a shell, the tests
#   docker run --rm smolrx-builder cargo test
#
# It runs on the machine that builds and compiles for TARGETARCH: amd64, arm64, or without one its own.

ARG RUST_IMAGE=rust:1.96.0-slim-trixie
# The classic builder knows no BUILDPLATFORM, and takes "linux" for Linux on its own architecture.
ARG BUILDER_PLATFORM=${BUILDPLATFORM:-linux}

FROM --platform=${BUILDER_PLATFORM} ${RUST_IMAGE} AS builder
WORKDIR /smolrx

# What the base image lacks of the standard library's source and of musl, rustup brings. One function of musl
# is made visible, so that .cargo/image.toml can name it.
ARG TARGETARCH
RUN set -eu; \
    arch=$(echo "${TARGETARCH:-$(uname -m)}" | sed 's/amd64/x86_64/; s/arm64/aarch64/'); \
    lib=$(rustc --print sysroot)/lib/rustlib; target=$arch-unknown-linux-musl; \
    [ -e "$lib/src/rust/library/Cargo.lock" ] || rustup component add rust-src; \
    [ -e "$lib/$target/lib/self-contained/libc.a" ] || rustup target add "$target"; \
    host=$(rustc -vV | sed -n 's/^host: //p'); \
    "$lib/$host/bin/rust-objcopy" --globalize-symbol=__simple_malloc "$lib/$target/lib/self-contained/libc.a"; \
    echo "$target" > /target

COPY . .

# RUSTC_BOOTSTRAP lets the pinned stable toolchain take the unstable switches of image.toml. A run of the
# result, where this machine can run it, shows that musl knows RELR: before 1.2.4 it ignores these
# relocations, and the program crashes. The object is for benches/imports.sh. The last fetch brings what the tests need, so that they run offline.
RUN set -eu; \
    target=$(cat /target) host=$(rustc -vV | sed -n 's/^host: //p'); \
    RUSTC_BOOTSTRAP=1 cargo rustc --release --locked --config .cargo/image.toml --target "$target" -- --emit=link,obj; \
    mv target/$target/release/deps/smolrx-*.o /smolrx.o; \
    mkdir /image; \
    "$(rustc --print sysroot)/lib/rustlib/$host/bin/rust-objcopy" --strip-sections \
      "target/$target/release/smolrx" /image/smolrx; \
    rm -r target; \
    [ "${target%%-*}" != "$(uname -m)" ] || /image/smolrx --version || \
      { echo "smolrx does not run: is this musl older than 1.2.4?" >&2; exit 1; }; \
    sed -n '/^FROM scratch/,$ { s| --from=builder /image/| |; p }' Dockerfile > /image/Dockerfile; \
    cargo fetch --locked --target "$host"

# What `cargo test` tests here is what ships.
ENV SMOLRX_BIN=/image/smolrx

# The same source gives the same bytes: sorted names, nobody's files, no time.
CMD ["tar", "-C", "/image", "--sort=name", "--owner=0", "--group=0", "--numeric-owner", \
     "--mode=go-w", "--mtime=@0", "--format=ustar", "-c", "Dockerfile", "smolrx"]

# The file comes first: from it the classic builder takes the architecture.
FROM scratch
COPY --from=builder /image/smolrx /smolrx
LABEL org.opencontainers.image.title="smolrx" \
      org.opencontainers.image.description="A reactive TCP server: lines become a debounced event stream" \
      org.opencontainers.image.licenses="MIT"
USER 65532:65532
EXPOSE 8888
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["/smolrx", "--health"]
ENTRYPOINT ["/smolrx"]
