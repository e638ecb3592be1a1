//! What a connection costs: smolrx measured against a bare epoll loop in C (the kernel's floor)
//! and against the Python program it replaces.
//!
//! ```sh
//! cargo bench                                        # the table of benches/README.md
//! cargo bench -- --svg benches/cost.svg                 # and its chart
//! cargo bench -- --quick                             # whether all of it works: 20 seconds, and the build
//! cargo bench -- --quick --only syscalls --verbose   # one measure
//! ```
//!
//! Each server is started by this program on a free port and driven over loopback by one thread;
//! every byte that comes back is compared, and so is the number of lines in the server's log.
//! The servers take turns, A B A B, and a figure is the median of its rounds. Every server writes
//! its log to the same kind of sink: a pipe of 1 MiB that is emptied every millisecond, so that it
//! is never full, and no server is charged for waking the reader.
//!
//! | variable | meaning |
//! |---|---|
//! | `SMOLRX_IMAGE_BIN` | the binary out of the image, measured as one more server |
//! | `SMOLRX_BEFORE_BIN` | an earlier image's binary, measured as one more, and compared with |
//! | `BASELINE_PYTHON` | a Python that can `import reactivex`; `python3` when not set |

#![forbid(unsafe_code)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, ErrorKind, PipeReader, Read, Write, pipe};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{array, env, fs, iter, mem, panic};

use common::{PATIENCE, Process, eventually, raise_descriptor_limit, refusal};
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::process::Signal;

/// How long a server is left alone before its memory or CPU time is read.
const SETTLE: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    match Options::parse(env::args().skip(1)) {
        Ok(Some(options)) if run(&options) => ExitCode::SUCCESS,
        Ok(Some(_)) => ExitCode::FAILURE,
        Ok(None) => {
            print!("{HELP}");
            ExitCode::SUCCESS
        }
        Err(sentence) => {
            eprintln!("cost: {sentence}; try --help");
            ExitCode::from(2)
        }
    }
}

/// Takes every measure of every server, prints the table and writes the chart. False when a measure failed, which
/// is a panic: its cell is empty and stderr says why.
fn run(options: &Options) -> bool {
    let began = Instant::now();
    raise_descriptor_limit();
    let servers = servers();
    let mut figures = Vec::new();
    let mut complete = true;
    panic::set_hook(Box::new(|_| {})); // `take` says it
    for measure in MEASURES.iter().filter(|measure| options.wants(measure)) {
        complete &= take(measure, &servers, options, &mut figures);
    }
    let _ = panic::take_hook();
    let notes = notes(options);
    print!("{}", table(&servers, &figures, &notes));
    if let Some(file) = &options.svg {
        fs::write(file, chart(&servers, &figures, &notes)).expect("the chart can be written");
    }
    eprintln!("{} seconds in all", began.elapsed().as_secs());
    complete
}

// ---- Options ----

const HELP: &str = "\
Usage: cargo bench [-- OPTIONS]

      --only MEASURE  size, connections, syscalls, instructions, keep-open, quiet, memory
                      or start; may be repeated
      --quick         a tenth of the counts
      --rounds N      rounds of each measure [default: 5, with --quick 1]
      --svg FILE      also write the table as a chart
  -v, --verbose       every system call by name, on stderr
  -h, --help          print this
";

struct Options {
    only: Vec<String>,
    rounds: usize,
    svg: Option<PathBuf>,
    verbose: bool,
    counts: Counts,
}

/// How much of everything: the counts of the README, or a tenth of them.
struct Counts {
    connections: usize,
    traced: usize,
    lines: usize,
    idle: usize,
    starts: usize,
}

impl Options {
    /// `None` when help was asked for.
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Option<Self>, String> {
        let (mut only, mut rounds, mut svg, mut share, mut verbose) = (vec![], None, None, 1, false);
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or(format!("{arg} needs a value"));
            match arg.as_str() {
                "--bench" => {} // cargo's own word
                "--only" => only.push(value()?),
                "--quick" => share = 10,
                "--rounds" => rounds = Some(value()?.parse().unwrap_or(0)),
                "--svg" => svg = Some(value()?.into()),
                "-v" | "--verbose" => verbose = true,
                "-h" | "--help" => return Ok(None),
                _ => return Err(format!("unknown option {arg}")),
            }
        }
        let rounds = rounds.unwrap_or(if share == 1 { 5 } else { 1 });
        if !(1..=100).contains(&rounds) {
            return Err("--rounds takes a number from 1 to 100".into());
        }
        if let Some(name) = only.iter().find(|name| MEASURES.iter().all(|m| m.name != **name)) {
            return Err(format!("--only does not know {name}"));
        }
        let [connections, traced, lines, idle, starts] =
            [20_000, 2_000, 1_000_000, 10_000, 50].map(|count| count / share);
        let counts = Counts { connections, traced, lines, idle, starts };
        Ok(Some(Options { only, rounds, svg, verbose, counts }))
    }

    fn wants(&self, measure: &Measure) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == measure.name)
    }
}

// ---- The servers ----

/// One program that can be measured, how it is started, and its class in the chart.
struct Server {
    name: &'static str,
    class: char,
    kind: Kind,
    program: PathBuf,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// smolrx as `cargo bench` built it: the ratios are about this one.
    Ours,
    /// smolrx as the image has it.
    Image,
    /// smolrx as an earlier image had it.
    Before,
    /// `benches/floor.c`.
    Floor,
    /// `baseline/rxserver.py`.
    Python,
}

impl Kind {
    fn is_smolrx(self) -> bool {
        matches!(self, Kind::Ours | Kind::Image | Kind::Before)
    }
}

/// What is asked of a server when it is started.
#[derive(Clone, Copy, PartialEq)]
enum Mode {
    OneLine,
    KeepOpen,
    /// The same, and no transcript.
    Quiet,
    ManyIdle,
}

/// All servers that this machine can run; stderr names the missing ones.
fn servers() -> Vec<Server> {
    let mut servers = Vec::new();
    let mut add = |name, class, kind, program| servers.push(Server { name, class, kind, program });
    add("smolrx", 'a', Kind::Ours, env!("CARGO_BIN_EXE_smolrx").into());
    if let Some(program) = env::var_os("SMOLRX_IMAGE_BIN") {
        add("image", 'b', Kind::Image, program.into());
    }
    if let Some(program) = env::var_os("SMOLRX_BEFORE_BIN") {
        add("before", 'e', Kind::Before, program.into());
    }
    let floor = Path::new(env!("CARGO_TARGET_TMPDIR")).join("floor");
    match refusal(Command::new("cc").args(["-O2", "-o"]).arg(&floor).arg(in_package("benches/floor.c"))) {
        None => add("C floor", 'c', Kind::Floor, floor),
        Some(reason) => eprintln!("without the C floor: {reason}"),
    }
    let python = PathBuf::from(env::var_os("BASELINE_PYTHON").unwrap_or("python3".into()));
    match refusal(Command::new(&python).args(["-c", "import reactivex"])) {
        None => add("Python", 'd', Kind::Python, python),
        Some(_) => eprintln!("without the Python baseline: {} cannot import reactivex", python.display()),
    }
    servers
}

fn in_package(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

impl Server {
    /// Only smolrx is one file, and can be quiet; Python's instructions would take valgrind minutes.
    fn does(&self, measure: &Measure) -> bool {
        match measure.name {
            "quiet" | "size" => self.kind.is_smolrx(),
            "instructions" => self.kind != Kind::Python,
            _ => true,
        }
    }

    /// The command that starts it on a free port.
    fn command(&self, mode: Mode) -> Vec<String> {
        let baseline = in_package("baseline/rxserver.py").display().to_string();
        let start: &[&str] = match self.kind {
            Kind::Floor => &[],
            Kind::Python => &[&baseline, "--tcp-port", "0", "--interval", "60000"],
            _ => &["--tcp-port", "0"],
        };
        let options: &[&str] = match mode {
            Mode::KeepOpen => &["--keep-open"],
            Mode::Quiet => &["--keep-open", "--quiet"],
            Mode::ManyIdle if self.kind.is_smolrx() => &["--max-conns", "20000"],
            _ => &[],
        };
        let program = self.program.display().to_string();
        [&[&*program], start, options].concat().into_iter().map(String::from).collect()
    }

    fn start(&self, mode: Mode) -> Running {
        Running::start(self.kind, mode, &self.command(mode))
    }

    /// Starts it under a tool that counts; returns what the tool has written to its file once that has this line's
    /// start.
    fn counted(&self, tool: &str, mode: Mode, drive: impl FnOnce(Running), last: &str) -> String {
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("counts");
        let _ = fs::remove_file(&file);
        let words = tool.split(' ').map(|word| word.replace("FILE", &file.display().to_string()));
        let command: Vec<String> = words.chain(self.command(mode)).collect();
        drive(Running::start(self.kind, mode, &command));
        let mut counts = String::new();
        eventually(PATIENCE, "its counts", || {
            counts = fs::read_to_string(&file).unwrap_or_default();
            counts.lines().any(|line| line.contains(last))
        });
        counts
    }
}

/// A server that serves.
struct Running {
    kind: Kind,
    process: Process,
    port: u16,
    log: JoinHandle<[usize; 3]>,
}

impl Running {
    /// Starts one, whose first line says which port it has, unless it is quiet.
    fn start(kind: Kind, mode: Mode, command: &[String]) -> Self {
        let (stdout, end) = pipe().unwrap();
        let mut program = Command::new(&command[0]);
        program.args(&command[1..]).stdin(Stdio::null()).stdout(end).stderr(Stdio::piped());
        let process = Process::spawn(program);
        let port = match mode {
            Mode::Quiet => process.listening_port(),
            _ => {
                let limit = Timespec::try_from(PATIENCE).unwrap();
                let ready = poll(&mut [PollFd::new(&stdout, PollFlags::IN)], Some(&limit));
                assert_eq!(ready, Ok(1), "it never said that it serves");
                let mut line = String::new();
                // Of one byte, so that it takes no more than the line.
                BufReader::with_capacity(1, &stdout).read_line(&mut line).expect("it serves");
                let port = line.trim_end().rsplit(':').next().and_then(|port| port.parse().ok());
                port.unwrap_or_else(|| panic!("its first line is no address: {line}"))
            }
        };
        Running { kind, process, port, log: count_log(stdout) }
    }

    /// Asks it to end, and compares what it logged with what it was sent.
    fn stop(mut self, lines: usize, connections: usize) {
        if self.kind.is_smolrx() {
            self.process.stop();
        } else {
            self.process.signal(Signal::TERM);
            self.process.exited(PATIENCE);
        }
        let log = self.log.join().expect("the log's reader lives");
        assert_eq!(log, [lines, lines, connections], "lines received, lines sent, connections closed");
    }

    /// What some work returns, the seconds that it takes, and the microseconds of CPU time of all the server's threads.
    fn timed<T>(&self, work: impl FnOnce() -> T) -> (T, f64, f64) {
        thread::sleep(SETTLE);
        let (cpu, began) = (self.process.activity().0, Instant::now());
        let result = work();
        let elapsed = began.elapsed();
        thread::sleep(SETTLE);
        let cpu = self.process.activity().0 - cpu;
        (result, elapsed.as_secs_f64(), cpu.as_nanos() as f64 / 1e3)
    }

    /// Resident memory in bytes. (VmRSS in /proc/PID/status is some pages off on kernels that count per CPU.)
    fn resident(&self) -> f64 {
        let rss = self.process.proc_field("smaps_rollup", "Rss:");
        rss.trim_end_matches(" kB").parse::<f64>().unwrap() * 1024.0
    }

    /// Connects to it. The last byte of the address varies, so that no count of connections runs
    /// out of ports.
    fn connect(&self, nth: usize) -> TcpStream {
        let address = Ipv4Addr::new(127, 0, 0, 1 + (nth % 8) as u8);
        TcpStream::connect((address, self.port)).expect("it can be connected to")
    }
}

/// Empties the pipe every millisecond until the server ends, and counts the lines that begin with `R`, `S` and `C`:
/// received, sent, closed. (Those of the observer are few, as its debounce lets few through.)
fn count_log(mut stdout: PipeReader) -> JoinHandle<[usize; 3]> {
    // Both spare the server the waits and wake-ups of a full and of an empty pipe.
    let _ = rustix::pipe::fcntl_setpipe_size(&stdout, 1 << 20);
    rustix::io::ioctl_fionbio(&stdout, true).unwrap();
    thread::spawn(move || {
        let (mut counts, mut buffer, mut line_starts) = ([0; 3], [0; 1 << 16], true);
        loop {
            match stdout.read(&mut buffer) {
                Ok(0) => return counts,
                Ok(length) => {
                    for &byte in &buffer[..length] {
                        if mem::replace(&mut line_starts, byte == b'\n') {
                            let sort = b"RSC".iter().position(|&first| first == byte);
                            sort.inspect(|&sort| counts[sort] += 1);
                        }
                    }
                }
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        }
    })
}

// ---- The clients ----

/// How many connections are in work at once.
const AT_ONCE: usize = 64;

/// One connection of the driver: what it says, and how far that has gone and come back.
struct Client {
    stream: TcpStream,
    script: Vec<u8>,
    sent: usize,
    echoed: usize,
    since: Instant,
    /// From before `connect` to the last byte of the echo.
    latency: Duration,
}

impl Client {
    fn connect(server: &Running, nth: usize, script: Vec<u8>) -> Self {
        let since = Instant::now();
        let stream = server.connect(nth);
        stream.set_nonblocking(true).unwrap();
        let mut client = Client { stream, script, sent: 0, echoed: 0, since, latency: Duration::ZERO };
        client.send();
        client
    }

    fn has_sent(&self) -> bool {
        self.sent == self.script.len()
    }

    /// Sends what the socket takes.
    fn send(&mut self) {
        while !self.has_sent() {
            match self.stream.write(&self.script[self.sent..]) {
                Ok(n) => self.sent += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("cannot send: {error}"),
            }
        }
    }

    /// Reads once and compares. True when the server has closed, having echoed everything.
    fn receive(&mut self, buffer: &mut [u8]) -> bool {
        match self.stream.read(buffer) {
            Ok(0) => {
                assert_eq!(self.echoed, self.script.len(), "bytes of the echo, then the end");
                return true;
            }
            Ok(n) => {
                let is_echo = self.script[self.echoed..].starts_with(&buffer[..n]);
                assert!(is_echo, "the echo differs after {} bytes", self.echoed);
                self.echoed += n;
                if self.echoed == self.script.len() {
                    self.latency = self.since.elapsed();
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("cannot receive: {error}"),
        }
        false
    }
}

/// Keeps `AT_ONCE` clients in work until `count` have said their scripts and have been closed,
/// shutting down their sending sides first if so asked. Returns the latency of each.
fn drive(
    server: &Running,
    count: usize,
    shut_down: bool,
    script: impl Fn(usize) -> Vec<u8>,
) -> Vec<Duration> {
    const READ: epoll::EventFlags = epoll::EventFlags::IN;
    const WRITE: epoll::EventFlags = epoll::EventFlags::OUT;
    const LIMIT: Timespec = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let mut events = Vec::with_capacity(AT_ONCE);
    let mut buffer = vec![0; 1 << 16];
    let mut latencies = Vec::with_capacity(count);
    let mut opened = 0;
    let mut clients: [Option<Client>; AT_ONCE] = array::from_fn(|_| None);
    let mut vacant: Vec<usize> = (0..AT_ONCE).collect();
    while latencies.len() < count {
        while opened < count
            && let Some(slot) = vacant.pop()
        {
            let client = Client::connect(server, opened, script(opened));
            opened += 1;
            let wish = if shut_down || !client.has_sent() { READ | WRITE } else { READ };
            let data = epoll::EventData::new_u64(slot as u64);
            epoll::add(&epoll, &client.stream, data, wish).unwrap();
            clients[slot] = Some(client);
        }
        events.clear();
        epoll::wait(&epoll, spare_capacity(&mut events), Some(&LIMIT)).unwrap();
        assert!(!events.is_empty(), "stalled after {} of {opened} connections", latencies.len());
        for event in &events {
            // Copies, for the kernel packs the struct.
            let (data, flags) = (event.data, event.flags);
            let slot = data.u64() as usize;
            let client = clients[slot].as_mut().expect("a closed client has no events");
            if flags.contains(WRITE) {
                client.send();
                if client.has_sent() {
                    if shut_down {
                        client.stream.shutdown(Shutdown::Write).unwrap();
                    }
                    epoll::modify(&epoll, &client.stream, data, READ).unwrap();
                }
            }
            if flags != WRITE && client.receive(&mut buffer) {
                latencies.push(client.latency);
                clients[slot] = None; // which closes it, and so leaves the epoll set
                vacant.push(slot);
            }
        }
    }
    latencies
}

/// Connections of one short line each, no two lines alike.
fn drive_lines(server: &Running, count: usize) -> Vec<Duration> {
    drive(server, count, false, |nth| format!("line {nth}\n").into_bytes())
}

/// What one client sends: so many short lines.
fn pipelined(client: usize, lines: usize) -> Vec<u8> {
    (0..lines).flat_map(|n| format!("{client} {n}\n").into_bytes()).collect()
}

// ---- The measures ----

/// One measure: how to take it, and the rows it fills.
struct Measure {
    name: &'static str,
    rows: &'static [Row],
    rounds: fn(&Options) -> usize,
    /// Takes it once of one server: a figure for each row.
    take: fn(&Server, &Options) -> Vec<f64>,
}

/// What a figure is of, in which unit, and whether a greater one is the better one.
struct Row {
    title: &'static str,
    unit: &'static str,
    rate: bool,
}

const fn rate(title: &'static str) -> Row {
    Row { title, unit: "", rate: true }
}

const fn cost(title: &'static str, unit: &'static str) -> Row {
    Row { title, unit, rate: false }
}

const fn measure(
    name: &'static str,
    rounds: fn(&Options) -> usize,
    take: fn(&Server, &Options) -> Vec<f64>,
    rows: &'static [Row],
) -> Measure {
    Measure { name, rows, rounds, take }
}

const CONNECTIONS: &[Row] = &[
    rate("connections per second"),
    cost("CPU per connection", "µs"),
    cost("latency p50", "µs"),
    cost("latency p99", "µs"),
    cost("latency max", "µs"),
];
const MEMORY: &[Row] = &[
    cost("resident memory, idle", "KiB"),
    cost("per idle connection", "bytes"),
    cost("after they left", "KiB"),
];
const MEASURES: &[Measure] = &[
    measure("size", |_| 1, size, &[cost("program", "bytes"), cost("what a pull transfers", "bytes")]),
    measure("connections", |options| options.rounds, connections, CONNECTIONS),
    measure("syscalls", |_| 1, syscalls, &[cost("system calls per connection", "")]),
    measure(
        "instructions",
        |_| 1,
        instructions,
        &[cost("instructions per connection", ""), cost("instructions per line", "")],
    ),
    measure(
        "keep-open",
        |options| options.rounds,
        |server, options| keep_open(server, Mode::KeepOpen, options),
        &[rate("lines per second, --keep-open"), cost("CPU per line", "µs")],
    ),
    measure(
        "quiet",
        |options| options.rounds,
        |server, options| keep_open(server, Mode::Quiet, options),
        &[rate("lines per second, -q"), cost("CPU per line, -q", "µs")],
    ),
    measure("memory", |options| options.rounds.min(3), memory, MEMORY),
    measure("start", |options| options.counts.starts, start, &[cost("start: exec to first echo", "ms")]),
];

/// The program as a file, and as the compressed layer of an image that holds nothing else.
fn size(server: &Server, _: &Options) -> Vec<f64> {
    let bytes = fs::metadata(&server.program).unwrap().len();
    let layer = "tar -C \"${1%/*}\" --transform='s/.*/smolrx/' --owner=0 --group=0 --mtime=@0 -c \"${1##*/}\" | gzip -n | wc -c";
    let layer = Command::new("sh").args(["-c", layer, "sh"]).arg(&server.program).output().unwrap();
    let layer = String::from_utf8_lossy(&layer.stdout).trim().parse();
    vec![bytes as f64, layer.expect("tar and gzip print a size")]
}

/// Connections of one line each: how many a second, what each costs the server, how long each
/// takes. The driver is one thread and works as hard as the server: where both are fast, the rate
/// is the driver's, and the CPU time tells them apart.
fn connections(server: &Server, options: &Options) -> Vec<f64> {
    let warm_up = 10 * AT_ONCE;
    let count = options.counts.connections;
    let server = server.start(Mode::OneLine);
    drive_lines(&server, warm_up);
    let (mut latencies, seconds, cpu) = server.timed(|| drive_lines(&server, count));
    server.stop(warm_up + count, warm_up + count);
    latencies.sort_unstable();
    let latency = |percent: usize| latencies[(count - 1) * percent / 100].as_secs_f64() * 1e6;
    vec![count as f64 / seconds, cpu / count as f64, latency(50), latency(99), latency(100)]
}

/// System calls of a connection, all threads: those of a run less those of a run without any
/// connection. strace slows the server down, so that more is ready at each of its waits.
fn syscalls(server: &Server, options: &Options) -> Vec<f64> {
    let count = options.counts.traced;
    let trace = |connections: usize| {
        // As the grandchild (-D): the server is our own child.
        let strace = "strace -D -f -c -o FILE";
        let drive = |server: Running| {
            drive_lines(&server, connections);
            thread::sleep(SETTLE);
            server.stop(connections, connections);
        };
        strace_counts(&server.counted(strace, Mode::OneLine, drive, " total"))
    };
    let (without, mut with) = (trace(0), trace(count));
    for (name, calls) in &mut with {
        *calls = (*calls - without.get(name).unwrap_or(&0.0)) / count as f64;
    }
    let total = with.remove("total").unwrap();
    if options.verbose {
        let mut calls: Vec<_> = with.iter().filter(|(_, calls)| calls.abs() >= 0.005).collect();
        calls.sort_by(|a, b| b.1.total_cmp(a.1));
        let calls: Vec<_> = calls.iter().map(|(name, calls)| format!("{calls:.2} {name}")).collect();
        eprint!("{}; ", calls.join(", "));
    }
    vec![total]
}

/// The calls by name, and `total`, of what `strace -c` prints: share, seconds, microseconds each,
/// calls, errors (or nothing), name.
fn strace_counts(counts: &str) -> BTreeMap<String, f64> {
    let counts = counts.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        Some((words.last()?.to_string(), words.get(3)?.parse().ok()?))
    });
    counts.collect()
}

/// Instructions in user space of a connection and of a line with `--keep-open`, all threads: those of a run less those
/// of a run without any. Those of a line hardly move from run to run; those of a connection by a tenth, with how
/// often it has to wait.
fn instructions(server: &Server, options: &Options) -> Vec<f64> {
    let valgrind =
        "valgrind -q --tool=cachegrind --cache-sim=no --cachegrind-out-file=FILE --log-file=/dev/null";
    let count = |mode: Mode, connections: usize, each: usize| -> f64 {
        let drive = |server: Running| {
            drive(&server, connections, mode == Mode::KeepOpen, |client| pipelined(client, each));
            thread::sleep(SETTLE);
            server.stop(connections * each, connections);
        };
        let counts = server.counted(valgrind, mode, drive, "summary: ");
        counts.rsplit("summary: ").next().unwrap().trim().parse().unwrap()
    };
    let (connections, each) = (options.counts.traced, options.counts.traced / 2);
    let per_connection =
        (count(Mode::OneLine, connections, 1) - count(Mode::OneLine, 0, 1)) / connections as f64;
    let lines = count(Mode::KeepOpen, AT_ONCE, each) - count(Mode::KeepOpen, 0, 1);
    vec![per_connection, lines / (AT_ONCE * each) as f64]
}

/// Short lines, pipelined: every client sends all of its lines as fast as the socket takes them.
fn keep_open(server: &Server, mode: Mode, options: &Options) -> Vec<f64> {
    // Python's hundredfold share of the time would buy no better figure.
    let share = if server.kind == Kind::Python { 10 } else { 1 };
    let each = options.counts.lines / share / AT_ONCE;
    let lines = each * AT_ONCE;
    let server = server.start(mode);
    let scripts: Vec<Vec<u8>> = (0..AT_ONCE).map(|client| pipelined(client, each)).collect();
    let (_, seconds, cpu) = server.timed(|| drive(&server, AT_ONCE, true, |client| scripts[client].clone()));
    let logged = usize::from(mode != Mode::Quiet);
    server.stop(logged * lines, logged * AT_ONCE);
    vec![lines as f64 / seconds, cpu / lines as f64]
}

/// Resident memory of a fresh server, what each idle connection adds, and what is left when all
/// of them have gone. The kernel's share of a connection is not in it.
fn memory(server: &Server, options: &Options) -> Vec<f64> {
    const STEP: usize = 64; // fewer than any backlog
    let count = options.counts.idle;
    let server = server.start(Mode::ManyIdle);
    thread::sleep(SETTLE);
    let (idle, before) = (server.resident(), server.process.descriptors());
    let mut clients = Vec::with_capacity(count);
    while clients.len() < count {
        let step = clients.len()..count.min(clients.len() + STEP);
        clients.extend(step.map(|nth| server.connect(nth)));
        let all = before + clients.len();
        eventually(PATIENCE, "all are accepted", || server.process.descriptors() >= all);
    }
    thread::sleep(5 * SETTLE);
    let full = server.resident();
    drop(clients);
    eventually(PATIENCE, "all are closed", || server.process.descriptors() <= before);
    thread::sleep(5 * SETTLE);
    let after = server.resident();
    server.stop(0, 0);
    vec![idle / 1024.0, (full - idle) / count as f64, after / 1024.0]
}

/// From before the fork to the last byte of the first echo.
fn start(server: &Server, _: &Options) -> Vec<f64> {
    let began = Instant::now();
    let server = server.start(Mode::OneLine);
    let mut stream = server.connect(0);
    let mut echo = [0; 6];
    stream.write_all(b"first\n").unwrap();
    stream.read_exact(&mut echo).unwrap();
    let elapsed = began.elapsed();
    assert_eq!((&echo, stream.read(&mut [0]).unwrap()), (b"first\n", 0), "the first echo, then the end");
    thread::sleep(Duration::from_millis(5)); // for the last line of its log
    server.stop(1, 1);
    vec![elapsed.as_secs_f64() * 1e3]
}

// ---- Rounds and medians ----

/// The medians of one row, server by server; none for a server that failed.
struct Figures {
    row: &'static Row,
    medians: Vec<Option<f64>>,
}

/// Takes one measure of all servers in turn, round by round. False when a server failed, which
/// ends its turns.
fn take(
    measure: &'static Measure,
    servers: &[Server],
    options: &Options,
    figures: &mut Vec<Figures>,
) -> bool {
    let rounds = (measure.rounds)(options);
    let mut complete = true;
    let mut turns: Vec<Option<Vec<Vec<f64>>>> =
        servers.iter().map(|server| server.does(measure).then(Vec::new)).collect();
    for round in 1..=rounds {
        for (server, samples) in servers.iter().zip(&mut turns) {
            let Some(taken) = samples else { continue };
            eprint!("{} {round}/{rounds}, {}: ", measure.name, server.name);
            match panic::catch_unwind(|| (measure.take)(server, options)) {
                Ok(sample) => {
                    let words = measure.rows.iter().zip(&sample);
                    let words = words.map(|(row, &figure)| format!("{} {}", row.title(), number(figure)));
                    eprintln!("{}", words.collect::<Vec<_>>().join("; "));
                    taken.push(sample);
                }
                Err(sentence) => {
                    eprintln!("{}", text_of(&*sentence));
                    (*samples, complete) = (None, false);
                }
            }
        }
    }
    for (nth, row) in measure.rows.iter().enumerate() {
        let of = |samples: &Vec<Vec<f64>>| median(samples.iter().map(|sample| sample[nth]).collect());
        figures
            .push(Figures { row, medians: turns.iter().map(|samples| samples.as_ref().map(of)).collect() });
    }
    complete
}

/// What a panic says.
fn text_of(panic: &dyn Any) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("without words")
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    let (low, high) = ((samples.len() - 1) / 2, samples.len() / 2);
    (samples[low] + samples[high]) / 2.0
}

impl Figures {
    /// How many times better `one` is than `other`: the faster or the cheaper.
    fn gain(&self, one: Option<usize>, other: Option<usize>) -> Option<f64> {
        let (one, other) = (self.medians[one?]?, self.medians[other?]?);
        let gain = if self.row.rate { one / other } else { other / one };
        gain.is_finite().then_some(gain)
    }
}

// ---- The table and the chart ----

/// The ratios of a row: what smolrx costs above the C floor and above the earlier binary, and what
/// it gains on Python. It is the image's, if that is measured.
fn ratios(servers: &[Server], figures: &Figures) -> [Option<f64>; 3] {
    let nth = |kind| servers.iter().position(|server| server.kind == kind);
    let ours = nth(Kind::Image).or(nth(Kind::Ours));
    let [floor, before, python] = [Kind::Floor, Kind::Before, Kind::Python].map(nth);
    [figures.gain(floor, ours), figures.gain(before, ours), figures.gain(ours, python)]
}

/// A markdown table whose columns also line up in a terminal.
fn table(servers: &[Server], figures: &[Figures], notes: &[String]) -> String {
    let ratio_names = ["cost, C = 1", "cost, before = 1", "gain on Python"];
    let names = servers.iter().map(|server| server.name).chain(ratio_names);
    let mut lines = vec![iter::once("").chain(names).map(String::from).collect::<Vec<_>>()];
    lines.extend(figures.iter().map(|figures| {
        let cells = figures.medians.iter().map(|figure| figure.map(number));
        let cells = cells.chain(ratios(servers, figures).map(|ratio| ratio.map(times)));
        let cells = cells.map(|cell| cell.unwrap_or("–".into()));
        iter::once(figures.row.title()).chain(cells).collect()
    }));
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max();
    let widths: Vec<usize> = (0..lines[0].len()).flat_map(width).collect();
    let rule = |(nth, width): (usize, &usize)| "-".repeat(width - nth.min(1)) + &":"[..nth.min(1)];
    lines.insert(1, widths.iter().enumerate().map(rule).collect());
    let mut table = String::new();
    for line in lines {
        let _ = write!(table, "| {:1$} |", line[0], widths[0]);
        for (cell, width) in line.iter().zip(&widths).skip(1) {
            let _ = write!(table, " {cell:>width$} |");
        }
        table.push('\n');
    }
    table + "\n" + &notes.join("\n") + "\n"
}

/// What a reader must know to take the same figures again.
fn notes(options: &Options) -> Vec<String> {
    let Counts { connections, traced, lines, idle, starts } = options.counts;
    let [connections, traced, lines, idle] = [connections, traced, lines, idle].map(|n| number(n as f64));
    let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let model = cpus.lines().find_map(|line| Some(line.strip_prefix("model name")?.split_once(": ")?.1));
    vec![
        format!(
            "{connections} connections ({traced} under strace and valgrind), {AT_ONCE} at a time; \
             {lines} lines over {AT_ONCE} connections; {idle} idle ones; {starts} starts."
        ),
        format!(
            "Medians of {} round(s) over loopback; Linux {}, {} × {}.",
            options.rounds,
            read("/proc/sys/kernel/osrelease").trim(),
            thread::available_parallelism().map_or(1, usize::from),
            model.unwrap_or(env::consts::ARCH)
        ),
        "Cost: how many times the C floor's, or the earlier binary's. Gain: how many times better than \
         Python's. Both of the image, where it is measured."
            .into(),
    ]
}

impl Row {
    fn title(&self) -> String {
        let comma = if self.unit.is_empty() { "" } else { ", " };
        format!("{}{comma}{}", self.title, self.unit)
    }
}

/// Three digits that count, and commas between the thousands: 0.312, 12.1, 14,233.
fn number(figure: f64) -> String {
    let decimals = match figure.abs() {
        0.0 => 0,
        below if below < 0.9995 => 3,
        below if below < 9.995 => 2,
        below if below < 99.95 => 1,
        _ => 0,
    };
    let mut text = format!("{figure:.decimals$}");
    let first = usize::from(figure < 0.0) + 1;
    let whole = text.find('.').unwrap_or(text.len());
    for nth in (first..whole).rev().filter(|nth| (whole - nth) % 3 == 0) {
        text.insert(nth, ',');
    }
    text
}

fn times(ratio: f64) -> String {
    if ratio < 0.995 { format!("{ratio:.2}×") } else { format!("{}×", number(ratio)) }
}

/// The same figures as bars: a panel for each row, two panels side by side. Its colours are read
/// on white and on black alike.
fn chart(servers: &[Server], figures: &[Figures], notes: &[String]) -> String {
    const PANEL: usize = 430; // all in pixels
    const BAR: usize = 310;
    const LINE: usize = 15;
    const TOP: usize = 30;
    let panel_height = 36 + LINE * servers.len();
    let height = TOP + figures.len().div_ceil(2) * panel_height + LINE * notes.len() + 10;
    let width = 2 * PANEL;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"system-ui,sans-serif\" font-size=\"12\">\n\
         <title>What a connection costs</title>\n\
         <style>text{{fill:#6e7781}}.t{{font-weight:600}}.r{{text-anchor:end}}\
         .a{{fill:#1f7ae0}}.b{{fill:#6f5bd6}}.c{{fill:#818b98}}.d{{fill:#d9822b}}.e{{fill:#2f9e6e}}\
         @media(prefers-color-scheme:dark){{text{{fill:#adb5be}}}}</style>\n"
    );
    for (nth, server) in servers.iter().enumerate() {
        let (class, x, text_x, name) = (server.class, 90 * nth, 90 * nth + 15, server.name);
        svg += &format!(
            "<rect class=\"{class}\" x=\"{x}\" y=\"4\" width=\"10\" height=\"10\"/>\
             <text x=\"{text_x}\" y=\"13\">{name}</text>\n"
        );
    }
    for (nth, figures) in figures.iter().enumerate() {
        let (x, y, right, title) =
            (nth % 2 * PANEL, TOP + nth / 2 * panel_height, PANEL - 30, figures.row.title());
        let [cost, before, gain] = ratios(servers, figures).map(|ratio| ratio.map(times));
        let [cost, before] =
            [(cost, "C"), (before, "before")].map(|(ratio, one)| ratio.map(|ratio| format!("{ratio} {one}")));
        let ratios = [cost, before, gain.map(|gain| format!("gain {gain}"))];
        let ratios = ratios.into_iter().flatten().collect::<Vec<_>>().join(" · ");
        svg += &format!(
            "<g transform=\"translate({x} {y})\"><text class=\"t\" y=\"12\">{title}</text>\
             <text class=\"r\" x=\"{right}\" y=\"12\">{ratios}</text>\n"
        );
        let longest = figures.medians.iter().flatten().fold(0.0, |a: f64, &b| a.max(b));
        for (nth, (server, figure)) in servers.iter().zip(&figures.medians).enumerate() {
            let Some(figure) = *figure else { continue };
            let width = (BAR as f64 * figure / longest).max(1.0);
            let (class, y, text_x) = (server.class, 18 + LINE * nth, width + 5.0);
            let (text_y, number) = (y + 10, number(figure));
            svg += &format!(
                "<rect class=\"{class}\" y=\"{y}\" width=\"{width:.0}\" height=\"11\"/>\
                 <text x=\"{text_x:.0}\" y=\"{text_y}\">{number}</text>\n"
            );
        }
        svg += "</g>\n";
    }
    for (nth, note) in notes.iter().rev().enumerate() {
        svg += &format!("<text y=\"{}\">{note}</text>\n", height - 8 - LINE * nth);
    }
    svg + "</svg>\n"
}
