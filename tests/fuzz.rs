//! A bounded fuzzer for the way from the socket's bytes to the printed text.
//!
//! ```sh
//! cargo test --test fuzz                   # the corpus, then two seconds of mutations of it
//! SMOLRX_FUZZ=60 cargo test --test fuzz    # a minute of them
//! SMOLRX_SEED=7 cargo test --test fuzz     # those of the run that said seed 7
//! ```
//!
//! The server's own code runs here, in one thread, on one end of a socket pair; the test is the
//! client at the other end, the observer and the terminal. It sends a chunk once the server has
//! done all it can with the one before, so that a run depends on its seed alone. What comes of it
//! must be what a plain model says. An input for which it is not is shrunk, and kept in
//! `tests/corpus`, which every run tries first. (Before that, addresses become text, against std's way.)
//!
//! A file of the corpus is a command and the chunks that a client sends, one a line, as Rust
//! writes bytes; `x{100}` is a hundred of them.

mod common;
#[allow(dead_code)]
#[path = "../main.rs"]
mod smolrx;

use std::any::Any;
use std::array;
use std::collections::HashMap;
use std::fmt::{self, Display};
use std::fs;
use std::io::{self, ErrorKind, PipeReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::str::FromStr;
use std::time::{Duration, Instant, SystemTime};

use common::{CLOSE, conversation, setting, shown};
use futures_lite::{FutureExt, StreamExt, future};
use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::stdio::{dup2_stderr, stderr};
use smolrx::{Arguments, Command, Server};

const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus");

#[test]
fn bytes_become_text_as_the_model_says() {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap();
    let seed = setting("SMOLRX_SEED", now.subsec_nanos().into());
    let time = Duration::from_secs(setting("SMOLRX_FUZZ", 2));
    addresses_become_text_as_std_has_it(seed);
    smol::block_on(fuzz(seed, time)).unwrap_or_else(|report| panic!("{report}"));
}

/// Addresses become text as the standard library has it, whose code for it the image does without.
fn addresses_become_text_as_std_has_it(seed: u64) {
    let mut random = Random::new(seed);
    for _ in 0..100_000 {
        // Runs of zeros of every length, and numbers of every length.
        let mut groups: [u16; 8] = array::from_fn(|_| random.pick(&[0, 0, 0, 1, 0x9a, 0xabc, 0xffff]));
        if random.below(4) == 0 {
            groups[..6].copy_from_slice(&[0, 0, 0, 0, 0, 0xffff]); // an IPv4 client of an IPv6 socket
        }
        let ip = IpAddr::from(groups);
        let port = random.pick(&[0, 7, 80, 8888, 65_535]);
        let expected = SocketAddr::new(ip.to_canonical(), port).to_string();
        assert_eq!(smolrx::address_text(SocketAddr::new(ip, port)), expected, "SMOLRX_SEED={seed}");
    }
}

/// The error is a report for whoever mends it.
async fn fuzz(seed: u64, time: Duration) -> Result<(), String> {
    let mut bench = Bench::new();
    let corpus = corpus();
    for (path, input) in &corpus {
        if let Some(failure) = bench.failure(input).await {
            return Err(format!("{}\n{input}\n{failure}", path.display()));
        }
    }

    let inputs: Vec<&Input> = corpus.iter().map(|(_, input)| input).collect();
    let mut random = Random::new(seed);
    let mut executions = 0;
    let start = Instant::now();
    while start.elapsed() < time {
        let input = mutant(&inputs, &mut random);
        executions += 1;
        if let Some(failure) = bench.failure(&input).await {
            let (input, failure) = bench.shrunk(input, failure).await;
            let path = Path::new(CORPUS).join(format!("found-{}-{seed}", failure.what));
            fs::write(&path, input.to_string()).unwrap();
            return Err(format!(
                "execution {executions} of SMOLRX_SEED={seed}, now {}\n{input}\n{failure}\n\
                 To run it again: cargo test --test fuzz",
                path.display()
            ));
        }
    }
    let (cases, rate) = (corpus.len(), f64::from(executions) / start.elapsed().as_secs_f64());
    // Not `println!`, which is heard of a test that fails only.
    let _ = writeln!(io::stdout(), "fuzz: {cases} cases, {executions} executions, {rate:.0}/s, seed {seed}");
    Ok(())
}

// ---------------------------------------------------------------- the model

/// All that comes of a connection.
#[derive(Default, PartialEq)]
struct Outcome {
    ending: String,
    echo: Vec<u8>,
    transcript: String,
    /// What the operators work on, a line each.
    events: String,
    complaints: String,
}

const IN_GOOD_ORDER: &str = "in good order";

/// The client, as the server sees it.
const PEER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 1);

/// The model: lines end after `\n`, and what is left at the end is one more.
fn expected(input: &Input) -> Outcome {
    let mut outcome = Outcome { ending: IN_GOOD_ORDER.into(), ..Outcome::default() };
    let mut print =
        |lines: &[String]| outcome.transcript.extend(lines.iter().map(|line| line.clone() + "\n"));
    for line in input.chunks.concat().split_inclusive(|&byte| byte == b'\n') {
        if line.len() > input.max_line {
            outcome.complaints =
                format!("smolrx: line from {PEER} is longer than {} bytes\n", input.max_line);
            break;
        }
        outcome.echo.extend(line);
        outcome.events += &(shown(line) + "\n");
        print(&conversation(&shown(line), PEER.port())[..2]);
        if !input.keep_open {
            break;
        }
    }
    if !outcome.echo.is_empty() {
        print(&[CLOSE.into()]);
    }
    outcome
}

/// Where an outcome differs from what was expected.
struct Failure {
    what: &'static str,
    got: Vec<u8>,
    expected: Vec<u8>,
}

impl Failure {
    fn of(got: &Outcome, expected: &Outcome) -> Option<Failure> {
        let parts = [
            ("ending", got.ending.as_bytes(), expected.ending.as_bytes()),
            ("echo", &got.echo, &expected.echo),
            ("transcript", got.transcript.as_bytes(), expected.transcript.as_bytes()),
            ("events", got.events.as_bytes(), expected.events.as_bytes()),
            ("complaints", got.complaints.as_bytes(), expected.complaints.as_bytes()),
        ];
        let (what, got, expected) = parts.into_iter().find(|(_, got, expected)| got != expected)?;
        Some(Failure { what, got: got.into(), expected: expected.into() })
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let same = self.got.iter().zip(&self.expected).take_while(|(a, b)| a == b).count();
        let around = |bytes: &[u8]| {
            let end = bytes.len().min(same + 80);
            bytes[same.saturating_sub(80)..end].escape_ascii().to_string()
        };
        writeln!(f, "{}, around byte {same}:", self.what)?;
        write!(f, "     got: {}\nexpected: {}", around(&self.got), around(&self.expected))
    }
}

// ---------------------------------------------------------------- the server

/// Servers in this process, by command, whose standard error is collected.
struct Bench {
    servers: HashMap<String, &'static Server>,
    complaints: PipeReader,
    stderr: OwnedFd,
}

impl Bench {
    fn new() -> Bench {
        let (complaints, end) = io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&complaints, true).unwrap();
        let stderr = stderr().try_clone_to_owned().unwrap();
        dup2_stderr(end).unwrap();
        Bench { servers: HashMap::new(), complaints, stderr }
    }

    async fn failure(&mut self, input: &Input) -> Option<Failure> {
        Failure::of(&self.outcome(input).await, &expected(input))
    }

    async fn outcome(&mut self, input: &Input) -> Outcome {
        let command = input.command();
        let server = *self.servers.entry(command.clone()).or_insert_with_key(|command| start(command));
        let (client, socket) = UnixStream::pair().unwrap();
        let mut dialogue = Dialogue { server, client, outcome: Outcome::default(), turns: 0 };
        if let Err(panic) = AssertUnwindSafe(dialogue.hold(socket, input)).catch_unwind().await {
            dialogue.outcome.ending = format!("panic: {}", message(&*panic));
            self.servers.remove(&command);
        }
        // It is read until that would block.
        let _ = self.complaints.read_to_string(&mut dialogue.outcome.complaints);
        dialogue.outcome
    }

    /// The simplest input that fails in the same way.
    async fn shrunk(&mut self, mut input: Input, mut failure: Failure) -> (Input, Failure) {
        let hook = panic::take_hook();
        panic::set_hook(Box::new(|_| {})); // one panic's message is enough
        let deadline = Instant::now() + Duration::from_secs(10);
        'simpler: loop {
            for candidate in simpler(&input.clone()) {
                if Instant::now() > deadline {
                    break 'simpler;
                }
                match self.failure(&candidate).await {
                    Some(same) if same.what == failure.what => {
                        (input, failure) = (candidate, same);
                        continue 'simpler;
                    }
                    _ => {}
                }
            }
            break;
        }
        panic::set_hook(hook);
        (input, failure)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        dup2_stderr(&self.stderr).unwrap();
    }
}

fn start(command: &str) -> &'static Server {
    match Command::parse(Arguments(command.split(' ').skip(1).map(|word| Some(word.into())).collect())) {
        Ok(Command::Serve(options)) => Box::leak(Box::new(Server::new(options))),
        _ => panic!("{command} does not serve"),
    }
}

fn message(panic: &dyn Any) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("without words")
}

/// A client's conversation with a server.
struct Dialogue {
    server: &'static Server,
    client: UnixStream,
    outcome: Outcome,
    turns: u32,
}

impl Dialogue {
    async fn hold(&mut self, socket: UnixStream, input: &Input) {
        self.client.set_nonblocking(true).unwrap();
        socket.set_nonblocking(true).unwrap();
        set_socket_send_buffer_size(&socket, 4096).unwrap(); // a long echo goes in parts
        self.server.handle_client(TcpStream::from(OwnedFd::from(socket)), PEER);
        for chunk in &input.chunks {
            self.send(chunk).await;
        }
        let _ = self.client.shutdown(Shutdown::Write);
        while self.turn().await || self.server.connected.get() > 0 {}

        // One who sends much more than the line that was asked for may be cut off.
        let unwanted = input.len().saturating_sub(self.outcome.echo.len());
        if unwanted > input.max_line {
            self.outcome.ending = IN_GOOD_ORDER.into();
        }
    }

    /// Sends a chunk and waits for all that comes of it, unless the server has closed.
    async fn send(&mut self, chunk: &[u8]) {
        let mut rest = chunk;
        while !rest.is_empty() && self.server.connected.get() > 0 {
            match self.client.write(rest) {
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
            // It waits for these bytes, so it will move.
            while !self.turn().await && self.server.connected.get() > 0 {}
            while self.turn().await {}
        }
    }

    /// Lets the server do what it can, takes what it gives, and says whether it did anything.
    async fn turn(&mut self) -> bool {
        self.turns += 1;
        assert!(self.turns < 50_000, "the connection never ends");
        let ticks = (0..1000).take_while(|_| self.server.executor.try_tick()).count();

        let outcome = &mut self.outcome;
        outcome.transcript += &self.server.transcript.text.take();
        self.server.transcript.producers.wake_all();
        let mut lines = pin!(self.server.lines.observe());
        while let Some(Some(line)) = future::poll_once(lines.next()).await {
            outcome.events += &(line + "\n");
        }
        match self.client.read_to_end(&mut outcome.echo) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Ok(_) if !outcome.ending.is_empty() => {} // a reset is said once
            Ok(_) => outcome.ending = IN_GOOD_ORDER.into(),
            Err(error) => outcome.ending = error.to_string(),
        }
        future::yield_now().await; // to the reactor
        ticks > 0
    }
}

// ---------------------------------------------------------------- the input

#[derive(Clone)]
struct Input {
    keep_open: bool,
    max_line: usize,
    /// What the client sends, as it is cut.
    chunks: Vec<Vec<u8>>,
}

const MAX_LINE: usize = 65_536;

fn corpus() -> Vec<(PathBuf, Input)> {
    let mut paths: Vec<_> = fs::read_dir(CORPUS).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort(); // a seed means the same everywhere
    let read = |path: PathBuf| {
        let input = fs::read_to_string(&path).unwrap().parse();
        let input = input.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        (path, input)
    };
    paths.into_iter().map(read).collect()
}

impl Input {
    fn command(&self) -> String {
        let mut command = String::from("smolrx");
        if self.keep_open {
            command += " --keep-open";
        }
        if self.max_line != MAX_LINE {
            command += &format!(" --max-line {}", self.max_line);
        }
        command
    }

    fn len(&self) -> usize {
        self.chunks.iter().map(Vec::len).sum()
    }
}

impl Display for Input {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.command())?;
        for chunk in &self.chunks {
            f.write_str("\n")?;
            for run in chunk.chunk_by(|a, b| a == b) {
                let byte = if run[0] == b'{' { r"\x7b".into() } else { run[0].escape_ascii().to_string() };
                match run.len() {
                    count @ ..5 => f.write_str(&byte.repeat(count))?,
                    count => write!(f, "{byte}{{{count}}}")?,
                }
            }
        }
        f.write_str("\n")
    }
}

impl FromStr for Input {
    type Err = String;

    fn from_str(text: &str) -> Result<Input, String> {
        let mut lines = text.lines();
        let mut words = lines.next().ok_or("no command")?.split(' ').skip(1);
        let mut input = Input { keep_open: false, max_line: MAX_LINE, chunks: vec![] };
        while let Some(word) = words.next() {
            match word {
                "--keep-open" => input.keep_open = true,
                "--max-line" => input.max_line = number(words.next().unwrap_or_default())?,
                _ => return Err(format!("unknown option {word}")),
            }
        }
        input.chunks = lines.map(unescaped).collect::<Result<_, _>>()?;
        Ok(input)
    }
}

fn number(text: &str) -> Result<usize, String> {
    text.parse().map_err(|error| format!("{text}: {error}"))
}

fn unescaped(mut text: &str) -> Result<Vec<u8>, String> {
    let mut bytes = vec![];
    while let Some(&first) = text.as_bytes().first() {
        let (byte, length) = match (first, text.get(1..2)) {
            (b'\\', Some("n")) => (b'\n', 2),
            (b'\\', Some("r")) => (b'\r', 2),
            (b'\\', Some("t")) => (b'\t', 2),
            (b'\\', Some("x")) => {
                let byte = text.get(2..4).and_then(|digits| u8::from_str_radix(digits, 16).ok());
                (byte.ok_or_else(|| format!("two digits are missing: {text}"))?, 4)
            }
            (b'\\', Some(itself)) => (itself.as_bytes()[0], 2),
            (b' '..=b'~', _) => (first, 1),
            _ => return Err(format!("not ASCII: {text}")),
        };
        text = &text[length..];
        let mut count = 1;
        if let Some((digits, rest)) = text.strip_prefix('{').and_then(|text| text.split_once('}')) {
            (count, text) = (number(digits)?, rest);
        }
        bytes.resize(bytes.len() + count, byte);
    }
    Ok(bytes)
}

// ---------------------------------------------------------------- simpler inputs

/// All that are a step simpler, the largest steps first.
fn simpler(input: &Input) -> impl Iterator<Item = Input> {
    let options =
        [Input { keep_open: false, ..input.clone() }, Input { max_line: MAX_LINE, ..input.clone() }];
    let options = options.into_iter().filter(|simpler| simpler.command() != input.command());

    let replaced = |range: Range<usize>, by: Option<Vec<u8>>| {
        let mut simpler = input.clone();
        simpler.chunks.splice(range, by);
        simpler
    };
    let count = input.chunks.len();
    let dropped = (0..count).map(move |at| replaced(at..at + 1, None));
    let joined = (1..count).map(move |at| replaced(at - 1..at + 1, Some(input.chunks[at - 1..=at].concat())));
    let edited = (0..count).flat_map(move |at| {
        shorter_or_plainer(&input.chunks[at]).map(move |chunk| replaced(at..at + 1, Some(chunk)))
    });
    options.chain(dropped).chain(joined).chain(edited)
}

/// A half, a quarter and so on down to a byte of it is left out, or written as `x`.
fn shorter_or_plainer(chunk: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let sizes = std::iter::successors(Some(chunk.len()), |size| Some(size / 2)).take_while(|&size| size > 0);
    let ranges = sizes.flat_map(move |size| {
        (0..chunk.len()).step_by(size).map(move |start| start..chunk.len().min(start + size))
    });
    ranges.flat_map(move |range| {
        let shorter = [&chunk[..range.start], &chunk[range.end..]].concat();
        let mut plainer = chunk.to_vec();
        plainer[range].fill(b'x');
        [Some(shorter), (plainer != chunk).then_some(plainer)].into_iter().flatten()
    })
}

// ---------------------------------------------------------------- mutants

/// What means something to the server, to a terminal, or in UTF-8.
const TOKENS: &[&[u8]] = &[
    b"\n",
    b"\n",
    b"\r",
    b"\r\n",
    b"\n\r",
    b"\0",
    b"\t",
    b" ",
    b"\\",
    b"\\u{1b}",
    b"{",
    b"foo",
    b"\x1b[2J",
    b"\x1b]0;x\x07",
    b"\xc3",
    b"\xe2\x80",
    b"\xf0\x9f\x98",
    b"\x80",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xc0\x8a",
    "\u{a0}".as_bytes(),
    "\u{3000}".as_bytes(),
    "\u{feff}".as_bytes(),
];

/// Characters at the borders of what is escaped.
const BORDERS: [u32; 12] =
    [0x1f, 0x7f, 0x80, 0x9f, 0x61c, 0x200e, 0x2028, 0x2029, 0x202a, 0x202e, 0x2066, 0x2069];

const MAX_LINES: [usize; 9] = [1, 2, 3, 12, 100, 4095, 4096, 4097, MAX_LINE];

/// A case of the corpus with a few changes.
fn mutant(corpus: &[&Input], random: &mut Random) -> Input {
    // The shortest of three, since long ones take long.
    let three = [(); 3].map(|()| random.pick(corpus));
    let mut input = three.into_iter().min_by_key(|input| input.len()).unwrap().clone();
    for _ in 0..=random.below(6) {
        mutate(&mut input, corpus, random);
    }
    input
}

fn mutate(input: &mut Input, corpus: &[&Input], random: &mut Random) {
    if input.chunks.is_empty() {
        input.chunks.push(vec![]);
    }
    let index = random.below(input.chunks.len());
    let chunk = &mut input.chunks[index];
    let at = random.below(chunk.len() + 1);
    let range = random.range(chunk.len());
    let insert = |chunk: &mut Vec<u8>, bytes: &[u8]| drop(chunk.splice(at..at, bytes.iter().copied()));
    match random.below(13) {
        0 => chunk[range].iter_mut().take(1).for_each(|byte| *byte ^= 1 << random.below(8)),
        1 | 2 => insert(chunk, random.pick(TOKENS)),
        3 => {
            let near = random.pick(&BORDERS) + random.below(3) as u32 - 1;
            insert(chunk, char::from_u32(near).unwrap_or('x').to_string().as_bytes());
        }
        4 => drop(chunk.drain(range)),
        5 => chunk.extend_from_within(range),
        6 => {
            chunk.truncate(at);
            input.chunks.truncate(index + 1);
        }
        7 => {
            let other = random.pick(corpus).chunks.concat();
            insert(chunk, &other[random.range(other.len())]);
        }
        8 => {
            let rest = chunk.split_off(at);
            input.chunks.insert(index + 1, rest);
        }
        9 => {
            let size = 1 + random.below(8) + input.len() / 64;
            input.chunks = input.chunks.concat().chunks(size).map(<[u8]>::to_vec).collect();
        }
        10 => {
            let missing =
                (input.max_line + random.below(4)).saturating_sub(1 + line_around(input, index, at));
            // Most of the time not to 64 KiB, since that takes long.
            if missing < 5000 || random.below(50) == 0 {
                insert(&mut input.chunks[index], &vec![b'x'; missing]);
            }
        }
        11 => input.max_line = random.pick(&MAX_LINES),
        _ => input.keep_open = !input.keep_open,
    }
}

/// The length of the line that goes through a place in a chunk, its ending included.
fn line_around(input: &Input, chunk: usize, at: usize) -> usize {
    let place = input.chunks[..chunk].iter().map(Vec::len).sum::<usize>() + at;
    let bytes = input.chunks.concat();
    let before = bytes[..place].rsplit(|&byte| byte == b'\n').next().map_or(0, <[u8]>::len);
    let after = bytes[place..].split_inclusive(|&byte| byte == b'\n').next().map_or(0, <[u8]>::len);
    before + after
}

/// Marsaglia's xorshift.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Random {
        Random((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % limit
    }

    fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }

    /// A piece of so many bytes, 64 long at most.
    fn range(&mut self, length: usize) -> Range<usize> {
        let start = self.below(length + 1);
        start..length.min(start + 1 + self.below(64))
    }
}
