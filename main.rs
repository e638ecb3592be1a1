//! A TCP server whose lines become a debounced event stream: Rx's operators as futures-lite streams.
//!
//! ```text
//! cargo run --release
//! echo foo | nc localhost 8888
//! ```
//!
//! Read from the top, this file follows one line from the socket to the screen: the program and its
//! pipeline, the options, what tasks wait for, the server, a connection, its memory, the subject, the
//! operators, standard output, text, and the health check.

#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::mem::{self, MaybeUninit};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::thread;
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
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrAny, SocketAddrUnix};
use rustix::net::{SocketFlags, SocketType};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::stdio::{stderr, stdout};
// libc's `_exit`: the end of the process, and nothing else.
use signal_hook::low_level::exit;
use smol::{Async, Task, Timer};

#[cfg(not(target_os = "linux"))]
compile_error!("smolrx runs on Linux; elsewhere, run its container image");

// ---------------------------------------------------------------- the program

/// Ends with `_exit`: nothing is buffered, and so std's clean-up after `main` would do nothing (1.2 kB).
fn main() -> ! {
    // Blocked, they leave it at an error from `write`, which gets its sentence. Blocking can't fail.
    let _ = SigSet::from_iter([SIGPIPE, SIGXFSZ]).thread_block();
    let (status, message) = match Command::parse(lexopt::Parser::from_env()).map(Command::run) {
        Ok(Ok(())) => exit(0),
        Ok(Err(message)) => (1, message),
        Err(message) => (2, format!("{message}; see smolrx --help")),
    };
    // Where writing blocks all the same, a signal must be able to end it.
    let _ = Signals::mask().thread_unblock();
    complain(open_anew(stderr()).unwrap_or(stderr()), &message);
    exit(status)
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

/// Serves until a signal ends it or stdout fails, the error being the sentence to print.
fn serve(options: Options) -> Result<(), String> {
    let signals = Signals::block().map_err(|error| failure("wait for signals", error))?;
    let output = Output::to(stdout()).map_err(|error| failure("write to stdout", error))?;
    raise_descriptor_limit();
    smol::block_on(async {
        let wanted = options.address;
        let listener =
            listen(wanted).map_err(|error| failure(&format!("listen on {}", address_text(wanted)), error))?;
        let address = local_address(&listener).unwrap_or(wanted);
        let (address, port) = (address_text(address), decimal(address.port().into()));
        // Tasks borrow the server for as long as the process lives.
        let server: &'static Server = Box::leak(Box::new(Server::new(options)));
        server.transcript.remark(&["Serving on ", &address]);

        let served = server.spawn(server.serve_clients(listener));
        server.spawn(server.stop_on_signals(signals)).detach();
        server.spawn(server.wake_the_overdue()).detach();
        server.spawn(observe(server, served)).detach();
        for name in [health_name(""), health_name(&port), health_name(&address)] {
            match health_socket(&name) {
                Ok(socket) => server.spawn(answer_probes(socket)).detach(),
                // Another server of this network namespace has that name: it is the one to ask.
                Err(Errno::ADDRINUSE) => {}
                Err(error) => server.complain(&failure("answer --health", error)),
            }
        }
        let written = server.spawn(server.transcript.write(output));
        // What `executor.run` does, without its queues for work stealing (3 kB).
        let run = async {
            loop {
                for _ in 0..TASKS_A_TURN {
                    server.executor.tick().await;
                }
                future::yield_now().await;
            }
        };
        future::or(written, run).await;
        written_out(server.transcript.failed.get())
    })
}

/// The experiment itself: subject → merge(timer) → debounce → observer.
///
/// It goes on until the server has `served` its last client and nothing is pending.
async fn observe(server: &'static Server, served: Task<()>) {
    let Options { interval, debounce, max_wait, .. } = server.options;
    let clock = timer(Realtime, Duration::ZERO, interval).map(decimal);
    let mut events = pin!(
        server
            .lines
            .observe()
            .merge(stream::stop_after_future(clock, served))
            .debounce(Realtime, debounce, max_wait)
    );
    while let Some(event) = events.next().await {
        poll_fn(|cx| server.transcript.poll_ready(cx)).await;
        server.transcript.event(&event);
    }
    server.transcript.close();
}

/// What an operation that failed is reported as.
fn failure(what: &str, error: Errno) -> String {
    format!("cannot {what}: {}", reason(error))
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
    /// The error is a sentence that names the option as it was typed.
    pub fn parse(mut args: lexopt::Parser) -> Result<Command, String> {
        use lexopt::Arg::{Long, Short, Value};

        let (mut bind, mut port) = (None, None);
        let (mut interval, mut debounce, mut max_wait, mut timeout) = (60_000, None, None, 60_000);
        let (mut max_conns, mut max_line) = (1024, 65_536);
        let (mut keep_open, mut quiet, mut health) = (false, false, false);
        loop {
            match args.next().map_err(sentence)? {
                Some(Long("tcp-port")) => port = Some(number(&mut args, "tcp-port", 0, 65_535)?),
                Some(Long("interval")) => interval = number(&mut args, "interval", 10, u32::MAX)?,
                Some(Long("debounce")) => debounce = Some(number(&mut args, "debounce", 1, u32::MAX)?),
                Some(Long("max-wait")) => max_wait = Some(number(&mut args, "max-wait", 1, u32::MAX)?),
                Some(Long("bind")) => {
                    let typed = value(&mut args)?;
                    let address: Option<IpAddr> = typed.parse().ok();
                    bind = Some(address.ok_or_else(|| misfit("bind", "an IPv4 or IPv6 address", &typed))?);
                }
                Some(Long("keep-open")) => keep_open = true,
                Some(Long("max-conns")) => max_conns = number(&mut args, "max-conns", 1, u32::MAX)?,
                Some(Long("max-line")) => max_line = number(&mut args, "max-line", 1, u32::MAX - 1)?,
                Some(Long("timeout")) => timeout = number(&mut args, "timeout", 1, u32::MAX)?,
                Some(Short('q') | Long("quiet")) => quiet = true,
                Some(Long("health")) => health = true,
                Some(Short('h') | Long("help")) => return Ok(Command::Print(HELP)),
                Some(Short('V') | Long("version")) => {
                    return Ok(Command::Print(concat!("smolrx ", env!("CARGO_PKG_VERSION"), "\n")));
                }
                Some(Value(word)) => return Err(format!("unexpected argument '{}'", word.to_string_lossy())),
                Some(Long(option)) => return Err(format!("unknown option '--{option}'")),
                Some(Short(option)) => return Err(format!("unknown option '-{option}'")),
                None => break,
            }
        }
        let address =
            SocketAddr::new(bind.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), port.unwrap_or(8888) as u16);
        if health {
            let by = match (bind, port) {
                (None, None) => String::new(),
                (None, Some(port)) => decimal(port.into()),
                _ => address_text(address),
            };
            return Ok(Command::Health(Asked { address, by }));
        }
        let milliseconds = |number: u32| Duration::from_millis(number.into());
        Ok(Command::Serve(Options {
            address,
            interval: milliseconds(interval),
            debounce: milliseconds(debounce.unwrap_or(interval / 10)),
            max_wait: max_wait.map(milliseconds),
            keep_open,
            max_conns: max_conns as usize,
            max_line: max_line as usize,
            timeout: milliseconds(timeout),
            quiet,
        }))
    }
}

/// The whole number that follows an option.
fn number(args: &mut lexopt::Parser, option: &str, min: u32, max: u32) -> Result<u32, String> {
    let typed = value(args)?;
    let number = typed.parse().ok().filter(|number| (min..=max).contains(number));
    number.ok_or_else(|| {
        let wanted = format!("a whole number from {} to {}", decimal(min.into()), decimal(max.into()));
        misfit(option, &wanted, &typed)
    })
}

/// What follows an option.
fn value(args: &mut lexopt::Parser) -> Result<String, String> {
    let typed = args.value().map_err(sentence)?;
    Ok(typed.to_string_lossy().into_owned())
}

fn misfit(option: &str, wanted: &str, typed: &str) -> String {
    format!("option '--{option}' takes {wanted}, not '{typed}'")
}

/// lexopt's own sentences print values with `Debug`, which the image compiles away.
fn sentence(error: lexopt::Error) -> String {
    match error {
        lexopt::Error::MissingValue { option: Some(option) } => format!("option '{option}' needs a value"),
        lexopt::Error::UnexpectedValue { option, .. } => format!("option '{option}' takes no value"),
        _ => String::from("unexpected argument"),
    }
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

    /// Waits for the next change.
    fn wait(&self) -> impl Future<Output = ()> {
        let waited = Cell::new(false);
        self.wait_until(move || waited.replace(true))
    }

    pub fn wake_all(&self) {
        for task in self.0.borrow_mut().drain(..) {
            task.wake();
        }
    }
}

/// SIGINT and SIGTERM, as a descriptor to read.
struct Signals(Async<SignalFd>);

impl Signals {
    fn mask() -> SigSet {
        SigSet::from_iter([SIGINT, SIGTERM])
    }

    /// To be called before the first thread is started: threads inherit what is blocked.
    fn block() -> Result<Signals, Errno> {
        let _ = Self::mask().thread_block();
        let signals = SignalFd::with_flags(&Self::mask(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(|error| errno(error.into()))?;
        Ok(Signals(Async::new_nonblocking(signals).map_err(errno)?))
    }

    /// The number of the next signal.
    async fn next(&self) -> i32 {
        loop {
            if let Ok(Some(signal)) = self.0.get_ref().read_signal() {
                return signal.ssi_signo as i32;
            }
            let _ = poll_fn(|cx| self.0.poll_readable(cx)).await;
        }
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
    stderr: Option<Output>,
    memory: LineMemory,
    /// The clients that are connected, by descriptor.
    clients: RefCell<Vec<Option<Rc<Client>>>>,
    /// How many they are.
    pub connected: Cell<usize>,
    /// Waits for the signal to stop.
    acceptor: Waiters,
    /// Wait until a client has left.
    departure: Waiters,
    /// When the overdue are woken next, if anybody is waited for.
    next_waking: Cell<Option<Instant>>,
    /// Waits for a client that is due before that.
    earlier: Waiters,
    /// The descriptor at which the turn of those who wait for memory begins.
    turn: Cell<usize>,
    /// Set by the first signal: when clients are waited for no longer.
    grace_end: Cell<Option<Instant>>,
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
            memory: LineMemory::default(),
            options,
            executor: StaticLocalExecutor::new(),
            lines: Subject::default(),
            stderr: Output::to(stderr()).ok(),
            clients: RefCell::default(),
            connected: Cell::default(),
            acceptor: Waiters::default(),
            departure: Waiters::default(),
            next_waking: Cell::default(),
            earlier: Waiters::default(),
            turn: Cell::default(),
            grace_end: Cell::default(),
        }
    }

    /// Starts a task. All are of one type to the executor: each would bring its own code (4 kB).
    fn spawn(&'static self, future: impl Future<Output = ()> + 'static) -> Task<()> {
        self.executor.spawn(future.boxed_local())
    }

    /// Serves clients until the first signal and until the last one has left, and completes the subject.
    async fn serve_clients(&'static self, listener: Arc<Async<TcpListener>>) {
        self.accept(&listener).await;
        drop(listener);
        self.departure.wait_until(|| self.connected.get() == 0).await;
        self.lines.on_completed();
    }

    /// Stops at the first signal; the second one is the end.
    async fn stop_on_signals(&self, signals: Signals) {
        signals.next().await;
        self.grace_end.set(Some(Instant::now() + GRACE));
        self.acceptor.wake_all();
        self.clients.borrow().iter().flatten().for_each(|client| client.wake());
        exit(128 + signals.next().await)
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
                        self.complain(&format!("{}; trying again", failure("accept", error)));
                    }
                    sleep(BACK_OFF).await;
                }
            }
        }
    }

    /// Starts the task of a new client.
    pub fn welcome(&'static self, socket: TcpStream, peer: SocketAddr) {
        let descriptor = socket.as_raw_fd() as usize;
        let client = Rc::new(Client {
            socket,
            peer,
            due: Cell::default(),
            task: Cell::default(),
            starved: Cell::default(),
        });
        let mut clients = self.clients.borrow_mut();
        while clients.len() <= descriptor {
            clients.push(None);
        }
        clients[descriptor] = Some(client.clone());
        self.connected.set(self.connected.get() + 1);
        let task = async move {
            Connection::new(self, &client).converse().await;
            self.clients.borrow_mut()[descriptor] = None;
            self.connected.set(self.connected.get() - 1);
            self.departure.wake_all();
        };
        self.spawn(task).detach();
    }

    /// Wakes the tasks of the clients whose time is over, an eighth of the timeout late at most:
    /// each of them tries once more and then judges. One timer serves all, and none while there is
    /// nobody to wait for; never returns.
    async fn wake_the_overdue(&self) {
        let pause = LOOK_AGAIN.min(self.options.timeout / 8);
        loop {
            let now = Instant::now();
            let mut next = None;
            for client in self.clients.borrow().iter().flatten() {
                match client.due.get() {
                    Some(due) if due <= now => client.wake(),
                    Some(due) if next.is_none_or(|next| due < next) => next = Some(due),
                    _ => {}
                }
            }
            self.next_waking.set(next);
            match next {
                Some(next) => {
                    let timer = sleep(next.max(now + pause) - now);
                    future::or(timer, self.earlier.wait()).await;
                }
                None => self.earlier.wait().await,
            }
        }
    }

    /// Wakes the next client that waits for memory; they take turns.
    fn wake_a_starved_client(&self) {
        let clients = self.clients.borrow();
        let (before, after) = clients.split_at(self.turn.get().min(clients.len()));
        if let Some(client) = after.iter().chain(before).flatten().find(|client| client.starved.get()) {
            self.turn.set(client.socket.as_raw_fd() as usize + 1);
            client.wake();
        }
    }

    fn is_stopping(&self) -> bool {
        self.grace_end.get().is_some()
    }

    fn grace_is_over(&self) -> bool {
        self.grace_end.get().is_some_and(|end| end <= Instant::now())
    }

    /// Ready when transcript and subject take more: back-pressure instead of memory.
    fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<()> {
        ready!(self.transcript.poll_ready(cx));
        self.lines.poll_ready(cx)
    }

    /// A line was received whole.
    fn receive(&self, line: &[u8], peer: &str) {
        let text = text_of(line);
        self.transcript.received(&text, peer);
        self.lines.on_next(text);
    }

    /// Prints a sentence on stderr, unless it would have to wait.
    fn complain(&self, sentence: &str) {
        if let Some(output) = &self.stderr {
            complain(output.fd, sentence);
        }
    }
}

// ---------------------------------------------------------------- a connection

/// Bytes that are read at once, unless a longer line is under way.
const CHUNK: usize = 4096;
/// Bytes of echo that leave at once, whatever the client's window and segments are like; they
/// can't be lost when the connection closes behind them.
const LEAVES_AT_ONCE: usize = 512;
/// When a client that waits for memory looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// What the server knows of a client.
struct Client {
    /// Non-blocking.
    socket: TcpStream,
    peer: SocketAddr,
    /// When to wake the task that waits for it, if one does.
    due: Cell<Option<Instant>>,
    task: Cell<Option<Waker>>,
    /// Its bytes are there, and there is no memory for them.
    starved: Cell<bool>,
}

impl Client {
    fn wake(&self) {
        self.due.set(None);
        if let Some(task) = self.task.take() {
            task.wake();
        }
    }
}

/// One client's conversation.
struct Connection<'a> {
    server: &'static Server,
    client: &'a Client,
    /// The reactor's registration, made once there is something to wait for: often there is not.
    io: Option<Async<&'a TcpStream>>,
    /// Bytes received and not yet echoed. While there are none it has no memory.
    buffer: Vec<u8>,
    memory: Share,
    /// So many bytes of the buffer are known to hold no newline.
    searched: usize,
    /// The part of the buffer that is still to be echoed.
    unsent: (usize, usize),
    /// Bytes echoed so far.
    echoed: usize,
    /// There may be bytes to read right now.
    readable: bool,
    /// When to stop waiting for the client, counted from its last byte; none while the server is at work for it.
    deadline: Option<Instant>,
    /// A line was received.
    received: bool,
    /// Why the echo was given up.
    gone: Option<Errno>,
    /// The conversation is over, and what the client still sends is passed over.
    lingering: bool,
    /// It waits, with a whole line in its socket, until the server takes one.
    queued: bool,
}

/// A direction of a connection.
#[derive(Clone, Copy, PartialEq)]
enum Direction {
    In,
    Out,
}

/// What a connection does next.
#[derive(PartialEq)]
enum Next {
    Read,
    /// Lines are left that the server can't take yet.
    Wait,
    Close,
}

impl<'a> Connection<'a> {
    fn new(server: &'static Server, client: &'a Client) -> Self {
        Connection {
            server,
            client,
            io: None,
            buffer: Vec::new(),
            memory: Share::default(),
            searched: 0,
            unsent: (0, 0),
            echoed: 0,
            readable: true,
            deadline: None,
            received: false,
            gone: None,
            lingering: false,
            queued: false,
        }
    }

    /// Receives lines and sends them back: one, or with `--keep-open` all that come.
    async fn converse(&mut self) {
        let mut next = Next::Read;
        let mut ended = false;
        while next != Next::Close {
            if next == Next::Wait {
                self.wait_for_the_server().await;
            } else {
                match self.read().await {
                    Ok(count) => ended = count == 0,
                    // It was reset, or waited for long enough: an unfinished line is no line.
                    Err(_) => break,
                }
            }
            next = self.receive_lines(ended);
            self.echo().await;
            if next == Next::Read && self.server.grace_is_over() {
                break;
            }
            if next == Next::Read && self.readable {
                // A client that never stops sending must not starve the others.
                future::yield_now().await;
            }
        }
        if !ended && self.gone.is_none() {
            // The echo's end goes first: a reset, should the client send more, comes too late for harm.
            let _ = net::shutdown(&self.client.socket, Shutdown::Write);
            if self.must_linger() {
                // Boxed: it is rare, and every connection would hold its state.
                Box::pin(self.linger()).await;
            }
        }
        self.buffer.clear();
        self.release();
        if self.received {
            self.server.transcript.remark(&["Close the client socket"]);
        }
    }

    /// Hands on the whole lines at the start of the buffer, as far as the server takes them, and
    /// marks them for the echo.
    fn receive_lines(&mut self, ended: bool) -> Next {
        let options = &self.server.options;
        let mut peer = String::new();
        let mut end = 0;
        let next = loop {
            match first_line(&self.buffer[end..], self.searched, ended, options.max_line) {
                Line::Whole(_) if !self.server.transcript.is_ready() || !self.server.lines.is_ready() => {
                    break Next::Wait;
                }
                Line::Whole(length) => {
                    if peer.is_empty() {
                        peer = address_text(self.client.peer);
                    }
                    self.server.receive(&self.buffer[end..end + length], &peer);
                    self.received = true;
                    self.searched = 0;
                    end += length;
                    if !options.keep_open {
                        break Next::Close;
                    }
                }
                Line::Partial if ended => break Next::Close,
                Line::Partial => {
                    self.searched = self.buffer.len() - end;
                    break Next::Read;
                }
                Line::TooLong => {
                    let (peer, longest) = (address_text(self.client.peer), decimal(options.max_line as u64));
                    self.server.complain(&format!("line from {peer} is longer than {longest} bytes"));
                    self.buffer.truncate(end);
                    break Next::Close;
                }
            }
        };
        self.unsent = (0, end);
        next
    }

    /// Waits until the server takes another line.
    fn wait_for_the_server(&mut self) -> impl Future<Output = ()> {
        poll_fn(|cx| {
            let ready = self.server.poll_ready(cx);
            self.readable |= ready.is_pending();
            ready
        })
    }

    /// Adds bytes to the buffer, waiting for them if there are none, and returns how many; 0 at the
    /// end of what the client sends. The error is why there will be no more.
    fn read(&mut self) -> impl Future<Output = Result<usize, Errno>> {
        poll_fn(|cx| match ready!(self.poll_io(cx, Direction::In)) {
            // After a failed echo, a reset looks like an end.
            Ok(0) if self.gone == Some(Errno::CONNRESET) => Poll::Ready(Err(Errno::CONNRESET)),
            outcome => Poll::Ready(outcome),
        })
    }

    /// Sends back what is marked for it as it came, and forgets it. If that fails, only the echo is
    /// given up: what else has arrived is received.
    fn echo(&mut self) -> impl Future<Output = ()> {
        poll_fn(|cx| {
            while self.gone.is_none() && self.unsent.0 < self.unsent.1 {
                self.gone = ready!(self.poll_io(cx, Direction::Out)).err();
            }
            self.buffer.drain(..self.unsent.1);
            Poll::Ready(())
        })
    }

    /// Whether bytes of the echo may be lost if the socket is closed now: when it is a long one, or
    /// when the client has sent bytes that nobody reads, which makes the kernel reset the connection.
    fn must_linger(&mut self) -> bool {
        let unread = || self.readable && self.discard().is_ok_and(|count| count > 0);
        self.echoed > LEAVES_AT_ONCE || self.received && (!self.buffer.is_empty() || unread())
    }

    /// Passes over what the client sends until it has the echo and closes, or the grace is over.
    async fn linger(&mut self) {
        self.buffer.clear();
        self.lingering = true;
        let end = Instant::now() + GRACE;
        self.deadline = Some(end);
        while let Ok(1..) = poll_fn(|cx| self.poll_io(cx, Direction::In)).await {
            if end <= Instant::now() || self.server.grace_is_over() {
                break;
            }
            future::yield_now().await;
        }
    }

    /// Attempts to read or to write until that succeeds or fails, waiting in between. Bytes that are
    /// there count before any clock does: the client is given up on after one more attempt only.
    fn poll_io(&mut self, cx: &mut Context<'_>, direction: Direction) -> Poll<Result<usize, Errno>> {
        let client = self.client;
        let (mut attempt, mut overdue) = (direction == Direction::Out || self.readable, false);
        loop {
            let mut starved = false;
            if attempt {
                match self.attempt(cx, direction) {
                    Err(Errno::AGAIN | Errno::INTR) => {}
                    Err(Errno::NOMEM) => starved = true,
                    Err(Errno::BUSY) => {
                        // It is the server that keeps the client waiting.
                        self.deadline = None;
                        client.due.set(None);
                        client.starved.set(false);
                        self.readable = true;
                        return Poll::Pending;
                    }
                    outcome => {
                        client.due.set(None);
                        client.starved.set(false);
                        if !self.lingering {
                            self.deadline = None;
                        }
                        return Poll::Ready(outcome);
                    }
                }
                if starved && !client.starved.replace(starved) {
                    // It has sent something: from now on it waits for the memory.
                    (self.deadline, overdue) = (None, false);
                }
                if overdue {
                    return Poll::Ready(Err(Errno::TIMEDOUT));
                }
            }
            client.starved.set(starved);
            if direction == Direction::In {
                self.release();
            }
            if !starved {
                let io = match &mut self.io {
                    Some(io) => io,
                    none => none.insert(Async::new_nonblocking(&client.socket).map_err(errno)?),
                };
                let poll_ready =
                    if direction == Direction::In { Async::poll_readable } else { Async::poll_writable };
                if let Poll::Ready(result) = poll_ready(io, cx) {
                    result.map_err(errno)?;
                    attempt = true;
                    continue;
                }
            }
            let now = Instant::now();
            let mut due = self.deadline(direction, now);
            if due > now {
                if starved {
                    due = due.min(now + LOOK_AGAIN);
                }
                // After a wait for anything but bytes to read, there may be some.
                self.readable = starved || direction == Direction::Out;
                client.task.set(Some(cx.waker().clone()));
                client.due.set(Some(due));
                if self.server.next_waking.get().is_none_or(|next| due < next) {
                    self.server.earlier.wake_all();
                }
                return Poll::Pending;
            }
            (attempt, overdue) = (true, true);
        }
    }

    fn attempt(&mut self, cx: &mut Context<'_>, direction: Direction) -> Result<usize, Errno> {
        match direction {
            Direction::In if self.lingering => self.discard(),
            Direction::In if self.reserve() => self.try_read(),
            Direction::In => self.try_read_line(cx),
            Direction::Out => {
                let (start, end) = self.unsent;
                let count = rustix::io::write(&self.client.socket, &self.buffer[start..end])?;
                self.unsent.0 += count;
                self.echoed = self.echoed.saturating_add(count);
                Ok(count)
            }
        }
    }

    /// When to stop waiting for the client: a timeout after its last byte, or at the end of the
    /// grace; at once if it is between two lines while the server stops.
    fn deadline(&mut self, direction: Direction, now: Instant) -> Instant {
        let deadline = *self.deadline.get_or_insert(now + self.server.options.timeout);
        match self.server.grace_end.get() {
            Some(_) if direction == Direction::In && self.is_between_lines() => now,
            Some(end) => deadline.min(end),
            None => deadline,
        }
    }

    fn is_between_lines(&self) -> bool {
        self.buffer.is_empty() && !self.client.starved.get() && !self.lingering
    }

    /// Adds the bytes that are there right now.
    fn try_read(&mut self) -> Result<usize, Errno> {
        let count = rustix::io::read(&self.client.socket, spare_capacity(&mut self.buffer))?;
        self.readable = self.buffer.len() == self.buffer.capacity();
        Ok(count)
    }

    /// Adds the bytes that are there up to the end of a line, if that is among them and if the line
    /// goes on at once: then no memory is needed for long. The error is NOMEM if that is not so, and
    /// BUSY if it is the server that does not take the line.
    fn try_read_line(&mut self, cx: &mut Context<'_>) -> Result<usize, Errno> {
        if mem::take(&mut self.queued) && self.server.poll_ready(cx).is_pending() {
            // Not even a look: thousands may be woken for the room of one line.
            self.queued = true;
            return Err(Errno::BUSY);
        }
        let mut chunk = [0; CHUNK];
        let (_, count) = net::recv(&self.client.socket, &mut chunk[..], RecvFlags::PEEK)?;
        let length = match chunk[..count].iter().position(|&byte| byte == b'\n') {
            Some(index) => index + 1,
            None if count == 0 => return Ok(0),
            None if self.buffer.len() + count > self.server.options.max_line => count,
            None => return Err(Errno::NOMEM),
        };
        if self.server.poll_ready(cx).is_pending() {
            self.queued = true;
            return Err(Errno::BUSY);
        }
        if self.gone.is_none() && !is_writable(self.client.socket.as_fd()) {
            return Err(Errno::NOMEM);
        }
        let length = rustix::io::read(&self.client.socket, &mut chunk[..length])?;
        self.buffer.reserve_exact(length);
        self.buffer.extend_from_slice(&chunk[..length]);
        self.readable = true;
        Ok(length)
    }

    /// Passes over the bytes that are there right now.
    fn discard(&self) -> Result<usize, Errno> {
        let mut chunk = [MaybeUninit::uninit(); CHUNK];
        let (bytes, _) = rustix::io::read(&self.client.socket, &mut chunk)?;
        Ok(bytes.len())
    }

    /// Makes room for more bytes: a chunk, or for a longer line up to as much again, never beyond
    /// the longest line, and no more than there is memory. Returns whether there is room.
    fn reserve(&mut self) -> bool {
        if self.buffer.is_empty() && self.buffer.capacity() > self.memory.bytes && !self.memory.long {
            // From a line that went on at once; it does not count, and may not be filled again.
            self.release();
        }
        let length = self.buffer.len();
        if length < self.buffer.capacity() {
            return true;
        }
        let limit = (self.server.options.max_line + 1).max(CHUNK);
        let wanted = length.max(CHUNK).min(limit - length);
        let granted = self.memory.extend(&self.server.memory, length, wanted);
        if granted == CHUNK && length == 0 {
            self.buffer = self.server.memory.chunk.take();
        }
        self.buffer.reserve_exact(granted);
        granted > 0
    }

    /// Gives memory back before a wait: an empty buffer whole, what another may hold no more.
    fn release(&mut self) {
        if !self.buffer.is_empty() {
            self.buffer.shrink_to(2 * self.buffer.len());
        } else if self.buffer.capacity() == CHUNK {
            self.server.memory.chunk.set(mem::take(&mut self.buffer));
        } else {
            self.buffer = Vec::new();
        }
        if self.memory.shrink_to(&self.server.memory, self.buffer.capacity()) {
            self.server.wake_a_starved_client();
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

// ---------------------------------------------------------------- memory for lines

/// Bytes of lines up to a chunk, over all connections.
const SHORT_LINES: usize = 256 * 1024;
/// Connections that may hold more than a chunk, up to the longest line.
const LONG_LINES: usize = 8;

/// Memory for lines that are not yet received or not yet echoed, over all connections. Whoever may
/// hold more than a chunk can have its whole line: no two wait for each other.
struct LineMemory {
    /// Bytes for short lines that nobody holds.
    short: Cell<usize>,
    /// Places for long lines that nobody has.
    long: Cell<usize>,
    /// A read buffer that nobody uses right now.
    chunk: Cell<Vec<u8>>,
}

impl Default for LineMemory {
    fn default() -> Self {
        LineMemory { short: Cell::new(SHORT_LINES), long: Cell::new(LONG_LINES), chunk: Cell::default() }
    }
}

/// A connection's share of it.
#[derive(Default)]
struct Share {
    /// Bytes held of those for short lines.
    bytes: usize,
    /// It has a place for a long line.
    long: bool,
}

impl Share {
    /// Takes more bytes for a buffer of a length, and returns how many there are.
    fn extend(&mut self, memory: &LineMemory, length: usize, wanted: usize) -> usize {
        let short = memory.short.get();
        let granted = wanted.min(short).min(CHUNK.saturating_sub(length));
        if !self.long && granted > 0 {
            memory.short.set(short - granted);
            self.bytes += granted;
            return granted;
        }
        if !self.long && memory.long.get() > 0 {
            memory.long.set(memory.long.get() - 1);
            memory.short.set(short + mem::take(&mut self.bytes));
            self.long = true;
        }
        if self.long { wanted } else { 0 }
    }

    /// Gives back all but so many bytes; returns whether a place for a long line is free again.
    fn shrink_to(&mut self, memory: &LineMemory, bytes: usize) -> bool {
        let short = memory.short.get();
        if !self.long {
            let bytes = bytes.min(self.bytes);
            memory.short.set(short + mem::replace(&mut self.bytes, bytes) - bytes);
        } else if bytes <= short.min(CHUNK) {
            *self = Share { bytes, long: false };
            memory.short.set(short - bytes);
            memory.long.set(memory.long.get() + 1);
            return true;
        }
        false
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
    /// Callers wait before, until it is ready.
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

/// The bytes that an item counts for: its own, and those of a place in the queue.
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

/// The time of the clock on the wall.
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
    /// debounce(3, 5)      -----2----5----7---|
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
                Poll::Ready(item) => return Poll::Ready(item),
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

/// What a pipe takes whole or not at all (POSIX: PIPE_BUF).
const AT_ONCE: usize = 4096;

/// What goes to stdout. Tasks add whole lines; one task writes all that a turn of the executor
/// has left, so that a batch costs one system call and a lone line still appears at once.
#[derive(Default)]
pub struct Transcript {
    quiet: bool,
    pub text: RefCell<String>,
    /// Bytes that are being written.
    writing: Cell<usize>,
    closing: Cell<bool>,
    /// Why nothing can be written any more.
    failed: Cell<Option<Errno>>,
    /// Waits for something to write.
    writer: Waiters,
    /// Wait for room.
    pub callers: Waiters,
}

impl Transcript {
    fn received(&self, line: &str, peer: &str) {
        self.remark(&["Received ", line, " from ", peer, "\nSend: ", line]);
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

    /// Writes what is added, until the transcript is closed or the output has failed.
    async fn write(&self, mut output: Output) {
        loop {
            self.writer.wait_until(|| self.closing.get() || !self.text.borrow().is_empty()).await;
            let text = self.text.take();
            if text.is_empty() {
                return output.end().await;
            }
            self.writing.set(text.len());
            let mut rest = text.as_bytes();
            while !rest.is_empty() {
                match output.write(batch(rest)).await {
                    Ok(count) => rest = &rest[count..],
                    Err(error) => return self.failed.set(Some(error)),
                }
            }
            self.writing.set(0);
            self.callers.wake_all();
        }
    }
}

/// As many whole lines as a pipe takes at once, or a part of one that is longer.
fn batch(text: &[u8]) -> &[u8] {
    if text.len() <= AT_ONCE {
        return text;
    }
    let head = &text[..AT_ONCE];
    match head.iter().rposition(|&byte| byte == b'\n') {
        Some(index) => &head[..index + 1],
        None => head,
    }
}

/// A standard stream that is written to without ever blocking.
struct Output {
    /// Non-blocking, or a regular file.
    fd: BorrowedFd<'static>,
    /// A thread carries on from here what is written.
    relayed: bool,
    /// The reactor's registration, made once there is something to wait for.
    io: Option<Async<BorrowedFd<'static>>>,
}

impl Output {
    fn to(stream: BorrowedFd<'static>) -> Result<Output, Errno> {
        let anew = open_anew(stream);
        Ok(Output { relayed: anew.is_err(), fd: anew.or_else(|_| relay(stream))?, io: None })
    }

    /// Writes some of the bytes once some can be taken, and returns how many.
    fn write(&mut self, bytes: &[u8]) -> impl Future<Output = Result<usize, Errno>> {
        poll_fn(|cx| {
            loop {
                match rustix::io::write(self.fd, bytes) {
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
        })
    }

    /// Returns when all is delivered; where a thread delivers it, that one ends the process.
    async fn end(self) {
        if self.relayed {
            let _ = net::shutdown(self.fd, Shutdown::Write);
            future::pending().await
        }
    }
}

/// Opens the file of a stream once more, non-blocking: making the stream itself so would be felt by
/// all who share it. A regular file blocks nobody, and has its place to write at in the stream.
fn open_anew(stream: BorrowedFd<'static>) -> Result<BorrowedFd<'static>, Errno> {
    if FileType::from_raw_mode(fs::fstat(stream)?.st_mode) == FileType::RegularFile {
        return Ok(stream);
    }
    let path = if is_stdout(stream) { c"/proc/self/fd/1" } else { c"/proc/self/fd/2" };
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(forever(fs::open(path, flags, Mode::empty())?))
}

/// A way to a stream that can't be opened anew (a socket, or a pipe or terminal of another user's): a
/// socket, and at its other end a thread that may block on the stream in our place.
fn relay(stream: BorrowedFd<'static>) -> Result<BorrowedFd<'static>, Errno> {
    let (near, far) = net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::io::ioctl_fionbio(&near, true)?;
    let copy = move || {
        let outcome = written_out(copy(&far, stream));
        // The last byte is delivered, or none can be any more. Without stdout that is the end.
        if is_stdout(stream) {
            let Err(message) = outcome else { exit(0) };
            complain(open_anew(stderr()).unwrap_or(stderr()), &message);
            exit(1);
        }
        loop {
            thread::park();
        }
    };
    thread::Builder::new().spawn(copy).map_err(errno)?;
    Ok(forever(near))
}

/// Copies all that comes; returns why it could go no further, if that is so.
fn copy(from: &OwnedFd, to: BorrowedFd) -> Option<Errno> {
    let mut chunk = [0; CHUNK];
    loop {
        let mut rest = match rustix::io::read(from, &mut chunk) {
            Ok(0) => return None,
            Ok(count) => &chunk[..count],
            Err(_) => &[],
        };
        while !rest.is_empty() {
            match rustix::io::write(to, rest) {
                Ok(count) => rest = &rest[count..],
                Err(Errno::INTR) => {}
                // Somebody else has made it non-blocking.
                Err(Errno::AGAIN) => drop(poll(&mut [PollFd::new(&to, PollFlags::OUT)], None)),
                Err(error) => return Some(error),
            }
        }
    }
}

/// What it means when writing to stdout has come to this end.
fn written_out(failed: Option<Errno>) -> Result<(), String> {
    match failed {
        // The reader of a closed pipe has seen what it wanted.
        None | Some(Errno::PIPE) => Ok(()),
        Some(error) => Err(failure("write to stdout", error)),
    }
}

fn is_stdout(stream: BorrowedFd) -> bool {
    stream.as_raw_fd() == stdout().as_raw_fd()
}

/// A descriptor that is open for as long as the process lives.
fn forever(fd: OwnedFd) -> BorrowedFd<'static> {
    let fd: &'static OwnedFd = Box::leak(Box::new(fd));
    fd.as_fd()
}

fn complain(fd: BorrowedFd, sentence: &str) {
    let _ = rustix::io::write(fd, format!("smolrx: {sentence}\n").as_bytes());
}

fn is_writable(fd: BorrowedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(&fd, PollFlags::OUT)], Some(&now)) == Ok(1)
}

// ---------------------------------------------------------------- text

/// A received line as everybody sees it: as text, stripped, escaped.
pub fn text_of(line: &[u8]) -> String {
    escaped(String::from_utf8_lossy(line).trim())
}

/// Words so that they stay one line and can't talk to the terminal: what could do either is shown
/// as Rust writes it, `\u{1b}` for ESC.
fn escaped(words: &str) -> String {
    let mut text = String::new();
    let mut start = 0;
    for (end, character) in words.char_indices() {
        if is_hostile(character) {
            text.push_str(&words[start..end]);
            character.escape_default().for_each(|character| text.push(character));
            start = end + character.len_utf8();
        }
    }
    text.push_str(&words[start..]);
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
    format!("{words} (error {})", decimal(error.raw_os_error() as u64))
}

// ---------------------------------------------------------------- the health check

/// The abstract Unix socket at which a server is asked by its address and port, by its port, or
/// without either, which the first server of a network namespace has.
fn health_name(asked: &str) -> String {
    format!("smolrx {asked}")
}

/// A datagram socket: to answer takes neither a seat nor a descriptor, and a full server is not ill.
fn health_socket(name: &str) -> Result<Async<BorrowedFd<'static>>, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    net::bind(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
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
    let server = address_text(asked.address);
    let answer = match ask(&health_name(&asked.by)) {
        Err(Errno::CONNREFUSED) => connect_and_read(asked.address),
        answer => answer,
    };
    match answer {
        Ok(0) => Ok(()),
        Ok(_) => Err(format!("{server} is another server")),
        Err(Errno::AGAIN | Errno::INPROGRESS) => Err(format!("{server} is not healthy: it does not answer")),
        Err(error) => Err(format!("{server} is not healthy: {}", reason(error))),
    }
}

fn ask(name: &str) -> Result<usize, Errno> {
    let socket = patient_socket(AddressFamily::UNIX, SocketType::DGRAM)?;
    net::bind(&socket, &SocketAddrUnix::new_unnamed())?; // any name: it needs one to be answered
    net::connect(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
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

/// Raises the soft limit of descriptors to the hard one: a connection is a descriptor.
fn raise_descriptor_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    // What can't be raised stays, and `accept` says when it is too little.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}
