//! A TCP server whose lines become a debounced event stream: Rx's operators as futures-lite streams.
//!
//! ```text
//! cargo run --release
//! echo foo | nc localhost 8888
//! ```
//!
//! Read from the top, this file follows one line from the socket to the screen: the program and its
//! pipeline, the options, what tasks wait for, the server, a connection, the subject, the
//! operators, standard output, text, and the health check.

#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::env;
use std::ffi::OsString;
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::mem;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use async_executor::StaticLocalExecutor;
use futures_lite::future::{self, FutureExt};
use futures_lite::stream::{self, Stream, StreamExt};
use nix::sys::signal::{SIGINT, SIGPIPE, SIGTERM, SIGXFSZ, SigSet};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use pin_project_lite::pin_project;
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{self, FileType, Mode, OFlags};
use rustix::io::{Errno, ReadWriteFlags, pwritev2};
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrAny, SocketAddrUnix};
use rustix::net::{SocketFlags, SocketType};
use rustix::process::{Resource, Rlimit, getrlimit, getsid, setrlimit};
use rustix::stdio::{stderr, stdout};
use rustix::termios::tcgetsid;
// libc's `_exit`: the end of the process, and nothing else.
use signal_hook::low_level::exit;
use smol::{Async, Timer};

#[cfg(not(target_os = "linux"))]
compile_error!("smolrx runs on Linux; elsewhere, run its container image");

// ---------------------------------------------------------------- the program

fn main() -> ! {
    // Blocked, these signals kill nobody: `write` fails instead, with EPIPE (a silent end) or EFBIG (a
    // sentence). Blocking can't fail.
    let _ = SigSet::from_iter([SIGPIPE, SIGXFSZ]).thread_block();
    match Command::parse(Arguments::new(env::args_os().skip(1))) {
        Ok(command) => finish(command.run(), 1),
        Err(message) => finish(Err(message + "; see smolrx --help"), 2),
    }
}

/// Ends the process: with 0, or if it failed with that status, after its sentence. (By `_exit`: nothing
/// is buffered, and so std's clean-up after `main` would do nothing.)
fn finish(outcome: Result<(), String>, status_if_failed: i32) -> ! {
    if let Err(message) = outcome {
        Output::to(stderr()).complain(&message);
        exit(status_if_failed)
    }
    exit(0)
}

impl Command {
    /// The error is a sentence for the person at the terminal.
    fn run(self) -> Result<(), String> {
        match self {
            Command::Serve(options) => serve(options),
            Command::Health(address) => probe(address),
            Command::Print(text) => {
                // Whoever closes the pipe has read enough.
                let _ = rustix::io::write(stdout(), text.as_bytes());
                Ok(())
            }
        }
    }
}

/// Tasks that run before the reactor is asked for events again.
const TASKS_A_TURN: usize = 200;

/// Serves until a signal or a failing stdout ends the process. Returns only why it could not start.
fn serve(options: Options) -> Result<(), String> {
    let signals = block_signals().map_err(|error| failure("wait for signals", error))?;
    let output = Output::to(stdout());
    raise_descriptor_limit();
    let wanted = options.address;
    let listener =
        listen(wanted).map_err(|error| failure(&["listen on ", &address_text(wanted)].concat(), error))?;
    let address = local_address(&listener).unwrap_or(wanted);
    let (address, port) = (address_text(address), decimal(address.port().into()));

    // Tasks borrow the server for as long as the process lives.
    let server: &'static Server = Box::leak(Box::new(Server::new(options)));
    server.transcript.remark(&["Serving on ", &address]);
    server.spawn(server.serve_clients(listener));
    server.spawn(server.stop_on_signals(signals));
    server.spawn(server.wake_the_due());
    server.spawn(observe(server));
    server.spawn(async { finish(server.transcript.write(output).await, 1) });
    for asked in ["", &port, &address] {
        match health_socket(asked) {
            Ok(socket) => server.spawn(answer_probes(socket)),
            // Another server of this network namespace has that name: it is the one to ask.
            Err(Errno::ADDRINUSE) => {}
            Err(error) => server.stderr.complain(&failure("answer --health", error)),
        }
    }
    // What `executor.run` does, without its queues for work stealing (3 kB).
    smol::block_on(async {
        loop {
            server.executor.tick().await;
            if (1..TASKS_A_TURN).all(|_| server.executor.try_tick()) {
                future::yield_now().await;
            }
        }
    })
}

/// The experiment itself: subject → merge(timer) → debounce → observer.
///
/// It goes on until the server has served its last client and nothing is pending.
async fn observe(server: &'static Server) {
    let Options { interval, debounce, max_wait, .. } = server.options;
    let clock = timer(Realtime, Duration::ZERO, interval).map(decimal);
    let clock = stream::stop_after_future(clock, server.lines.completion());
    let mut events = pin!(server.lines.observe().merge(clock).debounce(Realtime, debounce, max_wait));
    while let Some(event) = events.next().await {
        poll_fn(|cx| server.transcript.poll_ready(cx)).await;
        server.transcript.event(&event);
    }
    server.transcript.close();
}

/// What an operation that failed is reported as.
fn failure(what: &str, error: Errno) -> String {
    ["cannot ", what, ": ", &reason(error)].concat()
}

// ---------------------------------------------------------------- the options

const HELP: &str = "\
Usage: smolrx [OPTION]...
A TCP server whose lines become a debounced event stream.

  --tcp-port PORT   port to listen on; 0 takes a free one [8888]
  --interval MS     period of the clock, at least 10 [60000]
  --debounce MS     silence that ends a burst; only its last event is given
                    out [a tenth of --interval]
  --max-wait MS     longest time for which a burst holds an event back [none]
  --bind ADDR       IPv4 or IPv6 address to listen on [0.0.0.0]
  --keep-open       serve every line until the client closes
  --max-conns N     connections served at once; more wait in the backlog,
                    none is refused [1024]
  --max-line BYTES  longest line, its ending included [65536]
  --timeout MS      a connection that neither sends nor takes a byte for so
                    long is closed [60000]
  -q, --quiet       print events alone, one a line
  --health          ask the server on --bind:--tcp-port, or without these the
                    first one here, if it is healthy; exit 0 or 1
  -h, --help        print this
  -V, --version     print the version
";

/// What the command line asks for.
pub enum Command {
    Serve(Options),
    Health(Asked),
    Print(&'static str),
}

pub struct Options {
    address: SocketAddr,
    /// Period of the clock.
    interval: Duration,
    /// Silence that ends a burst.
    debounce: Duration,
    /// Longest time for which a burst holds an event back.
    max_wait: Option<Duration>,
    keep_open: bool,
    max_conns: usize,
    /// Longest line in bytes, its ending included.
    max_line: usize,
    /// How long a connection may neither send nor take a byte.
    timeout: Duration,
    quiet: bool,
}

/// Whose health is asked for.
pub struct Asked {
    address: SocketAddr,
    /// What was given: address and port, the port, or nothing.
    by: String,
}

impl Command {
    /// The error is a sentence that names the option, and the value as it was typed.
    pub fn parse(mut args: Arguments) -> Result<Command, String> {
        if args.has(["-h", "--help"]) {
            return Ok(Command::Print(HELP));
        }
        if args.has(["-V", "--version"]) {
            return Ok(Command::Print(concat!("smolrx ", env!("CARGO_PKG_VERSION"), "\n")));
        }
        let milliseconds = |number: u32| Duration::from_millis(number.into());
        let bind = match args.value("--bind")? {
            Some(typed) => {
                Some(typed.parse().map_err(|_| misfit("--bind", "an IPv4 or IPv6 address", &typed))?)
            }
            None => None,
        };
        let port = args.number("--tcp-port", 0, 65_535)?;
        let ip = bind.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let address = SocketAddr::new(ip, port.unwrap_or(8888) as u16);
        let interval = args.number("--interval", 10, u32::MAX)?.unwrap_or(60_000);
        let options = Options {
            address,
            interval: milliseconds(interval),
            debounce: milliseconds(args.number("--debounce", 1, u32::MAX)?.unwrap_or(interval / 10)),
            max_wait: args.number("--max-wait", 1, u32::MAX)?.map(milliseconds),
            keep_open: args.has(["--keep-open"; 2]),
            max_conns: args.number("--max-conns", 1, u32::MAX)?.unwrap_or(1024) as usize,
            max_line: args.number("--max-line", 1, u32::MAX - 1)?.unwrap_or(65_536) as usize,
            timeout: milliseconds(args.number("--timeout", 1, u32::MAX)?.unwrap_or(60_000)),
            quiet: args.has(["-q", "--quiet"]),
        };
        let health = args.has(["--health"; 2]);
        if let Some(word) = args.0.iter().flatten().next() {
            return Err(["unexpected argument '", word, "'"].concat());
        }
        if !health {
            return Ok(Command::Serve(options));
        }
        let by = match (bind, port) {
            (None, None) => String::new(),
            (None, Some(port)) => decimal(port.into()),
            _ => address_text(address),
        };
        Ok(Command::Health(Asked { address, by }))
    }
}

/// The words of the command line; each becomes None once it is understood.
pub struct Arguments(Vec<Option<String>>);

impl Arguments {
    pub fn new(words: impl Iterator<Item = OsString>) -> Arguments {
        Arguments(words.map(|word| Some(word.to_string_lossy().into_owned())).collect())
    }

    /// Whether an option is given, by either of its names (one that has one name repeats it).
    fn has(&mut self, names: [&str; 2]) -> bool {
        let given = |word: &&mut Option<String>| word.as_deref().is_some_and(|word| names.contains(&word));
        self.0.iter_mut().filter(given).filter_map(Option::take).count() > 0
    }

    /// The value of an option, `--option VALUE` or `--option=VALUE`, if it is given; of several the last.
    fn value(&mut self, option: &str) -> Result<Option<String>, String> {
        let mut last = None;
        for i in 0..self.0.len() {
            let rest = self.0[i].as_deref().and_then(|word| word.strip_prefix(option));
            let value = match rest {
                Some("") => self.0.get_mut(i + 1).and_then(Option::take),
                Some(rest) if rest.starts_with('=') => Some(rest[1..].to_owned()),
                _ => continue,
            };
            last = Some(value.ok_or_else(|| ["option '", option, "' needs a value"].concat())?);
            self.0[i] = None;
        }
        Ok(last)
    }

    /// The whole number that follows an option, if it is given.
    fn number(&mut self, option: &str, min: u32, max: u32) -> Result<Option<u32>, String> {
        let Some(typed) = self.value(option)? else { return Ok(None) };
        match typed.parse() {
            Ok(number) if (min..=max).contains(&number) => Ok(Some(number)),
            _ => {
                let wanted = ["a whole number from ", &decimal(min.into()), " to ", &decimal(max.into())];
                Err(misfit(option, &wanted.concat(), &typed))
            }
        }
    }
}

fn misfit(option: &str, wanted: &str, typed: &str) -> String {
    ["option '", option, "' takes ", wanted, ", not '", typed, "'"].concat()
}

// ---------------------------------------------------------------- what tasks wait for

/// Tasks that wait for something to change. Whoever changes it wakes them.
#[derive(Default)]
pub struct Waiters(RefCell<Vec<Waker>>);

impl Waiters {
    /// Ready if what is waited for `holds`; if not, the task is woken at the next change.
    fn poll_until(&self, cx: &mut Context<'_>, holds: bool) -> Poll<()> {
        if holds {
            return Poll::Ready(());
        }
        let mut tasks = self.0.borrow_mut();
        if !tasks.last().is_some_and(|task| task.will_wake(cx.waker())) {
            tasks.push(cx.waker().clone());
        }
        Poll::Pending
    }

    fn wait_until(&self, holds: impl Fn() -> bool) -> impl Future<Output = ()> {
        poll_fn(move |cx| self.poll_until(cx, holds()))
    }

    pub fn wake_all(&self) {
        for task in self.0.borrow_mut().drain(..) {
            task.wake();
        }
    }
}

fn stop_signals() -> SigSet {
    SigSet::from_iter([SIGINT, SIGTERM])
}

/// SIGINT and SIGTERM, as a descriptor to read. To be called before the first thread is started:
/// threads inherit what is blocked.
fn block_signals() -> Result<Async<SignalFd>, Errno> {
    let _ = stop_signals().thread_block();
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let signals = SignalFd::with_flags(&stop_signals(), flags).map_err(|error| errno(error.into()))?;
    Async::new_nonblocking(signals).map_err(errno)
}

/// The number of the next one.
async fn next_signal(signals: &Async<SignalFd>) -> i32 {
    loop {
        if let Ok(Some(signal)) = signals.get_ref().read_signal() {
            return signal.ssi_signo as i32;
        }
        let _ = poll_fn(|cx| signals.poll_readable(cx)).await;
    }
}

async fn sleep(duration: Duration) {
    Timer::after(duration).await;
}

// ---------------------------------------------------------------- the server

/// Clients accepted before the others get a turn.
const ACCEPTED_AT_ONCE: usize = 64;
/// The longest backlog that Linux grants by default. (std asks for 128, too few for a thousand clients at once.)
const BACKLOG: usize = 4096;
/// Pause after a failed accept: the descriptors or the memory that it lacked may be back by then.
const BACK_OFF: Duration = Duration::from_millis(100);
/// How long a client may take to end its line once the server stops, or to take a long echo once
/// its connection ends.
const GRACE: Duration = Duration::from_secs(5);
/// Bytes of an echo that the kernel holds for a client: with the megabytes that it grows to by
/// itself, seconds pass in which a slow client takes bytes and no one sees it.
const SEND_BUFFER: usize = 128 * 1024;

/// What all tasks share. They run on one thread, so cells do where locks would cost.
pub struct Server {
    options: Options,
    pub executor: StaticLocalExecutor,
    /// Every line received, by whichever client.
    pub lines: Subject<String>,
    pub transcript: Transcript,
    /// Where sentences go; opened at the start, as later there may be no descriptor for it.
    stderr: Output,
    /// Clients that are connected.
    pub connected: Cell<usize>,
    /// Wait until a client has left.
    departure: Waiters,
    /// Tasks of connections that wait, by descriptor.
    waits: RefCell<Vec<Option<Wait>>>,
    /// No later than the earliest instant at which one of them is due.
    next_due: Cell<Option<Instant>>,
    /// `wake_the_due`, which waits for an earlier one.
    sweeper: Waiters,
    /// Waits for the signal to stop.
    acceptor: Waiters,
    /// Set by the first signal: when clients are waited for no longer.
    grace_end: Cell<Option<Instant>>,
    /// Free ones of the `PLACES`: who has one may hold a whole line, others `ALLOWANCE` bytes.
    places: Cell<usize>,
    /// Somebody may be waiting for one.
    is_place_wanted: Cell<bool>,
    /// The descriptor at which the turn of those who wait for a place begins.
    turn: Cell<usize>,
    /// The read buffer, while nobody uses it.
    chunk: Cell<Vec<u8>>,
}

/// A task that waits for its client, or for a place.
struct Wait {
    /// When to wake it in any case.
    due: Instant,
    task: Waker,
    /// Bytes are there, and what it waits for is a place to put them.
    for_place: bool,
}

/// Raises the soft limit of descriptors to the hard one: a connection is a descriptor.
fn raise_descriptor_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    // What can't be raised stays, and `accept` says when it is too little.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// Listens on an address. Connections inherit its options, which so cost no call for each.
fn listen(address: SocketAddr) -> Result<Arc<Async<TcpListener>>, Errno> {
    let socket = net::socket(family(address), SocketType::STREAM, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER)?;
    // An echo leaves at once, and an urgent byte is a byte of its line.
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_socket_oobinline(&socket, true)?;
    if address.is_ipv6() {
        // `::` serves both families, whatever the system's default is.
        sockopt::set_ipv6_v6only(&socket, false)?;
    }
    net::bind(&socket, &SocketAddrAny::from(address))?;
    net::listen(&socket, BACKLOG as i32)?;
    // Registers it with the reactor; async-net's own `bind` takes neither backlog nor options.
    Ok(async_net::TcpListener::try_from(socket).map_err(errno)?.into())
}

fn local_address(listener: &Async<TcpListener>) -> Option<SocketAddr> {
    net::getsockname(listener).ok()?.try_into().ok()
}

fn family(address: SocketAddr) -> AddressFamily {
    if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET }
}

impl Server {
    pub fn new(options: Options) -> Server {
        Server {
            transcript: Transcript { quiet: options.quiet, ..Transcript::default() },
            options,
            executor: StaticLocalExecutor::new(),
            lines: Subject::default(),
            stderr: Output::to(stderr()),
            connected: Cell::default(),
            departure: Waiters::default(),
            waits: RefCell::default(),
            next_due: Cell::default(),
            sweeper: Waiters::default(),
            acceptor: Waiters::default(),
            grace_end: Cell::default(),
            places: Cell::new(PLACES),
            is_place_wanted: Cell::default(),
            turn: Cell::default(),
            chunk: Cell::default(),
        }
    }

    /// Starts a task. All are of one type to the executor: each would bring its own code (4 kB).
    fn spawn(&'static self, future: impl Future<Output = ()> + 'static) {
        self.executor.spawn(future.boxed_local()).detach();
    }

    /// Serves clients until the first signal and until the last one has left, and completes the subject.
    async fn serve_clients(&'static self, listener: Arc<Async<TcpListener>>) {
        self.accept(&listener).await;
        drop(listener);
        self.departure.wait_until(|| self.connected.get() == 0).await;
        self.lines.on_completed();
    }

    /// Stops at the first signal; the second one is the end.
    async fn stop_on_signals(&self, signals: Async<SignalFd>) {
        next_signal(&signals).await;
        self.grace_end.set(Some(Instant::now() + GRACE));
        self.acceptor.wake_all();
        self.waits.borrow_mut().iter_mut().filter_map(Option::take).for_each(|wait| wait.task.wake());
        exit(128 + next_signal(&signals).await)
    }

    /// Accepts clients, as many at once as the options allow; once the server stops, those who are
    /// in the backlog and hardly anybody else.
    async fn accept(&'static self, listener: &Async<TcpListener>) {
        let mut warned: Option<Instant> = None;
        let mut accepted: usize = 0;
        let mut backlog = BACKLOG;
        while backlog > 0 {
            let has_a_seat = || self.connected.get() < self.options.max_conns;
            if has_a_seat() && self.grace_is_over() {
                return;
            }
            self.departure.wait_until(has_a_seat).await;
            if self.is_stopping() {
                // The backlog takes one client at a time now; a flood of them has an end all the same.
                let _ = net::listen(listener, 0);
                backlog -= 1;
            }
            match net::acceptfrom_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok((socket, peer)) => {
                    if let Some(Ok(peer)) = peer.map(SocketAddr::try_from) {
                        self.welcome(socket.into(), peer);
                    }
                    accepted = accepted.wrapping_add(1);
                    if accepted.is_multiple_of(ACCEPTED_AT_ONCE) {
                        future::yield_now().await;
                    }
                }
                Err(Errno::AGAIN) if self.is_stopping() => return,
                Err(Errno::AGAIN) => {
                    poll_fn(|cx| match self.acceptor.poll_until(cx, self.is_stopping()) {
                        Poll::Pending => listener.poll_readable(cx).map(drop),
                        stopping => stopping,
                    })
                    .await
                }
                // The client left before its turn came.
                Err(Errno::CONNABORTED | Errno::INTR) => {}
                // Nobody is left whose end would free what it lacks.
                Err(_) if self.is_stopping() && self.connected.get() == 0 => return,
                Err(error) => {
                    if warned.is_none_or(|at| at.elapsed() >= Duration::from_secs(1)) {
                        warned = Some(Instant::now());
                        self.stderr.complain(&[&failure("accept", error), "; trying again"].concat());
                    }
                    sleep(BACK_OFF).await;
                }
            }
        }
    }

    /// Starts the task of a new client, whose socket does not block.
    pub fn welcome(&'static self, socket: TcpStream, peer: SocketAddr) {
        self.connected.set(self.connected.get() + 1);
        let task = async move {
            Connection::new(self, &socket, peer).converse().await;
            self.connected.set(self.connected.get() - 1);
            self.departure.wake_all();
        };
        self.spawn(task);
    }

    /// Wakes the tasks whose `due` has come, late by an eighth of the timeout and `LOOK_AGAIN` at most:
    /// each of them tries once more, and then judges if its client's time is over. One timer serves all,
    /// and none while nobody is waited for; never returns.
    async fn wake_the_due(&self) {
        let pause = LOOK_AGAIN.min(self.options.timeout / 8);
        loop {
            let now = Instant::now();
            let mut next = None;
            for wait in self.waits.borrow_mut().iter_mut() {
                if let Some(wait) = wait.take_if(|wait| wait.due <= now) {
                    wait.task.wake();
                } else if let Some(Wait { due, .. }) = wait {
                    next = Some(next.map_or(*due, |next: Instant| next.min(*due)));
                }
            }
            self.next_due.set(next);
            let earlier = self.sweeper.wait_until(|| self.next_due.get() != next);
            match next {
                Some(next) => future::or(sleep(next.max(now + pause) - now), earlier).await,
                None => earlier.await,
            }
        }
    }

    /// Wakes the next client that waits for a place; they take turns.
    fn wake_for_place(&self) {
        if !self.is_place_wanted.get() {
            return;
        }
        let mut waits = self.waits.borrow_mut();
        let (turn, length) = (self.turn.get(), waits.len());
        for descriptor in (turn..turn + length).map(|i| i % length) {
            if let Some(wait) = waits[descriptor].take_if(|wait| wait.for_place) {
                self.turn.set(descriptor + 1);
                return wait.task.wake();
            }
        }
        self.is_place_wanted.set(false);
    }

    fn is_stopping(&self) -> bool {
        self.grace_end.get().is_some()
    }

    fn grace_is_over(&self) -> bool {
        self.grace_end.get().is_some_and(|end| end <= Instant::now())
    }

    fn is_ready(&self) -> bool {
        self.transcript.is_ready() && self.lines.is_ready()
    }

    /// Ready when transcript and subject take more: back-pressure instead of memory.
    fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<()> {
        ready!(self.transcript.poll_ready(cx));
        self.lines.poll_ready(cx)
    }

    /// A line was received whole.
    fn receive(&self, line: &[u8], from: &str) {
        let text = text_of(line);
        self.transcript.received(&text, from);
        self.lines.on_next(text);
    }
}

// ---------------------------------------------------------------- a connection

/// Bytes that are read at once, unless a longer line is under way.
const CHUNK: usize = 4096;
/// Bytes that each connection may hold, of a line that is not yet whole or an echo that is not yet taken.
const ALLOWANCE: usize = 256;
/// So many connections at once may hold more, up to a whole line: as none of them needs another place,
/// no two wait for each other.
const PLACES: usize = 8;
/// When a client that waits for a place looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Bytes of echo that leave at once, whatever the client's window and segments are like; they
/// can't be lost when the connection closes behind them.
const LEAVES_AT_ONCE: usize = 512;

/// One client's conversation.
struct Connection<'a> {
    server: &'static Server,
    /// Non-blocking.
    socket: &'a TcpStream,
    peer: SocketAddr,
    /// The reactor's registration, made once there is something to wait for: often there is not.
    io: Option<Async<BorrowedFd<'a>>>,
    /// Bytes received and not yet echoed.
    buffer: Vec<u8>,
    /// So many of them are received lines, to be echoed.
    unsent: usize,
    /// So many of the rest are known to hold no newline.
    searched: usize,
    /// Bytes echoed so far.
    echoed: usize,
    /// When to stop waiting for the client, counted from its last byte; none while the server is at work for it.
    deadline: Option<Instant>,
    /// Why the echo was given up.
    gone: Option<Errno>,
    /// There may be bytes to read right now.
    readable: bool,
    /// `has_sent` is known: its bytes wait until the server takes lines.
    queued: bool,
    /// The next line is whole, but the server took no more.
    lines_left: bool,
    /// It has one of the places.
    has_place: bool,
    /// It has bytes to read and nowhere to put them.
    needs_place: bool,
    /// A line was received.
    received: bool,
    /// The conversation is over, and what the client still sends is passed over.
    lingering: bool,
}

/// What is waited for.
#[derive(Clone, Copy, PartialEq)]
enum For {
    Bytes,
    /// In the socket, for the echo.
    Room,
    Place,
}

impl<'a> Connection<'a> {
    fn new(server: &'static Server, socket: &'a TcpStream, peer: SocketAddr) -> Self {
        Connection {
            server,
            socket,
            peer,
            io: None,
            buffer: Vec::new(),
            unsent: 0,
            searched: 0,
            echoed: 0,
            deadline: None,
            gone: None,
            readable: true,
            queued: false,
            lines_left: false,
            has_place: false,
            needs_place: false,
            received: false,
            lingering: false,
        }
    }

    /// Receives lines and sends them back: one, or with `--keep-open` all that come.
    async fn converse(&mut self) {
        let (mut goes_on, mut ended) = (true, false);
        while goes_on {
            if mem::take(&mut self.lines_left) {
                poll_fn(|cx| self.server.poll_ready(cx)).await;
            } else {
                match poll_fn(|cx| self.poll_read(cx)).await {
                    Ok(count) => ended = count == 0,
                    // It was reset, or waited for long enough: an unfinished line is no line.
                    Err(_) => break,
                }
            }
            goes_on = self.receive_lines(ended);
            poll_fn(|cx| self.poll_echo(cx)).await;
            self.release();
            goes_on = self.lines_left || goes_on && !self.server.grace_is_over();
            if goes_on && self.readable {
                // A client that never stops sending must not starve the others.
                future::yield_now().await;
            }
        }
        if !ended && self.gone.is_none() {
            // The echo's end goes first: a reset, should the client send more, comes too late for harm.
            let _ = net::shutdown(self.socket, Shutdown::Write);
            self.lingering = self.must_linger();
            let end = Instant::now() + GRACE;
            self.deadline = Some(end);
            while self.lingering {
                self.buffer.clear();
                self.release();
                self.lingering = matches!(poll_fn(|cx| self.poll_read(cx)).await, Ok(1..))
                    && Instant::now() < end
                    && !self.server.grace_is_over();
                future::yield_now().await;
            }
        }
        self.buffer.clear();
        self.release();
        if self.received {
            self.server.transcript.remark(&["Close the client socket"]);
        }
    }

    /// Hands on the whole lines at the start of the buffer, as far as the server takes them, and
    /// marks them for the echo. Returns whether the conversation goes on.
    fn receive_lines(&mut self, ended: bool) -> bool {
        let options = &self.server.options;
        let mut from = String::new();
        loop {
            let rest = &self.buffer[self.unsent..];
            match first_line(rest, self.searched, ended, options.max_line) {
                Line::Whole(_) if self.unsent > 0 && !self.server.is_ready() => {
                    self.lines_left = true;
                    return true;
                }
                Line::Whole(length) => {
                    if from.is_empty() {
                        from = [" from ", &address_text(self.peer), "\nSend: "].concat();
                    }
                    self.server.receive(&rest[..length], &from);
                    self.received = true;
                    self.searched = 0;
                    self.unsent += length;
                    if !options.keep_open {
                        return false;
                    }
                }
                Line::Partial => {
                    self.searched = rest.len();
                    return !ended;
                }
                Line::TooLong => {
                    let (peer, longest) = (address_text(self.peer), decimal(options.max_line as u64));
                    let sentence = ["line from ", &peer, " is longer than ", &longest, " bytes"];
                    self.server.stderr.complain(&sentence.concat());
                    self.buffer.truncate(self.unsent);
                    return false;
                }
            }
        }
    }

    /// Adds bytes to the buffer, waiting for them if there are none, and returns how many; 0 at the
    /// end of what the client sends. The error is why there will be no more.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, Errno>> {
        let mut overdue = false;
        loop {
            if self.readable || overdue {
                if !self.lingering && !self.server.is_ready() && self.has_sent() {
                    // It is the server that keeps the client waiting.
                    self.deadline = None;
                    ready!(self.server.poll_ready(cx));
                }
                self.readable = false;
                match self.try_read() {
                    Err(Errno::AGAIN | Errno::INTR) => self.needs_place = false,
                    Err(Errno::NOMEM) => {
                        self.readable = true;
                        if !mem::replace(&mut self.needs_place, true) {
                            // It has sent something: from now on it waits for the place.
                            (self.deadline, overdue) = (None, false);
                        }
                    }
                    // After a failed echo, a reset looks like an end.
                    Ok(0) if self.gone == Some(Errno::CONNRESET) => {
                        return Poll::Ready(Err(Errno::CONNRESET));
                    }
                    outcome => {
                        (self.needs_place, self.queued) = (false, false);
                        if !self.lingering {
                            self.deadline = None;
                        }
                        return Poll::Ready(outcome);
                    }
                }
                if overdue {
                    return Poll::Ready(Err(Errno::TIMEDOUT));
                }
                self.release();
            }
            let cause = if self.needs_place { For::Place } else { For::Bytes };
            overdue = !ready!(self.poll_client(cx, cause))?;
            self.readable = true;
        }
    }

    /// Sends back what is marked for it as it came, and forgets it. If that fails, only the echo is
    /// given up: what else has arrived is received.
    fn poll_echo(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut overdue = false;
        while self.unsent > 0 && self.gone.is_none() {
            match rustix::io::write(self.socket, &self.buffer[..self.unsent]) {
                Ok(count) => {
                    self.buffer.drain(..count);
                    self.unsent -= count;
                    self.echoed = self.echoed.saturating_add(count);
                    self.deadline = None;
                }
                Err(Errno::AGAIN | Errno::INTR) if overdue => self.gone = Some(Errno::TIMEDOUT),
                Err(Errno::AGAIN | Errno::INTR) => {
                    self.release();
                    // When that is over, there may be bytes to read.
                    self.readable = true;
                    match ready!(self.poll_client(cx, For::Room)) {
                        Ok(in_time) => overdue = !in_time,
                        Err(error) => self.gone = Some(error),
                    }
                }
                Err(error) => self.gone = Some(error),
            }
        }
        self.buffer.drain(..mem::take(&mut self.unsent));
        Poll::Ready(())
    }

    /// Waits for the client. Ready with whether that was in time: bytes that are there count before
    /// any clock does, so it is given up on after one more attempt only.
    fn poll_client(&mut self, cx: &mut Context<'_>, cause: For) -> Poll<Result<bool, Errno>> {
        let (server, descriptor) = (self.server, self.socket.as_raw_fd() as usize);
        let mut in_time = Poll::Pending;
        if cause != For::Place {
            let io = match &mut self.io {
                Some(io) => io,
                none => none.insert(Async::new_nonblocking(self.socket.as_fd()).map_err(errno)?),
            };
            in_time = if cause == For::Room { io.poll_writable(cx) } else { io.poll_readable(cx) };
        }
        let now = Instant::now();
        let deadline = *self.deadline.get_or_insert(now + server.options.timeout);
        let deadline = match server.grace_end.get() {
            // Between two lines, a server that stops waits for nobody.
            Some(_) if cause == For::Bytes && self.buffer.is_empty() && !self.lingering => now,
            Some(end) => deadline.min(end),
            None => deadline,
        };
        let mut waits = server.waits.borrow_mut();
        while waits.len() <= descriptor {
            waits.push(None);
        }
        if in_time.is_ready() || deadline <= now {
            waits[descriptor] = None;
            return Poll::Ready(match in_time {
                Poll::Ready(outcome) => outcome.map(|()| true).map_err(errno),
                Poll::Pending => Ok(false),
            });
        }
        let for_place = cause == For::Place;
        let due = if for_place { deadline.min(now + LOOK_AGAIN) } else { deadline };
        waits[descriptor] = Some(Wait { due, task: cx.waker().clone(), for_place });
        server.is_place_wanted.set(server.is_place_wanted.get() | for_place);
        if server.next_due.get().is_none_or(|next| due < next) {
            server.next_due.set(Some(due));
            server.sweeper.wake_all();
        }
        Poll::Pending
    }

    /// Whether bytes of the echo may be lost if the socket is closed now: when it is a long one, or
    /// when the client has sent bytes that nobody reads, which makes the kernel reset the connection.
    fn must_linger(&mut self) -> bool {
        if self.received && self.readable {
            let _ = self.try_read();
        }
        self.echoed > LEAVES_AT_ONCE || self.received && !self.buffer.is_empty()
    }

    /// Whether the client has sent what may be a line.
    fn has_sent(&mut self) -> bool {
        let look = || net::recv(self.socket, &mut [0][..], RecvFlags::PEEK);
        // Thousands may be woken for the room of one line: they look once. An end makes a line of
        // what is there.
        self.queued = self.queued || look().is_ok_and(|(_, count)| count > 0 || !self.buffer.is_empty());
        self.queued
    }

    /// Adds the bytes that are there right now, as far as there is room for them.
    fn try_read(&mut self) -> Result<usize, Errno> {
        if !self.reserve() {
            return self.try_read_rest();
        }
        let count = rustix::io::read(self.socket, spare_capacity(&mut self.buffer))?;
        self.readable = self.buffer.len() == self.buffer.capacity();
        Ok(count)
    }

    /// Without a place: adds the rest of the line, if all of it has arrived and its echo can leave at
    /// once. The error is else NOMEM, which here says that it needs a place, and CONNRESET after a reset.
    fn try_read_rest(&mut self) -> Result<usize, Errno> {
        let mut chunk = [0; CHUNK];
        let (_, count) = net::recv(self.socket, &mut chunk[..], RecvFlags::PEEK)?;
        let state = poll_now(self.socket.as_fd(), PollFlags::OUT | PollFlags::RDHUP);
        let length = match chunk[..count].iter().position(|&byte| byte == b'\n') {
            Some(index) => index + 1,
            None if state.contains(PollFlags::HUP) => return Err(Errno::CONNRESET),
            None if count < CHUNK && state.contains(PollFlags::RDHUP) => count,
            None if self.buffer.len() + count > self.server.options.max_line => count,
            None => return Err(Errno::NOMEM),
        };
        if self.gone.is_none() && !state.contains(PollFlags::OUT) {
            return Err(Errno::NOMEM);
        }
        let count = rustix::io::read(self.socket, &mut chunk[..length])?;
        self.buffer.extend_from_slice(&chunk[..count]);
        self.readable = true;
        Ok(count)
    }

    /// Makes room for more bytes: with a place a chunk, or for a longer line as much again, up to one
    /// byte beyond the longest, which shows that a line is too long; else what is left of the
    /// allowance. Returns whether there is any.
    fn reserve(&mut self) -> bool {
        let (server, length) = (self.server, self.buffer.len());
        if !self.has_place && server.places.get() > 0 {
            server.places.set(server.places.get() - 1);
            self.has_place = true;
        }
        if self.has_place && self.buffer.capacity() < CHUNK {
            let mut chunk = server.chunk.take();
            chunk.reserve_exact(CHUNK);
            chunk.extend_from_slice(&self.buffer);
            self.buffer = chunk;
        }
        if length == self.buffer.capacity() {
            let longest = if self.has_place { server.options.max_line + 1 } else { ALLOWANCE };
            self.buffer.reserve_exact(longest.saturating_sub(length).min(length.max(ALLOWANCE)));
        }
        length < self.buffer.capacity()
    }

    /// Gives back what it need not hold: the room that is left, and the place if it can do without.
    fn release(&mut self) {
        if self.buffer.len() > ALLOWANCE {
            return;
        }
        if self.buffer.len() < self.buffer.capacity() {
            let part = self.buffer.to_vec();
            let mut chunk = mem::replace(&mut self.buffer, part);
            if chunk.capacity() == CHUNK {
                chunk.clear();
                self.server.chunk.set(chunk);
            }
        }
        if mem::take(&mut self.has_place) {
            self.server.places.set(self.server.places.get() + 1);
            self.server.wake_for_place();
        }
    }
}

enum Line {
    /// Its length in bytes, its ending included.
    Whole(usize),
    Partial,
    TooLong,
}

/// Looks for the first line of some bytes, of which so many are known to hold no newline. What is
/// left when the client has `ended` is a line, too.
fn first_line(bytes: &[u8], searched: usize, ended: bool, longest: usize) -> Line {
    let head = &bytes[..bytes.len().min(longest)];
    match head.iter().skip(searched).position(|&byte| byte == b'\n') {
        Some(index) => Line::Whole(searched + index + 1),
        None if bytes.len() > longest => Line::TooLong,
        None if ended && !bytes.is_empty() => Line::Whole(bytes.len()),
        None => Line::Partial,
    }
}

// ---------------------------------------------------------------- the subject

/// Bytes of text that wait, in the subject and for stdout, before those who add more have to wait, too.
const WAITING_TEXT: usize = 64 * 1024;

/// Rx's subject, hot, as this program needs it: many call `on_next`, one observes. Unlike Rx's it
/// is bounded, so that an observer who is slow holds up the callers instead of filling the memory.
#[derive(Default)]
pub struct Subject<T> {
    items: RefCell<VecDeque<T>>,
    /// The bytes of all items.
    bytes: Cell<usize>,
    completed: Cell<bool>,
    /// Wait for something to observe.
    observer: Waiters,
    /// Wait for room.
    callers: Waiters,
}

impl<T: AsRef<[u8]>> Subject<T> {
    /// To be called when it is ready; this does not check.
    pub fn on_next(&self, item: T) {
        self.bytes.set(self.bytes.get() + weight(&item));
        self.items.borrow_mut().push_back(item);
        self.observer.wake_all();
    }

    pub fn on_completed(&self) {
        self.completed.set(true);
        self.observer.wake_all();
    }

    fn is_ready(&self) -> bool {
        self.bytes.get() < WAITING_TEXT
    }

    /// Ready when there is room for an item.
    pub fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.callers.poll_until(cx, self.is_ready())
    }

    /// Ready when the subject is complete.
    pub fn completion(&self) -> impl Future<Output = ()> {
        self.observer.wait_until(|| self.completed.get())
    }

    /// The stream of the items, which ends when the subject is complete.
    pub fn observe(&self) -> impl Stream<Item = T> {
        stream::poll_fn(|cx| {
            let item = self.items.borrow_mut().pop_front();
            if let Some(item) = &item {
                self.bytes.set(self.bytes.get() - weight(item));
                self.callers.wake_all();
            } else {
                ready!(self.observer.poll_until(cx, self.completed.get()));
            }
            Poll::Ready(item)
        })
    }
}

/// The bytes that an item counts for: its own, and those of its entry in the queue.
fn weight<T: AsRef<[u8]>>(item: &T) -> usize {
    item.as_ref().len() + size_of::<T>()
}

// ---------------------------------------------------------------- the operators

/// A source of time, as Rx's operators take one: the real one, or virtual time in the tests.
pub trait Scheduler: Clone {
    type Timer: Future + Unpin;

    fn now(&self) -> Instant;

    /// A future that is ready from then on.
    fn at(&self, due: Instant) -> Self::Timer;
}

/// Real time: the system's monotonic clock, which nobody sets.
#[derive(Clone)]
struct Realtime;

impl Scheduler for Realtime {
    type Timer = Timer;

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn at(&self, due: Instant) -> Timer {
        Timer::at(due)
    }
}

/// Counts from 0: the first time after `due`, then every `period`.
///
/// ```text
/// timer(0, 3)   0--1--2--3--
/// ```
///
/// As in RxPY's `timer`, ticks that were missed (the process was stopped, say) don't come in a
/// burst: the count goes on one by one, and the period starts anew.
pub fn timer<S: Scheduler>(scheduler: S, due: Duration, period: Duration) -> impl Stream<Item = u64> {
    let first = scheduler.now() + due;
    stream::unfold((0, first), move |(count, due)| {
        let scheduler = scheduler.clone();
        async move {
            scheduler.at(due).await;
            let (now, next) = (scheduler.now(), due + period);
            Some((count, (count + 1, if next > now { next } else { now + period })))
        }
    })
}

/// The operators of Rx that futures-lite lacks.
pub trait RxExt: Stream + Sized {
    /// The items of both streams as they come.
    ///
    /// ```text
    /// a        1-----2-|
    /// b        --x-------y-|
    /// merge    1-x---2---y-|
    /// ```
    ///
    /// Unlike futures-lite's `or` and `race` it ends when both streams have; while both have
    /// items, they take turns.
    fn merge<B: Stream<Item = Self::Item>>(self, other: B) -> Merge<Self, B> {
        Merge { a: self.fuse(), b: other.fuse(), a_turn: false }
    }

    /// Only the items that are followed by a `window` of silence, at its end; with a `max_wait`
    /// also the latest item once one has been pending for so long.
    ///
    /// ```text
    /// source              1-2---3-4-5-6-7----|
    /// debounce(3)         -----2-----------7-|
    /// debounce(3, 5)      -----2-----5-----7-|
    /// ```
    ///
    /// When the source ends, the item that is pending comes at once (RxPY's `debounce`). Rx has no
    /// `max_wait`; it is the `maxWait` of lodash's `debounce`.
    fn debounce<S: Scheduler>(
        self,
        scheduler: S,
        window: Duration,
        max_wait: Option<Duration>,
    ) -> Debounce<Self, S> {
        Debounce { source: self.fuse(), scheduler, window, max_wait, pending: None, timer: None }
    }
}

impl<S: Stream> RxExt for S {}

pin_project! {
    /// Stream for [`RxExt::merge`].
    #[must_use = "streams do nothing unless polled"]
    pub struct Merge<A, B> {
        #[pin]
        a: stream::Fuse<A>,
        #[pin]
        b: stream::Fuse<B>,
        a_turn: bool,
    }
}

impl<A: Stream, B: Stream<Item = A::Item>> Stream for Merge<A, B> {
    type Item = A::Item;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<A::Item>> {
        let mut this = self.project();
        let mut ended = true;
        for _ in 0..2 {
            *this.a_turn = !*this.a_turn;
            let polled =
                if *this.a_turn { this.a.as_mut().poll_next(cx) } else { this.b.as_mut().poll_next(cx) };
            match polled {
                Poll::Ready(None) => {}
                Poll::Ready(item) => {
                    // The other has nothing: it is asked at every second item only.
                    *this.a_turn ^= !ended;
                    return Poll::Ready(item);
                }
                Poll::Pending => ended = false,
            }
        }
        if ended { Poll::Ready(None) } else { Poll::Pending }
    }
}

pin_project! {
    /// Stream for [`RxExt::debounce`].
    #[must_use = "streams do nothing unless polled"]
    pub struct Debounce<A: Stream, S: Scheduler> {
        #[pin]
        source: stream::Fuse<A>,
        scheduler: S,
        window: Duration,
        max_wait: Option<Duration>,
        pending: Option<Pending<A::Item>>,
        // Set for an instant at which an item was due, the pending one or another that it has
        // replaced since: a flood of items sets one timer a window.
        timer: Option<S::Timer>,
    }
}

/// The latest item of a burst.
struct Pending<T> {
    item: T,
    /// When it comes out, unless it is replaced.
    due: Instant,
    /// When the burst has held items back for long enough.
    latest: Option<Instant>,
}

impl<A: Stream, S: Scheduler> Stream for Debounce<A, S> {
    type Item = A::Item;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<A::Item>> {
        let mut this = self.project();
        let now = this.scheduler.now();
        // Late (the process was stopped, say): its silence was over before whatever comes now.
        if let Some(pending) = this.pending.take_if(|pending| pending.due < now) {
            return Poll::Ready(Some(pending.item));
        }
        loop {
            match this.source.as_mut().poll_next(cx) {
                Poll::Ready(Some(item)) => {
                    let latest = match this.pending {
                        Some(pending) => pending.latest,
                        None => this.max_wait.map(|wait| now + wait),
                    };
                    let due = now + *this.window;
                    let due = latest.map_or(due, |latest| latest.min(due));
                    *this.pending = Some(Pending { item, due, latest });
                }
                Poll::Ready(None) => return Poll::Ready(this.pending.take().map(|pending| pending.item)),
                Poll::Pending => break,
            }
        }
        while let Some(Pending { due, .. }) = this.pending {
            let timer = this.timer.get_or_insert_with(|| this.scheduler.at(*due));
            ready!(Pin::new(timer).poll(cx));
            *this.timer = None;
            if *due <= this.scheduler.now() {
                return Poll::Ready(this.pending.take().map(|pending| pending.item));
            }
        }
        Poll::Pending
    }
}

// ---------------------------------------------------------------- standard output

/// Bytes that a pipe takes whole or not at all (POSIX's PIPE_BUF, as it is on Linux).
const PIPE_BUF: usize = 4096;

/// What goes to stdout. Tasks add whole lines; one task writes all that a turn of the executor
/// has left, so that a batch costs one system call and a lone line still appears at once.
#[derive(Default)]
pub struct Transcript {
    quiet: bool,
    pub text: RefCell<String>,
    /// Bytes that are being written.
    writing: Cell<usize>,
    closing: Cell<bool>,
    /// Waits for something to write.
    writer: Waiters,
    /// Wait for room.
    pub callers: Waiters,
}

impl Transcript {
    /// A line, and what stands between its two appearances.
    fn received(&self, line: &str, from: &str) {
        if !self.quiet {
            let mut text = self.text.borrow_mut();
            text.push_str("Received ");
            text.push_str(line);
            text.push_str(from);
            text.push_str(line);
            text.push('\n');
            self.writer.wake_all();
        }
    }

    fn event(&self, event: &str) {
        self.line(&[if self.quiet { "" } else { "Observing " }, event]);
    }

    /// A line that `--quiet` leaves out.
    fn remark(&self, parts: &[&str]) {
        if !self.quiet {
            self.line(parts);
        }
    }

    /// A line, from its parts.
    fn line(&self, parts: &[&str]) {
        let mut text = self.text.borrow_mut();
        parts.iter().for_each(|part| text.push_str(part));
        text.push('\n');
        self.writer.wake_all();
    }

    fn is_ready(&self) -> bool {
        self.text.borrow().len() + self.writing.get() < WAITING_TEXT
    }

    /// Ready when there is room for a line.
    fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.callers.poll_until(cx, self.is_ready())
    }

    /// Lets `write` end once all is written.
    fn close(&self) {
        self.closing.set(true);
        self.writer.wake_all();
    }

    /// Writes what is added, until the transcript is closed; the error is the sentence to print.
    async fn write(&self, mut output: Output) -> Result<(), String> {
        let mut text = String::new();
        loop {
            self.writer.wait_until(|| self.closing.get() || !self.text.borrow().is_empty()).await;
            mem::swap(&mut text, &mut self.text.borrow_mut());
            if text.is_empty() {
                return Ok(());
            }
            self.writing.set(text.len());
            let mut rest = text.as_bytes();
            while !rest.is_empty() {
                match poll_fn(|cx| output.poll_write(cx, rest)).await {
                    Ok(count) => rest = &rest[count..],
                    // The reader of a closed pipe has seen what it wanted.
                    Err(Errno::PIPE) => return Ok(()),
                    Err(error) => return Err(failure("write to stdout", error)),
                }
            }
            // Its memory is for the next turn, unless that was an unusual one.
            text.clear();
            text.shrink_to(2 * WAITING_TEXT);
            self.writing.set(0);
            self.callers.wake_all();
        }
    }
}

/// A standard stream, written to without blocking wherever the kernel allows it.
struct Output {
    fd: BorrowedFd<'static>,
    /// It could not be opened anew, so that it blocks if it is given more than it takes.
    blocks: bool,
    /// The reactor's registration, made once there is something to wait for.
    io: Option<Async<BorrowedFd<'static>>>,
}

impl Output {
    fn to(stream: BorrowedFd<'static>) -> Output {
        let anew = open_anew(stream);
        Output { blocks: anew.is_err(), fd: anew.unwrap_or(stream), io: None }
    }

    /// Writes as many of the bytes as go at once.
    fn try_write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        if !self.blocks {
            return rustix::io::write(self.fd, batch(bytes));
        }
        let current_position = u64::MAX; // its -1: where the stream stands, as for `write`
        match pwritev2(self.fd, &[IoSlice::new(batch(bytes))], current_position, ReadWriteFlags::NOWAIT) {
            // A terminal, or Linux before 6.5, or an emulator of it.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            outcome => return outcome,
        }
        // Room for a piece, or an error, which `write` then reports.
        if poll_now(self.fd, PollFlags::OUT).is_empty() {
            return Err(Errno::AGAIN);
        }
        rustix::io::write(self.fd, piece(bytes))
    }

    /// Writes some of the bytes once some can be taken, and returns how many.
    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize, Errno>> {
        loop {
            match self.try_write(bytes) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let io = match &mut self.io {
                        Some(io) => io,
                        none => none.insert(Async::new_nonblocking(self.fd).map_err(errno)?),
                    };
                    ready!(io.poll_writable(cx)).map_err(errno)?;
                }
                outcome => return Poll::Ready(outcome),
            }
        }
    }

    /// Prints a sentence, as far as that goes without waiting.
    fn complain(&self, sentence: &str) {
        let text = ["smolrx: ", sentence, "\n"].concat();
        let mut rest = text.as_bytes();
        while let Ok(count @ 1..) = self.try_write(rest) {
            rest = &rest[count..];
        }
    }
}

/// As many whole lines as a pipe takes whole or not at all, or a part of one that is longer.
fn batch(text: &[u8]) -> &[u8] {
    let head = &text[..text.len().min(PIPE_BUF)];
    match head.iter().rposition(|&byte| byte == b'\n') {
        Some(index) => &head[..index + 1],
        None => head,
    }
}

/// What a terminal surely takes if it is writable (so do pipes and sockets): a part of a line, or its
/// ending. Its buffer grows by 256 bytes, and of an ending, which goes alone, it makes two.
fn piece(text: &[u8]) -> &[u8] {
    let head = &text[..text.len().min(256)];
    match head.iter().position(|&byte| byte == b'\n') {
        Some(index) => &head[..index.max(1)],
        None => head,
    }
}

/// Opens the file of a stream once more, non-blocking: O_NONBLOCK on the stream itself would be felt by
/// all who share it. Another user's terminal is refused through /proc, but if it is the one that
/// controls us, `/dev/tty` opens it. A regular file is used as it is: it blocks nobody, and its position
/// belongs to the stream. Fails for a socket, and for another user's pipe or other terminal.
fn open_anew(stream: BorrowedFd<'static>) -> Result<BorrowedFd<'static>, Errno> {
    if FileType::from_raw_mode(fs::fstat(stream)?.st_mode) == FileType::RegularFile {
        return Ok(stream);
    }
    let is_stdout = stream.as_raw_fd() == stdout().as_raw_fd();
    let path = if is_stdout { c"/proc/self/fd/1" } else { c"/proc/self/fd/2" };
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let anew = fs::open(path, flags, Mode::empty()).or_else(|error| {
        let controls = tcgetsid(stream)? == getsid(None)?;
        if controls { fs::open(c"/dev/tty", flags, Mode::empty()) } else { Err(error) }
    });
    Ok(forever(anew?))
}

/// A descriptor that is open for as long as the process lives.
fn forever(fd: OwnedFd) -> BorrowedFd<'static> {
    let fd: &'static OwnedFd = Box::leak(Box::new(fd));
    fd.as_fd()
}

/// What a descriptor is ready for right now, of what is asked, and whether it is at its end.
fn poll_now(fd: BorrowedFd, wanted: PollFlags) -> PollFlags {
    let mut fds = [PollFd::new(&fd, wanted)];
    let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    fds[0].revents()
}

// ---------------------------------------------------------------- text

/// A received line as everybody sees it: as text, stripped, escaped.
pub fn text_of(line: &[u8]) -> String {
    let words = String::from_utf8_lossy(line);
    let words = words.trim();
    // Most lines are what they show.
    if words.bytes().all(|byte| matches!(byte, b' '..=b'~')) { words.to_owned() } else { escaped(words) }
}

/// Words so that they stay one line and can't talk to the terminal: what could do either is shown
/// as Rust writes it, `\u{1b}` for ESC.
fn escaped(words: &str) -> String {
    let mut text = String::new();
    for character in words.chars() {
        match character {
            '\t' => text.push_str("\\t"),
            '\r' => text.push_str("\\r"),
            '\n' => text.push_str("\\n"),
            _ if is_hostile(character) => {
                text.push_str("\\u{");
                push_number(&mut text, character.into(), 16);
                text.push('}');
            }
            _ => text.push(character),
        }
    }
    text.shrink_to_fit();
    text
}

/// Control characters, and those that break lines or reorder them (Unicode's bidi controls).
fn is_hostile(character: char) -> bool {
    match character {
        ' '..='~' => false,
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => true,
        _ => character.is_control(),
    }
}

/// An address as people write it: an IPv4 client of an IPv6 socket is an IPv4 client,
/// and of an IPv6 address the first of the longest runs of zeros is left out, if it is longer than one
/// (RFC 5952). The standard library's own way from numbers to text also pads: 2 kB.
pub fn address_text(address: SocketAddr) -> String {
    let mut text = String::new();
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => push_joined(&mut text, &ip.octets().map(u16::from), 10, '.'),
        IpAddr::V6(ip) => {
            let groups = ip.segments();
            let zeros = |length| groups.windows(length).position(|run| run.iter().all(|&group| group == 0));
            let run = (2..=8).rev().find_map(|length| zeros(length).map(|start| (start, start + length)));
            let (start, end) = run.unwrap_or((8, 8));
            text.push('[');
            push_joined(&mut text, &groups[..start], 16, ':');
            if run.is_some() {
                text.push_str("::");
            }
            push_joined(&mut text, &groups[end..], 16, ':');
            text.push(']');
        }
    }
    text.push(':');
    push_number(&mut text, address.port().into(), 10);
    text
}

/// Adds numbers in a base, with a separator between any two.
fn push_joined(text: &mut String, numbers: &[u16], base: u32, separator: char) {
    for (i, &number) in numbers.iter().enumerate() {
        if i > 0 {
            text.push(separator);
        }
        push_number(text, number.into(), base);
    }
}

fn push_number(text: &mut String, number: u64, base: u32) {
    let rest = number / u64::from(base);
    if rest > 0 {
        push_number(text, rest, base);
    }
    text.extend(char::from_digit((number % u64::from(base)) as u32, base));
}

fn decimal(number: u64) -> String {
    let mut text = String::new();
    push_number(&mut text, number, 10);
    text
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// What went wrong, in words. The standard library's own, for every number, would cost 2 kB more.
fn reason(error: Errno) -> String {
    let words = match error {
        Errno::ACCESS | Errno::PERM => "permission denied",
        Errno::ADDRINUSE => "address in use",
        Errno::ADDRNOTAVAIL => "address not available",
        Errno::AFNOSUPPORT => "address family not supported",
        Errno::CONNREFUSED => "connection refused",
        Errno::CONNRESET => "connection reset",
        Errno::DQUOT | Errno::FBIG | Errno::NOSPC => "no storage space",
        Errno::HOSTUNREACH | Errno::NETUNREACH => "network unreachable",
        Errno::INVAL => "invalid argument",
        Errno::MFILE | Errno::NFILE => "no descriptor is free",
        Errno::NOBUFS | Errno::NOMEM => "out of memory",
        _ => "unexpected",
    };
    [words, " (error ", &decimal(error.raw_os_error() as u64), ")"].concat()
}

// ---------------------------------------------------------------- the health check

/// The abstract Unix socket at which a server is asked by its address and port, by its port, or
/// without either, which the first server of a network namespace has.
fn health_name(asked: &str) -> Result<SocketAddrUnix, Errno> {
    SocketAddrUnix::new_abstract_name(["smolrx ", asked].concat().as_bytes())
}

/// A datagram socket: to answer takes neither a seat nor a descriptor, and a full server is not ill.
fn health_socket(asked: &str) -> Result<Async<BorrowedFd<'static>>, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    net::bind(&socket, &health_name(asked)?)?;
    Async::new_nonblocking(forever(socket)).map_err(errno)
}

/// Answers those who ask for its health, for as long as the loop turns.
async fn answer_probes(socket: Async<BorrowedFd<'static>>) {
    loop {
        match net::recvfrom(&socket, &mut [0][..], RecvFlags::empty()) {
            Ok((_, _, Some(from))) => {
                let _ = net::sendto(&socket, &[], SendFlags::empty(), &from);
                future::yield_now().await;
            }
            Ok(_) => {}
            Err(_) => drop(poll_fn(|cx| socket.poll_readable(cx)).await),
        }
    }
}

/// Asks a server here through its socket, and any other as a TCP client that sends nothing and
/// expects it to close: which proves that it accepts and serves, and is no event. Within two seconds.
fn probe(asked: Asked) -> Result<(), String> {
    let answer = match ask(&asked.by) {
        Err(Errno::CONNREFUSED) => connect_and_read(asked.address),
        answer => answer,
    };
    let trouble = match answer {
        Ok(0) => return Ok(()),
        Ok(_) => String::from("is another server"),
        Err(Errno::AGAIN | Errno::INPROGRESS) => String::from("is not healthy: it does not answer"),
        Err(error) => ["is not healthy: ", &reason(error)].concat(),
    };
    Err([&address_text(asked.address), " ", &*trouble].concat())
}

fn ask(by: &str) -> Result<usize, Errno> {
    let socket = patient_socket(AddressFamily::UNIX, SocketType::DGRAM)?;
    net::bind(&socket, &SocketAddrUnix::new_unnamed())?; // any name: it needs one to be answered
    net::connect(&socket, &health_name(by)?)?;
    net::send(&socket, &[], SendFlags::empty())?;
    rustix::io::read(&socket, &mut [0])
}

fn connect_and_read(address: SocketAddr) -> Result<usize, Errno> {
    let socket = patient_socket(family(address), SocketType::STREAM)?;
    net::connect(&socket, &SocketAddrAny::from(address))?;
    // The kernel may choose as our own port the one that nobody listens on.
    if net::getsockname(&socket)? == net::getpeername(&socket)?.ok_or(Errno::NOTCONN)? {
        return Err(Errno::CONNREFUSED);
    }
    net::shutdown(&socket, Shutdown::Write)?;
    rustix::io::read(&socket, &mut [0])
}

/// A socket whose calls take a second at most.
fn patient_socket(family: AddressFamily, kind: SocketType) -> Result<OwnedFd, Errno> {
    let socket = net::socket(family, kind, None)?;
    // Linux: the limit for sending is the one for connecting, too.
    for limit in [Timeout::Send, Timeout::Recv] {
        sockopt::set_socket_timeout(&socket, limit, Some(Duration::from_secs(1)))?;
    }
    Ok(socket)
}
