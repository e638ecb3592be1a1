//! Starts the real binary and talks to it over real sockets.
//!
//! `SMOLRX_BIN` names the binary under test; without it cargo's own build is taken.
//! Nothing here sleeps to wait for something to be true: it waits for the thing itself, with a deadline.
#![allow(dead_code)] // each test file is a crate of its own and uses its own part

use nix::sched::{CloneFlags, unshare};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, getsockname, socket_with, sockopt};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit, setrlimit};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{OptionalActions, OutputModes, tcgetattr, tcsetattr};
use std::borrow::BorrowMut;
use std::env;
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

/// How long a success may take on a slow, noisy machine before it counts as a failure.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The transcript's line at the end of a connection.
pub const CLOSE: &str = "Close the client socket";

/// What a client that speaks HTTP is told.
pub const BAD_REQUEST: &[u8] =
    b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\nsend a line, for example by nc\n";

/// These options, with a clock and a debounce so slow that only the flush at the end is observed.
pub fn calm(options: &str) -> String {
    format!("--interval 600000 {options}")
}

/// A line of this many bytes, its ending included.
pub fn line_of(length: usize) -> String {
    "x".repeat(length - 1) + "\n"
}

pub fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Says past libtest's capture what is not run, and why; with `SMOLRX_NO_SKIPS`, as in CI, that is a failure.
pub fn skip(reason: impl fmt::Display) {
    assert!(env::var_os("SMOLRX_NO_SKIPS").is_none(), "SKIPPED where SMOLRX_NO_SKIPS is set: {reason}");
    let test = thread::current().name().unwrap_or("a part of a test").to_owned();
    let _ = writeln!(io::stderr(), "SKIPPED: {test}: {reason}");
}

/// The value of a setting in the environment, or what it is by default.
pub fn setting(name: &str, default: u64) -> u64 {
    let number = |text: String| text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number"));
    env::var(name).map_or(default, number)
}

/// A test with thousands of sockets needs as many descriptors itself.
pub fn raise_descriptor_limit() {
    let hard = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: hard, maximum: hard }).unwrap();
}

/// An empty directory named after the test. What is in it stays until that runs again.
pub fn scratch() -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(thread::current().name().unwrap());
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path).unwrap();
    path
}

/// Tries until `done` is true; fails after `within`.
pub fn eventually(within: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < within, "not within {within:?}: {what}");
        thread::sleep(ms(2));
    }
}

/// Repeats each load in a thread of its own while `body` runs, which begins once they have counted `enough`.
pub fn beside<T>(loads: Vec<impl FnMut() -> u64 + Send>, enough: u64, body: impl FnOnce() -> T) -> T {
    let (on, count) = (Arc::new(()), AtomicU64::new(0));
    thread::scope(|scope| {
        for mut load in loads {
            let (on, count) = (Arc::downgrade(&on), &count);
            scope.spawn(move || {
                while on.strong_count() > 0 {
                    count.fetch_add(load(), Ordering::Relaxed);
                }
            });
        }
        let _on = on; // gone when `body` has come to its end or panicked
        eventually(PATIENCE, "the load is on", || count.load(Ordering::Relaxed) >= enough);
        body()
    })
}

/// Checks all cases at once. A panic's message starts with its thread's name, which says which case it is.
pub fn at_once<T: Send>(cases: impl IntoIterator<Item = T>, check: impl Fn(T) + Sync) {
    let (test, check) = (thread::current().name().unwrap_or("a test").to_owned(), &check);
    thread::scope(|scope| {
        for (number, case) in (1..).zip(cases) {
            let thread = thread::Builder::new().name(format!("{test}, case {number}"));
            thread.spawn_scoped(scope, move || check(case)).unwrap();
        }
    });
}

// ---------------------------------------------------------------- the program

/// For glibc, to be like musl: no second arena, which grows at a time of its own, and nothing large kept.
pub const MALLOC: [(&str, &str); 2] = [("MALLOC_ARENA_MAX", "1"), ("MALLOC_MMAP_THRESHOLD_", "131072")];

/// A command with an open stdin, whose output is collected, unless its caller says where else they go.
fn command(name: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(name);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The program under test with these options, which are parted by blanks.
pub fn program(options: &str) -> Command {
    let mut command = command(binary());
    command.args(options.split_whitespace()).envs(MALLOC);
    command
}

/// The same, with a calm clock and a port of the loopback interface that it finds itself.
pub fn calm_on_loopback(options: &str) -> Command {
    program(&calm(&format!("--bind 127.0.0.1 --tcp-port 0 {options}")))
}

/// A command that another one runs, as `env` or `strace` does, whose arguments it becomes.
pub fn within(mut outer: Command, inner: &Command) -> Command {
    outer.arg(inner.get_program()).args(inner.get_args());
    outer.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    outer
}

/// A command that takes the place of a shell after `setup`, for example `ulimit -n 64`.
pub fn after(setup: &str, inner: &Command) -> Command {
    let mut shell = command("sh");
    shell.args(["-c", &format!("{setup}; exec \"$0\" \"$@\"")]);
    within(shell, inner)
}

/// A strace that injects, for example, `socket:error=EPERM:when=1`; none, and the test skipped, without it.
pub fn strace(injection: &str) -> Option<Command> {
    let probe = ["-o", "/dev/null", "-e", "inject=epoll_ctl:error=ENOMEM", "true"];
    if let Some(reason) = refusal(Command::new("strace").args(probe)) {
        skip(format!("no strace that injects: {reason}"));
        return None;
    }
    let mut strace = command("strace");
    strace.args(["-qq", "-o", "/dev/null", "-e", &format!("inject={injection}")]);
    Some(strace)
}

/// Whether this machine lacks the address `::1`; then it says what is skipped.
pub fn no_ipv6(what: &str) -> bool {
    let refusal = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).err();
    refusal.inspect(|reason| skip(format!("{what}: no IPv6 loopback here: {reason}"))).is_some()
}

/// Why a command that asks for a privilege or a tool fails; none if it does not.
pub fn refusal(command: &mut Command) -> Option<String> {
    match command.stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().into()),
        Err(error) => Some(format!("{:?}: {error}", command.get_program())),
    }
}

/// Runs `body` in a network of its own, a loopback interface on which a shell has run `setup`; or skips it.
pub fn in_a_network_of_its_own(setup: &str, body: impl FnOnce() + Send) {
    let setup = ["-ec", &format!("ip link set lo up; {setup}")];
    if let Some(reason) = refusal(Command::new("unshare").args(["--net", "sh"]).args(setup)) {
        return skip(format!("no network of its own: {reason}"));
    }
    // A thread has its own idea of what its network is, and what it starts inherits that.
    let inside = || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        assert_eq!(refusal(Command::new("sh").args(setup)), None);
        body();
    };
    thread::scope(|scope| _ = scope.spawn(inside));
}

/// The program as process 1, as in a container, in the place of a shell after `setup`; or none, and a skip.
pub fn as_process_one(setup: &str, inner: &Command) -> Option<Server> {
    let unshare = |namespaces: &[&str]| {
        let mut unshare = command("unshare");
        unshare.args(namespaces).args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
        unshare
    };
    let ways = [&[][..], &["--user", "--map-root-user"]];
    let Some(way) = ways.into_iter().find(|way| refusal(unshare(way).arg("true")).is_none()) else {
        skip("no PID namespace");
        return None;
    };
    let mut server = Server::of(within(unshare(way), &after(setup, inner)));
    let pid = server.tasks("children").concat().trim().parse().unwrap();
    server.pid = Pid::from_raw(pid).unwrap();
    assert_eq!(server.proc_field("status", "NSpid:"), format!("{pid}\t1"));
    Some(server)
}

fn binary() -> PathBuf {
    env::var_os("SMOLRX_BIN").map_or_else(|| env!("CARGO_BIN_EXE_smolrx").into(), PathBuf::from)
}

/// Runs a command to its end, which must come by itself.
pub fn run(command: impl BorrowMut<Command>) -> Exit {
    Process::spawn(command).exited(PATIENCE)
}

/// A running program whose output is collected; it is killed when dropped.
pub struct Process {
    child: Child,
    /// The program itself, where `child` is another that runs it.
    pub pid: Pid,
    pub stdout: Transcript,
    pub stderr: Transcript,
}

/// How a program ended, and the lines that it said.
#[derive(Debug)]
pub struct Exit {
    /// The exit code; none if a signal killed it.
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub stdout: Vec<String>,
    pub stderr: Vec<String>,
}

impl Exit {
    /// What it printed is a client's conversation, of one line, and the event at the end.
    #[track_caller]
    pub fn tells_of(&self, shown: &str, port: u16) {
        let told = [&conversation(shown, port)[..], &[format!("Observing {shown}")]].concat();
        assert_eq!(self.stdout.get(1..).unwrap_or_default(), told, "{self:?}");
    }
}

impl Process {
    pub fn spawn(mut command: impl BorrowMut<Command>) -> Self {
        let mut child = command.borrow_mut().spawn().expect("the program under test starts");
        let stdout = child.stdout.take().map_or_else(|| Transcript::of(io::empty()), Transcript::of);
        let stderr = child.stderr.take().map_or_else(|| Transcript::of(io::empty()), Transcript::of);
        Self { pid: Pid::from_child(&child), child, stdout, stderr }
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).expect("the program is there to be signalled");
    }

    /// Takes the end of its stdin to write to; stdin ends when that is dropped.
    pub fn stdin(&mut self) -> ChildStdin {
        self.child.stdin.take().unwrap()
    }

    /// Stops it in its tracks, until it is woken.
    pub fn suspend(&self) {
        self.signal(Signal::STOP);
        eventually(PATIENCE, "all its threads are stopped", || {
            self.tasks("stat").iter().all(|stat| stat.rsplit(") ").next().unwrap().starts_with('T'))
        });
    }

    pub fn wake(&self) {
        self.signal(Signal::CONT);
    }

    /// Attaches a strace, until that is dropped.
    pub fn traced_by(&self, mut strace: Command) -> Process {
        let strace = Process::spawn(strace.args(["-p", &self.pid.to_string()]));
        eventually(PATIENCE, "it is traced", || self.proc_field("status", "TracerPid:") != "0");
        strace
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for the end, which must come within the deadline, though nobody may read the output.
    pub fn status(&mut self, within: Duration) -> ExitStatus {
        let start = Instant::now();
        while self.is_running() {
            let said = (&self.stdout, &self.stderr);
            assert!(start.elapsed() < within, "still running after {within:?}\n{said:?}");
            thread::sleep(ms(2));
        }
        self.child.wait().unwrap()
    }

    /// Waits for the end, which must come within the deadline, and for all that it has said.
    pub fn exited(&mut self, within: Duration) -> Exit {
        let status = self.status(within);
        self.stdout.resume();
        let (stdout, stderr) = (self.stdout.to_the_end(), self.stderr.to_the_end());
        Exit { code: status.code(), signal: status.signal(), stdout, stderr }
    }

    /// Waits for the end after this instant, at which it was signalled: it must come in time, and be good.
    #[track_caller]
    pub fn stopped(&mut self, signalled: Instant) -> Exit {
        let exit = self.exited(PATIENCE);
        let took = signalled.elapsed();
        assert_eq!(exit.code, Some(0), "the exit code after a signal: {:?}", exit.stderr);
        // Six seconds, and a moment to see it; an emulator, started by a script, takes longer for all.
        let is_emulated = fs::read(binary()).is_ok_and(|file| file.starts_with(b"#!"));
        assert!(took < if is_emulated { ms(8000) } else { ms(6250) }, "ended {took:?} after the signal");
        exit
    }

    /// Asks it to stop, which must be in time and end well.
    #[track_caller]
    pub fn stop(&mut self) -> Exit {
        self.stopped(self.ask_to_stop())
    }

    /// Asks it to stop, and returns when it did.
    pub fn ask_to_stop(&self) -> Instant {
        let now = Instant::now();
        self.signal(Signal::TERM);
        now
    }

    fn proc(&self, file: &str) -> PathBuf {
        format!("/proc/{}/{file}", self.pid).into()
    }

    /// A file of each of its threads.
    pub fn tasks(&self, file: &str) -> Vec<String> {
        let tasks = fs::read_dir(self.proc("task")).unwrap();
        tasks.map(|task| fs::read_to_string(task.unwrap().path().join(file)).unwrap()).collect()
    }

    fn open_descriptors(&self) -> Vec<PathBuf> {
        fs::read_dir(self.proc("fd")).unwrap().map(|descriptor| descriptor.unwrap().path()).collect()
    }

    /// A line of a file of `name: value` lines.
    pub fn proc_field(&self, file: &str, name: &str) -> String {
        let text = fs::read_to_string(self.proc(file)).unwrap();
        let line = text.lines().find(|line| line.starts_with(name));
        line.unwrap_or_else(|| panic!("no {name} in {file}:\n{text}"))[name.len()..].trim().into()
    }

    /// Its memory, without the pages of its own file, which come as code is used and may be taken back.
    pub fn memory_kb(&self) -> u64 {
        self.proc_field("smaps_rollup", "Anonymous:").trim_end_matches(" kB").parse().unwrap()
    }

    pub fn descriptors(&self) -> usize {
        self.open_descriptors().len()
    }

    /// Leaves it descriptors for this many clients, and no more.
    pub fn limit_descriptors(&self, clients: usize) {
        let open = self.open_descriptors();
        let is_free = |number: &u64| !open.contains(&self.proc(&format!("fd/{number}")));
        let current = (0..).filter(is_free).nth(clients);
        let limit = Rlimit { current, maximum: current };
        prlimit(Some(self.pid), Resource::Nofile, limit).unwrap();
    }

    pub fn threads(&self) -> u64 {
        self.proc_field("status", "Threads:").parse().unwrap()
    }

    /// Time spent on a processor by all its threads, and how often they came to one.
    pub fn activity(&self) -> (Duration, u64) {
        let word = |stat: &str, n| stat.split_whitespace().nth(n).unwrap().parse::<u64>().unwrap();
        let add = |(time, turns), stat: &String| (time + word(stat, 0), turns + word(stat, 2));
        let (nanoseconds, turns) = self.tasks("schedstat").iter().fold((0, 0), add);
        (Duration::from_nanos(nanoseconds), turns)
    }

    /// Time spent on a processor while this much goes by.
    pub fn busy_during(&self, time: Duration) -> Duration {
        let before = self.activity().0;
        thread::sleep(time);
        self.activity().0 - before
    }

    /// Waits until it does nothing any more, and returns its `activity` so far.
    pub fn comes_to_rest(&self) -> (Duration, u64) {
        eventually(PATIENCE, "it comes to rest", || self.busy_during(ms(200)).is_zero());
        self.activity()
    }

    /// The port it listens on, for when it does not say.
    pub fn listening_port(&self) -> u16 {
        let mut port = None;
        eventually(PATIENCE, "it listens", || {
            let descriptors = self.open_descriptors();
            let links: Vec<_> = descriptors.iter().filter_map(|path| fs::read_link(path).ok()).collect();
            let is_ours = |inode: &str| links.contains(&format!("socket:[{inode}]").into());
            let sockets = sockets(&self.proc("net/tcp"), " 0A "); // it is LISTEN
            let address = sockets.iter().find_map(|fields| is_ours(&fields[9]).then_some(&*fields[1]));
            port = address.map(|address| u16::from_str_radix(&address[address.len() - 4..], 16).unwrap());
            port.is_some()
        });
        port.unwrap()
    }
}

/// The fields of each TCP socket whose line contains this text:
/// sl local_address rem_address st tx_queue:rx_queue ... inode (the tenth).
fn sockets(file: &Path, text: &str) -> Vec<Vec<String>> {
    let sockets = fs::read_to_string(file).unwrap();
    let lines = sockets.lines().filter(|line| line.contains(text));
    lines.map(|line| line.split_whitespace().map(String::from).collect()).collect()
}

impl Drop for Process {
    fn drop(&mut self) {
        // Either may fail: it has usually ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A socket that programs started meanwhile do not inherit.
fn stream_socket() -> OwnedFd {
    socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap()
}

/// A port that the kernel gives to nobody while this socket has it; a server that is told to can listen there.
pub fn reserve_port() -> (OwnedFd, u16) {
    let socket = stream_socket();
    sockopt::set_socket_reuseaddr(&socket, true).unwrap();
    bind(&socket, &SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))).unwrap();
    let address = SocketAddr::try_from(getsockname(&socket).unwrap()).unwrap();
    (socket, address.port())
}

/// A program that listens on a port of its own, which stays so when it listens no more.
pub struct Server {
    process: Process,
    /// Where it listens. To a client on this machine, an unspecified address is its own.
    pub address: SocketAddr,
    _port: Option<OwnedFd>,
}

impl Server {
    /// Starts it on a free port, and waits until it serves.
    pub fn start(options: &str) -> Self {
        Self::start_after("true", options)
    }

    /// The same, with a calm clock.
    pub fn calm(options: &str) -> Self {
        Self::start(&calm(options))
    }

    /// The same as `start`, in the place of a shell that has run `setup`.
    pub fn start_after(setup: &str, options: &str) -> Self {
        let (socket, port) = reserve_port();
        let program = program(&format!("--tcp-port {port} {options}"));
        Self { _port: Some(socket), ..Self::of(after(setup, &program)) }
    }

    /// Starts a server that says where it serves.
    pub fn of(command: impl BorrowMut<Command>) -> Self {
        let process = Process::spawn(command);
        let first = process.stdout.wait_until("its first line", |lines| lines.first().cloned());
        let address = first.strip_prefix("Serving on ").and_then(|address| address.parse().ok());
        let address = address.unwrap_or_else(|| panic!("not `Serving on ADDRESS:PORT`: {first}"));
        Self { process, address, _port: None }
    }

    /// Starts a server on the loopback interface that need not say where it serves.
    pub fn on_loopback(command: impl BorrowMut<Command>) -> Self {
        let process = Process::spawn(command);
        let address = (Ipv4Addr::LOCALHOST, process.listening_port()).into();
        Self { process, address, _port: None }
    }

    pub fn connect(&self) -> Client {
        Client::connect(self.address)
    }

    /// This many clients that are connected, and then have each sent `text`.
    pub fn clients(&self, count: usize, text: &str) -> Vec<Client> {
        raise_descriptor_limit();
        let mut clients: Vec<Client> = (0..count).map(|_| self.connect()).collect();
        clients.iter_mut().for_each(|client| client.send(text));
        clients
    }

    /// A client that has sent `text`, all of which the server has read.
    pub fn client_in(&self, text: &str) -> Client {
        let mut client = self.connect();
        client.send(text);
        client.wait_until_taken();
        client
    }

    /// A client that can take a few kilobytes only before it has read them.
    pub fn connect_with_small_window(&self) -> Client {
        let socket = stream_socket();
        sockopt::set_socket_recv_buffer_size(&socket, 4096).unwrap();
        rustix::net::connect(&socket, &self.address).unwrap();
        Client::of(TcpStream::from(socket))
    }

    /// Sends these bytes on a connection of their own, which must be echoed and then closed.
    pub fn echo(&self, bytes: impl AsRef<[u8]>) -> u16 {
        let mut client = self.connect();
        client.send(&bytes);
        client.finish();
        assert_eq!(client.rest(), bytes.as_ref(), "the echo of a line");
        client.port()
    }

    /// Asks it to stop and, once it does, a second time, which is to end it at once.
    pub fn signal_twice(&self, first: Signal, second: Signal) {
        self.signal(first);
        self.wait_until_refused();
        thread::sleep(ms(150)); // sooner, it would be the same signal
        self.signal(second);
    }

    /// Nobody is let in any more, and at once.
    pub fn wait_until_refused(&self) {
        eventually(ms(1500), "a new connection is refused", || {
            // One that comes in between two steps of the end gets no answer for a second.
            let attempt = TcpStream::connect_timeout(&self.address, ms(100));
            attempt.is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused)
        });
    }
}

/// The answer of `--health` for the server at a port of this machine.
pub fn health(options: &str, port: u16) -> Exit {
    run(program(&format!("{options} --health --tcp-port {port}")))
}

#[track_caller]
pub fn assert_healthy(port: u16) {
    let exit = health("", port);
    assert_eq!(exit.code, Some(0), "the health of port {port}: {exit:?}");
}

impl Deref for Server {
    type Target = Process;
    fn deref(&self) -> &Process {
        &self.process
    }
}

impl DerefMut for Server {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.process
    }
}

// -------------------------------------------------------------- what it says

/// What a program writes, line by line, as a thread reads it.
#[derive(Clone, Default)]
pub struct Transcript(Arc<(Mutex<Reading>, Condvar)>);

#[derive(Default)]
struct Reading {
    lines: Vec<String>,
    /// What came after the last newline, once the end has come.
    rest: Option<Vec<u8>>,
    paused: bool,
}

impl Transcript {
    pub fn of(source: impl Read + Send + 'static) -> Self {
        let transcript = Self::default();
        let (reader, mut source) = (transcript.clone(), BufReader::with_capacity(4096, source));
        thread::spawn(move || {
            while reader.wait_while(PATIENCE * 100, |reading| reading.paused).rest.is_none() {
                let mut line = Vec::new();
                let _ = source.read_until(b'\n', &mut line); // a failure is the end
                let mut reading = reader.lock();
                match line.strip_suffix(b"\n").map(|line| String::from_utf8(line.into())) {
                    Some(line) => reading.lines.push(line.unwrap_or_else(|e| format!("not UTF-8: {e}"))),
                    None => reading.rest = Some(line),
                }
                if !source.buffer().contains(&b'\n') {
                    reader.0.1.notify_all();
                }
            }
        });
        transcript
    }

    fn lock(&self) -> MutexGuard<'_, Reading> {
        self.0.0.lock().unwrap()
    }

    fn wait_while(&self, limit: Duration, wait: impl FnMut(&mut Reading) -> bool) -> MutexGuard<'_, Reading> {
        self.0.1.wait_timeout_while(self.lock(), limit, wait).unwrap().0
    }

    /// Waits until the lines so far give an answer.
    pub fn wait_until<T>(&self, what: &str, mut answer: impl FnMut(&[String]) -> Option<T>) -> T {
        let mut found = None;
        let reading = self.wait_while(PATIENCE, |reading| {
            found = answer(&reading.lines);
            found.is_none() && reading.rest.is_none()
        });
        drop(reading);
        found.unwrap_or_else(|| panic!("waited in vain for {what}\n{self:?}"))
    }

    /// Waits for a line that reads exactly so.
    pub fn wait_for(&self, line: &str) {
        self.wait_until(&format!("`{line}`"), |lines| lines.iter().any(|l| l == line).then_some(()));
    }

    pub fn wait_for_count(&self, count: usize) {
        self.wait_until(&format!("{count} lines"), |lines| (lines.len() >= count).then_some(()));
    }

    pub fn lines(&self) -> Vec<String> {
        self.lock().lines.clone()
    }

    pub fn clear(&self) {
        self.lock().lines.clear();
    }

    /// All lines, once the program has ended; the last one must be whole.
    fn to_the_end(&self) -> Vec<String> {
        let reading = self.wait_while(PATIENCE, |reading| reading.rest.is_none());
        let rest = reading.rest.as_ref().expect("the output ends with the program");
        assert_eq!(String::from_utf8_lossy(rest), "", "part of a line at the end");
        reading.lines.clone()
    }

    /// Stops reading (after at most one more chunk or line), so that the pipe fills up.
    pub fn pause(&self) {
        self.lock().paused = true;
    }

    pub fn resume(&self) {
        self.lock().paused = false;
        self.0.1.notify_all();
    }
}

impl fmt::Debug for Transcript {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let reading = self.lock();
        let lines = &reading.lines;
        writeln!(f, "--- {} lines, the last of them:", lines.len())?;
        lines.iter().skip(lines.len().saturating_sub(40)).try_for_each(|line| writeln!(f, "{line:.200}"))?;
        writeln!(f, "--- and then: {:?}", reading.rest.as_deref().map(String::from_utf8_lossy))
    }
}

/// A terminal: the end to read, which is its screen, and the end for a program. It adds no `\r` to a `\n`.
pub fn terminal() -> (File, OwnedFd) {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let screen = openpt(flags).unwrap();
    unlockpt(&screen).unwrap();
    let program_end = ioctl_tiocgptpeer(&screen, flags).unwrap();
    let mut modes = tcgetattr(&program_end).unwrap();
    modes.output_modes.remove(OutputModes::ONLCR);
    tcsetattr(&program_end, OptionalActions::Now, &modes).unwrap();
    (File::from(screen), program_end)
}

/// An output of each kind: what it is, its end to read, and its end for a program.
pub fn outputs() -> [Output; 3] {
    let (screen, terminal) = terminal();
    let (reader, pipe) = io::pipe().unwrap();
    let (peer, socket) = UnixStream::pair().unwrap();
    sockopt::set_socket_send_buffer_size(&socket, 32 << 10).unwrap();
    [
        ("a terminal", Box::new(screen), terminal),
        ("a pipe", Box::new(reader), pipe.into()),
        ("a socket", Box::new(peer), socket.into()),
    ]
}

pub type Output = (&'static str, Box<dyn Read + Send>, OwnedFd);

/// What the observer printed.
pub fn observed(lines: &[String]) -> Vec<&str> {
    lines.iter().filter_map(|line| line.strip_prefix("Observing ")).collect()
}

pub fn received_from(lines: &[String], port: u16) -> Vec<&str> {
    let from = format!(" from 127.0.0.1:{port}");
    lines.iter().filter_map(|line| line.strip_prefix("Received ")?.strip_suffix(&from)).collect()
}

/// The three lines of a connection that sent one line.
pub fn conversation(shown: &str, port: u16) -> [String; 3] {
    [format!("Received {shown} from 127.0.0.1:{port}"), format!("Send: {shown}"), CLOSE.into()]
}

// ------------------------------------------------- how a line is to be shown

/// A received line as it is shown, in all three places: as text, stripped (a byte order mark, too), escaped.
pub fn shown(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let text = text.trim_start_matches(|c: char| c.is_whitespace() || c == '\u{feff}').trim_end();
    let escaped = |c: char| if is_hostile(c) { c.escape_default().to_string() } else { c.into() };
    text.chars().map(escaped).collect()
}

/// Whether a terminal could take this for a command, a line's end or a change of direction.
pub fn is_hostile(c: char) -> bool {
    let marks = ['\u{61c}', '\u{200e}', '\u{200f}'];
    c.is_control() || marks.contains(&c) || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

// ----------------------------------------------------------------- a client

/// A client's end of a connection.
pub struct Client(pub TcpStream);

impl Client {
    pub fn connect(address: SocketAddr) -> Self {
        Self::of(TcpStream::connect(address).unwrap_or_else(|e| panic!("connect to {address}: {e}")))
    }

    fn of(socket: TcpStream) -> Self {
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        Self(socket)
    }

    pub fn port(&self) -> u16 {
        self.0.local_addr().unwrap().port()
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.write_all(bytes.as_ref()).expect("the server takes what is sent");
    }

    /// Waits until this many bytes are there to be read, and leaves them there.
    pub fn wait_for_bytes(&self, count: usize) {
        let are_there = || rustix::io::ioctl_fionread(&self.0).unwrap() >= count as u64;
        eventually(PATIENCE, "the bytes are there", are_there);
    }

    /// Waits until the server has accepted this client and read all that it has sent.
    pub fn wait_until_taken(&self) {
        eventually(PATIENCE, "the server reads what was sent", || self.is_read());
    }

    /// Whether it has done so by now.
    pub fn is_read(&self) -> bool {
        let port = format!(":{:04X} ", self.port());
        // The thread may be in a network of its own. State 01 is ESTABLISHED, inode 0 the backlog.
        sockets(Path::new("/proc/thread-self/net/tcp"), &port).iter().any(|fields| {
            let is_taken = fields[2].ends_with(port.trim_end()) && fields[9] != "0";
            is_taken && fields[3] == "01" && fields[4].ends_with(":00000000")
        })
    }

    /// Sends nothing more.
    pub fn finish(&self) {
        // The server may have closed already, as it had a whole line, or stops.
        let refused = self.0.shutdown(Shutdown::Write).err().filter(|e| e.kind() != ErrorKind::NotConnected);
        assert!(refused.is_none(), "shutdown: {refused:?}");
    }

    /// The next bytes must be these.
    pub fn expect(&mut self, bytes: impl AsRef<[u8]>) {
        let mut got = vec![0; bytes.as_ref().len()];
        self.0.read_exact(&mut got).expect("the server echoes");
        assert_eq!(String::from_utf8_lossy(&got), String::from_utf8_lossy(bytes.as_ref()));
    }

    /// Everything until the server closes the connection in good order.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.0.read_to_end(&mut bytes).expect("the server closes the connection in good order");
        bytes
    }

    /// Everything until the connection ends in any way.
    pub fn until_closed(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let end = self.0.read_to_end(&mut bytes).map_err(|e| e.kind());
        assert_ne!(end, Err(ErrorKind::WouldBlock), "the connection is still open after {PATIENCE:?}");
        bytes
    }

    /// Whether nothing comes, not even the connection's end, for this long.
    pub fn hears_nothing_for(&mut self, time: Duration) -> bool {
        self.0.set_read_timeout(Some(time)).unwrap();
        let silent = self.0.peek(&mut [0]).is_err_and(|e| e.kind() == ErrorKind::WouldBlock);
        self.0.set_read_timeout(Some(PATIENCE)).unwrap();
        silent
    }

    pub fn reset(self) {
        sockopt::set_socket_linger(&self.0, Some(Duration::ZERO)).unwrap();
    }
}

/// A client that sends numbered lines as fast as they are taken, and checks the echo of every one.
pub struct Flood {
    pub client: Client,
    reads: bool,
    /// All lines begun, how many they are, and how many of their bytes are sent and have come back.
    text: Vec<u8>,
    pub lines: usize,
    sent: usize,
    received: usize,
    /// Lines whose echo has come.
    pub echoed: usize,
    ended: bool,
}

impl Flood {
    pub fn new(client: Client, reads: bool) -> Self {
        client.0.set_nonblocking(true).unwrap();
        // Left alone, the kernel holds megabytes of what is sent to a server that takes no more.
        sockopt::set_socket_send_buffer_size(&client.0, 64 << 10).unwrap();
        Self { client, reads, text: vec![], lines: 0, sent: 0, received: 0, echoed: 0, ended: false }
    }

    pub fn line(&self, number: usize) -> String {
        format!("line {number} of {} {}", self.client.port(), "x".repeat(80))
    }

    /// Sends and receives what goes without waiting; returns whether anything went.
    pub fn pump(&mut self, begin_lines: bool) -> bool {
        if self.sent == self.text.len() && begin_lines {
            self.text.extend((self.line(self.lines) + "\n").into_bytes());
            self.lines += 1;
        }
        let before = (self.sent, self.received);
        if self.sent < self.text.len() && !self.ended {
            self.sent += self.went((&self.client.0).write(&self.text[self.sent..]));
        }
        if self.reads {
            let mut chunk = [0; 16384];
            let read = (&self.client.0).read(&mut chunk);
            self.ended |= matches!(read, Ok(0));
            let echo = &chunk[..self.went(read)];
            let awaited = &self.text[self.received..self.sent];
            assert!(awaited.starts_with(echo), "{:?}, not {:?}", echo.escape_ascii(), awaited.escape_ascii());
            self.received += echo.len();
            self.echoed += echo.iter().filter(|&&byte| byte == b'\n').count();
        }
        (self.sent, self.received) != before
    }

    /// How many bytes went; any error but "not now" ends the flood.
    fn went(&mut self, result: io::Result<usize>) -> usize {
        self.ended |= result.as_ref().is_err_and(|e| e.kind() != ErrorKind::WouldBlock);
        result.unwrap_or(0)
    }

    /// Sends and receives until every flood is at a standstill for this long.
    pub fn pump_until_stalled(floods: &mut [Self], standstill: Duration) {
        let mut last = Instant::now();
        eventually(PATIENCE, "the server takes no more", || {
            let mut pump_all = || floods.iter_mut().fold(false, |any, flood| any | flood.pump(true));
            if (0..500).take_while(|_| pump_all()).count() > 0 {
                last = Instant::now();
            }
            last.elapsed() >= standstill
        });
    }

    /// Completes the line begun last, ends the sending side, and takes the echo of all.
    pub fn complete(floods: &mut [Self]) {
        eventually(PATIENCE, "the floods come to an end", || {
            for flood in &mut *floods {
                while flood.pump(false) {}
                if flood.sent == flood.text.len() {
                    flood.client.finish();
                }
            }
            floods.iter().all(|flood| flood.ended)
        });
    }
}
