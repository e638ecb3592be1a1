//! A fuzzer for the way from the socket's bytes to the printed text.
//!
//! ```sh
//! cargo test --test fuzz                   # a few seconds of it
//! SMOLRX_FUZZ=60 cargo test --test fuzz    # about a minute
//! ```
//!
//! What comes of an input must be what a plain model says. The server's own code runs here, in one thread, on
//! one end of a socket pair; the test is the client at the other end, the observer and the terminal, and
//! sends a chunk once the server has done all it can with the one before. The real binary gets such inputs
//! over TCP, with pauses. Proptest makes the inputs; what fails is shrunk, and kept in
//! `tests/fuzz.regressions` to be tried first from then on.

mod common;
#[allow(dead_code)]
#[path = "../main.rs"]
mod smolrx;

use std::cell::RefCell;
use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::pin::pin;
use std::thread;
use std::time::Instant;

use common::{BAD_REQUEST, CLOSE, PATIENCE, conversation, ms, observed, setting, shown};
use futures_lite::{StreamExt, future};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{FileFailurePersistence, TestRunner};
use rustix::net::sockopt::set_socket_send_buffer_size;
use smolrx::{Invocation, Server};

// ---------------------------------------------------------------- the input

struct Input {
    keep_open: bool,
    max_line: usize,
    /// What the client sends, as it is cut.
    chunks: Vec<Vec<u8>>,
}

/// What means something to the server, to a terminal, or in UTF-8; and what nearly does.
const TOKENS: [&[u8]; 5] = [
    b"\r\n|\r|\0|\t| |\\u{1b}|foo|x\n|\x1b[2J|\x1b]0;x\x07",
    b"\xc3|\xe2\x80|\xf0\x9f\x98|\x80|\xff|\xed\xa0\x80|\xc0\x8a",
    b"\xef\xbb\xbf|\xef\xbb|\n\xef\xbb\xbf|\xc2\xa0|\xe3\x80\x80", // the byte order mark, and blanks
    b"GET / HTTP/1.1|POST /x HTTP/1.0\r\n|\nG  /  HTTP/1.1|/ HTTP/1.1|GET | HTTP/1.0|\n GET / HTTP/1.1",
    b"get / HTTP/1.1|GET / HTTP/1.2|GET / HTTP/1.1.|GET / x HTTP/1.1|GET HTTP/1.1|GET\t/ HTTP/1.0",
];

/// Characters at the borders of what is escaped.
const BORDERS: &[u32] =
    &[0x1f, 0x7f, 0x80, 0x9f, 0x61c, 0x200e, 0x2028, 0x2029, 0x202a, 0x202e, 0x2066, 0x2069];

/// Lengths of lines, and of what is read at once, in bytes; and those nearby.
fn lengths() -> impl Strategy<Value = usize> {
    (select(&[1, 2, 3, 12, 100, 512, 2048, 4096]), 0..5usize).prop_map(|(length, up)| 1.max(length + up - 1))
}

/// Pieces of text, cut anywhere.
fn inputs(options: impl Strategy<Value = (bool, usize)>) -> impl Strategy<Value = Input> {
    let tokens: Vec<_> = TOKENS.iter().flat_map(|tokens| tokens.split(|&byte| byte == b'|')).collect();
    let border = |(border, up)| char::from_u32(border + up - 1).unwrap_or('x').to_string().into_bytes();
    let piece = prop_oneof![
        8 => Just(Ok(b"\n".to_vec())),
        16 => select(tokens).prop_map(|token| Ok(token.to_vec())),
        4 => (select(BORDERS), 0..3u32).prop_map(border).prop_map(Ok),
        4 => vec(any::<u8>(), 1..6).prop_map(Ok),
        2 => (select(b"xx\0\n"), lengths()).prop_map(|(byte, length)| Ok(vec![byte; length])),
        4 => (0..5usize).prop_map(Err), // the line is brought to the limit, short of it or beyond it by a few
    ];
    let (pieces, cuts) = (vec(piece, 0..12), vec(any::<Index>(), 0..30));
    (options, pieces, cuts).prop_map(|((keep_open, max_line), pieces, cuts)| {
        let mut bytes = Vec::new();
        for piece in pieces {
            bytes.extend(piece.unwrap_or_else(|beyond| {
                let line = bytes.rsplit(|&byte| byte == b'\n').next().map_or(0, <[u8]>::len);
                vec![b'x'; (max_line + beyond).saturating_sub(line + 2)]
            }));
        }
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort();
        cuts.dedup();
        let chunks = cuts.windows(2).map(|cut| bytes[cut[0]..cut[1]].to_vec()).collect();
        Input { keep_open, max_line, chunks }
    })
}

fn options(keep_open: bool, max_line: usize) -> String {
    let keep_open = if keep_open { " --keep-open" } else { "" };
    format!("--max-line {max_line}{keep_open}")
}

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}", options(self.keep_open, self.max_line))?;
        self.chunks.iter().try_for_each(|chunk| write!(f, " \"{}\"", chunk.escape_ascii()))
    }
}

// ---------------------------------------------------------------- the model

/// All that comes of a connection.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    /// Of the client's `read`: a reset, say.
    failure: Option<ErrorKind>,
    echo: String,
    stdout: String,
    stderr: String,
    /// The latest line that was to be observed.
    latest: Option<String>,
}

/// Three words: capitals, a target, a version. Words are parted by blanks, and none comes before them.
fn is_http(line: &[u8]) -> bool {
    let words = line.trim_ascii_end().split(|&byte| byte == b' ').filter(|word| !word.is_empty());
    let is_method = |word: &[u8]| line.starts_with(word) && word.iter().all(u8::is_ascii_uppercase);
    matches!(words.collect::<Vec<_>>()[..], [word, _, b"HTTP/1.0" | b"HTTP/1.1"] if is_method(word))
}

/// The model: lines end after `\n`, and what is left at the end is one more.
fn expected(input: &Input, port: u16) -> Outcome {
    let peer = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let (mut outcome, mut echo) = (Outcome::default(), Vec::new());
    for line in input.chunks.concat().split_inclusive(|&byte| byte == b'\n') {
        if line.len() > input.max_line {
            let limit = input.max_line;
            outcome.stderr =
                format!("smolrx: line from {peer} is longer than {limit} bytes; --max-line allows more\n");
            break;
        }
        if is_http(line) {
            outcome.stderr = format!("smolrx: {peer} sent HTTP; send a line, for example by nc\n");
            echo.extend(BAD_REQUEST);
            break;
        }
        echo.extend(line);
        let [received, sent, _] = conversation(&shown(line), port);
        outcome.stdout += &format!("{received}\n{sent}\n");
        outcome.latest = Some(shown(line));
        if !input.keep_open {
            break;
        }
    }
    if outcome.latest.is_some() {
        outcome.stdout += &format!("{CLOSE}\n");
    }
    outcome.echo = echo.escape_ascii().to_string();
    outcome
}

// ---------------------------------------------------------------- the server

/// Has a client's conversation with a server in this process.
async fn talk(input: &Input) -> Outcome {
    let options = options(input.keep_open, input.max_line);
    let Ok(Invocation::Serve(options)) = Invocation::parse(options.split(' ').map(Into::into)) else {
        panic!("smolrx {options} does not serve");
    };
    let server: &'static Server = Box::leak(Box::new(Server::new(options)));
    let (client, socket) = UnixStream::pair().unwrap();
    client.set_nonblocking(true).unwrap();
    socket.set_nonblocking(true).unwrap();
    set_socket_send_buffer_size(&socket, 4096).unwrap(); // a long echo goes in parts
    server.handle_client(TcpStream::from(OwnedFd::from(socket)), (Ipv4Addr::LOCALHOST, 1).into());

    let (mut outcome, mut echo) = (Outcome::default(), Vec::new());
    let (start, is_served) = (Instant::now(), || server.connected.get() > 0);
    // Lets the server do what it can, takes what it gives, and says whether it did anything.
    let mut turn = async || {
        assert!(start.elapsed() < PATIENCE, "the connection never ends");
        let steps = (0..1000).take_while(|_| server.executor.try_tick()).count();
        outcome.stdout += &server.stdout.take(String::new());
        outcome.stderr += &server.stderr.take(String::new());
        if let Some(Some(line)) = future::poll_once(pin!(server.lines.observe()).next()).await {
            outcome.latest = Some(line);
        }
        let failure = (&client).read_to_end(&mut echo).err().map(|error| error.kind());
        outcome.failure = outcome.failure.or(failure.filter(|kind| *kind != ErrorKind::WouldBlock));
        future::yield_now().await; // to the reactor
        steps > 0
    };
    for chunk in &input.chunks {
        let mut rest = &chunk[..];
        while !rest.is_empty() && is_served() {
            rest = &rest[(&client).write(rest).unwrap_or(0)..];
            // It waits for these bytes, so it will move.
            while !turn().await && is_served() {}
            while turn().await && is_served() {}
        }
    }
    let _ = client.shutdown(Shutdown::Write);
    while turn().await || is_served() {}
    outcome.echo = echo.escape_ascii().to_string();
    outcome
}

// ---------------------------------------------------------------- the tests

/// Whatever the bytes are, what a client gets, what is printed and what is observed is what the model says.
#[test]
fn bytes_become_text_as_the_model_says() {
    let check = |input: Input| {
        let (mut outcome, expected) = (smol::block_on(talk(&input)), expected(&input, 1));
        if expected.echo.is_empty() {
            // Nothing was answered: who is refused may be cut off.
            outcome.failure = None;
        }
        prop_assert_eq!(outcome, expected, "{:?}", input);
        Ok(())
    };
    for &(keep_open, max_line, chunks) in CASES {
        let chunks = chunks.iter().map(|chunk| chunk.to_vec()).collect();
        check(Input { keep_open, max_line, chunks }).unwrap_or_else(|failure| panic!("{failure}"));
    }
    let max_line = prop_oneof![30 => lengths(), 1 => Just(65_536)]; // the longest takes long
    fuzz(500 * setting("SMOLRX_FUZZ", 2), inputs((any::<bool>(), max_line)), check);
}

/// The real binary does what the model says over TCP as well, whatever the pauses between the chunks are.
#[test]
fn bytes_over_tcp_become_text_as_the_model_says() {
    for (keep_open, max_line) in [(true, 2048), (false, 2048), (true, 12)] {
        let inputs = inputs(Just((keep_open, max_line)));
        let pauses = vec(prop_oneof![3 => Just(0), 1 => 1..4u64], 7);
        let mut server = common::Server::calm(&options(keep_open, max_line));
        let latest = RefCell::new(String::from("0"));
        fuzz(60 * setting("SMOLRX_FUZZ", 2), (inputs, pauses), |(input, pauses)| {
            let outputs = [&server.stdout, &server.stderr];
            outputs.iter().for_each(|output| output.clear());
            let mut client = server.connect();
            for (chunk, pause) in input.chunks.iter().zip(pauses.iter().cycle()) {
                let _ = client.0.write_all(chunk); // the server may have closed
                thread::sleep(ms(*pause));
            }
            client.finish();
            let expected = expected(&input, client.port());
            let echo = client.until_closed().escape_ascii().to_string();
            if expected.stderr.contains("longer") {
                // What had not reached the client when the connection was cut may be missing at the end.
                prop_assert!(expected.echo.starts_with(&echo), "echoed: {echo}");
            } else {
                prop_assert_eq!(echo, expected.echo);
            }
            for (output, text) in outputs.iter().zip([expected.stdout, expected.stderr]) {
                output.wait_for_count(text.lines().count());
                prop_assert_eq!(output.lines(), text.lines().collect::<Vec<_>>());
            }
            latest.replace_with(|latest| expected.latest.unwrap_or(latest.clone()));
            Ok(())
        });
        assert_eq!(observed(&server.stop().stdout), [latest.into_inner()]);
    }
}

/// What chance seldom makes: tens of kilobytes, as one line or as thousands.
const CASES: &[(bool, usize, &[&[u8]])] = &[
    (true, 65_536, &[&[b'\n'; 9000]]),
    (true, 65_536, &[&[b'x'; 4096], b"x", &[b'x'; 24_095], b"\nfoo\n"]),
    (true, 65_536, &[&[b'x'; 65_535], b"\n", &[b'x'; 65_536], b"\n"]),
    (true, 65_536, &[&[b'\0'; 30_000], &[b'\0'; 7000], b"\nfoo\nbar\n"]),
    (false, 65_536, &[&[b'\0'; 65_536]]),
    (false, 65_536, &[&[b'x'; 8065], b"\nz"]),
];

/// Addresses become text as the standard library has it, whose code for it the image does without.
#[test]
fn addresses_become_text_as_std_has_it() {
    let group = select(&[0, 0, 0, 1, 0x9a, 0xabc, 0xffff]);
    let ip = prop_oneof![
        3 => prop::array::uniform8(group).prop_map(IpAddr::from),
        1 => any::<u32>().prop_map(|ip| Ipv4Addr::from(ip).to_ipv6_mapped().into()),
    ];
    fuzz(20_000, (ip, any::<u16>()).prop_map(SocketAddr::from), |address| {
        let expected = SocketAddr::new(address.ip().to_canonical(), address.port()).to_string();
        prop_assert_eq!(smolrx::text::address_text(address), expected);
        Ok(())
    });
}

/// Checks this many cases; what fails is shrunk, said and kept.
fn fuzz<S: Strategy>(cases: u64, of: S, check: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let config = ProptestConfig {
        cases: cases as u32,
        max_shrink_time: 20_000, // ms
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct("tests/fuzz.regressions"))),
        ..ProptestConfig::default()
    };
    TestRunner::new(config).run(&of, check).unwrap_or_else(|failure| panic!("{failure}"));
}
