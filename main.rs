//! A TCP server whose lines become a debounced event stream: Rx's operators as futures-lite streams.
//!
//! ```text
//! cargo run --release
//! echo foo | nc localhost 8888
//! ```
//!
//! Read from the top, this file follows one line from the socket to the screen: the program and its
//! pipeline, the options, waiting, the server, permits and deadlines, a connection, the subject, the
//! operators, standard output, text, errors, and the health check. What is `pub` is for the tests, which
//! include this file as a module.

#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::env;
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::mem::{self, MaybeUninit};
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
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{self, FileType, Mode, OFlags};
use rustix::io::{Errno, ReadWriteFlags, ioctl_fionread, pwritev2};
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrAny, SocketAddrUnix};
use rustix::net::{SocketFlags, SocketType};
use rustix::pipe::PIPE_BUF;
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
    // Blocked, these signals kill nobody: `write` fails instead, with EPIPE (a silent end) or EFBIG (an
    // error message). Blocking can't fail.
    let _ = SigSet::from_iter([SIGPIPE, SIGXFSZ]).thread_block();
    let args = env::args_os().skip(1).map(|arg| Some(arg.to_string_lossy().into_owned()));
    let outcome = match Command::parse(Arguments(args.collect())) {
        Ok(Command::Serve(options)) => serve(options),
        Ok(Command::Health(address, name)) => probe(address, &name),
        Ok(Command::Print(text)) => match rustix::io::write(stdout(), text.as_bytes()) {
            // Whoever closes a pipe has read enough.
            Ok(_) | Err(Errno::PIPE) => Ok(()),
            Err(error) => Err(failure("write to stdout", error)),
        },
        Err(message) => exit_with(Err(message + "; see smolrx --help"), 2),
    };
    exit_with(outcome, 1)
}

/// Ends the process: with 0, or after an error message with `status_if_failed`. (By `_exit`: nothing is
/// buffered, and so std's clean-up after `main` would do nothing.)
fn exit_with(outcome: Result<(), String>, status_if_failed: i32) -> ! {
    if let Err(message) = outcome {
        Output::to(stderr()).print_error(&message);
        exit(status_if_failed)
    }
    exit(0)
}

/// Tasks that run before the reactor is asked for events again.
const TASKS_A_TURN: usize = 200;

/// Serves until a signal or a failing stdout ends the process. Returns only why it could not start.
fn serve(options: Options) -> Result<(), String> {
    let signals = block_signals().map_err(|error| failure("wait for signals", error))?;
    let output = Output::to(stdout());
    // A connection is a descriptor. What can't be raised stays, and `accept` says when it is too little.
    let maximum = getrlimit(Resource::Nofile).maximum;
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    let wanted = options.address;
    let listener =
        listen(wanted).map_err(|error| failure(&["listen on ", &address_text(wanted)].concat(), error))?;
    let own = net::getsockname(&listener).ok().and_then(|own| own.try_into().ok()).unwrap_or(wanted);
    let (address, port) = (address_text(own), decimal(own.port().into()));

    // Tasks borrow the server for as long as the process lives.
    let server = leak(Server::new(options));
    server.log(&["Serving on ", &address]);
    server.spawn(server.stop_on_signals(signals, listener.clone()));
    server.spawn(server.serve_clients(listener));
    // A short `--timeout` is kept more exactly.
    server.spawn(server.deadlines.wake_the_due(RESOLUTION.min(server.options.timeout / 8)));
    server.spawn(observe(server));
    server.spawn(async { exit_with(server.transcript.write(output).await, 1) });
    // Its names, by which `--health` finds it.
    for name in ["", &port, &address] {
        match health_socket(name) {
            Ok(socket) => server.spawn(server.answer_probes(socket)),
            // Another server of this network namespace has that name: it is the one to ask.
            Err(Errno::ADDRINUSE) => {}
            Err(error) => server.stderr.print_error(&failure("answer --health", error)),
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

/// Keeps a value for as long as the process lives.
fn leak<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

/// The experiment itself: subject → merge(timer) → debounce → observer.
///
/// It goes on until the server has served its last client and nothing is pending.
async fn observe(server: &'static Server) {
    let Options { interval, debounce, max_wait, quiet, .. } = server.options;
    let clock = timer(Realtime, Duration::ZERO, interval).map(decimal);
    let clock = stream::stop_after_future(clock, server.lines.completion());
    let mut events = pin!(server.lines.observe().merge(clock).debounce(Realtime, debounce, max_wait));
    while let Some(event) = events.next().await {
        poll_fn(|cx| server.transcript.poll_ready(cx)).await;
        server.transcript.push_line(&[if quiet { "" } else { "Observing " }, &event]);
    }
    server.transcript.close();
}

// ---------------------------------------------------------------- the options

const HELP: &str = "\
Usage: smolrx [OPTION]...
A TCP server whose lines become a debounced event stream.

  --tcp-port PORT   port to listen on; 0 takes a free one [8888]
  --interval MS     period of the clock, at least 10 [60000]
  --debounce MS     silence that ends a burst; only its last event is
                    emitted [a tenth of --interval]
  --max-wait MS     longest time for which a burst holds an event back [none]
  --bind ADDR       IPv4 or IPv6 address to listen on [0.0.0.0]
  --keep-open       serve every line until the client closes
  --max-conns N     connections served at once; more wait in the backlog,
                    none is refused [1024]
  --max-line BYTES  longest line, its ending included [65536]
  --timeout MS      a connection that neither sends nor takes a byte for that
                    long is closed [60000]
  -q, --quiet       print events alone, one a line
  --health          ask the server on --bind:--tcp-port whether it is healthy,
                    or without these the first that runs here; exit 0 or 1
  -h, --help        print this
  -V, --version     print the version
";

/// What the command line asks for.
pub enum Command {
    Serve(Options),
    /// Ask the server at this address for its health, by this name (see `health_address`).
    Health(SocketAddr, String),
    Print(&'static str),
}

/// As `HELP` describes them.
pub struct Options {
    address: SocketAddr,
    interval: Duration,
    debounce: Duration,
    max_wait: Option<Duration>,
    keep_open: bool,
    max_conns: usize,
    max_line: usize,
    timeout: Duration,
    quiet: bool,
}

impl Command {
    /// The error names the option, and the value as it was typed.
    pub fn parse(mut args: Arguments) -> Result<Command, String> {
        if args.has(&["-h", "--help"]) {
            return Ok(Command::Print(HELP));
        }
        if args.has(&["-V", "--version"]) {
            return Ok(Command::Print(concat!("smolrx ", env!("CARGO_PKG_VERSION"), "\n")));
        }
        let milliseconds = |number: u32| Duration::from_millis(number.into());
        let ip = |typed: String| {
            typed.parse().map_err(|_| invalid_value("--bind", "an IPv4 or IPv6 address", &typed))
        };
        let bind = args.value("--bind")?.map(ip).transpose()?;
        let port = args.number("--tcp-port", 0, 65_535)?;
        let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let address = SocketAddr::new(bind.unwrap_or(any), port.unwrap_or(8888) as u16);
        let interval = args.number("--interval", 10, u32::MAX)?.unwrap_or(60_000);
        let options = Options {
            address,
            interval: milliseconds(interval),
            debounce: milliseconds(args.number("--debounce", 1, u32::MAX)?.unwrap_or(interval / 10)),
            max_wait: args.number("--max-wait", 1, u32::MAX)?.map(milliseconds),
            keep_open: args.has(&["--keep-open"]),
            max_conns: args.number("--max-conns", 1, u32::MAX)?.unwrap_or(1024) as usize,
            max_line: args.number("--max-line", 1, u32::MAX - 1)?.unwrap_or(65_536) as usize,
            timeout: milliseconds(args.number("--timeout", 1, u32::MAX)?.unwrap_or(60_000)),
            quiet: args.has(&["-q", "--quiet"]),
        };
        let health = args.has(&["--health"]);
        if let Some(arg) = args.0.iter().flatten().next() {
            return Err(["unexpected argument '", arg, "'"].concat());
        }
        if !health {
            return Ok(Command::Serve(options));
        }
        let name = match (bind, port) {
            (None, None) => String::new(),
            (None, Some(port)) => decimal(port.into()),
            _ => address_text(address),
        };
        Ok(Command::Health(address, name))
    }
}

/// The arguments of the command line. One that is understood becomes None; were it removed, the next one
/// might pass for the value of an option before it.
pub struct Arguments(pub Vec<Option<String>>);

impl Arguments {
    /// Whether an option is given, by any of its names.
    fn has(&mut self, names: &[&str]) -> bool {
        let given = |arg: &&mut Option<String>| arg.as_deref().is_some_and(|arg| names.contains(&arg));
        self.0.iter_mut().filter(given).filter_map(Option::take).count() > 0
    }

    /// The value of an option, `--option VALUE` or `--option=VALUE`, if it is given; of several the last.
    fn value(&mut self, option: &str) -> Result<Option<String>, String> {
        let mut last = None;
        for i in 0..self.0.len() {
            let rest = self.0[i].as_deref().and_then(|arg| arg.strip_prefix(option));
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
        let number = typed.parse().ok().filter(|number| (min..=max).contains(number));
        let wanted = || ["a whole number from ", &decimal(min.into()), " to ", &decimal(max.into())].concat();
        number.map(Some).ok_or_else(|| invalid_value(option, &wanted(), &typed))
    }
}

fn invalid_value(option: &str, wanted: &str, typed: &str) -> String {
    ["option '", option, "' takes ", wanted, ", not '", typed, "'"].concat()
}

// ---------------------------------------------------------------- waiting

/// A condition variable for tasks: it keeps those that wait for a change, and whoever makes the change wakes all.
#[derive(Default)]
pub struct Waiters(RefCell<Vec<Waker>>);

impl Waiters {
    /// Ready if the condition `holds`; else the task is woken at the next change, and asks again.
    fn poll_until(&self, cx: &mut Context<'_>, holds: bool) -> Poll<()> {
        if holds {
            return Poll::Ready(());
        }
        let mut tasks = self.0.borrow_mut();
        // A task that asks again before the change is kept once. The last four are enough to look at: so many tasks
        // ask by turns on `Server::stop` (`accept` and three `answer_probes`), and elsewhere one.
        if !tasks.iter().rev().take(4).any(|task| task.will_wake(cx.waker())) {
            tasks.push(cx.waker().clone());
        }
        Poll::Pending
    }

    fn wait_until(&self, holds: impl Fn() -> bool) -> impl Future<Output = ()> {
        poll_fn(move |cx| self.poll_until(cx, holds()))
    }

    pub fn wake_all(&self) {
        self.0.borrow_mut().drain(..).for_each(Waker::wake);
    }
}

/// A descriptor's registration with the reactor, made once there is something to wait for: often there is not.
fn registered<'a, 'fd>(
    io: &'a mut Option<Async<BorrowedFd<'fd>>>,
    fd: BorrowedFd<'fd>,
) -> Result<&'a Async<BorrowedFd<'fd>>, Errno> {
    Ok(match io {
        Some(io) => io,
        none => none.insert(Async::new_nonblocking(fd).map_err(errno)?),
    })
}

/// What a descriptor is ready for right now, of what is asked, and whether it is at its end.
fn poll_now(fd: BorrowedFd, wanted: PollFlags) -> PollFlags {
    let mut fds = [PollFd::new(&fd, wanted)];
    let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    fds[0].revents()
}

// ---------------------------------------------------------------- the server

/// The longest backlog that Linux grants by default. (std asks for 128, too few for a thousand clients at once.)
const BACKLOG: i32 = 4096;
/// Clients accepted before the others get a turn.
const ACCEPTED_AT_ONCE: usize = 64;
/// Pause after a failed accept, unless a client leaves before: what it lacked, descriptors or memory, may be back.
const BACK_OFF: Duration = Duration::from_millis(100);
/// How long a client may take to end its line once the server stops, or to take a long echo once
/// its connection ends.
const GRACE: Duration = Duration::from_secs(5);
/// Bytes of an echo that the kernel holds for a client. Left alone, it grows to megabytes, and a slow client
/// takes bytes for seconds before anybody sees room for more.
const SEND_BUFFER: usize = 128 * 1024;

/// What all tasks share. They run on one thread, so cells do where locks would cost.
pub struct Server {
    options: Options,
    pub executor: StaticLocalExecutor,
    /// Every line received, by whichever client.
    pub lines: Subject<String>,
    pub transcript: Transcript,
    /// For error messages; opened at the start, as later there may be no descriptor for it.
    stderr: Output,
    /// Clients that are connected.
    pub connected: Cell<usize>,
    /// Tasks that wait for a client to leave.
    departure: Waiters,
    /// When the grace period ends; set by the first signal.
    grace_end: Cell<Option<Instant>>,
    /// Tasks that wait for that signal.
    stop: Waiters,
    /// How many of the `PERMITS` are taken.
    permits_taken: Cell<usize>,
    deadlines: Deadlines,
    /// A free buffer, for the next connection that reads: without it, each batch of lines would cost an mmap
    /// and a munmap.
    spare: Cell<Vec<u8>>,
}

impl Server {
    pub fn new(options: Options) -> Server {
        Server {
            options,
            executor: StaticLocalExecutor::new(),
            lines: Subject::default(),
            transcript: Transcript::default(),
            stderr: Output::to(stderr()),
            connected: Cell::default(),
            departure: Waiters::default(),
            grace_end: Cell::default(),
            stop: Waiters::default(),
            permits_taken: Cell::default(),
            deadlines: Deadlines::default(),
            spare: Cell::default(),
        }
    }

    /// Starts a task. Boxed, all are of one type: else the executor's code would be there once for each (4 kB).
    fn spawn(&'static self, future: impl Future<Output = ()> + 'static) {
        self.executor.spawn(future.boxed_local()).detach();
    }

    /// Accepts clients until the first signal, waits until the last client has left, and completes the subject.
    async fn serve_clients(&'static self, listener: Arc<Async<TcpListener>>) {
        self.accept(&listener).await;
        drop(listener);
        self.departure.wait_until(|| self.connected.get() == 0).await;
        self.lines.on_completed();
    }

    /// Stops at the first signal; the second one is the end.
    async fn stop_on_signals(&self, signals: Async<SignalFd>, listener: Arc<Async<TcpListener>>) {
        next_signal(&signals).await;
        // The backlog keeps those who are in it, and lets in newcomers one at a time.
        let _ = net::listen(&listener, 0);
        drop(listener); // `serve_clients` closes it
        self.grace_end.set(Some(Instant::now() + GRACE));
        self.stop.wake_all();
        self.deadlines.wake_all();
        exit(128 + next_signal(&signals).await)
    }

    /// Accepts clients, as many at once as the options allow; once the server stops, those who are
    /// in the backlog and hardly anybody else.
    async fn accept(&'static self, listener: &Async<TcpListener>) {
        let mut next_warning = Instant::now();
        let mut accepted_since_stop = 0;
        loop {
            self.departure.wait_until(|| self.connected.get() < self.options.max_conns).await;
            // Else newcomers could keep a server that stops busy for ever.
            if accepted_since_stop > BACKLOG {
                return;
            }
            match net::acceptfrom_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok((socket, peer)) => {
                    accepted_since_stop += i32::from(self.is_stopping());
                    if let Some(Ok(peer)) = peer.map(SocketAddr::try_from) {
                        self.handle_client(socket.into(), peer);
                    }
                    // Nobody leaves before the others get their turn: `connected` counts those accepted.
                    if self.connected.get().is_multiple_of(ACCEPTED_AT_ONCE) {
                        future::yield_now().await;
                    }
                }
                Err(Errno::AGAIN) if self.is_stopping() => return,
                Err(Errno::AGAIN) => poll_fn(|cx| self.poll_readable(cx, listener)).await,
                // The client left before its turn came; or a signal came.
                Err(Errno::CONNABORTED | Errno::INTR) => {}
                // Nobody is left whose end would free what it lacks.
                Err(_) if self.is_stopping() && self.connected.get() == 0 => return,
                Err(error) => {
                    let now = Instant::now();
                    if next_warning <= now {
                        next_warning = now + Duration::from_secs(1);
                        self.stderr.print_error(&[&failure("accept", error), "; trying again"].concat());
                    }
                    let connected = self.connected.get();
                    let departure = self.departure.wait_until(|| self.connected.get() < connected);
                    future::or(departure, async { _ = Timer::at(now + BACK_OFF).await }).await;
                }
            }
        }
    }

    /// Starts the task of a new client, whose socket does not block.
    pub fn handle_client(&'static self, socket: TcpStream, peer: SocketAddr) {
        self.connected.set(self.connected.get() + 1);
        self.spawn(async move {
            Connection::new(self, &socket, peer).run().await;
            self.connected.set(self.connected.get() - 1);
            self.departure.wake_all();
        });
    }

    /// Ready when there is something to read, or the server stops.
    fn poll_readable<T>(&self, cx: &mut Context<'_>, io: &Async<T>) -> Poll<()> {
        if self.stop.poll_until(cx, self.is_stopping()).is_ready() {
            return Poll::Ready(());
        }
        io.poll_readable(cx).map(drop)
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

    /// Prints a line that `--quiet` leaves out.
    fn log(&self, parts: &[&str]) {
        if !self.options.quiet {
            self.transcript.push_line(parts);
        }
    }
}

/// Listens on an address. Connections inherit the options of this socket: no call is needed for each.
fn listen(address: SocketAddr) -> Result<Arc<Async<TcpListener>>, Errno> {
    let address = SocketAddrAny::from(address);
    let socket = net::socket(address.address_family(), SocketType::STREAM, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER)?;
    // An echo leaves at once, and an urgent byte is a byte of its line.
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_socket_oobinline(&socket, true)?;
    if address.address_family() == AddressFamily::INET6 {
        // `::` serves both families, whatever the system's default is.
        sockopt::set_ipv6_v6only(&socket, false)?;
    }
    net::bind(&socket, &address)?;
    net::listen(&socket, BACKLOG)?;
    // Registers it with the reactor, and gives it back in an `Arc`. async-net's own `bind` takes neither backlog
    // nor options.
    Ok(async_net::TcpListener::try_from(socket).map_err(errno)?.into())
}

/// SIGINT and SIGTERM, as a descriptor to read. To be called before the first thread is started:
/// threads inherit what is blocked.
fn block_signals() -> Result<Async<SignalFd>, Errno> {
    let signals = SigSet::from_iter([SIGINT, SIGTERM]);
    let _ = signals.thread_block();
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let signals = SignalFd::with_flags(&signals, flags).map_err(|error| errno(error.into()))?;
    Async::new_nonblocking(signals).map_err(errno)
}

/// Waits for the next signal; its number.
async fn next_signal(signals: &Async<SignalFd>) -> i32 {
    loop {
        if let Ok(Some(signal)) = signals.get_ref().read_signal() {
            return signal.ssi_signo as i32;
        }
        let _ = poll_fn(|cx| signals.poll_readable(cx)).await;
    }
}

// ---------------------------------------------------------------- permits and deadlines
// Limits of a connection. Memory: to hold more than its allowance, it needs one of a few permits (a semaphore).
// Time: once its deadline has passed, its task is woken though the client did nothing.

/// Bytes that each connection may hold, of a line that is not yet whole or an echo that is not yet taken.
const ALLOWANCE: usize = 256;
/// At most this many connections at once have a permit to hold more, up to a whole line: as none of them needs
/// another permit, no two wait for each other.
const PERMITS: usize = 8;
/// The error of an attempt that needs a permit first. (Should the kernel lack memory, it is right to wait as well.)
const NEEDS_PERMIT: Errno = Errno::NOMEM;
/// What it fails with once the client's time is over. (TIMEDOUT is the kernel's: the client's network is gone.)
const TIME_IS_OVER: Errno = Errno::TIME;
/// How often a task that waits for a permit tries by itself.
const RETRY: Duration = Duration::from_millis(100);
/// How late a task may be woken that is due: one timer then serves many.
const RESOLUTION: Duration = Duration::from_millis(100);

/// What wakes a connection's task if its client does not: its timeout or, while it waits for a permit, its turn.
#[derive(Default)]
struct Deadlines {
    /// By descriptor.
    tasks: RefCell<Vec<Option<Wait>>>,
    /// No later than the earliest instant at which one of them is due.
    next_due: Cell<Option<Instant>>,
    /// Where `wake_the_due` waits for an earlier one.
    earlier: Waiters,
    /// The descriptor at which `wake_for_permit` begins its search, as tasks take turns. None once it has found
    /// nobody: most reads give a permit back, and hardly ever does anybody wait for it.
    permit_turn: Cell<Option<usize>>,
}

/// What one task waits for.
struct Wait {
    /// When to wake it in any case.
    due: Instant,
    task: Waker,
    is_for_permit: bool,
}

impl Deadlines {
    /// Notes what a connection's task waits for now, if it does.
    fn set(&self, socket: &TcpStream, wait: Option<Wait>) {
        let descriptor = socket.as_raw_fd() as usize;
        let mut tasks = self.tasks.borrow_mut();
        if tasks.len() <= descriptor {
            tasks.resize_with(descriptor + 1, || None);
        }
        if let Some(Wait { due, is_for_permit, .. }) = wait {
            if is_for_permit {
                self.permit_turn.set(self.permit_turn.get().or(Some(0)));
            }
            if self.next_due.get().is_none_or(|next| due < next) {
                self.next_due.set(Some(due));
                self.earlier.wake_all();
            }
        }
        tasks[descriptor] = wait;
    }

    fn wake_all(&self) {
        self.tasks.borrow_mut().iter_mut().filter_map(Option::take).for_each(|wait| wait.task.wake());
    }

    /// Wakes the next task that waits for a permit; they take turns.
    fn wake_for_permit(&self) {
        let Some(turn) = self.permit_turn.get() else { return };
        let mut tasks = self.tasks.borrow_mut();
        let is_next = |&i: &usize| tasks[i].as_ref().is_some_and(|wait| wait.is_for_permit);
        let next = (turn..tasks.len()).chain(0..turn).find(is_next);
        self.permit_turn.set(next.map(|i| i + 1));
        if let Some(wait) = next.and_then(|i| tasks[i].take()) {
            wait.task.wake();
        }
    }

    /// Wakes the tasks that are due, later by `resolution` at most: each of them tries once more, and then
    /// judges if its client's time is over. One timer serves all. Never returns.
    async fn wake_the_due(&self, resolution: Duration) {
        loop {
            let now = Instant::now();
            let is_due = |wait: &mut Wait| wait.due <= now;
            for wait in self.tasks.borrow_mut().iter_mut().filter_map(|wait| wait.take_if(is_due)) {
                wait.task.wake();
            }
            let next = self.tasks.borrow().iter().flatten().map(|wait| wait.due).min();
            self.next_due.set(next);
            let timer = next.map_or_else(Timer::never, |next| Timer::at(next.max(now + resolution)));
            let earlier = self.earlier.wait_until(|| self.next_due.get() != next);
            future::or(async { _ = timer.await }, earlier).await;
        }
    }
}

// ---------------------------------------------------------------- a connection
// Its task reads bytes, emits the lines in them, echoes these, and lingers at the end. Each step is an attempt that
// never blocks; `poll_attempt` repeats it, and waits in between.

/// Bytes that are read at once.
const CHUNK: usize = 4096;
/// An echo of at most this many bytes leaves at once, whatever the client's window and segments are like: the
/// connection may close behind it without lingering, and only a lost packet can cost the client these bytes.
const LEAVES_AT_ONCE: usize = 512;

/// One client's conversation.
struct Connection<'a> {
    server: &'static Server,
    /// Non-blocking.
    socket: &'a TcpStream,
    peer: SocketAddr,
    /// See `registered`.
    io: Option<Async<BorrowedFd<'a>>>,
    /// Bytes received and not yet echoed.
    buffer: Vec<u8>,
    /// How many bytes at its start are whole lines that are still to be echoed.
    unsent: usize,
    /// Bytes of all lines so far.
    emitted: usize,
    /// Why the echo was given up.
    echo_error: Option<Errno>,
    /// There may be bytes to read right now.
    readable: bool,
    /// Once its time is over: how many more bytes it reads, and one for the end of the stream.
    last_bytes: Option<u64>,
    /// It has one of the `PERMITS`.
    has_permit: bool,
    /// What was awaited last.
    awaited: Awaited,
    /// When the wait for it times out; none until the next wait begins.
    deadline: Option<Instant>,
}

/// What a connection's task waits for.
#[derive(Clone, Copy, PartialEq)]
enum Awaited {
    /// Bytes from the client.
    Bytes,
    /// Room in the socket's send buffer, for the echo.
    Room,
    /// A permit to read the bytes that are there.
    Permit,
    /// The client's end of the connection, until this instant.
    Close(Instant),
}

/// What a connection goes on with.
enum Next {
    /// To read more bytes.
    Read,
    /// To emit the lines that are in the buffer, once the server is ready.
    Emit,
    /// To close.
    Close,
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
            emitted: 0,
            echo_error: None,
            readable: true,
            last_bytes: None,
            has_permit: false,
            awaited: Awaited::Bytes,
            deadline: None,
        }
    }

    /// Receives lines and sends them back: one, or with `--keep-open` all that come.
    async fn run(&mut self) {
        let server = self.server;
        let (mut next, mut ended) = (Next::Read, false);
        loop {
            let searched = match next {
                Next::Read if !self.is_over() => {
                    let searched = self.buffer.len();
                    let read = poll_fn(|cx| self.poll_attempt(cx, Awaited::Bytes, Self::try_read)).await;
                    // It was reset, or waited for long enough: an unfinished line is no line.
                    let Ok(count) = read else { break };
                    ended = count == 0;
                    // After an echo that failed, a broken connection looks like an end, if none came before (PIPE).
                    if ended && !matches!(self.echo_error, None | Some(TIME_IS_OVER | Errno::PIPE)) {
                        break;
                    }
                    searched
                }
                Next::Emit => {
                    poll_fn(|cx| server.poll_ready(cx)).await;
                    0
                }
                Next::Read | Next::Close => break,
            };
            next = self.emit_lines(searched, ended);
            while self.unsent > 0 {
                let echo = poll_fn(|cx| self.poll_attempt(cx, Awaited::Room, Self::try_echo)).await;
                // Only the echo is given up: what else has arrived is emitted.
                self.echo_error = self.echo_error.or(echo.err());
            }
            self.release();
            if self.readable && (self.has_permit || self.buffer.len() <= ALLOWANCE) {
                // A client that never stops sending must not starve the others. (Without a permit, one that has read more
                // than its allowance goes on: else a thousand could hold as much.)
                future::yield_now().await;
            }
        }
        let mut lingers = self.shut_down(ended);
        let end = Instant::now() + GRACE;
        while lingers {
            let passed = poll_fn(|cx| self.poll_attempt(cx, Awaited::Close(end), Self::discard)).await;
            lingers = matches!(passed, Ok(1..)) && Instant::now() < end && !self.is_over();
            future::yield_now().await;
        }
        if self.emitted > 0 {
            server.log(&["Close the client socket"]);
        }
    }

    /// Whether its time is over, and all is read that had arrived when this was asked first. Later bytes are not
    /// read: else a client that never pauses would have no end.
    fn is_over(&mut self) -> bool {
        let is_late = self.server.grace_is_over() || self.echo_error == Some(TIME_IS_OVER);
        if is_late && self.last_bytes.is_none() {
            self.last_bytes = Some(self.arrived() + 1);
        }
        self.last_bytes == Some(0)
    }

    /// Begins a lingering close, and returns whether it is to go on: with bytes that nobody has read, the kernel would
    /// send a reset, which may cost the client the end of its echo. So the sending side is shut down first, and what
    /// comes is discarded.
    fn shut_down(&mut self, ended: bool) -> bool {
        let has_unread = !self.buffer.is_empty() || (self.readable && matches!(self.discard(), Ok(1..)));
        self.buffer.clear();
        self.release();
        if ended || self.echo_error.is_some() {
            return false;
        }
        let _ = net::shutdown(self.socket, Shutdown::Write);
        self.emitted > if has_unread { 0 } else { LEAVES_AT_ONCE }
    }

    /// Emits the whole lines at the start of the buffer to the subject, for as long as the server is ready,
    /// and marks them for the echo. The first `searched` bytes hold no newline.
    fn emit_lines(&mut self, mut searched: usize, ended: bool) -> Next {
        let (server, options) = (self.server, &self.server.options);
        // What stands between the two copies of a text in the transcript: made once, for all lines.
        let mut between = String::new();
        loop {
            let rest = &self.buffer[self.unsent..];
            match first_line(rest, searched, ended, options.max_line) {
                Line::Whole(_) if !server.is_ready() => return Next::Emit,
                Line::Whole(length) => {
                    if between.is_empty() {
                        between = [" from ", &address_text(self.peer), "\nSend: "].concat();
                    }
                    let text = text_of(&rest[..length]);
                    server.log(&["Received ", &text, &between, &text]);
                    server.lines.on_next(text);
                    self.unsent += length;
                    self.emitted += length;
                    searched = 0;
                    if !options.keep_open {
                        return Next::Close;
                    }
                }
                Line::Partial if ended => return Next::Close,
                Line::Partial => return Next::Read,
                Line::TooLong => {
                    let (peer, longest) = (address_text(self.peer), decimal(options.max_line as u64));
                    let message = ["line from ", &peer, " is longer than ", &longest, " bytes"];
                    server.stderr.print_error(&message.concat());
                    self.buffer.truncate(self.unsent);
                    return Next::Close;
                }
            }
        }
    }

    /// Attempts something until it is done, or fails, or the client took too long. What the client has
    /// done counts before any clock does: there is one more attempt after its time is over.
    fn poll_attempt(
        &mut self,
        cx: &mut Context<'_>,
        awaited: Awaited,
        attempt: fn(&mut Self) -> Result<usize, Errno>,
    ) -> Poll<Result<usize, Errno>> {
        self.server.deadlines.set(self.socket, None);
        let mut waited = Ok(());
        loop {
            let awaited = match attempt(self) {
                Err(Errno::AGAIN | Errno::INTR) => awaited,
                Err(NEEDS_PERMIT) => Awaited::Permit,
                outcome => {
                    self.deadline = None;
                    return Poll::Ready(outcome);
                }
            };
            // The time was over before this attempt, which found nothing.
            waited?;
            self.release();
            waited = ready!(self.poll_client(cx, awaited));
            self.readable = true; // maybe: the next attempt finds out
        }
    }

    /// Waits for the client, or for a permit. The error is TIME_IS_OVER once the time for it is over.
    fn poll_client(&mut self, cx: &mut Context<'_>, awaited: Awaited) -> Poll<Result<(), Errno>> {
        let is_for_permit = awaited == Awaited::Permit;
        if !is_for_permit {
            let io = registered(&mut self.io, self.socket.as_fd())?;
            let polled = match awaited {
                Awaited::Room => io.poll_writable(cx),
                _ => io.poll_readable(cx),
            };
            if let Poll::Ready(outcome) = polled {
                return Poll::Ready(outcome.map_err(errno));
            }
        }
        let now = Instant::now();
        let deadline = self.deadline_for(awaited, now);
        if deadline <= now {
            return Poll::Ready(Err(TIME_IS_OVER));
        }
        let due = if is_for_permit { deadline.min(now + RETRY) } else { deadline };
        self.server.deadlines.set(self.socket, Some(Wait { due, task: cx.waker().clone(), is_for_permit }));
        Poll::Pending
    }

    /// When the wait for something is over.
    fn deadline_for(&mut self, awaited: Awaited, now: Instant) -> Instant {
        let server = self.server;
        // The time starts anew with something else to wait for, which is progress, and while it is the server
        // that is not ready.
        if awaited != self.awaited || (awaited == Awaited::Permit && !server.is_ready()) {
            (self.awaited, self.deadline) = (awaited, None);
        }
        let end = match awaited {
            Awaited::Close(end) => end,
            // What had arrived when its echo was given up counts, and nothing more.
            Awaited::Bytes if self.echo_error.is_some() => now,
            _ => now + server.options.timeout,
        };
        let deadline = *self.deadline.get_or_insert(end);
        match server.grace_end.get() {
            // Between two lines, a server that stops waits for nobody.
            Some(_) if awaited == Awaited::Bytes && self.buffer.is_empty() => now,
            // The grace ends for those who have the permits: one will be free.
            Some(grace_end) if awaited != Awaited::Permit => deadline.min(grace_end),
            _ => deadline,
        }
    }

    /// Reads bytes that have arrived.
    fn try_read(&mut self) -> Result<usize, Errno> {
        if !self.readable {
            return Err(Errno::AGAIN);
        }
        self.take_permit();
        let room = self.readable_length()?;
        let mut chunk = [MaybeUninit::uninit(); CHUNK];
        let bytes = self.read(&mut chunk[..room])?;
        if self.buffer.len() <= ALLOWANCE {
            // So small, it has no room (see `release`): the spare buffer may have.
            let part = mem::replace(&mut self.buffer, self.server.spare.take());
            self.buffer.extend_from_slice(&part);
        }
        self.buffer.reserve_exact(bytes.len());
        self.buffer.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    /// Takes a permit, if one is free; `release` gives it back.
    fn take_permit(&mut self) {
        let taken = &self.server.permits_taken;
        if !self.has_permit && taken.get() < PERMITS {
            taken.set(taken.get() + 1);
            self.has_permit = true;
        }
    }

    /// How many bytes may be read. With a permit, up to one more than the longest line has: it shows that
    /// a line is too long. Without one, up to the allowance, and once that is full the rest of the line.
    fn readable_length(&self) -> Result<usize, Errno> {
        let most = if self.has_permit { self.server.options.max_line + 1 } else { ALLOWANCE };
        match most.saturating_sub(self.buffer.len()) {
            0 => self.rest_of_line(),
            room => Ok(room.min(CHUNK)),
        }
    }

    /// How many bytes are read without a permit: the rest of the line, if all of it has arrived and its echo
    /// can leave at once; or what has arrived of a line that is too long, and so is refused, or that a reset has cut
    /// off; 0 at the end of the stream. The error is AGAIN if nothing has arrived, else the connection's or NEEDS_PERMIT.
    fn rest_of_line(&self) -> Result<usize, Errno> {
        let mut chunk = [MaybeUninit::uninit(); CHUNK];
        let ((bytes, _), _) = net::recv(self.socket, &mut chunk, RecvFlags::PEEK)?;
        let state = poll_now(self.socket.as_fd(), PollFlags::OUT | PollFlags::RDHUP);
        let ended = state.contains(PollFlags::RDHUP);
        let length = match bytes.iter().position(|&byte| byte == b'\n') {
            Some(index) => index + 1,
            // (A `recv` stops at an urgent byte: the count of the bytes that have arrived says if these are all.)
            None if ended && self.arrived() == bytes.len() as u64 => bytes.len(),
            None if self.buffer.len() + bytes.len() > self.server.options.max_line => bytes.len(),
            None => return Err(NEEDS_PERMIT),
        };
        let leaves = self.echo_error.is_some() || state.contains(PollFlags::OUT);
        if leaves && self.server.is_ready() { Ok(length) } else { Err(NEEDS_PERMIT) }
    }

    /// How many bytes have arrived and are not read yet.
    fn arrived(&self) -> u64 {
        ioctl_fionread(self.socket).unwrap_or(0)
    }

    /// Sends the lines that are marked for the echo, byte for byte, and drops what is sent; once the echo is given up,
    /// drops all of them.
    fn try_echo(&mut self) -> Result<usize, Errno> {
        // Broken while it waited: `write` would take the error, by which `read` knows that no end came before.
        let state = || poll_now(self.socket.as_fd(), PollFlags::empty());
        if self.awaited == Awaited::Room && state().contains(PollFlags::ERR) {
            self.echo_error = Some(Errno::PIPE);
        }
        let count = match self.echo_error {
            None => rustix::io::write(self.socket, &self.buffer[..self.unsent])?,
            Some(_) => self.unsent,
        };
        self.buffer.drain(..count);
        self.unsent -= count;
        Ok(count)
    }

    /// Reads bytes that nobody needs.
    fn discard(&mut self) -> Result<usize, Errno> {
        Ok(self.read(&mut [MaybeUninit::uninit(); CHUNK])?.len())
    }

    /// Reads into a chunk.
    fn read<'c>(&mut self, chunk: &'c mut [MaybeUninit<u8>]) -> Result<&'c [u8], Errno> {
        let room = chunk.len();
        self.readable = false;
        let (bytes, _) = rustix::io::read(self.socket, chunk)?;
        self.readable = bytes.len() == room;
        self.last_bytes = self.last_bytes.map(|left| left.saturating_sub(bytes.len() as u64));
        Ok(bytes)
    }

    /// Gives back what it does not need: the room in a buffer that holds little, and the permit with it.
    fn release(&mut self) {
        if self.buffer.len() > ALLOWANCE {
            return;
        }
        if self.buffer.len() < self.buffer.capacity() {
            let part = self.buffer.to_vec();
            let mut spare = mem::replace(&mut self.buffer, part);
            spare.clear();
            spare.shrink_to(2 * CHUNK);
            self.server.spare.set(spare);
        }
        if mem::take(&mut self.has_permit) {
            self.server.permits_taken.set(self.server.permits_taken.get() - 1);
            self.server.deadlines.wake_for_permit();
        }
    }
}

enum Line {
    /// Its length in bytes, its ending included.
    Whole(usize),
    Partial,
    TooLong,
}

/// Looks for the first line in `bytes`, the first `searched` of which are known to hold no newline. What is
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

/// Bytes in a queue (the subject's, the transcript's) from which on its producers have to wait.
const HIGH_WATER_MARK: usize = 64 * 1024;

/// Rx's subject, hot, as this program needs it: many call `on_next`, one observes. Unlike Rx's it
/// is bounded, so that an observer who is slow holds up the producers instead of filling the memory.
#[derive(Default)]
pub struct Subject<T> {
    items: RefCell<VecDeque<T>>,
    /// The bytes of all items.
    bytes: Cell<usize>,
    completed: Cell<bool>,
    /// The task that waits for an item or for completion.
    observer: Waiters,
    /// Tasks that wait for room.
    producers: Waiters,
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
        self.bytes.get() < HIGH_WATER_MARK
    }

    /// Ready when there is room for an item.
    pub fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.producers.poll_until(cx, self.is_ready())
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
                self.producers.wake_all();
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

/// Counts from 0: the first time after a `delay`, then every `period`.
///
/// ```text
/// timer(0, 3)   0--1--2--3--
/// ```
///
/// As in RxPY's `timer`, ticks that were missed (the process was stopped, say) don't come in a
/// burst: the count goes on one by one, and the period starts anew.
pub fn timer<S: Scheduler>(scheduler: S, delay: Duration, period: Duration) -> impl Stream<Item = u64> {
    let first = scheduler.now() + delay;
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
        Merge { a: self.fuse(), b: other.fuse(), a_first: true }
    }

    /// Emits an item once it is followed by a `window` of silence; with a `max_wait` also the latest
    /// item of a burst that has lasted for that long.
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
        // The one that is asked first; they take turns.
        a_first: bool,
    }
}

impl<A: Stream, B: Stream<Item = A::Item>> Stream for Merge<A, B> {
    type Item = A::Item;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<A::Item>> {
        let mut this = self.project();
        let (mut ended, a_first) = (true, *this.a_first);
        for is_a in [a_first, !a_first] {
            let polled = if is_a { this.a.as_mut().poll_next(cx) } else { this.b.as_mut().poll_next(cx) };
            match polled {
                Poll::Ready(None) => {}
                Poll::Ready(item) => {
                    *this.a_first = !a_first;
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
    /// When it comes out in any case: `max_wait` after the first item of the burst.
    deadline: Option<Instant>,
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
                    let deadline = match this.pending {
                        Some(pending) => pending.deadline,
                        None => this.max_wait.map(|wait| now + wait),
                    };
                    let due = now + *this.window;
                    let due = deadline.map_or(due, |deadline| deadline.min(due));
                    *this.pending = Some(Pending { item, due, deadline });
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

/// What goes to stdout. Tasks add whole lines; one task writes all that a turn of the executor has left: many
/// lines cost a system call for each 4 KiB (see `atomic_chunk`), and a lone line still appears at once.
#[derive(Default)]
pub struct Transcript {
    pub text: RefCell<String>,
    /// Bytes that are being written.
    writing: Cell<usize>,
    closing: Cell<bool>,
    /// The task that waits for something to write.
    writer: Waiters,
    /// Tasks that wait for room.
    pub producers: Waiters,
}

impl Transcript {
    /// Adds a line, from its parts.
    fn push_line(&self, parts: &[&str]) {
        let mut text = self.text.borrow_mut();
        parts.iter().for_each(|part| text.push_str(part));
        text.push('\n');
        self.writer.wake_all();
    }

    fn is_ready(&self) -> bool {
        self.text.borrow().len() + self.writing.get() < HIGH_WATER_MARK
    }

    /// Ready when there is room for a line.
    fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.producers.poll_until(cx, self.is_ready())
    }

    /// Lets `write` end once all is written.
    fn close(&self) {
        self.closing.set(true);
        self.writer.wake_all();
    }

    /// Writes what is added, until the transcript is closed; the error is the message to print.
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
            // Its memory is for the next turn, unless this text was unusually long.
            text.clear();
            text.shrink_to(2 * HIGH_WATER_MARK);
            self.writing.set(0);
            self.producers.wake_all();
        }
    }
}

/// A standard stream, written to without blocking wherever the kernel allows it.
struct Output {
    fd: BorrowedFd<'static>,
    /// It could not be opened anew, so that it blocks if it is given more than it takes.
    blocks: bool,
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
            return rustix::io::write(self.fd, atomic_chunk(bytes));
        }
        let current_position = u64::MAX; // -1 to pwritev2, which then writes where `write` does
        match pwritev2(
            self.fd,
            &[IoSlice::new(atomic_chunk(bytes))],
            current_position,
            ReadWriteFlags::NOWAIT,
        ) {
            // A terminal, or Linux before 6.5, or an emulator of it.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            outcome => return outcome,
        }
        // Room for a piece, or an error, which `write` then reports.
        if poll_now(self.fd, PollFlags::OUT).is_empty() {
            return Err(Errno::AGAIN);
        }
        rustix::io::write(self.fd, terminal_chunk(bytes))
    }

    /// Writes some of the bytes once some can be taken, and returns how many.
    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize, Errno>> {
        loop {
            match self.try_write(bytes) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    ready!(registered(&mut self.io, self.fd)?.poll_writable(cx)).map_err(errno)?;
                }
                outcome => return Poll::Ready(outcome),
            }
        }
    }

    /// Prints an error message, as far as that goes without waiting.
    fn print_error(&self, message: &str) {
        let text = ["smolrx: ", message, "\n"].concat();
        let mut rest = text.as_bytes();
        while let Ok(count @ 1..) = self.try_write(rest) {
            rest = &rest[count..];
        }
    }
}

/// As many whole lines as a pipe takes whole or not at all (PIPE_BUF); of a longer line, a part.
fn atomic_chunk(text: &[u8]) -> &[u8] {
    let head = &text[..text.len().min(PIPE_BUF)];
    match head.iter().rposition(|&byte| byte == b'\n') {
        Some(index) => &head[..=index],
        None => head,
    }
}

/// What a writable terminal takes without blocking (so do pipes and sockets): 256 bytes, by which its
/// buffer grows. A newline goes alone, as the terminal makes two bytes of it (CR LF).
fn terminal_chunk(text: &[u8]) -> &[u8] {
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
    Ok(leak(anew?).as_fd())
}

// ---------------------------------------------------------------- text

/// A line as text: stripped, and with all that could break the line or talk to the terminal escaped as Rust
/// writes it, `\u{1b}` for ESC. (Backslashes stay as they are: this is to be read, not to be undone.)
fn text_of(line: &[u8]) -> String {
    let plain = line.trim_ascii();
    // Most lines need no more.
    if plain.iter().all(|byte| matches!(byte, b' '..=b'~')) {
        return String::from_utf8_lossy(plain).into_owned();
    }
    let mut text = String::new();
    for character in String::from_utf8_lossy(line).trim().chars() {
        match character {
            '\t' => text.push_str("\\t"),
            '\r' => text.push_str("\\r"),
            _ if is_hostile(character) => {
                text.push_str("\\u{");
                push_number(&mut text, character.into(), 16);
                text.push('}');
            }
            _ => text.push(character),
        }
    }
    text.shrink_to_fit(); // the subject counts its length alone
    text
}

/// Control characters, and those that break lines or reorder them (Unicode's bidi controls).
fn is_hostile(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
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

// ---------------------------------------------------------------- errors

/// The error message for an operation that failed: what can't be done, and why.
fn failure(what: &str, error: Errno) -> String {
    ["cannot ", what, ": ", &error_text(error)].concat()
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// What went wrong, in words. The standard library's own, for every number, would cost 2 kB more.
fn error_text(error: Errno) -> String {
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
// `--health` asks a running server through a Unix socket, and where there is none through TCP.

/// An abstract Unix socket. A server answers by three names: `address:port`, `port`, and, if it is the first
/// one in its network namespace, the empty name.
fn health_address(name: &str) -> Result<SocketAddrUnix, Errno> {
    SocketAddrUnix::new_abstract_name(["smolrx ", name].concat().as_bytes())
}

/// A datagram socket: to answer takes neither a connection nor a descriptor, and a full server is not ill.
fn health_socket(name: &str) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    net::bind(&socket, &health_address(name)?)?;
    Ok(socket)
}

impl Server {
    /// Answers those who ask for its health, for as long as the loop turns. A server that stops leaves its
    /// names to the next one.
    async fn answer_probes(&self, socket: OwnedFd) {
        let Ok(io) = Async::new_nonblocking(socket.as_fd()) else { return };
        while !self.is_stopping() {
            match net::recvfrom(&socket, &mut [0][..], RecvFlags::empty()) {
                Ok((_, _, from)) => {
                    let _ = from.map(|from| net::sendto(&socket, &[], SendFlags::empty(), &from));
                    future::yield_now().await;
                }
                Err(_) => poll_fn(|cx| self.poll_readable(cx, &io)).await,
            }
        }
    }
}

/// Asks a server here through its socket, and any other as a TCP client that sends nothing and
/// expects it to close: which proves that it accepts and serves, and is no event. Within two seconds.
fn probe(address: SocketAddr, name: &str) -> Result<(), String> {
    let (who, answer) = match ask(name) {
        Err(Errno::CONNREFUSED) => (address_text(address), connect_and_read(address)),
        answer => (String::from("the server"), answer),
    };
    let trouble = match answer {
        Ok(0) => return Ok(()),
        Ok(_) => String::from("is another server"),
        Err(Errno::AGAIN | Errno::INPROGRESS) => String::from("is not healthy: it does not answer"),
        Err(error) => ["is not healthy: ", &error_text(error)].concat(),
    };
    Err([&*who, " ", &trouble].concat())
}

fn ask(name: &str) -> Result<usize, Errno> {
    let socket = socket_with_timeout(AddressFamily::UNIX, SocketType::DGRAM)?;
    net::bind(&socket, &SocketAddrUnix::new_unnamed())?; // any name: it needs one to be answered
    net::connect(&socket, &health_address(name)?)?;
    net::send(&socket, &[], SendFlags::empty())?;
    rustix::io::read(&socket, &mut [0])
}

fn connect_and_read(address: SocketAddr) -> Result<usize, Errno> {
    let address = SocketAddrAny::from(address);
    let socket = socket_with_timeout(address.address_family(), SocketType::STREAM)?;
    net::connect(&socket, &address)?;
    // A TCP self-connect: where nobody listens on the port, the kernel may choose it as our own.
    if net::getsockname(&socket)? == net::getpeername(&socket)?.ok_or(Errno::NOTCONN)? {
        return Err(Errno::CONNREFUSED);
    }
    net::shutdown(&socket, Shutdown::Write)?;
    rustix::io::read(&socket, &mut [0])
}

/// A socket whose calls fail after a second.
fn socket_with_timeout(family: AddressFamily, kind: SocketType) -> Result<OwnedFd, Errno> {
    let socket = net::socket(family, kind, None)?;
    // Linux: the limit for sending is the one for connecting, too.
    for limit in [Timeout::Send, Timeout::Recv] {
        sockopt::set_socket_timeout(&socket, limit, Some(Duration::from_secs(1)))?;
    }
    Ok(socket)
}
