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

ARG RUST_IMAGE=rust:1.96.0-slim-trixie

FROM ${RUST_IMAGE} AS builder
WORKDIR /smolrx

# What the base image lacks of the standard library's source and of musl, rustup brings.
RUN set -eu; \
    lib=$(rustc --print sysroot)/lib/rustlib; target=$(uname -m)-unknown-linux-musl; \
    [ -e "$lib/src/rust/library/Cargo.lock" ] || rustup component add rust-src; \
    [ -e "$lib/$target/lib/self-contained/libc.a" ] || rustup target add "$target"

COPY . .

# RUSTC_BOOTSTRAP lets the pinned stable toolchain take the unstable switches of image.toml. A run of the
# result shows that musl knows RELR: before 1.2.4 it ignores these relocations, and the program crashes.
RUN set -eu; \
    target=$(uname -m)-unknown-linux-musl; \
    RUSTC_BOOTSTRAP=1 cargo build --release --locked --config .cargo/image.toml --target "$target"; \
    mkdir /image; \
    strip --strip-section-headers -o /image/smolrx "target/$target/release/smolrx"; \
    rm -r target; \
    /image/smolrx --version || { echo "smolrx does not run: is this musl older than 1.2.4?" >&2; exit 1; }; \
    sed -n '/^FROM scratch/,$ { s| --from=builder /image/| |; p }' Dockerfile > /image/Dockerfile

# What `cargo test` tests here is what ships.
ENV SMOLRX_BIN=/image/smolrx

# The same source gives the same bytes: sorted names, nobody's files, no time.
CMD ["tar", "-C", "/image", "--sort=name", "--owner=0", "--group=0", "--numeric-owner", \
     "--mode=go-w", "--mtime=@0", "--format=ustar", "-c", "Dockerfile", "smolrx"]

FROM scratch
LABEL org.opencontainers.image.title="smolrx" \
      org.opencontainers.image.description="A reactive TCP server: lines become a debounced event stream" \
      org.opencontainers.image.licenses="MIT"
COPY --from=builder /image/smolrx /smolrx
USER 65532:65532
EXPOSE 8888
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["/smolrx", "--health"]
ENTRYPOINT ["/smolrx"]
