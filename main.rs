//! A TCP server whose lines become a debounced event stream: Rx's operators as futures-lite streams.
//!
//! ```text
//! cargo run --release
//! echo foo | nc localhost 8888
//! ```
//!
//! Read from the top, this file follows one line from the socket to the screen: the program and its
//! pipeline, the options, the server, a connection, the subject, the operators, the log, the signals.

#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::mem;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use async_executor::StaticLocalExecutor;
use futures_lite::future::{self, FutureExt};
use futures_lite::stream::{self, Stream, StreamExt};
use nix::sys::signal::{SIGINT, SIGPIPE, SIGTERM, SigSet};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use pin_project_lite::pin_project;
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::BorrowedFd;
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{self, AddressFamily, Shutdown, SocketAddrAny, SocketFlags, SocketType};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::stdio::{stderr, stdout};
use signal_hook::low_level::exit;
use smol::{Async, Task, Timer};

#[cfg(not(target_os = "linux"))]
compile_error!("smolrx runs on Linux; elsewhere, run its container image");

// ---------------------------------------------------------------- the program

/// Ends with `_exit`: nothing is buffered, and so std's clean-up after `main` would do nothing (1.2 kB).
fn main() -> ! {
    // With SIGPIPE blocked, writing to what nobody reads is an error, not the end. Blocking can't fail.
    let _ = SigSet::from_iter([SIGPIPE]).thread_block();
    let (status, message) = match Command::parse(lexopt::Parser::from_env()).map(Command::run) {
        Ok(Ok(())) => exit(0),
        Ok(Err(message)) => (1, message),
        Err(message) => (2, format!("{message}; see smolrx --help")),
    };
    complain(&message);
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
    let signals = Signals::block().map_err(|error| format!("cannot wait for signals: {}", reason(error)))?;
    raise_descriptor_limit();
    smol::block_on(async {
        let address = options.address;
        let listener = bind(address)
            .map_err(|error| format!("cannot listen on {}: {}", shown(address), reason(error)))?;
        // Tasks borrow the server for as long as the process lives.
        let server: &'static Server = Box::leak(Box::new(Server::new(options)));
        server.log.remark(&["Serving on ", &shown(local_address(&listener).unwrap_or(address))]);

        let served = server.spawn(server.serve(listener, signals));
        server.spawn(server.close_the_idle()).detach();
        server.spawn(observe(server, served)).detach();
        let written = server.spawn(server.log.write());
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
        match server.log.failed.get() {
            // The reader of a closed pipe has seen what it wanted.
            None | Some(Errno::PIPE) => Ok(()),
            Some(error) => Err(format!("cannot write to stdout: {}", reason(error))),
        }
    })
}

/// The experiment itself: subject → map → merge(timer) → debounce → observer.
///
/// It goes on until the server has `served` its last client and nothing is pending.
async fn observe(server: &'static Server, served: Task<()>) {
    let interval = server.options.interval;
    let lines = server.lines.observe().map(|line| text_of(&line));
    let clock = timer(Realtime, Duration::ZERO, interval).map(decimal);
    let mut events =
        pin!(lines.merge(stream::stop_after_future(clock, served)).debounce(Realtime, interval / 10));

    while let Some(event) = events.next().await {
        poll_fn(|cx| server.log.poll_room(cx)).await;
        server.log.line(&["Observing ", &event]);
    }
    server.log.close();
}

/// What the operators work on: the line as text, stripped, safe to print.
pub fn text_of(line: &[u8]) -> String {
    let mut text = String::new();
    push_escaped(&mut text, String::from_utf8_lossy(line).trim());
    text
}

// ---------------------------------------------------------------- the options

const HELP: &str = "\
Usage: smolrx [OPTION]...
A TCP server whose lines become a debounced event stream.

  --tcp-port PORT   port to listen on; 0 takes a free one [8888]
  --interval MS     period of the clock; a tenth of it is the debounce;
                    at least 10 [60000]
  --bind ADDR       IPv4 or IPv6 address to listen on [0.0.0.0]
  --keep-open       serve every line until the client closes
  --max-conns N     connections served at once; more wait in the backlog,
                    none is refused [1024]
  --max-line BYTES  longest line, its ending included [65536]
  --timeout MS      a connection that neither sends nor takes a byte for so
                    long is closed [60000]
  -q, --quiet       print only what is observed
  --health          probe the server on --bind:--tcp-port, exit 0 or 1
  -h, --help        print this
  -V, --version     print the version
";

/// What the command line asks for.
pub enum Command {
    Serve(Options),
    Health(SocketAddr),
    Print(&'static str),
}

pub struct Options {
    address: SocketAddr,
    /// Period of the clock.
    interval: Duration,
    keep_open: bool,
    max_conns: usize,
    /// Longest line in bytes, its ending included.
    max_line: usize,
    /// How long a connection may neither send nor take a byte.
    timeout: Duration,
    quiet: bool,
}

impl Command {
    /// The error is a sentence that names the option as it was typed.
    pub fn parse(mut args: lexopt::Parser) -> Result<Command, String> {
        use lexopt::Arg::{Long, Short, Value};

        let (mut ip, mut port) = (IpAddr::V4(Ipv4Addr::UNSPECIFIED), 8888);
        let (mut interval, mut timeout) = (60_000, 60_000);
        let (mut max_conns, mut max_line) = (1024, 65_536);
        let (mut keep_open, mut quiet, mut health) = (false, false, false);
        loop {
            match args.next().map_err(sentence)? {
                Some(Long("tcp-port")) => port = number(&mut args, "tcp-port", 0, 65_535)?,
                Some(Long("interval")) => interval = number(&mut args, "interval", 10, u32::MAX)?,
                Some(Long("bind")) => {
                    let typed = value(&mut args)?;
                    let address = typed.parse().ok();
                    ip = address.ok_or_else(|| misfit("bind", "an IPv4 or IPv6 address", &typed))?;
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
        let address = SocketAddr::new(ip, port as u16);
        if health {
            return Ok(Command::Health(address));
        }
        Ok(Command::Serve(Options {
            address,
            interval: Duration::from_millis(interval.into()),
            keep_open,
            max_conns: max_conns as usize,
            max_line: max_line as usize,
            timeout: Duration::from_millis(timeout.into()),
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

// ---------------------------------------------------------------- the server

/// Clients accepted before the others get a turn.
const ACCEPTED_AT_ONCE: u32 = 64;
/// Pause after a failed accept: the descriptors or the memory that it lacked may be back by then.
const BACK_OFF: Duration = Duration::from_millis(100);
/// How long a client may take to end its line once the server stops.
const GRACE: Duration = Duration::from_secs(5);

/// What all tasks share. They run on one thread, so cells do where locks would cost.
pub struct Server {
    options: Options,
    pub executor: StaticLocalExecutor,
    /// Every line received, by whichever client.
    pub lines: Subject<Vec<u8>>,
    pub log: Log,
    /// The clients that are connected, by descriptor.
    clients: RefCell<Vec<Option<Rc<Client>>>>,
    /// How many they are.
    pub connected: Cell<usize>,
    /// Notified when a client has left.
    left: Condition,
    /// Notified when a client has to be waited for.
    waiting: Condition,
    /// Set by the first signal.
    stopping: Cell<bool>,
    /// A read buffer that nobody uses right now.
    spare: Cell<Vec<u8>>,
}

/// Listens on an address, with as long a backlog as the kernel grants: std asks for 128, too few
/// for a thousand clients at once.
fn bind(address: SocketAddr) -> Result<Arc<Async<TcpListener>>, Errno> {
    let socket = net::socket(family(address), SocketType::STREAM, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() {
        // `::` serves both families, whatever the system's default is.
        sockopt::set_ipv6_v6only(&socket, false)?;
    }
    net::bind(&socket, &SocketAddrAny::from(address))?;
    net::listen(&socket, i32::MAX)?;
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
            log: Log::new(options.quiet),
            options,
            executor: StaticLocalExecutor::new(),
            lines: Subject::default(),
            clients: RefCell::default(),
            connected: Cell::default(),
            left: Condition::default(),
            waiting: Condition::default(),
            stopping: Cell::default(),
            spare: Cell::default(),
        }
    }

    /// Starts a task. All are of one type to the executor: each would bring its own code (4 kB).
    fn spawn(&'static self, future: impl Future<Output = ()> + 'static) -> Task<()> {
        self.executor.spawn(future.boxed_local())
    }

    /// Accepts clients until the first signal, waits for those it has, and completes the subject.
    async fn serve(&'static self, listener: Arc<Async<TcpListener>>, signals: Signals) {
        future::or(self.accept(&listener), async {
            signals.next().await;
        })
        .await;
        drop(listener);
        self.spawn(async move { exit(128 + signals.next().await) }).detach();
        self.drain().await;
        self.lines.complete();
    }

    /// Accepts clients, as many at once as the options allow; never returns.
    async fn accept(&'static self, listener: &Async<TcpListener>) {
        let mut warned: Option<Instant> = None;
        let mut accepted: u32 = 0;
        loop {
            self.left.wait_until(|| self.connected.get() < self.options.max_conns).await;
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
                Err(Errno::AGAIN) => drop(poll_fn(|cx| listener.poll_readable(cx)).await),
                // The client left before its turn came.
                Err(Errno::CONNABORTED | Errno::INTR) => {}
                Err(error) => {
                    if warned.is_none_or(|at| at.elapsed() >= Duration::from_secs(1)) {
                        warned = Some(Instant::now());
                        complain(&format!("cannot accept: {}; trying again", reason(error)));
                    }
                    sleep(BACK_OFF).await;
                }
            }
        }
    }

    /// Starts the task of a new client.
    pub fn welcome(&'static self, socket: TcpStream, peer: SocketAddr) {
        let seat = socket.as_raw_fd() as usize;
        let client = Rc::new(Client {
            socket,
            peer,
            deadline: Cell::default(),
            cut: Cell::default(),
            task: Cell::default(),
        });
        let mut clients = self.clients.borrow_mut();
        while clients.len() <= seat {
            clients.push(None);
        }
        clients[seat] = Some(client.clone());
        self.connected.set(self.connected.get() + 1);
        let task = async move {
            Connection::new(self, &client).serve().await;
            self.clients.borrow_mut()[seat] = None;
            self.connected.set(self.connected.get() - 1);
            self.left.notify_all();
        };
        self.spawn(task).detach();
    }

    /// Waits until every line is served, five seconds at most.
    async fn drain(&self) {
        self.stopping.set(true);
        self.each_client(Client::wake);
        let gone = || self.left.wait_until(|| self.connected.get() == 0);
        future::or(gone(), sleep(GRACE)).await;
        self.each_client(Client::cut);
        gone().await;
    }

    /// Cuts clients that neither send nor take a byte, an eighth of the timeout late at most. One
    /// timer serves all, and none while there is nobody to wait for; never returns.
    async fn close_the_idle(&self) {
        loop {
            let now = Instant::now();
            let mut next = None;
            for client in self.clients.borrow().iter().flatten() {
                match client.deadline.get() {
                    Some(deadline) if deadline <= now => client.cut(),
                    Some(deadline) if next.is_none_or(|next| deadline < next) => next = Some(deadline),
                    _ => {}
                }
            }
            match next {
                Some(next) => drop(Timer::at(next.max(now + self.options.timeout / 8)).await),
                None => self.waiting.wait().await,
            }
        }
    }

    fn each_client(&self, visit: fn(&Client)) {
        self.clients.borrow().iter().flatten().for_each(|client| visit(client));
    }

    /// Ready when log and subject have room: back-pressure instead of memory.
    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        ready!(self.log.poll_room(cx));
        self.lines.poll_room(cx)
    }

    /// A line was received whole.
    fn receive(&self, line: &[u8], peer: &str) {
        self.log.received(line, peer);
        self.lines.next(line.to_vec());
    }
}

// ---------------------------------------------------------------- a connection

/// Bytes that are read at once, unless a longer line is under way.
const CHUNK: usize = 4096;

/// What the server knows of a client.
struct Client {
    /// Non-blocking.
    socket: TcpStream,
    peer: SocketAddr,
    /// When to stop waiting for it; nothing while the server is at work for it.
    deadline: Cell<Option<Instant>>,
    /// The server gave up on it.
    cut: Cell<bool>,
    /// The task that waits for it.
    task: Cell<Option<Waker>>,
}

impl Client {
    fn cut(&self) {
        self.cut.set(true);
        self.wake();
    }

    fn wake(&self) {
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
    /// There may be more to read right now: the last read filled the buffer, or a wait has passed since.
    more: bool,
}

impl<'a> Connection<'a> {
    fn new(server: &'static Server, client: &'a Client) -> Self {
        Connection { server, client, io: None, buffer: Vec::new(), more: true }
    }

    /// Receives, hands on and echoes lines: one, or with `--keep-open` all that the client sends.
    async fn serve(&mut self) {
        let options = &self.server.options;
        let mut received = false;
        let mut searched = 0;
        // An error is a client that has reset the connection or was cut: its unfinished line is no line.
        while let Ok(count) = self.read().await {
            let peer = shown(self.client.peer);
            let ended = count == 0;
            let mut end = 0;
            let last = loop {
                match first_line(&self.buffer[end..], searched, ended, options.max_line) {
                    Line::Whole(length) => {
                        self.room().await;
                        self.server.receive(&self.buffer[end..end + length], &peer);
                        received = true;
                        end += length;
                        searched = 0;
                        if !options.keep_open {
                            break true;
                        }
                    }
                    Line::Partial => break ended,
                    Line::TooLong => {
                        let longest = decimal(options.max_line as u64);
                        complain(&format!("line from {peer} is longer than {longest} bytes"));
                        break true;
                    }
                }
            };
            if self.echo(end).await.is_err() {
                break;
            }
            if last || self.server.stopping.get() && self.buffer.is_empty() {
                if !ended {
                    // The echo's end goes first: a reset, should the client send more, comes too late for harm.
                    let _ = net::shutdown(&self.client.socket, Shutdown::Write);
                    if self.has_unread() {
                        // Boxed: it is rare, and every connection would hold its state (100 bytes).
                        Box::pin(self.linger()).await;
                    }
                }
                break;
            }
            searched = self.buffer.len();
            if self.more {
                // A client that never stops sending must not starve the others.
                future::yield_now().await;
            }
        }
        self.buffer.clear();
        self.release();
        if received {
            self.server.log.remark(&["Close the client socket"]);
        }
    }

    /// Adds bytes to the buffer, waiting for them if there are none, and returns how many; 0 at the
    /// end of what the client sends, and when the server stops and the client is between two lines.
    fn read(&mut self) -> impl Future<Output = Result<usize, Errno>> {
        poll_fn(|cx| {
            loop {
                if self.more || self.server.stopping.get() {
                    match self.try_read() {
                        Err(Errno::AGAIN | Errno::INTR) => {}
                        result => return Poll::Ready(result),
                    }
                }
                self.release();
                if self.server.stopping.get() && self.buffer.is_empty() {
                    return Poll::Ready(Ok(0));
                }
                ready!(self.poll_wait(cx, Async::poll_readable))?;
                self.more = true;
            }
        })
    }

    /// Adds the bytes that are there right now.
    fn try_read(&mut self) -> Result<usize, Errno> {
        self.reserve();
        let count = rustix::io::read(&self.client.socket, spare_capacity(&mut self.buffer))?;
        self.more = self.buffer.len() == self.buffer.capacity();
        self.client.deadline.set(None);
        Ok(count)
    }

    /// Waits until the server can take a line.
    fn room(&mut self) -> impl Future<Output = ()> {
        poll_fn(|cx| {
            let room = self.server.poll_room(cx);
            self.more |= room.is_pending();
            room
        })
    }

    /// Sends the first bytes of the buffer back as they came, and forgets them.
    fn echo(&mut self, end: usize) -> impl Future<Output = Result<(), Errno>> {
        let mut sent = 0;
        poll_fn(move |cx| {
            while sent < end {
                match rustix::io::write(&self.client.socket, &self.buffer[sent..end]) {
                    Ok(count) => {
                        sent += count;
                        self.client.deadline.set(None);
                    }
                    Err(Errno::AGAIN | Errno::INTR) => {
                        self.more = true;
                        ready!(self.poll_wait(cx, Async::poll_writable))?;
                    }
                    Err(error) => return Poll::Ready(Err(error)),
                }
            }
            self.buffer.drain(..end);
            Poll::Ready(Ok(()))
        })
    }

    /// The client has sent more than was asked for.
    fn has_unread(&mut self) -> bool {
        !self.buffer.is_empty() || self.more && self.try_read().is_ok_and(|count| count > 0)
    }

    /// Closing while bytes are unread would reset the connection, and the client might lose the
    /// echo: so some of them are read first.
    async fn linger(&mut self) {
        let read = async {
            let mut unwanted = 0;
            while unwanted <= self.server.options.max_line {
                self.buffer.clear();
                match self.read().await {
                    Ok(0) | Err(_) => break,
                    Ok(count) => unwanted += count,
                }
            }
        };
        future::or(read, sleep(GRACE)).await;
    }

    /// Waits until the socket is ready; an error if the client was cut meanwhile.
    fn poll_wait(&mut self, cx: &mut Context<'_>, poll_ready: PollReady<'a>) -> Poll<Result<(), Errno>> {
        let client = self.client;
        if client.cut.get() {
            return Poll::Ready(Err(Errno::TIMEDOUT));
        }
        let io = match &mut self.io {
            Some(io) => io,
            none => none.insert(Async::new_nonblocking(&client.socket).map_err(errno)?),
        };
        let ready = poll_ready(io, cx).map_err(errno);
        if ready.is_pending() {
            client.task.set(Some(cx.waker().clone()));
            if client.deadline.get().is_none() {
                client.deadline.set(Some(Instant::now() + self.server.options.timeout));
                self.server.waiting.notify_all();
            }
        }
        ready
    }

    /// Makes room for more bytes: a chunk, or for a longer line up to as much again, never
    /// beyond the longest line.
    fn reserve(&mut self) {
        if self.buffer.capacity() == 0 {
            self.buffer = self.server.spare.take();
        }
        let length = self.buffer.len();
        if length == self.buffer.capacity() {
            let limit = (self.server.options.max_line + 1).max(CHUNK);
            self.buffer.reserve_exact(length.max(CHUNK).min(limit - length));
        }
    }

    /// Gives memory back before a wait: an empty buffer whole, what another may hold no more.
    fn release(&mut self) {
        if !self.buffer.is_empty() {
            self.buffer.shrink_to(2 * self.buffer.len());
        } else if self.buffer.capacity() == CHUNK {
            self.server.spare.set(mem::take(&mut self.buffer));
        } else {
            self.buffer = Vec::new();
        }
    }
}

type PollReady<'a> = fn(&Async<&'a TcpStream>, &mut Context<'_>) -> Poll<io::Result<()>>;

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

/// Items that the subject holds before its writers have to wait.
const BACKLOG: usize = 64;

/// Rx's subject: many writers, one observer, hot. It is bounded, so that an observer who is slow
/// holds up the writers instead of filling the memory.
pub struct Subject<T> {
    items: RefCell<VecDeque<T>>,
    completed: Cell<bool>,
    /// Notified when there is something to observe.
    written: Condition,
    /// Notified when there is room again.
    read: Condition,
}

impl<T> Default for Subject<T> {
    fn default() -> Self {
        Subject {
            items: RefCell::default(),
            completed: Cell::default(),
            written: Condition::default(),
            read: Condition::default(),
        }
    }
}

impl<T> Subject<T> {
    /// Rx's `on_next`. Writers wait for `room` before.
    pub fn next(&self, item: T) {
        self.items.borrow_mut().push_back(item);
        self.written.notify_all();
    }

    /// Rx's `on_completed`.
    pub fn complete(&self) {
        self.completed.set(true);
        self.written.notify_all();
    }

    /// Ready when the observer has made room.
    pub fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.read.poll_until(cx, self.items.borrow().len() < BACKLOG)
    }

    /// The stream of the items, which ends when the subject is complete.
    pub fn observe(&self) -> impl Stream<Item = T> {
        stream::poll_fn(|cx| {
            let item = self.items.borrow_mut().pop_front();
            if item.is_some() {
                self.read.notify_all();
            } else {
                ready!(self.written.poll_until(cx, self.completed.get()));
            }
            Poll::Ready(item)
        })
    }
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

    /// Only the items that are followed by a `window` of silence, at its end.
    ///
    /// ```text
    /// source           1-2---3----|
    /// debounce(3)      ------2--3-|
    /// ```
    ///
    /// When the source ends, the item that is pending comes at once (RxPY's `debounce`).
    fn debounce<S: Scheduler>(self, scheduler: S, window: Duration) -> Debounce<Self, S> {
        Debounce { source: self.fuse(), scheduler, window, pending: None, timer: None }
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
        // The latest item and when its silence ends.
        pending: Option<(A::Item, Instant)>,
        // Set for the end of a silence, its own or that of an item which has been replaced since:
        // a flood of items sets one timer a window.
        timer: Option<S::Timer>,
    }
}

impl<A: Stream, S: Scheduler> Stream for Debounce<A, S> {
    type Item = A::Item;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<A::Item>> {
        let mut this = self.project();
        let now = this.scheduler.now();
        // Late (the process was stopped, say): its silence was over before whatever comes now.
        if let Some((item, _)) = this.pending.take_if(|(_, due)| *due < now) {
            return Poll::Ready(Some(item));
        }
        loop {
            match this.source.as_mut().poll_next(cx) {
                Poll::Ready(Some(item)) => *this.pending = Some((item, now + *this.window)),
                Poll::Ready(None) => return Poll::Ready(this.pending.take().map(|(item, _)| item)),
                Poll::Pending => break,
            }
        }
        while let Some((_, due)) = this.pending {
            let timer = this.timer.get_or_insert_with(|| this.scheduler.at(*due));
            ready!(Pin::new(timer).poll(cx));
            *this.timer = None;
            if *due <= this.scheduler.now() {
                return Poll::Ready(this.pending.take().map(|(item, _)| item));
            }
        }
        Poll::Pending
    }
}

// ---------------------------------------------------------------- the log

/// Bytes of text that wait for stdout before those who write more have to wait, too.
const LOG_ROOM: usize = 64 * 1024;
/// What a pipe that is writable takes without blocking (POSIX: PIPE_BUF), and never in two parts.
const AT_ONCE: usize = 4096;

/// What goes to stdout. Tasks add whole lines; one task writes all that a turn of the executor
/// has left, so that a batch costs one system call and a lone line still appears at once.
pub struct Log {
    quiet: bool,
    pub text: RefCell<String>,
    closing: Cell<bool>,
    /// Why nothing can be written any more.
    failed: Cell<Option<Errno>>,
    /// Notified when there is something to write.
    written: Condition,
    /// Notified when there is room again.
    pub taken: Condition,
}

impl Log {
    fn new(quiet: bool) -> Log {
        Log {
            quiet,
            text: RefCell::default(),
            closing: Cell::default(),
            failed: Cell::default(),
            written: Condition::default(),
            taken: Condition::default(),
        }
    }

    fn received(&self, line: &[u8], peer: &str) {
        if !self.quiet {
            let line = String::from_utf8_lossy(line);
            let mut text = self.text.borrow_mut();
            text.push_str("Received ");
            let start = text.len();
            push_escaped(&mut text, without_ending(&line));
            let escaped = start..text.len();
            text.push_str(" from ");
            text.push_str(peer);
            text.push_str("\nSend: ");
            text.extend_from_within(escaped);
            text.push('\n');
            self.written.notify_all();
        }
    }

    /// A line that `--quiet` leaves out.
    fn remark(&self, parts: &[&str]) {
        if !self.quiet {
            self.line(parts);
        }
    }

    /// A line for everybody, from its parts.
    fn line(&self, parts: &[&str]) {
        let mut text = self.text.borrow_mut();
        parts.iter().for_each(|part| text.push_str(part));
        text.push('\n');
        self.written.notify_all();
    }

    /// Ready when stdout has made room.
    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.taken.poll_until(cx, self.text.borrow().len() < LOG_ROOM)
    }

    /// Lets `write` end once all is written.
    fn close(&self) {
        self.closing.set(true);
        self.written.notify_all();
    }

    /// Writes to stdout what is added, until the log is closed or stdout has failed.
    async fn write(&self) {
        let mut io = None;
        loop {
            self.written.wait_until(|| self.closing.get() || !self.text.borrow().is_empty()).await;
            let text = self.text.take();
            if text.is_empty() {
                return;
            }
            self.taken.notify_all();
            let mut rest = text.as_bytes();
            while !rest.is_empty() {
                match write_out(batch(rest), &mut io).await {
                    Ok(count) => rest = &rest[count..],
                    Err(error) => return self.failed.set(Some(error)),
                }
            }
        }
    }
}

/// As many whole lines as stdout takes at once, or a part of one that is longer.
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

/// Writes to stdout without blocking and without making it non-blocking, which whoever else has
/// the same file open would feel.
async fn write_out(bytes: &[u8], io: &mut Option<Async<BorrowedFd<'static>>>) -> Result<usize, Errno> {
    loop {
        if is_writable(stdout()) {
            match rustix::io::write(stdout(), bytes) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return result,
            }
        }
        if io.is_none() {
            *io = Some(Async::new_nonblocking(stdout()).map_err(errno)?);
        }
        poll_fn(|cx| io.as_ref().map_or(Poll::Pending, |io| io.poll_writable(cx))).await.map_err(errno)?;
    }
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

fn is_writable(fd: BorrowedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(&fd, PollFlags::OUT)], Some(&now)) == Ok(1)
}

/// Prints a sentence on stderr, unless that would block.
fn complain(sentence: &str) {
    if is_writable(stderr()) {
        let _ = rustix::io::write(stderr(), format!("smolrx: {sentence}\n").as_bytes());
    }
}

/// An address as the log and the sentences have it: an IPv4 client of an IPv6 socket is an IPv4 client,
/// and of an IPv6 address the first of the longest runs of zeros is left out, if it is longer than one
/// (RFC 5952). The standard library's own way from numbers to text also pads: 2 kB.
pub fn shown(address: SocketAddr) -> String {
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

fn without_ending(line: &str) -> &str {
    line.strip_suffix("\r\n").or(line.strip_suffix('\n')).unwrap_or(line)
}

/// Adds words so that they stay one line and can't talk to the terminal: what could do either is shown
/// as Rust writes it, `\u{1b}` for ESC.
fn push_escaped(text: &mut String, words: &str) {
    let mut start = 0;
    for (end, character) in words.char_indices() {
        if is_hostile(character) {
            text.push_str(&words[start..end]);
            character.escape_default().for_each(|character| text.push(character));
            start = end + character.len_utf8();
        }
    }
    text.push_str(&words[start..]);
}

/// Control characters, and those that break lines or reorder them (Unicode's bidi controls).
fn is_hostile(character: char) -> bool {
    match character {
        ' '..='~' => false,
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => true,
        _ => character.is_control(),
    }
}

// ---------------------------------------------------------------- waiting, signals, health

/// Tasks that wait for a condition. Whoever changes what it depends on notifies them.
#[derive(Default)]
pub struct Condition(RefCell<Vec<Waker>>);

impl Condition {
    /// Ready if the condition `holds`; if not, the task is woken at the next notification.
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

    /// Waits for the next notification.
    fn wait(&self) -> impl Future<Output = ()> {
        let waited = Cell::new(false);
        self.wait_until(move || waited.replace(true))
    }

    pub fn notify_all(&self) {
        for task in self.0.borrow_mut().drain(..) {
            task.wake();
        }
    }
}

async fn sleep(duration: Duration) {
    Timer::after(duration).await;
}

/// SIGINT and SIGTERM, as a descriptor to read.
struct Signals(Async<SignalFd>);

impl Signals {
    /// To be called before the first thread is started: threads inherit what is blocked.
    fn block() -> Result<Signals, Errno> {
        let mask = SigSet::from_iter([SIGINT, SIGTERM]);
        let _ = mask.thread_block();
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
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

/// Raises the soft limit of descriptors to the hard one: a connection is a descriptor.
fn raise_descriptor_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    // What can't be raised stays, and `accept` says when it is too little.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// Connects as a client that sends nothing, and expects the server's task to close. That proves
/// that the server accepts and serves, and it is no event. Within two seconds.
fn probe(address: SocketAddr) -> Result<(), String> {
    let server = shown(address);
    match connect_and_read(address) {
        Ok(0) => Ok(()),
        Ok(_) => Err(format!("{server} is another server")),
        Err(Errno::AGAIN | Errno::INPROGRESS) => Err(format!("{server} is not healthy: it does not answer")),
        Err(error) => Err(format!("{server} is not healthy: {}", reason(error))),
    }
}

fn connect_and_read(address: SocketAddr) -> Result<usize, Errno> {
    let socket = net::socket(family(address), SocketType::STREAM, None)?;
    // Linux: the limit for sending is the one for connecting, too.
    for limit in [Timeout::Send, Timeout::Recv] {
        sockopt::set_socket_timeout(&socket, limit, Some(Duration::from_secs(1)))?;
    }
    net::connect(&socket, &SocketAddrAny::from(address))?;
    net::shutdown(&socket, Shutdown::Write)?;
    rustix::io::read(&socket, &mut [0])
}
