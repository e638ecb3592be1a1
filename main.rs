//! A TCP server whose lines become a debounced event stream: Rx's operators as futures-lite streams.
//!
//! ```text
//! cargo run --release -- --interval 600000 --debounce 500 -- ./sync.sh
//! echo foo | nc localhost 8888
//! ```
//!
//! It is to be read from the top: the program and its pipeline, the operators, the command; then what feeds
//! them, the server and a connection; the output; and the tools: text, waiting, options, the health check.
//! Outside the inner modules, what is `pub` is for the tests, which include this file.
//!
//! Text is put together by `concat` and never by `format!`, which costs 3 kB.

#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::env;
use std::ffi::{CStr, OsString};
use std::future::{Future, poll_fn};
use std::io;
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use async_executor::{StaticLocalExecutor, Task};
use futures_lite::future::{self, FutureExt};
use futures_lite::stream::StreamExt;
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::signal::{SIGCHLD, SIGHUP, SIGINT, SIGPIPE, SIGTERM, SIGXFSZ, SigSet, SigmaskHow};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rlsf::SmallGlobalTlsf;
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrAny, SocketAddrUnix};
use rustix::net::{SocketFlags, SocketType};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Resource, Rlimit, Signal, WaitOptions, WaitStatus};
use rustix::process::{getpid, getrlimit, kill_process, setrlimit, wait, waitpid};
use rustix::stdio::{stderr, stdout};
// libc's `_exit`: the end of the process, and nothing else.
use signal_hook::low_level::exit;
use smol::{Async, Timer};

use output::Output;
use rx::{Realtime, RxExt, Subject, timer};
use text::{address_text, cannot, decimal, errno, error_text, excerpt, text_of};

#[cfg(not(target_os = "linux"))]
compile_error!("smolrx runs on Linux; elsewhere, run its container image");

// ---------------------------------------------------------------- the program

/// It never gives memory back to the system. `.cargo/image.toml` leaves out musl's own allocator.
#[global_allocator]
static ALLOCATOR: SmallGlobalTlsf = SmallGlobalTlsf::new();

fn main() -> ! {
    // This comes first: until signals are blocked, one that is sent to process 1 is lost.
    let (handled, original_mask) = block_signals();
    let mut args = env::args_os();
    args.next(); // its own name
    let invocation = Invocation::parse(args);
    if !matches!(invocation, Ok(Invocation::Serve(_))) {
        // Only the server reads them. Anything else is ended by Ctrl-C as usual.
        let _ = handled.thread_unblock();
    }
    let outcome = match invocation {
        Ok(Invocation::Serve(options)) => serve(options, handled, original_mask),
        Ok(Invocation::Health(address, name)) => probe(address, &name),
        Ok(Invocation::Print(text)) => match rustix::io::write(stdout(), text.as_bytes()) {
            // Whoever closes a pipe has read enough.
            Ok(_) | Err(Errno::PIPE) => Ok(()),
            Err(error) => Err(cannot(&["write to stdout"], error)),
        },
        Err(message) => exit_with(Err(message + "; see smolrx --help"), 2),
    };
    exit_with(outcome, 1)
}

/// How long a stderr that nobody reads may hold up the end.
const MOMENT: Duration = Duration::from_millis(100);

/// Ends the process: with 0, or after an error message with `status_if_failed`.
fn exit_with(outcome: Result<(), String>, status_if_failed: i32) -> ! {
    if let Err(message) = outcome {
        let limit = Timespec::try_from(MOMENT).ok();
        if let Ok(1..) = poll(&mut [PollFd::new(&stderr(), PollFlags::OUT)], limit.as_ref()) {
            let _ = rustix::io::write(stderr(), ["smolrx: ", &message, "\n"].concat().as_bytes());
        }
        exit(status_if_failed)
    }
    exit(0)
}

/// Tasks that run before the reactor is asked for events again.
const TASKS_PER_TURN: usize = 200;

/// Serves until the process ends. Returns only why it could not start.
fn serve(options: Options, handled: SigSet, original_mask: SigSet) -> Result<(), String> {
    // Each connection needs a descriptor. If the limit can't be raised, `accept` reports running out.
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    let requested = options.address;
    let listener =
        listen(requested).map_err(|error| cannot(&["listen on ", &address_text(requested)], error))?;
    let bound = net::getsockname(&listener).ok().and_then(|bound| bound.try_into().ok()).unwrap_or(requested);
    let signals = signal_source(&handled).map_err(|error| cannot(&["wait for signals"], errno(error)))?;

    // Tasks borrow the server for as long as the process lives.
    let server = Box::leak(Box::new(Server::new(options)));
    let args = strings(std::mem::take(&mut server.options.command));
    if !args.is_empty() {
        let command = Command::new(args, original_mask, limit);
        server.command = Some(command.map_err(|error| cannot(&["read /proc/self/environ"], error))?);
    }
    let server: &'static Server = server;
    server.stdout.start(stdout(), Some(&server.stderr));
    server.stderr.start(stderr(), None);
    output::end_with_reader(stdout());
    server.warn_of_endless_burst();
    let probes = server.answer_probes(&decimal(bound.port().into()));
    server.spawn(server.handle_signals(signals)).detach();
    server.spawn(server.serve_clients(listener, probes)).detach();
    server.spawn(server.deadlines.wake_the_due(RESOLUTION.min(server.options.timeout / 8))).detach();
    server.spawn(observe(server)).detach();
    server.log(&["Serving on ", &address_text(bound)]);
    // What `executor.run` does, without its queues for work stealing (3 kB).
    smol::block_on(async {
        loop {
            server.executor.tick().await;
            if (1..TASKS_PER_TURN).all(|_| server.executor.try_tick()) {
                future::yield_now().await;
            }
        }
    })
}

const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// The experiment itself: clock and subject → debounce → observer.
///
/// It goes on until the server has served its last client and nothing is pending; then the process ends.
async fn observe(server: &'static Server) {
    let Options { interval, debounce, max_wait, .. } = server.options;
    // Without an interval, the first tick is a century away. `or` ends when its second stream does: the lines
    // end, the clock never does.
    let (delay, period) = interval.map_or((CENTURY, CENTURY), |period| (Duration::ZERO, period));
    let items = timer(Realtime, delay, period).map(Event::Tick).or(server.lines.observe().map(Event::Line));
    let events = items.debounce(Realtime, debounce, max_wait, Event::reduce);
    pin!(events.then_latest(Event::reduce, |event| server.handle(event))).for_each(drop).await;
    server.finish(0);
}

/// An item of the stream.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A client's line, stripped and escaped.
    Line(String),
    /// The clock's count.
    Tick(u64),
}

impl Event {
    /// What is left of two items of a burst: the later one, but a tick never replaces a line.
    pub fn reduce(earlier: Event, later: Event) -> Event {
        match (&earlier, &later) {
            (Event::Line(_), Event::Tick(_)) => earlier,
            _ => later,
        }
    }

    fn text(self) -> String {
        match self {
            Event::Line(text) => text,
            Event::Tick(count) => decimal(count),
        }
    }
}

impl Server {
    /// The observer: prints an event, and runs the command, if there is one.
    async fn handle(&self, event: Event) {
        let text = event.text();
        self.stdout.ready().await;
        self.log(&["Observing ", &text]);
        match &self.command {
            Some(command) => {
                // The command's output follows that line, unless stdout is stalled or slow.
                for _ in 0..100 {
                    if self.stdout.is_written() {
                        break;
                    }
                    Timer::after(output::PAUSE).await;
                }
                self.run(command, &text).await
            }
            None if self.options.quiet => self.stdout.push_line(&[&text]),
            None => {}
        }
    }

    /// Takes no more lines, and ends the process once all output is written. The status of the first call
    /// counts.
    fn finish(&self, status: i32) {
        self.lines.on_completed();
        self.stdout.close(status);
    }
}

// ---------------------------------------------------------------- the operators

pub mod rx {
    //! Rx as futures-lite streams: the subject, and the operators that futures-lite lacks.

    use std::cell::Cell;
    use std::future::Future;
    use std::pin::Pin;
    use std::task::{Poll, ready};
    use std::time::{Duration, Instant};

    use futures_lite::stream::{self, Stream, StreamExt};
    use smol::Timer;

    use super::Waiters;

    /// A source of time, as Rx's operators take one: the real one, or virtual time in the tests.
    pub trait Scheduler: Clone {
        type Timer: Future + Unpin;

        fn now(&self) -> Instant;

        /// A future that is ready once `due` has come.
        fn at(&self, due: Instant) -> Self::Timer;
    }

    /// Real time: the system's monotonic clock, which nobody sets.
    #[derive(Clone)]
    pub struct Realtime;

    impl Scheduler for Realtime {
        type Timer = Timer;

        fn now(&self) -> Instant {
            Instant::now()
        }

        fn at(&self, due: Instant) -> Timer {
            Timer::at(due)
        }
    }

    /// A hot subject with one observer. An Rx subject calls its observer at once; here a task polls later and
    /// finds only the latest item: enough for a debounce that keeps the later of two lines.
    #[derive(Default)]
    pub struct Subject<T> {
        latest: Cell<Option<T>>,
        completed: Cell<bool>,
        /// The task that waits for an item or for completion.
        observer: Waiters,
    }

    impl<T> Subject<T> {
        pub fn on_next(&self, item: T) {
            self.latest.set(Some(item));
            self.observer.wake_all();
        }

        pub fn on_completed(&self) {
            self.completed.set(true);
            self.observer.wake_all();
        }

        pub fn is_completed(&self) -> bool {
            self.completed.get()
        }

        /// The stream of the items, which ends when the subject is complete.
        pub fn observe(&self) -> impl Stream<Item = T> {
            stream::poll_fn(|cx| {
                let item = self.latest.take();
                if item.is_none() {
                    ready!(self.observer.poll_until(cx, self.completed.get()));
                }
                Poll::Ready(item)
            })
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

    /// The operators of Rx that futures-lite lacks. What can be turned off is an `Option`, like
    /// `max_wait`. A new operator may be one line:
    ///
    /// ```text
    /// fn start_with(self, item: Self::Item) -> impl Stream<Item = Self::Item> {
    ///     stream::once(item).chain(self)
    /// }
    /// ```
    pub trait RxExt: Stream + Sized {
        /// Emits what `reduce` makes of a burst once a `window` of silence follows it, or once it has lasted
        /// for `max_wait`. Rx's own debounce keeps the last item, as `|_, later| later` does:
        ///
        /// ```text
        /// source              1-2---3-4-5-6-7----|
        /// debounce(3)         -----2-----------7-|
        /// debounce(3, 5)      -----2-----5-----7-|
        /// ```
        ///
        /// When the source ends, the item that is pending comes at once, as in RxPY. `max_wait` is not Rx's:
        /// it comes from lodash's `debounce`.
        fn debounce<S: Scheduler>(
            self,
            scheduler: S,
            window: Duration,
            max_wait: Option<Duration>,
            reduce: impl FnMut(Self::Item, Self::Item) -> Self::Item,
        ) -> impl Stream<Item = Self::Item> {
            // The item of a burst, when it is due, and when it is due at the latest.
            let mut pending: Option<(Self::Item, Instant, Option<Instant>)> = None;
            let (mut source, mut reduce, mut timer) = (Box::pin(self.fuse()), reduce, None);
            stream::poll_fn(move |cx| {
                loop {
                    let now = scheduler.now();
                    // It is overdue (the process was stopped, say): its burst was over before what comes now.
                    // At a tie the source goes first.
                    if let Some((item, ..)) = pending.take_if(|(_, due, _)| *due < now) {
                        return Poll::Ready(Some(item));
                    }
                    match source.poll_next(cx) {
                        Poll::Ready(Some(item)) => {
                            let (item, deadline) = match pending.take() {
                                Some((earlier, _, deadline)) => (reduce(earlier, item), deadline),
                                None => (item, max_wait.map(|wait| now + wait)),
                            };
                            let due = now + window;
                            let due = deadline.map_or(due, |deadline| deadline.min(due));
                            pending = Some((item, due, deadline));
                        }
                        Poll::Ready(None) => return Poll::Ready(pending.take().map(|(item, ..)| item)),
                        Poll::Pending => break,
                    }
                }
                while let Some((_, due, _)) = pending {
                    // The timer may still be an earlier item's: a flood sets one per window, not per item.
                    ready!(Pin::new(timer.get_or_insert_with(|| scheduler.at(due))).poll(cx));
                    timer = None;
                    if due <= scheduler.now() {
                        return Poll::Ready(pending.take().map(|(item, ..)| item));
                    }
                }
                Poll::Pending
            })
        }

        /// Like futures-lite's `then`, it runs one future at a time; but the source goes on meanwhile, and
        /// `reduce` makes one item of what comes. That runs next, even after the source's end. Rx:
        /// `onBackpressureLatest`, then `concatMap`. With futures that take three:
        ///
        /// ```text
        /// source                  abc-----d----|
        /// then_latest(later, f)   ---a--c----d-|
        /// ```
        ///
        /// The source must be pending at times, or the futures get no turn.
        fn then_latest<Fut: Future>(
            self,
            reduce: impl FnMut(Self::Item, Self::Item) -> Self::Item,
            f: impl FnMut(Self::Item) -> Fut,
        ) -> impl Stream<Item = Fut::Output> {
            let (mut source, mut reduce, mut f) = (Box::pin(self.fuse()), reduce, f);
            let (mut running, mut pending): (Option<Pin<Box<Fut>>>, _) = (None, None);
            stream::poll_fn(move |cx| {
                loop {
                    // The source goes first at a tie.
                    let ended = loop {
                        match source.poll_next(cx) {
                            Poll::Ready(Some(item)) => {
                                pending = Some(match pending.take() {
                                    Some(earlier) => reduce(earlier, item),
                                    None => item,
                                });
                            }
                            Poll::Ready(None) => break true,
                            Poll::Pending => break false,
                        }
                    };
                    if let Some(future) = &mut running {
                        let output = ready!(future.as_mut().poll(cx));
                        running = None;
                        return Poll::Ready(Some(output));
                    }
                    match pending.take() {
                        Some(item) => running = Some(Box::pin(f(item))),
                        None if ended => return Poll::Ready(None),
                        None => return Poll::Pending,
                    }
                }
            })
        }
    }

    impl<S: Stream> RxExt for S {}
}

// ---------------------------------------------------------------- the command

/// The command that runs for each event. It gets the signal mask, the limit of descriptors and the
/// environment with which the server started, and its event; SIGPIPE has its default action.
struct Command {
    args: Vec<&'static CStr>,
    variables: Vec<&'static CStr>,
    original_mask: SigSet,
    original_limit: Rlimit,
    /// Two descriptors below the original limit, freed for `posix_spawn` (musl's opens a pipe): clients may
    /// hold all the others below it.
    reserve: Cell<Option<(OwnedFd, OwnedFd)>>,
    /// The run that is under way, and how the last one ended.
    pid: Cell<Option<Pid>>,
    status: Cell<Option<WaitStatus>>,
    /// The task that waits for the end of a run.
    end: Waiters,
}

const EVENT_VARIABLE: &str = "SMOLRX_EVENT=";

impl Command {
    fn new(
        args: Vec<&'static CStr>,
        original_mask: SigSet,
        original_limit: Rlimit,
    ) -> Result<Command, Errno> {
        let mut variables = strings(environment()?);
        variables.retain(|variable| !variable.to_bytes().starts_with(EVENT_VARIABLE.as_bytes()));
        let reserve = Cell::new(pipe_with(PipeFlags::CLOEXEC).ok());
        let (pid, status, end) = Default::default();
        Ok(Command { args, variables, original_mask, original_limit, reserve, pid, status, end })
    }

    /// Starts a run.
    fn start(&self, event: &str) -> nix::Result<()> {
        let mut attributes = PosixSpawnAttr::init()?;
        attributes
            .set_flags(PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF)?;
        attributes.set_sigmask(&self.original_mask)?;
        attributes.set_sigdefault(&SigSet::from(SIGPIPE))?; // std may have ignored it
        let actions = PosixSpawnFileActions::init()?;
        let assignment = [EVENT_VARIABLE, event, "\0"].concat();
        let mut variables = self.variables.clone();
        variables.extend(CStr::from_bytes_with_nul(assignment.as_bytes()));
        let name = self.args[0].to_bytes_with_nul();
        let path = variables.iter().find_map(|variable| variable.to_bytes().strip_prefix(b"PATH="));
        let path = path.unwrap_or(b"/usr/local/bin:/usr/bin:/bin");
        // A name with a slash is a path itself: it is looked for in one place, without a directory before it.
        let path = if name.contains(&b'/') { b"" } else { path };
        // posix_spawn sets no limits: the command inherits those of this moment.
        let raised = getrlimit(Resource::Nofile);
        drop(self.reserve.take());
        let _ = setrlimit(Resource::Nofile, self.original_limit);
        let mut outcome = Err(nix::Error::ENOENT);
        for directory in path.split(|&byte| byte == b':') {
            let slash: &[u8] = if directory.is_empty() { b"" } else { b"/" };
            let file = [directory, slash, name].concat();
            let file = CStr::from_bytes_with_nul(&file).unwrap_or_default();
            match posix_spawn(file, &actions, &attributes, &self.args, &variables) {
                Err(nix::Error::ENOENT | nix::Error::ENOTDIR | nix::Error::ENAMETOOLONG) => {}
                // Like a shell, it goes on looking.
                Err(nix::Error::EACCES) => outcome = Err(nix::Error::EACCES),
                other => {
                    outcome = other;
                    break;
                }
            }
        }
        let _ = setrlimit(Resource::Nofile, raised);
        self.reserve.set(pipe_with(PipeFlags::CLOEXEC).ok());
        self.pid.set(Pid::from_raw(outcome?.as_raw()));
        Ok(())
    }

    /// Notes how the run ended, and wakes the task that waits for it.
    fn note_end(&self, status: Option<WaitStatus>) {
        self.pid.set(None);
        self.status.set(status);
        self.end.wake_all();
    }
}

/// Splits a block of strings that end with a NUL each; they live as long as the process.
fn strings(block: Vec<u8>) -> Vec<&'static CStr> {
    let strings = block.leak().split_inclusive(|&byte| byte == 0);
    strings.filter_map(|string| CStr::from_bytes_with_nul(string).ok()).collect()
}

/// The environment in which the server was started. (std's `vars_os` is 1.6 kB.)
fn environment() -> Result<Vec<u8>, Errno> {
    let file = rustix::fs::open(c"/proc/self/environ", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut block = Vec::new();
    loop {
        block.reserve(CHUNK);
        if rustix::io::read(&file, spare_capacity(&mut block))? == 0 {
            return Ok(block);
        }
    }
}

impl Server {
    /// Runs the command once. If it is not found or can't be executed, the server ends with a shell's status
    /// (127, 126); after any other error it goes on.
    async fn run(&self, command: &Command, event: &str) {
        if let Err(error) = command.start(event) {
            self.print_error(&[&cannot(&["run ", &excerpt(command.args[0].to_bytes())], errno(error))]);
            match error {
                nix::Error::ENOENT => self.finish(127),
                nix::Error::EACCES | nix::Error::EPERM | nix::Error::ENOEXEC | nix::Error::ELOOP => {
                    self.finish(126)
                }
                _ => return,
            }
            // No further event is run.
            return future::pending().await;
        }
        while command.pid.get().is_some() {
            // Where SIGCHLD was ignored, no signal says that it has ended.
            let second = Duration::from_secs(1);
            at_most(second, command.end.wait_until(&|| command.pid.get().is_none())).await;
            self.reap();
        }
        let status = command.status.take();
        let code = status.and_then(WaitStatus::exit_status).unwrap_or(0);
        if let Some(signal) = status.and_then(WaitStatus::terminating_signal) {
            self.print_error(&["the command was ended by signal ", &decimal(signal as u64)]);
        } else if code != 0 {
            self.print_error(&["the command exited with ", &decimal(code as u64)]);
        }
    }

    /// Takes note of each child that has ended: the command, and as process 1 whatever others have left
    /// behind.
    fn reap(&self) {
        let command = self.command.as_ref();
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if let Some(command) = command
                && command.pid.get() == Some(pid)
            {
                command.note_end(Some(status));
            }
        }
        if let Some(command) = command
            && let Some(pid) = command.pid.get()
        {
            match waitpid(Some(pid), WaitOptions::NOHANG) {
                Ok(None) => {}
                Ok(Some((_, status))) => command.note_end(Some(status)), // ended after `wait`
                // Where SIGCHLD was ignored, it is gone without a status. (`wait` does not tell: other
                // children may be alive.)
                Err(_) => command.note_end(None),
            }
        }
    }
}

// ---------------------------------------------------------------- the server

/// The longest backlog that Linux grants by default. (std asks for 128, too few for a thousand clients at
/// once.)
const BACKLOG: i32 = 4096;
/// Clients accepted before the others get a turn.
const ACCEPTED_PER_TURN: usize = 64;
/// Pause after the kernel lacked a descriptor or memory, which may be free by then.
const BACK_OFF: Duration = Duration::from_millis(100);
/// How long a client may take to end its line once the server stops, or to take a long echo once its
/// connection ends.
const GRACE: Duration = Duration::from_secs(5);
/// The same for a client that has not sent a byte yet: its line may be on the way.
const FIRST_BYTE_GRACE: Duration = Duration::from_millis(250);
/// A second signal within this time counts as the first: `timeout` sends two.
const SAME_SIGNAL: Duration = Duration::from_millis(100);
/// The send buffer of a connection, in bytes (Linux doubles it). Left alone, it grows to megabytes, and a
/// slow client's progress shows only every few seconds.
const SEND_BUFFER: usize = 128 * 1024;

/// What all tasks share. They run on one thread, so cells suffice; only `Output`, which has a lock, is
/// shared with other threads.
#[derive(Default)]
pub struct Server {
    options: Options,
    command: Option<Command>,
    pub executor: StaticLocalExecutor,
    /// Every line received, from whichever client.
    pub lines: Subject<String>,
    pub stdout: Output,
    pub stderr: Output,
    /// Clients that are connected.
    pub connected: Cell<usize>,
    /// The task that waits for a client to leave.
    departure: Waiters,
    /// When the first signal came.
    stopping_since: Cell<Option<Instant>>,
    /// The task that waits for that signal.
    first_signal: Waiters,
    deadlines: Deadlines,
    /// No warning is printed before this instant.
    next_warning: Cell<Option<Instant>>,
}

impl Server {
    pub fn new(options: Options) -> Server {
        Server { options, ..Server::default() }
    }

    /// Starts a task, boxed, so that all are of one type: otherwise the executor's code is compiled for each
    /// (4 kB).
    fn spawn(&'static self, future: impl Future<Output = ()> + 'static) -> Task<()> {
        self.executor.spawn(future.boxed_local())
    }

    /// Accepts clients until the first signal, serves those who are still in the backlog, waits until the
    /// last client has left or the grace is over, and completes the subject.
    async fn serve_clients(&'static self, listener: Arc<Async<TcpListener>>, probes: [Option<Task<()>>; 2]) {
        future::or(
            self.accept(&listener),
            self.first_signal.wait_until(&|| self.stopping_since.get().is_some()),
        )
        .await;
        // Dropped, these tasks end: the names are free for the next server.
        drop(probes);
        // The backlog keeps those who are in it, and lets in newcomers one at a time.
        let _ = net::listen(&listener, 0);
        let drain = async {
            self.accept(&listener).await;
            drop(listener);
            self.departure.wait_until(&|| self.connected.get() == 0).await;
        };
        at_most(GRACE, drain).await;
        self.lines.on_completed();
    }

    /// Stops at the first signal; the second one is the end.
    async fn handle_signals(&self, signals: Async<SignalFd>) {
        self.reap(); // a shell that has become this program may have left children
        loop {
            match signals.get_ref().read_signal() {
                Ok(Some(signal)) if signal.ssi_signo == SIGCHLD as u32 => self.reap(),
                Ok(Some(signal)) => match self.stopping_since.get() {
                    None => {
                        self.stopping_since.set(Some(Instant::now()));
                        self.first_signal.wake_all();
                        self.deadlines.wake_all();
                    }
                    Some(first) if first.elapsed() < SAME_SIGNAL => {}
                    Some(_) => {
                        let number = signal.ssi_signo as i32;
                        let pid = self.command.as_ref().and_then(|command| command.pid.get());
                        if let (Some(pid), Some(signal)) = (pid, Signal::from_named_raw(number)) {
                            let _ = kill_process(pid, signal);
                        }
                        exit(128 + number)
                    }
                },
                _ => _ = poll_fn(|cx| signals.poll_readable(cx)).await,
            }
        }
    }

    /// Accepts clients, as many at once as the options allow. Once the server stops, it returns when the
    /// backlog is empty.
    async fn accept(&'static self, listener: &Async<TcpListener>) {
        loop {
            self.departure.wait_until(&|| self.connected.get() < self.options.max_conns).await;
            match net::acceptfrom_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok((socket, peer)) => {
                    if let Some(Ok(peer)) = peer.map(SocketAddr::try_from) {
                        self.handle_client(socket.into(), peer);
                    }
                    // Nobody leaves before this task yields: `connected` grows one by one.
                    if self.connected.get().is_multiple_of(ACCEPTED_PER_TURN) {
                        future::yield_now().await;
                    }
                }
                Err(Errno::AGAIN) if self.stopping_since.get().is_some() => return,
                Err(Errno::AGAIN) => _ = poll_fn(|cx| listener.poll_readable(cx)).await,
                // The client left before its turn came; or a signal came.
                Err(Errno::CONNABORTED | Errno::INTR) => {}
                Err(error) => {
                    let connected = self.connected.get();
                    self.warn("accept", error);
                    at_most(BACK_OFF, self.departure.wait_until(&|| self.connected.get() < connected)).await;
                }
            }
        }
    }

    /// Starts the task of a new client, whose socket does not block.
    pub fn handle_client(&'static self, socket: TcpStream, peer: SocketAddr) {
        self.connected.set(self.connected.get() + 1);
        let serve = async move {
            let mut connection = Connection {
                server: self,
                socket: &socket,
                peer: &peer,
                io: None,
                buffer: Vec::new(),
                to_echo: 0,
                echoed: 0,
                echo_failed: false,
                is_readable: true,
                bytes_queued: 0,
                has_received: false,
                is_closing: false,
            };
            connection.run().await;
            self.deadlines.forget(&socket);
            self.connected.set(self.connected.get() - 1);
            self.departure.wake_all();
        };
        self.spawn(serve).detach();
    }

    /// Warns that the kernel lacks something, once a second at most.
    fn warn(&self, what: &str, error: Errno) {
        let now = Instant::now();
        if self.next_warning.get().is_none_or(|next| next <= now) {
            self.next_warning.set(Some(now + Duration::from_secs(1)));
            self.print_error(&[&cannot(&[what], error), "; trying again"]);
        }
    }

    /// Prints a line that `--quiet` leaves out.
    fn log(&self, parts: &[&str]) {
        if !self.options.quiet {
            self.stdout.push_line(parts);
        }
    }

    /// Prints an error message, unless stderr is stalled.
    fn print_error(&self, parts: &[&str]) {
        if self.stderr.is_ready() {
            self.stderr.push_line(&["smolrx: ", &parts.concat()]);
        }
    }

    fn warn_of_endless_burst(&self) {
        let Options { interval, debounce, max_wait, .. } = self.options;
        if interval.is_some_and(|interval| debounce >= interval) && max_wait.is_none() {
            self.print_error(&[
                "--debounce is not below --interval: without --max-wait, a burst may never end",
            ]);
        }
    }
}

/// Listens on an address. Connections inherit the options of this socket: no call is needed for each.
fn listen(address: SocketAddr) -> Result<Arc<Async<TcpListener>>, Errno> {
    let address = SocketAddrAny::from(address);
    let socket = net::socket_with(address.address_family(), SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
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
    // async-net, one of the crates that this program is meant to show, only wraps the socket here: its `bind`
    // takes neither backlog nor options, and its `accept` registers each client (two system calls more).
    Ok(async_net::TcpListener::try_from(socket).map_err(errno)?.into())
}

/// Blocks the signals that the server handles, which it reads from a descriptor. Returns these, and what was
/// blocked before. Call it before the first thread is started: threads inherit what is blocked.
fn block_signals() -> (SigSet, SigSet) {
    let mut handled = SigSet::from_iter([SIGINT, SIGTERM, SIGCHLD]);
    // SIGHUP ends other processes by default, as it should. Process 1 has no default action.
    if getpid().is_init() {
        handled.add(SIGHUP);
    }
    // With these two blocked, a failed `write` returns EPIPE or EFBIG instead of ending the process.
    let mut blocked = handled;
    blocked.add(SIGPIPE);
    blocked.add(SIGXFSZ);
    // It can't fail.
    (handled, blocked.thread_swap_mask(SigmaskHow::SIG_BLOCK).unwrap_or(SigSet::empty()))
}

fn signal_source(handled: &SigSet) -> io::Result<Async<SignalFd>> {
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    Async::new_nonblocking(SignalFd::with_flags(handled, flags)?)
}

// ---------------------------------------------------------------- a connection

/// How many bytes are read at once. A chunk, the default longest line and a block's header make 4 KiB.
const CHUNK: usize = 2048 - BLOCK_HEADER;
/// The bytes that the allocator adds to a block.
const BLOCK_HEADER: usize = 16;
/// An echo of at most this many bytes leaves at once, unless the client's window is smaller: the connection
/// may close behind it without lingering.
const LEAVES_AT_ONCE: usize = 512;

const HTTP_ANSWER: &[u8] =
    b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\nsend a line, for example by nc\n";

/// One client's conversation.
struct Connection<'a> {
    server: &'static Server,
    /// Non-blocking.
    socket: &'a TcpStream,
    peer: &'a SocketAddr,
    /// The registration with the reactor, made once there is something to wait for: often there is not.
    io: Option<Async<BorrowedFd<'a>>>,
    /// What is to be sent (whole lines, or the HTTP answer), then the other bytes received: at most a line
    /// and a chunk.
    buffer: Vec<u8>,
    /// How many bytes at the start of `buffer` are to be echoed, and how many of these have been.
    to_echo: usize,
    echoed: usize,
    /// The client no longer takes an echo; whole lines that it has sent still count.
    echo_failed: bool,
    /// There may be bytes to read right now.
    is_readable: bool,
    /// Bytes that were queued for this client in all: echoes, or the HTTP answer.
    bytes_queued: usize,
    /// A line has been received.
    has_received: bool,
    is_closing: bool,
}

/// Why a connection ends early.
enum Failure {
    Io,
    TimeIsOver,
}

impl Connection<'_> {
    async fn run(&mut self) {
        // A failure is the client's affair: it may leave at any point.
        if let Ok(true) = self.serve().await {
            self.close().await;
        }
        if self.has_received {
            self.server.log(&["Close the client socket"]);
        }
    }

    /// Receives lines and sends them back: one, or with `--keep-open` all that come. Returns whether more
    /// may come: then a plain close could cost the client its echo.
    async fn serve(&mut self) -> Result<bool, Failure> {
        let server = self.server;
        // What is printed between the two copies of a line, " from ...\nSend: ": made at the first line.
        let mut between = String::new();
        // Bytes of the unfinished line that hold no newline.
        let mut searched = 0;
        let mut has_ended = false;
        loop {
            let rest = &self.buffer[self.to_echo..];
            // Where the client broke off, its unfinished line does not count.
            match first_line(rest, searched, has_ended && !self.echo_failed, server.options.max_line) {
                Line::Whole(_) if !server.stdout.is_ready() => {
                    self.echo().await?;
                    server.stdout.ready().await;
                    self.is_readable = true; // maybe: time has passed
                }
                // Lines are no longer taken: this one is not received, so it is not echoed.
                Line::Whole(_) if server.lines.is_completed() => return Err(Failure::TimeIsOver),
                Line::Whole(length) if is_http_request(&rest[..length]) => {
                    // A browser, say, is answered in its own words.
                    let who = address_text(*self.peer);
                    server.print_error(&[&who, " sent HTTP; send a line, for example by nc"]);
                    self.echo().await?;
                    self.buffer.clear();
                    self.buffer.extend_from_slice(HTTP_ANSWER);
                    self.buffer.push(b'\n'); // stands for the rest of the request: the close has to linger
                    self.to_echo = HTTP_ANSWER.len();
                    self.bytes_queued += self.to_echo;
                    break;
                }
                Line::Whole(length) => {
                    let text = text_of(&rest[..length]);
                    if between.is_empty() {
                        between = [" from ", &address_text(*self.peer), "\nSend: "].concat();
                    }
                    server.log(&["Received ", &text, &between, &text]);
                    server.lines.on_next(text);
                    (self.has_received, searched) = (true, 0);
                    self.to_echo += length;
                    self.bytes_queued += length;
                    if !server.options.keep_open {
                        break;
                    }
                }
                Line::Partial if has_ended => break,
                Line::Partial => {
                    self.echo().await?;
                    searched = self.buffer.len();
                    match self.read().await {
                        Ok(count) => has_ended = count == 0,
                        Err(Failure::TimeIsOver) => break,
                        Err(failure) => return Err(failure),
                    }
                }
                Line::TooLong => {
                    let (peer, longest) = (address_text(*self.peer), decimal(server.options.max_line as u64));
                    let message =
                        ["line from ", &peer, " is longer than ", &longest, " bytes; --max-line allows more"];
                    server.print_error(&message);
                    break;
                }
            }
        }
        self.echo().await?;
        Ok(!has_ended && !self.echo_failed)
    }

    /// Reads a chunk at most, and returns its length; 0 if the client has ended.
    async fn read(&mut self) -> Result<usize, Failure> {
        if self.is_readable {
            // A client that never stops sending must not starve the others.
            future::yield_now().await;
        }
        self.attempt(Self::try_read).await
    }

    /// Sends back what is to be echoed, byte for byte.
    async fn echo(&mut self) -> Result<(), Failure> {
        while self.echoed < self.to_echo && !self.echo_failed {
            match self.attempt(Self::try_echo).await {
                Ok(count) => self.echoed += count,
                Err(Failure::Io) => self.echo_failed = true,
                Err(failure) => return Err(failure),
            }
            if self.echoed < self.to_echo {
                future::yield_now().await;
            }
        }
        self.buffer.drain(..self.to_echo);
        (self.to_echo, self.echoed) = (0, 0);
        if self.buffer.is_empty() {
            self.buffer = Vec::new();
        }
        Ok(())
    }

    /// Closes so that the echo arrives. With bytes that nobody has read, the kernel would send a reset, which
    /// may cost the client the end of its echo: so only the sending side is shut down, and for a while what
    /// comes is discarded (a lingering close).
    async fn close(&mut self) {
        let sends_more = !self.buffer.is_empty() || matches!(self.try_read(), Ok(1..));
        let must_linger = self.bytes_queued > if sends_more { 0 } else { LEAVES_AT_ONCE };
        if must_linger {
            let _ = net::shutdown(self.socket, Shutdown::Write);
            self.is_closing = true;
            let end = Instant::now() + GRACE;
            self.buffer.clear();
            // The last attempt may take a grace of its own.
            while let Ok(1..) = self.attempt(Self::try_read).await
                && Instant::now() < end
            {
                self.buffer.clear();
                future::yield_now().await;
            }
        }
    }

    /// Attempts something until it is done, or fails, or the client takes too long. What the client has done
    /// counts before any clock does: there is one more attempt after its time is over.
    async fn attempt(&mut self, attempt: fn(&mut Self) -> Result<usize, Errno>) -> Result<usize, Failure> {
        let (mut start, mut in_time) = (None, true);
        loop {
            match attempt(self) {
                Ok(count) => return Ok(count),
                Err(Errno::AGAIN | Errno::INTR) if in_time => {}
                Err(Errno::AGAIN | Errno::INTR) => return Err(Failure::TimeIsOver),
                Err(_) => return Err(Failure::Io),
            }
            in_time = poll_fn(|cx| self.poll_client(cx, &mut start)).await;
            self.is_readable = true; // maybe: the next attempt finds out
        }
    }

    /// Waits until the client moves (true) or its time is over (false). `start` is when it first waits: most
    /// attempts never do, and read no clock.
    /// (As `future::or` of two async blocks, this would cost an idle connection 550 bytes more.)
    fn poll_client(&mut self, cx: &mut Context<'_>, start: &mut Option<Instant>) -> Poll<bool> {
        let now = Instant::now();
        let mut due = self.deadline(*start.get_or_insert(now));
        match self.poll_socket(cx) {
            Poll::Ready(Ok(())) => return Poll::Ready(true),
            // The kernel lacked something: this is polled again soon.
            Poll::Ready(Err(error)) => {
                self.server.warn("wait for a client", errno(error));
                due = due.min(now + BACK_OFF);
            }
            Poll::Pending => {}
        }
        self.server.deadlines.poll(cx, self.socket, due).map(|()| false)
    }

    fn poll_socket(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let io = match &self.io {
            Some(io) => io,
            None => self.io.insert(Async::new_nonblocking(self.socket.as_fd())?),
        };
        if self.echoed < self.to_echo { io.poll_writable(cx) } else { io.poll_readable(cx) }
    }

    /// When a wait that began at `start` is over: after the timeout or, once the server stops, after the
    /// grace.
    fn deadline(&self, start: Instant) -> Instant {
        let due = start + if self.is_closing { GRACE } else { self.server.options.timeout };
        let Some(since) = self.server.stopping_since.get() else { return due };
        let grace = if self.is_closing || !self.buffer.is_empty() {
            GRACE
        } else if self.has_received {
            // Between two lines, a server that stops waits for nobody.
            Duration::ZERO
        } else {
            FIRST_BYTE_GRACE
        };
        due.min(start.max(since) + grace).min(since + GRACE)
    }

    fn try_read(&mut self) -> Result<usize, Errno> {
        if !self.is_readable {
            return Err(Errno::AGAIN);
        }
        self.is_readable = false;
        let mut chunk = [MaybeUninit::uninit(); CHUNK];
        let (bytes, rest) = rustix::io::read(self.socket, &mut chunk)?;
        self.is_readable = rest.is_empty();
        // The buffer grows in blocks of 256, 4096, 65536 bytes and so on, but never beyond a line and a
        // chunk: few sizes, which fit the allocator's classes, leave few holes in memory.
        let mut block = 256;
        while block - BLOCK_HEADER < self.buffer.len() + bytes.len() {
            block *= 16;
        }
        let capacity = (block - BLOCK_HEADER).min(self.server.options.max_line + CHUNK);
        self.buffer.reserve_exact(capacity - self.buffer.len());
        self.buffer.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn try_echo(&mut self) -> Result<usize, Errno> {
        rustix::io::write(self.socket, &self.buffer[self.echoed..self.to_echo])
    }
}

enum Line {
    /// Its length in bytes, its ending included.
    Whole(usize),
    Partial,
    TooLong,
}

/// Looks for the first line in `bytes`, the first `searched` of which are known to hold no newline. What is
/// left when the client `has_ended` is a line, too.
fn first_line(bytes: &[u8], searched: usize, has_ended: bool, longest: usize) -> Line {
    let head = &bytes[..bytes.len().min(longest)];
    match head.iter().skip(searched).position(|&byte| byte == b'\n') {
        Some(index) => Line::Whole(searched + index + 1),
        None if bytes.len() > longest => Line::TooLong,
        None if has_ended && !bytes.is_empty() => Line::Whole(bytes.len()),
        None => Line::Partial,
    }
}

/// Whether a line begins an HTTP request: a method in capitals, a target, a version. It is refused
/// because any web page can make a browser send one to the browser's own machine.
fn is_http_request(line: &[u8]) -> bool {
    let mut words = line.trim_ascii_end().split(|&byte| byte == b' ').filter(|word| !word.is_empty());
    let words = [words.next(), words.next(), words.next(), words.next()];
    matches!(words, [Some(method), Some(_), Some(b"HTTP/1.1" | b"HTTP/1.0"), None]
        if line.starts_with(method) && method.iter().all(u8::is_ascii_uppercase))
}

// ---------------------------------------------------------------- the output

mod output {
    //! The way to stdout, and to stderr. Tasks add lines to a text; each output has a thread, which takes all
    //! that has gathered and writes it, and may block. Many lines cost few system calls, and a lone line
    //! still appears at once.

    use std::mem;
    use std::os::fd::BorrowedFd;
    use std::sync::{Condvar, Mutex, MutexGuard};
    use std::thread;
    use std::time::Duration;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::io::{Errno, write};
    use rustix::pipe::PIPE_BUF;

    use super::text::cannot;
    use super::{CENTURY, MOMENT, Waiters, exit, poll_fn};

    /// Producers wait once this many bytes of text have gathered.
    const HIGH_WATER_MARK: usize = 64 * 1024;
    /// After a write, the thread waits until this many bytes have gathered, or for a pause: under load,
    /// waking it for each line would cost more than the line.
    const MANY: usize = HIGH_WATER_MARK / 2;
    pub const PAUSE: Duration = Duration::from_millis(1);
    /// The exit code of a process that SIGPIPE has ended, as a shell reports it.
    const BROKEN_PIPE: i32 = 128 + 13;

    #[derive(Default)]
    pub struct Output {
        queue: Mutex<Queue>,
        /// Where the thread waits.
        changed: Condvar,
    }

    #[derive(Default)]
    struct Queue {
        text: String,
        /// How many bytes of text the thread waits for, if it does wait.
        awaited: Option<usize>,
        /// The status with which the process ends once all is written.
        status: Option<i32>,
        /// Tasks that wait for room.
        producers: Waiters,
    }

    impl Queue {
        fn has_room(&self) -> bool {
            self.text.len() < HIGH_WATER_MARK
        }

        /// Whether this many bytes have gathered, or no more will.
        fn has(&self, bytes: usize) -> bool {
            self.text.len() >= bytes || self.status.is_some()
        }
    }

    impl Output {
        /// Adds a line, from its parts.
        pub fn push_line(&self, parts: &[&str]) {
            let mut queue = self.lock();
            parts.iter().for_each(|part| queue.text.push_str(part));
            queue.text.push('\n');
            self.wake(queue);
        }

        /// Ends the process with a status, once all is written. The first status counts.
        pub fn close(&self, status: i32) {
            let mut queue = self.lock();
            queue.status.get_or_insert(status);
            self.wake(queue);
        }

        pub fn is_ready(&self) -> bool {
            self.lock().has_room()
        }

        /// Ready when there is room for a line: back-pressure instead of memory.
        pub async fn ready(&self) {
            poll_fn(|cx| {
                let queue = self.lock();
                queue.producers.poll_until(cx, queue.has_room())
            })
            .await
        }

        /// Whether all is written: no text is left, and the thread waits again.
        pub fn is_written(&self) -> bool {
            let queue = self.lock();
            queue.text.is_empty() && queue.awaited.is_some()
        }

        fn lock(&self) -> MutexGuard<'_, Queue> {
            self.queue.lock().unwrap()
        }

        fn wake(&self, mut queue: MutexGuard<Queue>) {
            if queue.awaited.is_some_and(|bytes| queue.has(bytes)) {
                queue.awaited = None;
                self.changed.notify_one();
            }
        }

        /// Starts the thread that writes to a stream. The one of stdout is given stderr as `errors`: what is
        /// queued there is written, too, before the process ends.
        pub fn start(&'static self, stream: BorrowedFd<'static>, errors: Option<&'static Output>) {
            thread::spawn(move || {
                let mut text = String::new();
                loop {
                    self.wait_for(1, CENTURY);
                    text = self.take(text);
                    if text.is_empty() {
                        // The output was closed.
                        let status = self.lock().status;
                        end(status.unwrap_or(0), errors)
                    }
                    // What stderr does not take is lost.
                    if let Err(error) = write_all(stream, text.as_bytes())
                        && let Some(errors) = errors
                    {
                        // The reader is gone. (A terminal's error would be EIO.)
                        if error == Errno::PIPE || hangs_up(stream, Some(&Timespec::default())) {
                            exit(BROKEN_PIPE)
                        }
                        errors.push_line(&["smolrx: ", &cannot(&["write to stdout"], error)]);
                        end(1, Some(errors))
                    }
                    // Its memory is for the next turn, unless this text was unusually long.
                    text.clear();
                    text.shrink_to(2 * HIGH_WATER_MARK);
                    self.wait_for(MANY, PAUSE);
                }
            });
        }

        /// Waits until this many bytes have gathered, the limit is over, or the output is closed.
        fn wait_for(&self, bytes: usize, limit: Duration) {
            let waits = |queue: &mut Queue| {
                queue.awaited = (!queue.has(bytes)).then_some(bytes); // for `wake`
                queue.awaited.is_some()
            };
            let _ = self.changed.wait_timeout_while(self.lock(), limit, waits);
        }

        /// Takes what was added, and leaves an empty string in its place.
        pub fn take(&self, empty: String) -> String {
            let mut queue = self.lock();
            queue.producers.wake_all();
            mem::replace(&mut queue.text, empty)
        }
    }

    /// Ends the process: by the thread of stderr, once all is written there; if nobody reads that, in a
    /// moment.
    fn end(status: i32, errors: Option<&Output>) -> ! {
        if let Some(errors) = errors {
            errors.close(status);
            thread::sleep(MOMENT);
        }
        exit(status)
    }

    /// Ends the process, as SIGPIPE would, once the reader of a stream (a pipe, socket or terminal) is gone.
    pub fn end_with_reader(stream: BorrowedFd<'static>) {
        thread::spawn(move || {
            while !hangs_up(stream, None) {}
            exit(BROKEN_PIPE)
        });
    }

    /// Waits until a stream's reader is gone; false if the limit is over, or `poll` was interrupted.
    fn hangs_up(stream: BorrowedFd, limit: Option<&Timespec>) -> bool {
        // Asked for no event, `poll` reports errors and a hang-up alone.
        matches!(poll(&mut [PollFd::new(&stream, PollFlags::empty())], limit), Ok(1..))
    }

    fn write_all(stream: BorrowedFd, mut text: &[u8]) -> Result<(), Errno> {
        while !text.is_empty() {
            match write(stream, atomic_chunk(text)) {
                Ok(count) => text = &text[count..],
                Err(Errno::INTR) => {}
                // Whoever shares it has made it non-blocking.
                Err(Errno::AGAIN) => _ = poll(&mut [PollFd::new(&stream, PollFlags::OUT)], None),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The whole lines that fit into PIPE_BUF bytes, which a pipe takes at once or not at all; of a longer
    /// line, a part. Others may write to the same pipe, such as the command.
    fn atomic_chunk(text: &[u8]) -> &[u8] {
        let head = &text[..text.len().min(PIPE_BUF)];
        match head.iter().rposition(|&byte| byte == b'\n') {
            Some(index) => &head[..=index],
            None => head,
        }
    }
}

// ---------------------------------------------------------------- text

pub mod text {
    //! Bytes, numbers, addresses and errors as text.

    use std::io;
    use std::net::{IpAddr, SocketAddr};

    use rustix::io::Errno;

    /// A line as text: stripped and escaped.
    pub fn text_of(line: &[u8]) -> String {
        let line = line.trim_ascii();
        // Most lines need no more.
        if line.iter().all(|byte| matches!(byte, b' '..=b'~')) {
            return String::from_utf8_lossy(line).into_owned();
        }
        // `is_whitespace` leaves out the byte order mark.
        let is_blank = |first: char| first.is_whitespace() || first == '\u{feff}';
        escaped(String::from_utf8_lossy(line).trim_start_matches(is_blank).trim_end())
    }

    /// Escapes all that could break the line or control the terminal, as Rust writes it: `\u{1b}` for ESC.
    /// (Backslashes stay as they are: this is to be read, not to be undone.)
    fn escaped(text: &str) -> String {
        let mut escaped = String::new();
        for character in text.chars() {
            match character {
                '\t' => escaped.push_str("\\t"),
                '\r' => escaped.push_str("\\r"),
                _ if is_hostile(character) => {
                    escaped.push_str("\\u{");
                    push_number(&mut escaped, character.into(), 16);
                    escaped.push('}');
                }
                _ => escaped.push(character),
            }
        }
        escaped
    }

    /// What somebody has typed, for a message: escaped, and cut if it is long.
    pub fn excerpt(typed: &[u8]) -> String {
        const LONGEST: usize = 60; // characters
        let mut text = escaped(&String::from_utf8_lossy(typed));
        if let Some((end, _)) = text.char_indices().nth(LONGEST) {
            text.truncate(end);
            text.push_str("...");
        }
        text
    }

    /// Control characters, and those that break lines or reorder them (Unicode's bidi controls).
    fn is_hostile(character: char) -> bool {
        const MARKS: [char; 3] = ['\u{61c}', '\u{200e}', '\u{200f}'];
        let is_in = |first, last| (first..=last).contains(&character);
        character.is_control()
            || MARKS.contains(&character)
            || is_in('\u{2028}', '\u{202e}')
            || is_in('\u{2066}', '\u{2069}')
    }

    /// An address with its port. A mapped IPv4 address is shown as IPv4; in IPv6 the first of the longest
    /// runs of two or more zero groups becomes `::` (RFC 5952). (std's formatting can pad as well: 2 kB.)
    pub fn address_text(address: SocketAddr) -> String {
        let mut text = String::with_capacity(24); // most of them fit
        match address.ip().to_canonical() {
            IpAddr::V4(ip) => push_joined(&mut text, &ip.octets().map(u16::from), 10, '.'),
            IpAddr::V6(ip) => {
                let groups = ip.segments();
                let zeros =
                    |length| groups.windows(length).position(|run| run.iter().all(|&group| group == 0));
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
        let higher = number / u64::from(base);
        if higher > 0 {
            push_number(text, higher, base);
        }
        text.extend(char::from_digit((number % u64::from(base)) as u32, base));
    }

    pub fn decimal(number: u64) -> String {
        let mut text = String::new();
        push_number(&mut text, number, 10);
        text
    }

    /// The error message for an operation that failed: what can't be done, and why.
    pub fn cannot(what: &[&str], error: Errno) -> String {
        ["cannot ", &what.concat(), ": ", &error_text(error)].concat()
    }

    pub fn errno(error: impl Into<io::Error>) -> Errno {
        Errno::from_io_error(&error.into()).unwrap_or(Errno::IO)
    }

    /// What went wrong, in words. The standard library's own, for every number, would cost 2 kB more.
    pub fn error_text(error: Errno) -> String {
        let words = match error {
            Errno::ACCESS | Errno::PERM => "permission denied",
            Errno::NOENT | Errno::NOTDIR => "not found",
            Errno::NOEXEC => "not a program",
            Errno::TOOBIG => "too long for the system",
            Errno::AGAIN => "no process is free", // for a command
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
}

// ---------------------------------------------------------------- waiting

/// A condition variable for tasks: it keeps those that wait for a change, and whoever makes the change wakes
/// all.
#[derive(Default)]
struct Waiters(RefCell<Vec<Waker>>);

impl Waiters {
    /// Ready if the condition `holds`; else the task is woken at the next change, and asks again.
    fn poll_until(&self, cx: &mut Context<'_>, holds: bool) -> Poll<()> {
        if holds {
            return Poll::Ready(());
        }
        let mut tasks = self.0.borrow_mut();
        // A task that asks again right away is not kept twice.
        if !tasks.last().is_some_and(|task| task.will_wake(cx.waker())) {
            tasks.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Waits until the condition holds. (A generic would be compiled for each condition: 80 bytes.)
    async fn wait_until(&self, holds: &dyn Fn() -> bool) {
        poll_fn(|cx| self.poll_until(cx, holds())).await
    }

    fn wake_all(&self) {
        self.0.borrow_mut().drain(..).for_each(Waker::wake);
    }
}

/// Waits until a future is ready, but no longer than a limit.
fn at_most(limit: Duration, future: impl Future<Output = ()>) -> impl Future<Output = ()> {
    let timer = Timer::after(limit);
    future::or(future, async { _ = timer.await })
}

/// How long after its deadline a task may be woken: one timer serves all. (A `Timer` for each wait would cost
/// a system call each, and 150 bytes.)
const RESOLUTION: Duration = Duration::from_millis(100);

/// The deadlines of connections.
#[derive(Default)]
struct Deadlines {
    /// By descriptor.
    tasks: RefCell<Vec<Option<(Instant, Waker)>>>,
    /// No later than the earliest of them.
    next: Cell<Option<Instant>>,
    /// Where `wake_the_due` waits for an earlier one.
    earlier: Waiters,
}

impl Deadlines {
    /// Ready once a connection's deadline has passed.
    fn poll(&self, cx: &mut Context<'_>, socket: &TcpStream, deadline: Instant) -> Poll<()> {
        if deadline <= Instant::now() {
            return Poll::Ready(());
        }
        let descriptor = socket.as_raw_fd() as usize;
        let mut tasks = self.tasks.borrow_mut();
        if tasks.len() <= descriptor {
            tasks.resize_with(descriptor + 1, || None);
        }
        tasks[descriptor] = Some((deadline, cx.waker().clone()));
        if self.next.get().is_none_or(|next| deadline < next) {
            self.next.set(Some(deadline));
            self.earlier.wake_all();
        }
        Poll::Pending
    }

    fn forget(&self, socket: &TcpStream) {
        if let Some(task) = self.tasks.borrow_mut().get_mut(socket.as_raw_fd() as usize) {
            *task = None;
        }
    }

    fn wake_all(&self) {
        self.tasks.borrow_mut().iter_mut().filter_map(Option::take).for_each(|(_, task)| task.wake());
    }

    /// Wakes the tasks whose deadline has passed, later by `resolution` at most. Never returns.
    async fn wake_the_due(&self, resolution: Duration) {
        loop {
            let now = Instant::now();
            let mut next: Option<Instant> = None;
            for task in self.tasks.borrow_mut().iter_mut() {
                if let Some((_, task)) = task.take_if(|(deadline, _)| *deadline <= now) {
                    task.wake();
                } else if let Some((deadline, _)) = task {
                    next = Some(next.map_or(*deadline, |next| next.min(*deadline)));
                }
            }
            self.next.set(next);
            let timer = next.map_or_else(Timer::never, |next| Timer::at(next.max(now + resolution)));
            let timer = async { _ = timer.await };
            future::or(timer, self.earlier.wait_until(&|| self.next.get() != next)).await;
        }
    }
}

// ---------------------------------------------------------------- the options

const HELP: &str = "\
Usage: smolrx [OPTION]... [-- COMMAND [ARG]...]
A TCP server whose lines become a debounced event stream. COMMAND runs for each
event, and finds it in the environment variable SMOLRX_EVENT.

  --tcp-port PORT   port to listen on; 0 takes a free one [8888]
  --interval MS     period of the clock, at least 10; 0 for no clock [60000]
  --debounce MS     silence that ends a burst; only its last line is emitted
                    [a tenth of --interval; without a clock 1000]
  --max-wait MS     longest time for which a burst is held back [none]
  --bind ADDR       IPv4 or IPv6 address to listen on [0.0.0.0]
  --keep-open       serve every line until the client closes
  --max-conns N     connections served at once; more wait in the backlog [512]
  --max-line BYTES  longest line, its ending included [2048]
  --timeout MS      a connection that sends no byte, or takes none of its echo,
                    for that long is closed [60000]
  -q, --quiet       print events alone, one a line; with a COMMAND, nothing
  --health          ask the server on --tcp-port whether it is healthy, or
                    without that the first one here; exit 0 or 1
  -h, --help        print this
  -V, --version     print the version
";

/// What the command line asks for.
pub enum Invocation {
    Serve(Options),
    /// Ask the server at this address for its health, by this name (see `health_address`).
    Health(SocketAddr, String),
    Print(&'static str),
}

/// As `HELP` describes them.
pub struct Options {
    address: SocketAddr,
    interval: Option<Duration>,
    debounce: Duration,
    max_wait: Option<Duration>,
    keep_open: bool,
    max_conns: usize,
    max_line: usize,
    timeout: Duration,
    quiet: bool,
    /// The command and its arguments, each with a NUL at its end; empty without one.
    command: Vec<u8>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            address: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 8888)),
            interval: Some(Duration::from_secs(60)),
            debounce: Duration::ZERO, // a tenth of `interval`: see `parse`
            max_wait: None,
            keep_open: false,
            max_conns: 512,
            max_line: 2048,
            timeout: Duration::from_secs(60),
            quiet: false,
            command: Vec::new(),
        }
    }
}

impl Invocation {
    /// Parses the command line. An error names the option, and the value as it was typed.
    pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Invocation, String> {
        let mut options = Options::default();
        let (mut debounce, mut health, mut has_port, mut print) = (None, false, false, None);
        let mut args = Arguments { rest: args, name: String::new(), value: None };
        while args.advance() {
            match &*args.name {
                "--tcp-port" => {
                    options.address.set_port(args.number("a whole number from ", false, 0, 65_535)? as u16);
                    has_port = true;
                }
                "--bind" => {
                    let typed = args.value()?;
                    let ip = typed.strip_prefix('[').and_then(|ip| ip.strip_suffix(']')).unwrap_or(&typed);
                    let ip = ip.parse().map_err(|_| args.invalid_value("an IPv4 or IPv6 address", &typed))?;
                    options.address.set_ip(ip);
                }
                "--interval" => {
                    let period =
                        args.number("0 or a whole number of milliseconds from ", true, 10, u32::MAX)?;
                    options.interval = (period > 0).then(|| Duration::from_millis(period.into()));
                }
                "--debounce" => debounce = Some(args.milliseconds()?),
                "--max-wait" => options.max_wait = Some(args.milliseconds()?),
                "--timeout" => options.timeout = args.milliseconds()?,
                "--max-conns" => {
                    options.max_conns = args.number("a whole number from ", false, 1, u32::MAX)? as usize
                }
                "--max-line" => {
                    options.max_line =
                        args.number("a whole number of bytes from ", false, 1, u32::MAX)? as usize
                }
                "--keep-open" => options.keep_open = true,
                "-q" | "--quiet" => options.quiet = true,
                "--health" => health = true,
                "-h" | "--help" => print = Some(HELP),
                "-V" | "--version" => print = Some(concat!("smolrx ", env!("CARGO_PKG_VERSION"), "\n")),
                "--" => {
                    for arg in args.rest.by_ref() {
                        options.command.extend(arg.into_vec());
                        options.command.push(0);
                    }
                    if options.command.is_empty() {
                        return Err(String::from("no command follows '--'"));
                    }
                }
                _ => return Err(args.misfit()),
            }
            if args.value.is_some() {
                return Err(["option '", &args.name, "' takes no value"].concat());
            }
            if let Some(text) = print {
                return Ok(Invocation::Print(text));
            }
        }
        if health {
            let name = if has_port { decimal(options.address.port().into()) } else { String::new() };
            return Ok(Invocation::Health(options.address, name));
        }
        let default = options.interval.map_or(Duration::from_secs(1), |interval| interval / 10);
        options.debounce = debounce.unwrap_or(default);
        Ok(Invocation::Serve(options))
    }
}

/// The arguments of the command line, one by one. (lexopt, whose shape this has, is 4.4 kB.)
struct Arguments<I> {
    rest: I,
    /// The current one, without the value that is attached to it (`--option=VALUE`).
    name: String,
    value: Option<String>,
}

impl<I: Iterator<Item = OsString>> Arguments<I> {
    fn advance(&mut self) -> bool {
        let Some(arg) = self.rest.next() else { return false };
        self.name = arg.to_string_lossy().into_owned();
        if self.name.starts_with("--")
            && let Some(index) = self.name.find('=')
        {
            self.value = Some(self.name.split_off(index).split_off(1));
        }
        true
    }

    /// The value of the current option, `--option VALUE` or `--option=VALUE`.
    fn value(&mut self) -> Result<String, String> {
        let value = self.value.take().or_else(|| Some(self.rest.next()?.to_string_lossy().into_owned()));
        value.ok_or_else(|| ["option '", &self.name, "' needs a value"].concat())
    }

    /// The value as a number from `min` to `max`, or 0 if `or_zero`. (`str::parse` would take a `+`.) In a
    /// message, these limits follow the description.
    fn number(&mut self, description: &str, or_zero: bool, min: u32, max: u32) -> Result<u32, String> {
        let typed = self.value()?;
        let digit = |number: u32, byte| number.checked_mul(10)?.checked_add(char::from(byte).to_digit(10)?);
        match typed.bytes().try_fold(0, digit).filter(|_| !typed.is_empty()) {
            Some(number) if (min..=max).contains(&number) || or_zero && number == 0 => Ok(number),
            _ => {
                let description = [description, &decimal(min.into()), " to ", &decimal(max.into())].concat();
                Err(self.invalid_value(&description, &typed))
            }
        }
    }

    fn milliseconds(&mut self) -> Result<Duration, String> {
        let number = self.number("a whole number of milliseconds from ", false, 1, u32::MAX)?;
        Ok(Duration::from_millis(number.into()))
    }

    fn invalid_value(&self, description: &str, typed: &str) -> String {
        ["option '", &self.name, "' takes ", description, ", not '", &excerpt(typed.as_bytes()), "'"].concat()
    }

    /// The error message for an argument that is none of the options.
    fn misfit(&self) -> String {
        let typed = excerpt(self.name.as_bytes());
        let (what, hint) = match &*self.name {
            "--port" | "-p" => ("unknown option '", "'; the port is set by --tcp-port"),
            name if !name.starts_with('-') => ("unexpected argument '", "'; a command follows '--'"),
            name if name.starts_with("--") || name.len() <= 2 => ("unknown option '", "'"),
            _ => ("unknown option '", "'; give short options one by one"),
        };
        [what, &typed, hint].concat()
    }
}

// ---------------------------------------------------------------- the health check
// `--health` asks a running server through a Unix socket, or else through TCP.

/// The address of an abstract Unix socket. A server has two, by two names: its port's number and, if it is
/// the first one in its network namespace, the empty name.
fn health_address(name: &str) -> Result<SocketAddrUnix, Errno> {
    SocketAddrUnix::new_abstract_name(["smolrx ", name].concat().as_bytes())
}

/// A datagram socket: an answer needs neither a connection nor a new descriptor, so even a full server
/// answers.
fn health_socket(name: &str) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    net::bind(&socket, &health_address(name)?)?;
    Ok(socket)
}

impl Server {
    /// Starts to answer those who ask for its health.
    fn answer_probes(&'static self, port: &str) -> [Option<Task<()>>; 2] {
        ["", port].map(|name| {
            let socket = health_socket(name).inspect_err(|&error| {
                if error == Errno::ADDRINUSE && name == port {
                    self.print_error(&[&cannot(&["answer --health for port ", port], error)]);
                }
            });
            Some(self.spawn(self.answer(socket.ok()?)))
        })
    }

    /// Answers until its task is dropped.
    async fn answer(&self, socket: OwnedFd) {
        let Ok(io) = Async::new_nonblocking(socket.as_fd()) else { return };
        loop {
            match net::recvfrom(&socket, &mut [0][..], RecvFlags::empty()) {
                Ok((_, _, from)) => {
                    let _ = from.map(|from| net::sendto(&socket, &[], SendFlags::empty(), &from));
                    future::yield_now().await;
                }
                Err(_) => _ = poll_fn(|cx| io.poll_readable(cx)).await,
            }
        }
    }
}

/// Asks a server through its Unix socket: one that does not answer there is not healthy. If none has the
/// name, it connects by TCP, sends nothing and expects the server to close: this proves that it accepts and
/// serves, and is no event. It takes two seconds at most.
fn probe(address: SocketAddr, name: &str) -> Result<(), String> {
    let (who, answer) = match ask(name) {
        Err(error) if error != Errno::AGAIN => (address_text(address), connect_and_read(address)),
        answer => (String::from("the server"), answer),
    };
    let trouble = match answer {
        Ok(0) => return Ok(()),
        Ok(_) => String::from("is not smolrx"),
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
