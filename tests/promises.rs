//! The README's promises, each against the client, the reader or the moment that once broke it.
//!
//! What takes a privilege or a tool (another user, a network of its own) is skipped where that is not to be had,
//! and says so.

mod common;

use common::*;
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::net::sockopt;
use rustix::process::Signal;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// These options, and a clock that keeps out of the way.
fn calm<'a>(options: &[&'a str]) -> Vec<&'a str> {
    [&CALM, options].concat()
}

/// The same, for a server that finds itself a port of the loopback interface.
fn calm_on_loopback<'a>(options: &[&'a str]) -> Vec<&'a str> {
    [&CALM[..], &["--bind", "127.0.0.1", "--tcp-port", "0"], options].concat()
}

/// A line of so many bytes, its ending included.
fn line_of(length: usize) -> String {
    "x".repeat(length - 1) + "\n"
}

/// Lines that were received, in order, from the client with this port.
fn received_from(transcript: &[String], port: u16) -> Vec<&str> {
    let from = format!(" from 127.0.0.1:{port}");
    transcript.iter().filter_map(|line| line.strip_prefix("Received ")?.strip_suffix(&from)).collect()
}

// ------------------------------------------------------------------ stopping

/// Clients that send without a pause and take their echo do not hold up the end, nor what it owes.
#[test]
fn sigterm_ends_a_flood() {
    for length in [2001, 101] {
        for quiet in [false, true] {
            let mut command = program(&calm_on_loopback(&["--keep-open"]));
            if quiet {
                command.arg("--quiet").stdout(Stdio::piped());
            } else {
                command.stdout(Stdio::null());
            }
            let mut process = Process::spawn_with_stdout(command);
            flood(process.listening_address(), 4, &line_of(length));
            let signalled = Instant::now();
            process.signal(Signal::TERM);
            let exit = process.exited(ms(6000));
            println!("lines of {length}, quiet {quiet}: after {:?}", signalled.elapsed());
            assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{exit:?}");
            if quiet {
                assert_eq!(exit.stdout, [line_of(length).trim()]);
            }
        }
    }
}

/// Starts clients that send this line over and over and take its echo, until the server is gone;
/// comes back when the flood is on.
fn flood(address: SocketAddr, clients: usize, line: &str) {
    let echoed = Arc::new(AtomicU64::new(0));
    for _ in 0..clients {
        let client = Client::connect(address);
        let (mut writer, mut reader) = (client.0.try_clone().unwrap(), client.0);
        let lines = line.repeat(65536 / line.len());
        thread::spawn(move || while writer.write_all(lines.as_bytes()).is_ok() {});
        let echoed = echoed.clone();
        thread::spawn(move || {
            let mut chunk = [0; 65536];
            while let Ok(length @ 1..) = reader.read(&mut chunk) {
                echoed.fetch_add(length as u64, Ordering::Relaxed);
            }
        });
    }
    eventually(PATIENCE, "the flood is on", || echoed.load(Ordering::Relaxed) > 8 << 20);
}

/// Whoever is in the backlog when the signal comes is served like those who are connected.
#[test]
fn sigterm_serves_the_backlog() {
    for options in [&[][..], &["--max-conns", "8"], &["--keep-open"]] {
        let mut server = Server::start(&calm(options));
        let mut early = server.connect();
        early.send("ear");
        early.is_taken();
        server.suspend();
        let mut clients: Vec<Client> = (0..200).map(|_| server.connect()).collect();
        for (i, client) in clients.iter_mut().enumerate() {
            client.send(format!("line {i}\n"));
        }
        let mut silent: Vec<Client> = (0..10).map(|_| server.connect()).collect();
        server.signal(Signal::TERM);
        server.wake();
        for (i, client) in clients.iter_mut().enumerate() {
            assert_eq!(client.rest(), format!("line {i}\n").as_bytes(), "{options:?}");
        }
        for client in &mut silent {
            assert_eq!(client.rest(), b"", "{options:?}");
        }
        server.refuses();
        early.send("ly\n");
        assert_eq!(early.rest(), b"early\n", "{options:?}");
        let exit = server.exited(ms(6000));
        assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{options:?}: {:?}", exit.stderr);
        for (i, client) in clients.iter().enumerate() {
            assert_eq!(received_from(&exit.stdout, client.port()), [format!("line {i}")], "{options:?}");
        }
        assert_eq!(exit.stdout.iter().filter(|line| *line == CLOSE).count(), 201, "{options:?}");
        assert_eq!(observed(&exit.stdout), ["early"], "{options:?}");
    }
}

/// Also where all connections are taken, by clients who never end their lines: once their grace is over.
#[test]
fn sigterm_serves_the_backlog_of_a_full_server() {
    let mut server = Server::start(&calm(&["--max-conns", "2"]));
    let mut holders: Vec<Client> = (0..2).map(|_| server.connect()).collect();
    for holder in &mut holders {
        holder.send("half");
        holder.is_taken();
    }
    let mut clients: Vec<Client> = (0..100).map(|_| server.connect()).collect();
    for (i, client) in clients.iter_mut().enumerate() {
        client.send(format!("line {i}\n"));
    }
    server.signal(Signal::TERM);
    let exit = server.exited(ms(7000));
    assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{exit:?}");
    for (i, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.rest(), format!("line {i}\n").as_bytes());
        assert_eq!(received_from(&exit.stdout, client.port()), [format!("line {i}")]);
    }
}

/// With `--keep-open` all lines of such a client are served that are there, though its time is over from the start.
#[test]
fn sigterm_serves_all_lines_of_the_backlog_of_a_full_server() {
    for (longest, lines) in [("100", 20), ("65536", 12_000)] {
        let mut server = Server::start(&calm(&["--keep-open", "--max-conns", "1", "--max-line", longest]));
        let mut holder = server.connect();
        holder.send("half");
        holder.is_taken();
        let mut client = server.connect();
        client.send(line_of(10).repeat(lines));
        client.finish();
        server.signal(Signal::TERM);
        assert!(client.rest() == line_of(10).repeat(lines).as_bytes(), "not all {lines} are echoed");
        let exit = server.exited(ms(7000));
        assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{:?}", exit.stderr);
        assert_eq!(received_from(&exit.stdout, client.port()).len(), lines);
    }
}

/// Nor does what such a client has sent behind its line cost it the echo, though nobody waits for it any more.
#[test]
fn sigterm_echoes_the_whole_line_to_the_backlog_of_a_full_server() {
    let mut server = Server::start(&calm(&["--max-conns", "1"]));
    let mut holder = server.connect();
    holder.send("half");
    holder.is_taken();
    let line = line_of(20_000);
    let clients: Vec<_> = (0..3)
        .map(|_| {
            let mut client = Client::with_small_window(server.loopback());
            client.send(line.clone() + &"+".repeat(20_000));
            thread::spawn(move || client.until_closed())
        })
        .collect();
    server.signal(Signal::TERM);
    let exit = server.exited(ms(7000));
    assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{:?}", exit.stderr);
    for client in clients {
        assert_eq!(client.join().unwrap().len(), line.len());
    }
}

/// Nor does the grace run out for lines that are there, whole, while it is stdout that keeps them waiting.
#[test]
fn sigterm_at_a_stalled_stdout_loses_no_line_that_is_there() {
    let loses_nothing = |options: &[&str], length, lines| {
        let mut server = Server::start(&calm(options));
        server.stdout.pause();
        let mut fillers: Vec<Client> = (0..12).map(|_| server.connect()).collect();
        fillers.iter_mut().for_each(|client| client.send(line_of(30_000)));
        thread::sleep(ms(500));
        let mut clients: Vec<Client> = (0..20).map(|_| server.connect()).collect();
        clients.iter_mut().for_each(|client| client.send(line_of(length).repeat(lines)));
        thread::sleep(ms(500));
        server.signal(Signal::TERM);
        thread::sleep(ms(6500));
        server.stdout.resume();
        let exit = server.exited(PATIENCE);
        assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{:?}", exit.stderr);
        for client in &fillers {
            assert_eq!(received_from(&exit.stdout, client.port()).len(), 1, "of {options:?}, {length} bytes");
        }
        for client in &clients {
            let received = received_from(&exit.stdout, client.port()).len();
            assert_eq!(received, lines, "of {options:?}, {length} bytes");
        }
    };
    thread::scope(|scope| {
        for (length, lines) in [(300, 1), (20_000, 1)] {
            scope.spawn(move || loses_nothing(&[], length, lines));
        }
        for (length, lines) in [(20, 200), (500, 20)] {
            scope.spawn(move || loses_nothing(&["--keep-open"], length, lines));
        }
    });
}

/// So is whoever waits for memory at that moment, though his line is there and is one of hundreds.
#[test]
fn sigterm_serves_those_who_wait_for_memory() {
    let mut server = Server::start(&CALM);
    let line = line_of(3000);
    server.suspend();
    let mut clients: Vec<Client> = (0..300).map(|_| server.connect()).collect();
    clients.iter_mut().for_each(|client| client.send(&line));
    server.signal(Signal::TERM);
    server.wake();
    let whole = clients.into_iter().map(|mut client| usize::from(client.until_closed() == line.as_bytes()));
    assert_eq!(whole.sum::<usize>(), 300, "of 300 lines were echoed");
    let exit = server.exited(ms(6000));
    assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{:?}", exit.stderr);
    assert_eq!(exit.stdout.iter().filter(|line| *line == CLOSE).count(), 300);
}

/// A flood of new connections, each with a line and reset at once, does not hold up the end.
#[test]
fn sigterm_ends_a_flood_of_connections() {
    for options in [&[][..], &["--max-conns", "1"]] {
        let port = Port::reserve();
        let number = port.number();
        let mut command = program(&calm(&["--tcp-port", &number.to_string()]));
        command.args(options).stdout(Stdio::null());
        let mut process = Process::spawn_with_stdout(command);
        let address = process.listening_address();
        let connections = AtomicU64::new(0);
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        // Who is not let in now tries anew.
                        if let Ok(socket) = TcpStream::connect_timeout(&address, ms(2000)) {
                            connections.fetch_add(1, Ordering::Relaxed);
                            let _ = (&socket).write_all(b"x\n");
                            let _ = sockopt::set_socket_linger(&socket, Some(Duration::ZERO));
                        }
                    }
                });
            }
            eventually(PATIENCE, "the flood is on", || connections.load(Ordering::Relaxed) > 2000);
            process.signal(Signal::TERM);
            let signalled = Instant::now();
            while process.is_running() && signalled.elapsed() < ms(7000) {
                thread::sleep(ms(10));
            }
            over.store(true, Ordering::Relaxed);
            println!("{options:?}: {:?} after the signal, {connections:?} connections", signalled.elapsed());
            // The flood is over, and with it whatever it would still hold up.
            assert!(signalled.elapsed() < ms(7000), "{options:?}: the flood holds it up");
        });
        let exit = process.exited(PATIENCE);
        assert_eq!(exit.code, Some(0), "{options:?}: {exit:?}");
    }
}

/// Nor does the want of a descriptor, be they held by clients that are silent, that are in the middle of a line, or by
/// nobody but the server itself.
#[test]
fn sigterm_ends_it_when_no_descriptor_is_free() {
    for (clients, begun) in [(0, ""), (2, ""), (2, "begun")] {
        let what = format!("{clients} clients that have sent `{begun}`");
        let mut server = Server::start_with_descriptors_for(clients);
        let mut holders: Vec<Client> = (0..clients).map(|_| server.connect()).collect();
        for holder in &mut holders {
            holder.send(begun);
            holder.is_taken();
        }
        let _waiting = server.connect();
        // For this one there is none.
        server.stderr.wait_until("its complaint", |lines| {
            lines.iter().any(|line| line.starts_with("smolrx: cannot accept: ")).then_some(())
        });
        server.signal(Signal::TERM);
        let exit = server.exited(ms(6000));
        assert_eq!(exit.code, Some(0), "{what}: {exit:?}");
    }
}

/// Nor does a backlog take long with descriptors for a single client, and none of its lines is lost.
#[test]
fn sigterm_serves_the_backlog_with_a_single_descriptor() {
    let mut server = Server::start_with_descriptors_for(1);
    server.suspend();
    let mut clients: Vec<Client> = (0..400).map(|_| server.connect()).collect();
    for (i, client) in clients.iter_mut().enumerate() {
        client.send(format!("line {i}\n"));
    }
    server.signal(Signal::TERM);
    server.wake();
    let exit = server.exited(ms(6000));
    assert_eq!(exit.code, Some(0), "{exit:?}");
    for (i, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.rest(), format!("line {i}\n").as_bytes());
        assert_eq!(received_from(&exit.stdout, client.port()), [format!("line {i}")]);
    }
}

// ------------------------------------------------------------ nobody reads it

/// A server whose output nobody reads, and clients that have sent until it takes no more.
struct Stalled {
    process: Process,
    address: SocketAddr,
    floods: Vec<Flood>,
}

/// What comes out of an output, and the output.
type Output = (Box<dyn Read + Send>, OwnedFd);

fn a_terminal() -> Output {
    let (screen, end) = terminal();
    (Box::new(screen), end)
}

fn a_pipe() -> Output {
    let (reader, writer) = io::pipe().unwrap();
    (Box::new(reader), writer.into())
}

fn a_socket() -> Output {
    let (reader, writer) = UnixStream::pair().unwrap();
    (Box::new(reader), writer.into())
}

impl Stalled {
    /// With the other end of this for its standard output, and for its standard error as well if so told.
    /// It must be healthy all the same, and leave the output's other holders as blocking as they were.
    fn start(mut command: Command, (reader, writer): Output, both: bool) -> Self {
        let holder = writer.try_clone().unwrap();
        command.stderr(if both { writer.try_clone().unwrap().into() } else { Stdio::piped() });
        command.stdout(writer);
        let mut process = Process::spawn_with_output(command);
        process.stdout = Transcript::of_paused(reader);
        let address = process.listening_address();
        let mut floods: Vec<Flood> = (0..2).map(|_| Flood::new(Client::connect(address), true)).collect();
        Flood::pump_until_stalled(&mut floods, ms(500));
        is_healthy(address.port());
        let flags = fcntl_getfl(&holder).unwrap();
        assert!(!flags.contains(OFlags::NONBLOCK), "the output does not block its other holders any more");
        Self { process, address, floods }
    }

    /// The first signal waits for the reader, the second one is the end.
    fn ends_with_two_signals(mut self) {
        self.process.signal(Signal::TERM);
        refuses(self.address);
        assert!(self.process.is_running(), "ended although nobody had read what is owed");
        self.process.signal(Signal::TERM);
        eventually(ms(1500), "the second signal ends it", || !self.process.is_running());
        assert_eq!(self.process.exit_code(), Some(143));
    }

    /// Once somebody reads again, all is there: also if it was asked to stop meanwhile.
    fn loses_nothing(mut self, stop_before: bool) {
        if stop_before {
            self.process.signal(Signal::TERM);
            refuses(self.address);
        }
        self.process.stdout.resume();
        Flood::complete(&mut self.floods);
        if !stop_before {
            self.process.signal(Signal::TERM);
        }
        let exit = self.process.exited(PATIENCE);
        assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{:?}", exit.stderr);
        for flood in &self.floods {
            let received = received(&exit.stdout, flood);
            assert!(received >= flood.echoed, "{} lines echoed, {received} received", flood.echoed);
            assert!(
                stop_before || flood.echoed == flood.lines,
                "{} lines, {} echoed",
                flood.lines,
                flood.echoed
            );
        }
        let event = exit.stdout.last().unwrap();
        assert!(event.starts_with("Observing line "), "the pending event is not the last line: {event}");
    }
}

/// A terminal that nobody reads holds up no probe, and two signals end the server.
#[test]
fn stalled_terminal_can_be_probed_and_ended() {
    for both in [false, true] {
        let command = program(&calm_on_loopback(&["--keep-open"]));
        Stalled::start(command, a_terminal(), both).ends_with_two_signals();
    }
}

/// When somebody reads the terminal again, nothing is lost.
#[test]
fn stalled_terminal_loses_nothing() {
    for stop_before in [false, true] {
        let command = program(&calm_on_loopback(&["--keep-open"]));
        Stalled::start(command, a_terminal(), true).loses_nothing(stop_before);
    }
}

/// The same holds for an output that the server may not open anew, as it is another user's, or can't, as it is a socket.
#[test]
fn stalled_output_that_cannot_be_opened_anew() {
    let options = calm_on_loopback(&["--keep-open"]);
    let stall = |output: Output, both| {
        let (command, scratch) = program_of_nobody(&options)?;
        Some((Stalled::start(command, output, both), scratch))
    };
    for (kind, output) in [("terminal", a_terminal as fn() -> Output), ("pipe", a_pipe)] {
        for both in [false, true] {
            println!("a {kind} of another user, for both outputs: {both}");
            let Some((stalled, _scratch)) = stall(output(), both) else { return };
            stalled.ends_with_two_signals();
        }
        let Some((stalled, _scratch)) = stall(output(), false) else { return };
        stalled.loses_nothing(true);
    }
    println!("a socket");
    Stalled::start(program(&options), a_socket(), false).ends_with_two_signals();
    Stalled::start(program(&options), a_socket(), false).loses_nothing(true);
}

/// Sentences for a terminal that nobody reads are left out: a server is never held up by its complaints.
#[test]
fn stalled_terminal_under_stderr_holds_nobody_up() {
    let (screen, end) = terminal();
    let mut command = program(&calm_on_loopback(&["--max-line", "16"]));
    command.stdout(Stdio::piped()).stderr(end);
    let mut process = Process::spawn_with_output(command);
    let address = process.listening_address();
    let started = Instant::now();
    for i in 0..4000 {
        let mut client = Client::connect(address);
        client.0.set_read_timeout(Some(ms(2000))).unwrap();
        client.send("longer than sixteen bytes");
        let end = client.0.read(&mut [0]);
        assert!(!end.is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock), "stuck at complaint {i}");
    }
    println!("4,000 complaints in {:?}", started.elapsed());
    is_healthy(address.port());
    let signalled = Instant::now();
    assert_eq!(process.stop().stderr.len(), 0);
    assert!(signalled.elapsed() < ms(2500), "after {:?}", signalled.elapsed());
    drop(screen);
}

/// Two servers write to one pipe whose reader takes a little now and then: neither is ever held up by the other.
#[test]
fn servers_that_share_a_pipe_do_not_hold_each_other_up() {
    let (mut reader, writer) = io::pipe().unwrap();
    let start = || {
        let mut command = program(&calm_on_loopback(&["--keep-open"]));
        command.stdout(writer.try_clone().unwrap());
        let process = Process::spawn_with_stdout(command);
        let address = process.listening_address();
        let floods: Vec<Flood> = (0..2).map(|_| Flood::new(Client::connect(address), true)).collect();
        (process, address, floods)
    };
    let mut servers = [start(), start()];
    for (_, _, floods) in &mut servers {
        Flood::pump_until_stalled(floods, ms(300));
    }
    for i in 0..3000 {
        // A page of room, for which both of them were waiting.
        reader.read_exact(&mut [0; 4096]).unwrap();
        thread::sleep(Duration::from_micros(200));
        for (_, address, floods) in &mut servers {
            floods.iter_mut().for_each(|flood| _ = flood.pump(true));
            let mut probe = Client::connect(*address);
            probe.finish();
            probe.0.set_read_timeout(Some(ms(2000))).unwrap();
            let end = probe.0.read(&mut [0]);
            assert!(matches!(end, Ok(0)), "held up after {i} pages: {end:?}");
        }
    }
    servers.iter().for_each(|(_, address, _)| is_healthy(address.port()));
    for (process, address, _) in &mut servers {
        process.signal(Signal::TERM);
        refuses(*address);
        process.signal(Signal::TERM);
        eventually(ms(1500), "the second signal ends it", || !process.is_running());
        assert_eq!(process.exit_code(), Some(143));
    }
    drop(writer);
    reader.read_to_end(&mut vec![]).unwrap();
}

/// A file that may not grow any more is a failed write like any other, not a signal's victim.
#[test]
fn file_size_limit_under_stdout_is_one_sentence() {
    let scratch = Scratch::new();
    let path = scratch.file("log");
    let mut command = program_after("ulimit -f 1", &["--tcp-port", "0", "--interval", "10"]);
    command.stdout(File::create(&path).unwrap());
    let exit = Process::spawn_with_stdout(command).exited(PATIENCE);
    assert_eq!((exit.code, exit.signal), (Some(1), None), "{exit:?}");
    assert_eq!(exit.stderr.len(), 1, "{exit:?}");
    assert!(exit.stderr[0].starts_with("smolrx: cannot write to stdout: "), "{exit:?}");
    let log = fs::read_to_string(&path).unwrap();
    assert!(log.len() >= 512 && log.starts_with("Serving on ") && log.contains("\nObserving 0\n"), "{log}");
}

// ------------------------------------------------------------------ timeouts

/// Lines that are there when their clients' time is judged count, however late that is: they came while the server
/// slept, and are more than it looks at in one go.
#[test]
fn lines_that_came_in_time_beat_the_timeout() {
    const CLIENTS: usize = 1500;
    raise_descriptor_limit();
    for keep_open in [false, true] {
        let mut options = calm(&["--timeout", "4000", "--max-conns", "2000"]);
        options.extend(keep_open.then_some("--keep-open"));
        let mut server = Server::start(&options);
        let before = server.descriptors();
        server.suspend();
        let mut clients: Vec<Client> = (0..CLIENTS).map(|_| server.connect()).collect();
        clients.iter_mut().for_each(|client| client.send("in "));
        let accepting = Instant::now();
        server.wake();
        eventually(PATIENCE, "all are accepted", || server.descriptors() == before + CLIENTS);
        clients.last().unwrap().is_taken();
        server.suspend();
        assert!(accepting.elapsed() < ms(3900), "this machine is too slow to tell");
        clients.iter_mut().for_each(|client| client.send("time\n"));
        thread::sleep(ms(4300));
        server.wake();
        let echoed = clients.iter_mut().map(|client| usize::from(client.gets("in time\n"))).sum::<usize>();
        assert_eq!(echoed, CLIENTS, "of {CLIENTS} lines were echoed, keep-open {keep_open}");
        assert_eq!(observed(&server.stop().stdout), ["in time"]);
    }
}

/// Nor are those cut for want of memory that came while the server slept, hundreds at a time.
#[test]
fn lines_that_wait_for_memory_beat_the_timeout() {
    let lengths = [3000, 6000];
    let mut servers = lengths.map(|_| Server::start(&calm(&["--timeout", "2000"])));
    let mut clients = vec![];
    for server in &servers {
        let before = server.descriptors();
        let connecting = Instant::now();
        let connected: Vec<Client> = (0..300).map(|_| server.connect()).collect();
        eventually(PATIENCE, "all are accepted", || server.descriptors() == before + 300);
        server.suspend();
        assert!(connecting.elapsed() < ms(1900), "this machine is too slow to tell");
        clients.push(connected);
    }
    for (clients, length) in clients.iter_mut().zip(lengths) {
        clients.iter_mut().for_each(|client| client.send(line_of(length)));
    }
    thread::sleep(ms(2300));
    servers.iter().for_each(|server| server.wake());
    for ((server, clients), length) in servers.iter_mut().zip(clients).zip(lengths) {
        let line = line_of(length);
        let whole = clients.into_iter().map(|mut client| usize::from(client.gets(&line)));
        assert_eq!(whole.sum::<usize>(), 300, "of 300 lines of {length} bytes were echoed");
        assert_eq!(observed(&server.stop().stdout), [line.trim()]);
    }
}

/// A client that has begun to take its echo when its time is judged is not cut, however late that is: the server slept,
/// and others have more for it than it looks at in one go.
#[test]
fn echo_taken_in_time_beats_the_timeout() {
    const OTHERS: usize = 1500;
    raise_descriptor_limit();
    let line = line_of(6_000_000); // more than the kernel's buffers hold
    let limits = ["--timeout", "4000", "--max-conns", "2000", "--max-line", "9000000"];
    let mut command = program(&calm_on_loopback(&limits));
    command.stdout(Stdio::null());
    let server = Process::spawn_with_stdout(command);
    let address = server.listening_address();
    let before = server.descriptors();
    server.suspend();
    let mut others: Vec<Client> = (0..OTHERS).map(|_| Client::connect(address)).collect();
    others.iter_mut().for_each(|client| client.send("in "));
    let accepting = Instant::now();
    server.wake();
    eventually(PATIENCE, "all are accepted", || server.descriptors() == before + OTHERS);
    let mut takers: Vec<Client> = (0..4)
        .map(|_| {
            let mut client = Client::with_small_window(address);
            client.send(&line);
            client.wait_for_bytes(1);
            client
        })
        .collect();
    thread::sleep(ms(50)); // now the server waits for them
    server.suspend();
    assert!(accepting.elapsed() < ms(3900), "this machine is too slow to tell");

    others.iter_mut().for_each(|client| client.send("time\n"));
    let taken: Vec<Vec<u8>> = takers.iter_mut().map(take_what_the_kernel_holds).collect();
    thread::sleep(ms(4300));
    server.wake();
    // All at once: whoever has to wait for its turn takes nothing meanwhile.
    thread::scope(|scope| {
        for (taker, mut bytes) in takers.iter_mut().zip(taken) {
            let line = &line;
            scope.spawn(move || {
                assert!(bytes.len() < line.len(), "the kernel holds it all");
                bytes.extend(taker.until_closed());
                assert!(bytes == line.as_bytes(), "cut after {} of {} bytes", bytes.len(), line.len());
            });
        }
    });
}

/// Takes the echo of a server that sleeps, so that there is room for more.
fn take_what_the_kernel_holds(client: &mut Client) -> Vec<u8> {
    let mut bytes = vec![];
    let mut last = Instant::now();
    while last.elapsed() < ms(50) {
        if client.bytes_there() > 0 {
            bytes.extend(client.take(usize::MAX));
            last = Instant::now();
        }
        thread::yield_now();
    }
    bytes
}

/// A client that takes a little of its echo all the time is not cut, though the kernel's buffers are large.
#[test]
fn slow_taker_is_not_cut() {
    let server = Server::start(&calm(&["--timeout", "3000", "--max-line", "9000000"]));
    let line = line_of(8_000_000);
    let mut client = server.connect();
    client.send(&line);
    let mut bytes = vec![];
    let start = Instant::now();
    while start.elapsed() < ms(6000) {
        let mut chunk = [0; 10_000];
        let length = client.0.read(&mut chunk).expect("the server goes on with its echo");
        bytes.extend(&chunk[..length]);
        thread::sleep(ms(100));
    }
    bytes.extend(client.until_closed());
    assert!(bytes == line.as_bytes(), "cut after {} of {} bytes", bytes.len(), line.len());
}

/// Who sends, but takes no byte of the echo for `--timeout`, is not served without one: what has arrived by then
/// is received, and the connection is closed, be it that more comes without any pause.
#[test]
fn client_that_takes_no_echo_is_not_served_without() {
    for pause in [ms(20), ms(0)] {
        let mut server = Server::start(&calm(&["--keep-open", "--timeout", "1000"]));
        let mut client = Client::with_small_window(server.loopback());
        client.0.set_nonblocking(true).unwrap();
        let line = line_of(1000).repeat(64);
        let (mut sent, start) = (0, Instant::now());
        let closed = loop {
            assert!(start.elapsed() < ms(10_000), "it is still served after {sent} bytes");
            match client.0.write(&line.as_bytes()[sent % line.len()..]) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(ms(1)),
                Err(error) => break error,
            }
            if start.elapsed() > ms(2000) {
                thread::sleep(pause);
            }
        };
        println!("closed after {:?} and {sent} bytes: {closed}", start.elapsed());
        assert_eq!(server.stop().code, Some(0));
    }
}

// ------------------------------------------------------------- those who leave

/// Who sends all lines and leaves, without waiting for the echo, has all those that have arrived received and
/// observed. (The server sleeps until it has left: what its own kernel still holds then, it loses to itself.)
#[test]
fn lines_of_a_client_that_sends_and_leaves_are_received() {
    for _ in 0..5 {
        let mut server = Server::start(&calm(&["--keep-open"]));
        server.suspend();
        let command = format!("seq 10000 > /dev/tcp/127.0.0.1/{}", server.address.port());
        let sent = Command::new("bash").args(["-c", &command]).status().unwrap();
        assert!(sent.success(), "{command}: {sent}");
        server.wake();
        server.stdout.wait_for(CLOSE);
        let exit = server.stop();
        let received = exit.stdout.iter().filter(|line| line.starts_with("Received ")).count();
        assert_eq!(received, 10_000);
        assert_eq!(observed(&exit.stdout), ["10000"]);
    }
}

/// Lines that arrived before a reset are received; what is no whole line by then is none.
#[test]
fn lines_before_a_reset_are_received() {
    let lines: Vec<String> = (0..100).map(|i| format!("{i:059}")).collect();
    let text: String = lines.iter().map(|line| line.clone() + "\n").collect();
    for round in 0..20 {
        let mut server = Server::start(&calm(&["--keep-open"]));
        // Every other time the reset is there, too, before the server looks.
        let in_the_backlog = round % 2 == 0;
        if in_the_backlog {
            server.suspend();
        }
        let mut client = server.connect();
        client.send(format!("{text}part of a line"));
        let port = client.port();
        client.reset();
        if in_the_backlog {
            server.wake();
        }
        server.stdout.wait_for(CLOSE);
        let exit = server.stop();
        assert_eq!(received_from(&exit.stdout, port), lines, "in the backlog: {in_the_backlog}");
        assert_eq!(observed(&exit.stdout), [&lines[99]]);
    }
}

/// The same where clients that stay in the middle of their lines have all permits: who needs one waits for it, gone or not.
#[test]
fn lines_before_a_reset_wait_for_their_turn() {
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum End {
        Reset,
        Finish,
        FinishAndReset,
    }
    let whole = line_of(5001);
    let last = line_of(1001).trim().to_owned();
    for (options, sent, end, received) in [
        (&[][..], &whole, End::Reset, vec![5000]),
        (&["--keep-open"], &whole, End::Reset, vec![5000]),
        (&["--keep-open"], &format!("x\n{whole}"), End::Finish, vec![1, 5000]),
        (&["--keep-open"], &format!("x\n{last}"), End::Finish, vec![1, 1000]),
        (&[], &last, End::FinishAndReset, vec![1000]),
        (&["--keep-open"], &format!("{whole}{last}"), End::FinishAndReset, vec![5000, 1000]),
        (&[], &last, End::Reset, vec![]),
        (&["--keep-open"], &format!("{whole}{last}"), End::Reset, vec![5000]),
    ] {
        let mut server = Server::start(&calm(options));
        let holders: Vec<Client> = (0..8)
            .map(|_| {
                let mut holder = server.connect();
                holder.send(&last);
                holder.is_taken();
                holder
            })
            .collect();
        server.suspend();
        let mut client = server.connect();
        client.send(sent);
        let port = client.port();
        if end != End::Reset {
            client.finish();
        }
        thread::sleep(ms(20));
        if end == End::Finish {
            drop(client); // the echo has nobody to go to
        } else {
            client.reset();
        }
        server.wake();
        thread::sleep(ms(300));
        holders.into_iter().for_each(Client::reset);
        let exit = server.stop();
        let lengths: Vec<usize> = received_from(&exit.stdout, port).iter().map(|line| line.len()).collect();
        assert_eq!(lengths, received, "{options:?}, {} bytes, {end:?}", sent.len());
    }
}

/// Nor is what a client had begun whose network has gone; unless it had ended its side before.
#[test]
fn line_of_a_client_that_vanishes_is_none_unless_it_has_ended() {
    for ended in [false, true] {
        in_a_network_of_its_own("echo 2 > /proc/sys/net/ipv4/tcp_retries2", || {
            let mut server = Server::start(&calm(&["--keep-open"]));
            let mut client = Client::with_small_window(server.loopback());
            // So many that the echo is not all taken, and so few that all of it is in the server's kernel.
            client.send(line_of(101).repeat(2050));
            client.send("last");
            if ended {
                client.finish();
            }
            thread::sleep(ms(500));
            let down = Command::new("ip").args(["link", "set", "lo", "down"]).status().unwrap();
            assert!(down.success());
            server.stdout.wait_for(CLOSE);
            let exit = server.stop();
            let received = received_from(&exit.stdout, client.port());
            assert_eq!(received.len(), 2050 + usize::from(ended), "the client has ended: {ended}");
            assert_eq!(received.last() == Some(&"last"), ended);
        });
    }
}

/// Lines of a client that ends its side in order and then leaves are received with the last, which has no newline.
#[test]
fn last_line_of_a_client_that_leaves_is_received() {
    for _ in 0..20 {
        let mut server = Server::start(&calm(&["--keep-open"]));
        server.suspend();
        let mut client = server.connect();
        client.send("sent and left\n".repeat(1000) + "the last");
        client.finish();
        let port = client.port();
        drop(client); // the echo has nobody to go to
        server.wake();
        server.stdout.wait_for(CLOSE);
        let exit = server.stop();
        let received = received_from(&exit.stdout, port);
        assert_eq!((received.len(), received.last()), (1001, Some(&"the last")));
        assert_eq!(observed(&exit.stdout), ["the last"]);
    }
}

// ------------------------------------------------------- bytes after the line

/// The echo of a long line arrives whole although its client sends one byte more and takes it late.
#[test]
fn byte_after_a_long_line_costs_nothing() {
    let server = Server::start(&CALM);
    let line = line_of(60_000);
    for pause in [0, 50] {
        let mut clients: Vec<Client> =
            (0..10).map(|_| Client::with_small_window(server.loopback())).collect();
        clients.iter_mut().for_each(|client| client.send(&line));
        clients.iter().for_each(|client| client.wait_for_bytes(1));
        thread::sleep(ms(pause));
        clients.iter_mut().for_each(|client| client.send("+"));
        thread::sleep(ms(200));
        let whole =
            clients.iter_mut().filter_map(|client| (client.until_closed() == line.as_bytes()).then_some(()));
        assert_eq!(
            whole.count(),
            10,
            "of 10 echoes were whole, the byte sent {pause} ms after the echo's first"
        );
    }
}

/// The same over a slow network.
#[test]
fn byte_after_a_long_line_costs_nothing_over_a_slow_network() {
    let slow = "ip link set lo mtu 1500; tc qdisc add dev lo root tbf rate 8mbit burst 10kb latency 400ms";
    in_a_network_of_its_own(slow, || {
        let server = Server::start(&CALM);
        let line = line_of(60_000);
        for pause in (20..200).step_by(10) {
            let mut client = server.connect();
            client.send(&line);
            thread::sleep(ms(pause));
            client.send("+");
            assert!(client.until_closed() == line.as_bytes(), "not whole, the byte sent after {pause} ms");
        }
    });
}

/// Nor does a flood after the line cost its echo, but it is listened to for about five seconds only.
#[test]
fn flood_after_a_long_line_costs_nothing_for_five_seconds() {
    let server = Server::start(&CALM);
    let before = server.descriptors();
    let line = line_of(60_000);
    let mut client = Client::with_small_window(server.loopback());
    client.send(&line);
    client.wait_for_bytes(1);
    let sent = Instant::now();
    let mut writer = client.0.try_clone().unwrap();
    let flood = thread::spawn(move || {
        // Until the server has had enough.
        while writer.write_all(&[b'-'; 10_000]).is_ok() {
            thread::sleep(ms(1));
        }
    });
    thread::sleep(ms(1000));
    let mut echo = vec![0; line.len()];
    client.0.read_exact(&mut echo).expect("the whole echo");
    assert!(echo == line.as_bytes(), "the echo differs");
    assert!(sent.elapsed() < ms(4000), "the echo took {:?}", sent.elapsed());
    eventually(ms(7000), "it is let go", || server.descriptors() == before);
    println!("let go after {:?}", sent.elapsed());
    assert!(sent.elapsed() < ms(7000), "let go after {:?}", sent.elapsed());
    flood.join().unwrap();
}

/// A client that takes its long echo, sends no more and never closes is let go after five seconds;
/// so is one that does not even take it.
#[test]
fn client_that_never_closes_is_let_go() {
    let server = Server::start(&CALM);
    let before = server.descriptors();
    let line = line_of(60_000);
    let mut clients: Vec<Client> = (0..4).map(|_| Client::with_small_window(server.loopback())).collect();
    for client in &mut clients {
        client.send(&line);
        client.wait_for_bytes(1);
    }
    let sent = Instant::now();
    for client in &mut clients[..2] {
        client.send("+");
        thread::sleep(ms(50));
        client.expect(&line);
    }
    eventually(ms(7000), "they are let go", || server.descriptors() == before);
    println!("let go after {:?}", sent.elapsed());
    // What the kernel still has for the other two it goes on to deliver.
    for client in &mut clients[2..] {
        client.expect(&line);
    }
}

/// An echo that is under way when the signal comes arrives whole, though its client sends one byte more.
#[test]
fn echo_under_way_at_sigterm_arrives_whole() {
    for options in [&calm(&["--keep-open"])[..], &CALM] {
        let line = line_of(60_000);
        let mut server = Server::start(options);
        let mut client = Client::with_small_window(server.loopback());
        client.send(&line);
        client.wait_for_bytes(1);
        let signalled = Instant::now();
        server.signal(Signal::TERM);
        server.refuses();
        client.send("+");
        thread::sleep(ms(300));
        assert!(client.until_closed() == line.as_bytes(), "not whole with {options:?}");
        client.0.shutdown(Shutdown::Both).unwrap_or(()); // closed by the other side, perhaps
        let exit = server.exited(PATIENCE);
        assert_eq!(exit.code, Some(0), "{exit:?}");
        assert!(signalled.elapsed() < ms(6000), "after {:?}", signalled.elapsed());
        assert_eq!(observed(&exit.stdout), [line.trim()]);
    }
}

// --------------------------------------------------------------- byte for byte

/// Small lines do not wait for the client's acknowledgement of those before them.
#[test]
fn pipelined_lines_are_not_held_back() {
    let server = Server::start(&calm(&["--keep-open"]));
    let lines = "small\n".repeat(1000);
    let mut gaps = vec![];
    for _ in 0..15 {
        let mut client = server.connect();
        sockopt::set_tcp_quickack(&client.0, false).unwrap(); // as in the middle of a conversation
        client.send(&lines);
        // Looked at, not read: reading would acknowledge.
        client.wait_for_bytes(1);
        let first = Instant::now();
        client.wait_for_bytes(lines.len() as u64);
        gaps.push(first.elapsed());
        client.expect(&lines);
    }
    gaps.sort();
    assert!(gaps[5] < ms(20), "the rest of an echo came so long after its beginning: {gaps:?}");
}

/// A byte sent as urgent is in its place in the echo like any other.
#[test]
fn urgent_byte_is_echoed_in_its_place() {
    for options in [&CALM[..], &calm(&["--keep-open"])] {
        let mut server = Server::start(options);
        let mut client = server.connect();
        client.send("ab");
        client.is_taken();
        client.send_urgent(b'c');
        client.send("d\n");
        client.finish();
        assert_eq!(client.rest(), b"abcd\n");
        let exit = server.stop();
        assert_eq!(exit.stdout[1..4], conversation("abcd", client.port()));
    }
}

// -------------------------------------------------------------------- memory

/// Kilobytes that it may hold, whatever its clients do.
const MOST_MEMORY: u64 = 4096;

/// Runs this while looking at the server's memory, which must stay within its bound.
fn in_bounded_memory<T>(server: &Server, what: &str, run: impl FnOnce() -> T) -> T {
    let largest = AtomicU64::new(0);
    let result = thread::scope(|scope| {
        let (done, end) = std::sync::mpsc::channel::<()>();
        let largest = &largest;
        scope.spawn(move || {
            loop {
                largest.fetch_max(server.memory_kb(), Ordering::Relaxed);
                if end.recv_timeout(ms(5)) != Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                    break;
                }
            }
        });
        let result = run();
        drop(done);
        result
    });
    let largest = largest.into_inner();
    println!("{what}: {largest} kB");
    assert!(largest <= MOST_MEMORY, "{what}: {largest} kB");
    result
}

/// A thousand clients that each hold an unfinished line of the greatest length take no more memory than is set aside,
/// and no time from one whose line is short.
#[test]
fn unfinished_lines_take_bounded_memory_and_nobodys_time() {
    raise_descriptor_limit();
    for options in [&CALM[..], &calm(&["--keep-open"])] {
        let mut server = Server::start(options);
        let hostile: Vec<Client> = in_bounded_memory(&server, "1,023 unfinished lines", || {
            let mut hostile: Vec<Client> = (0..1023).map(|_| server.connect()).collect();
            let unfinished = "x".repeat(65_535);
            hostile.iter_mut().for_each(|client| client.send(&unfinished));
            for i in 0..10 {
                let mut client = server.connect();
                let start = Instant::now();
                if i % 2 == 0 {
                    client.send("short\n");
                } else {
                    client.send("sho");
                    thread::sleep(ms(100));
                    client.send("rt\n");
                }
                client.expect("short\n");
                assert!(start.elapsed() < ms(1100), "a short line took {:?}", start.elapsed());
            }
            is_healthy(server.address.port());
            hostile
        });
        // Not in good order, in which an unfinished line is a line.
        hostile.into_iter().for_each(Client::reset);
        server.echo("last\n");
        assert_eq!(observed(&server.stop().stdout), ["last"]);
    }
}

/// Nor do clients that end theirs, all at once, while others have the permits.
#[test]
fn last_lines_take_bounded_memory() {
    raise_descriptor_limit();
    // A single `recv` does not read beyond an urgent byte.
    for (length, urgent) in [(4000, ""), (4156, "!and more than fits")] {
        let mut server = Server::start(&CALM);
        let last = "x".repeat(length);
        let mut clients: Vec<Client> = (0..1000).map(|_| server.connect()).collect();
        let others = clients.split_off(8);
        let mut holders = clients;
        holders.iter_mut().for_each(|holder| holder.send(&last));
        holders.iter().for_each(|holder| holder.is_taken());
        server.suspend();
        let more = urgent.repeat(250);
        let mut others: Vec<Client> = others
            .into_iter()
            .map(|mut client| {
                client.send(&last);
                if !urgent.is_empty() {
                    client.send_urgent(more.as_bytes()[0]);
                    client.send(&more[1..]);
                }
                client.finish();
                client
            })
            .collect();
        in_bounded_memory(&server, "992 last lines", || {
            server.wake();
            thread::sleep(ms(1000));
            holders.into_iter().for_each(Client::reset);
            for client in &mut others {
                assert!(client.rest() == format!("{last}{more}").as_bytes());
            }
        });
        assert_eq!(server.stop().stdout.iter().filter(|line| *line == CLOSE).count(), 992);
    }
}

/// Clients that hold unfinished lines, a flood of others and a slow reader together take no short line's turn.
#[test]
fn short_lines_are_served_while_stdout_is_read_slowly() {
    let (mut reader, writer) = io::pipe().unwrap();
    let mut command = program(&calm_on_loopback(&["--keep-open"]));
    command.stdout(writer);
    let process = Process::spawn_with_stdout(command);
    let slow = Arc::new(AtomicBool::new(false));
    let slowed = slow.clone();
    thread::spawn(move || {
        let mut chunk = [0; 65536];
        while let Ok(length @ 1..) = reader.read(&mut chunk) {
            if slowed.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_secs_f64(length as f64 / 300_000.0));
            }
        }
    });
    let address = process.listening_address();
    flood(address, 4, &line_of(101));
    slow.store(true, Ordering::Relaxed);
    let unfinished = "h".repeat(65_000);
    let mut holders: Vec<Client> = (0..9).map(|_| Client::connect(address)).collect();
    holders.iter_mut().for_each(|holder| holder.send(&unfinished));
    thread::sleep(ms(1000));
    let mut times = vec![];
    for _ in 0..8 {
        let start = Instant::now();
        let mut client = Client::connect(address);
        client.0.set_read_timeout(Some(ms(5000))).unwrap();
        client.send("short\n");
        let mut echo = [0; 6];
        times.push(client.0.read_exact(&mut echo).map(|()| (echo == *b"short\n", start.elapsed())));
    }
    println!("{times:?}");
    let served = times.iter().flatten().filter(|(whole, time)| *whole && *time < ms(5000));
    assert_eq!(served.count(), 8, "of 8 short lines were served: {times:?}");
}

/// Lines that arrive with a part of the next one, hundreds at a time and again and again, take no more memory either.
#[test]
fn lines_with_a_part_of_the_next_take_bounded_memory() {
    raise_descriptor_limit();
    let mut server = Server::start(&calm(&["--keep-open"]));
    let line = line_of(4096);
    let clients = in_bounded_memory(&server, "900 lines and parts of lines", || {
        let mut holders: Vec<Client> = (0..9).map(|_| server.connect()).collect();
        let unfinished = "h".repeat(65_000);
        holders.iter_mut().for_each(|holder| holder.send(&unfinished));
        thread::sleep(ms(300));
        let mut clients: Vec<Client> = (0..900).map(|_| server.connect()).collect();
        for length in [4096, 8192, 16_384, 32_768] {
            let text = line.clone() + &"y".repeat(length);
            for client in &mut clients {
                client.send(&text);
                client.take(usize::MAX);
            }
            thread::sleep(ms(1000));
            server.echo("short\n");
        }
        holders.into_iter().chain(clients)
    });
    clients.for_each(Client::reset);
    server.echo("last\n");
    server.stop();
}

/// Long lines that come slowly, hundreds at a time and piece by piece in turns, are all served, in as much memory.
#[test]
fn long_lines_in_turns_are_all_served_in_bounded_memory() {
    let mut server = Server::start(&CALM);
    let line = line_of(60_000);
    in_bounded_memory(&server, "300 lines in turns", || {
        let mut clients: Vec<Client> = (0..300).map(|_| server.connect()).collect();
        for piece in line.as_bytes().chunks(4000) {
            clients.iter_mut().for_each(|client| client.send(piece));
            thread::sleep(ms(20));
        }
        for client in &mut clients {
            assert!(client.rest() == line.as_bytes(), "the echo differs");
        }
    });
    let exit = server.stop();
    assert_eq!(exit.stdout.iter().filter(|line| *line == CLOSE).count(), 300);
}

/// Text that waits for its reader, be it six times as long as the bytes that it shows, takes as much memory and
/// no more; and it is all there when somebody reads.
#[test]
fn text_that_waits_takes_bounded_memory() {
    let mut server = Server::start(&CALM);
    let line = "\x7f".repeat(65_535) + "\n";
    server.stdout.pause();
    let mut clients = in_bounded_memory(&server, "100 lines of DEL", || {
        let mut clients: Vec<Client> = (0..100).map(|_| server.connect()).collect();
        clients.iter_mut().for_each(|client| client.send(&line));
        thread::sleep(ms(1000));
        is_healthy(server.address.port());
        server.stdout.resume();
        for client in &mut clients {
            assert!(client.rest() == line.as_bytes(), "the echo differs");
        }
        clients
    });
    let exit = server.stop();
    let on_screen = shown(line.as_bytes());
    for client in clients.drain(..) {
        assert!(received_from(&exit.stdout, client.port()) == [&on_screen]);
    }
    assert!(observed(&exit.stdout) == [&on_screen]);
}

/// Last lines without a newline whose clients leave while nobody reads the transcript wait without being read, all of
/// them, and are all there when somebody does.
#[test]
fn last_lines_at_a_stalled_stdout_take_bounded_memory() {
    raise_descriptor_limit();
    let mut server = Server::start(&CALM);
    server.stdout.pause();
    let filler = "\x7f".repeat(65_535) + "\n";
    let lines: Vec<String> = (0..1000).map(|i| format!("{i:0>4}{}", "\x7f".repeat(990))).collect();
    let mut clients = in_bounded_memory(&server, "1,000 last lines", || {
        let mut fillers: Vec<Client> = (0..3).map(|_| server.connect()).collect();
        fillers.iter_mut().for_each(|client| client.send(&filler));
        thread::sleep(ms(300));
        let mut clients: Vec<Client> = (0..1000).map(|_| server.connect()).collect();
        for (client, line) in clients.iter_mut().zip(&lines) {
            client.send(&line[..500]);
        }
        thread::sleep(ms(300));
        for (client, line) in clients.iter_mut().zip(&lines) {
            client.send(&line[500..]);
            client.finish();
        }
        thread::sleep(ms(1000));
        is_healthy(server.address.port());
        server.stdout.resume();
        for (client, line) in clients.iter_mut().zip(&lines) {
            assert!(client.rest() == line.as_bytes(), "the echo differs");
        }
        clients
    });
    let exit = server.stop();
    for (client, line) in clients.drain(..).zip(&lines) {
        assert!(received_from(&exit.stdout, client.port()) == [&shown(line.as_bytes())]);
    }
}

/// Eight clients who don't take their echo keep nobody else's line from being served, if it comes in one piece.
#[test]
fn lines_are_served_beside_clients_that_take_nothing() {
    let mut server = Server::start(&calm(&["--keep-open"]));
    let mut takers: Vec<Flood> = (0..12).map(|_| Flood::new(server.connect(), false)).collect();
    Flood::pump_until_stalled(&mut takers, ms(500));
    for length in [10, 900, 3000, 4096] {
        let line = line_of(length);
        let start = Instant::now();
        server.echo(&line);
        assert!(start.elapsed() < ms(1100), "{length} bytes took {:?}", start.elapsed());
    }
    drop(takers);
    server.echo(line_of(60_000));
    server.stop();
}

/// Clients that come and leave without a word while nobody reads the transcript leave nothing behind.
#[test]
fn clients_that_say_nothing_at_a_stalled_stdout_leave_nothing() {
    let mut server = Server::start(&CALM);
    server.stdout.pause();
    let filler = "\x7f".repeat(65_535) + "\n";
    let mut fillers: Vec<Client> = (0..3).map(|_| server.connect()).collect();
    fillers.iter_mut().for_each(|client| client.send(&filler));
    thread::sleep(ms(300));
    let before = server.memory_kb();
    for _ in 0..10_000 {
        let mut client = server.connect();
        client.finish();
        assert!(client.rest().is_empty());
    }
    let after = server.memory_kb();
    assert!(after < before + 200, "{before} kB before, {after} kB after");
    server.stdout.resume();
    server.stop();
}

/// Beside eight clients that hold the room for long lines: a last line that its client's end completes is served, and
/// who is reset while waiting for such room gives its seat free.
#[test]
fn clients_beside_long_lines_end_at_once() {
    let mut server = Server::start(&calm(&["--max-conns", "40"]));
    let hold = |length| {
        let mut client = server.connect();
        client.send("h".repeat(length));
        client
    };
    let holders: Vec<Client> = (0..8).map(|_| hold(6000)).collect();
    thread::sleep(ms(300));
    for length in [500, 513, 1500, 4000] {
        let start = Instant::now();
        let mut client = hold(length);
        client.finish();
        assert_eq!(client.rest().len(), length);
        assert!(start.elapsed() < ms(1100), "{length} bytes took {:?}", start.elapsed());
    }
    let waiting: Vec<Client> = (0..32).map(|_| hold(3000)).collect();
    thread::sleep(ms(300));
    waiting.into_iter().for_each(Client::reset);
    let start = Instant::now();
    server.echo("short\n");
    assert!(start.elapsed() < ms(1100), "a seat was free after {:?}", start.elapsed());
    holders.into_iter().for_each(Client::reset);
    server.stop();
}

// -------------------------------------------------------------------- health

/// A server whose seats are all taken is busy, not ill; one that does not run is ill.
#[test]
fn full_server_is_healthy() {
    // Asked by its port alone, also if it is bound to one address.
    for bind in ["0.0.0.0", "127.0.0.1"] {
        let mut server = Server::start(&calm(&["--max-conns", "2", "--bind", bind]));
        let idle = [server.connect(), server.connect(), server.connect()];
        idle[..2].iter().for_each(Client::is_taken); // accepted
        for _ in 0..3 {
            is_healthy(server.address.port());
        }
        server.suspend();
        let exit = health(&[], server.address.port());
        server.wake();
        assert_eq!(exit.code, Some(1), "bound to {bind}: {exit:?}");
        assert!(exit.lifetime < ms(3000), "bound to {bind}: {exit:?}");
        drop(idle);
        assert_eq!(server.stop().stdout[1..], ["Observing 0"], "bound to {bind}");
    }
}

/// A probe does not find itself where nobody listens, though the kernel may give it the very port it asks for.
#[test]
fn probe_does_not_answer_itself() {
    in_a_network_of_its_own("echo 40000 40009 > /proc/sys/net/ipv4/ip_local_port_range", || {
        let mut healthy = vec![];
        for _ in 0..10 {
            let answers = (40_000..40_010).filter(|&port| health(&[], port).code != Some(1));
            healthy.extend(answers);
        }
        assert!(healthy.is_empty(), "{} of 100 probes found a server: {healthy:?}", healthy.len());
    });
}

/// A network's only server is found by a probe without options, wherever it listens.
#[test]
fn only_server_is_found_without_options() {
    in_a_network_of_its_own("", || {
        let probe = || run(&["--health"]);
        assert_eq!(probe().code, Some(1), "nobody is there");
        for port in ["9999", "8888", "12345"] {
            let mut server = Server::of(Process::spawn(program(&calm(&["--tcp-port", port]))));
            let exit = probe();
            assert_eq!(exit.code, Some(0), "on port {port}: {exit:?}");
            server.suspend();
            let exit = probe();
            assert_eq!(exit.code, Some(1), "suspended on port {port}: {exit:?}");
            assert!(exit.lifetime < ms(3000), "{exit:?}");
            server.wake();
            assert_eq!(server.stop().stdout[1..], ["Observing 0"], "a probe leaves no trace");
            assert_eq!(probe().code, Some(1), "it has ended");
            let server = Server::of(Process::spawn(program(&calm(&["--tcp-port", port]))));
            assert_eq!(probe().code, Some(0), "another one on port {port}");
            drop(server); // killed
            assert_eq!(probe().code, Some(1), "it was killed");
        }
    });
}

/// Of two servers of one network each answers for itself.
#[test]
fn each_of_two_servers_answers_for_itself() {
    in_a_network_of_its_own("", || {
        let start =
            |port| Server::of(Process::spawn(program(&calm(&["--tcp-port", port, "--max-conns", "1"]))));
        let answers = || [9001, 9002].map(|port| health(&[], port).code);
        let (one, two) = (start("9001"), start("9002"));
        let _idle = [one.connect(), two.connect(), one.connect(), two.connect()];
        _idle[..2].iter().for_each(Client::is_taken); // accepted: both are full
        assert_eq!(answers(), [Some(0), Some(0)]);
        one.suspend();
        assert_eq!(answers(), [Some(1), Some(0)]);
        one.wake();
        assert_eq!(answers(), [Some(0), Some(0)]);
        drop(one); // killed
        assert_eq!(answers(), [Some(1), Some(0)]);
        drop(two);
        assert_eq!(answers(), [Some(1), Some(1)]);
    });
}

/// A server that starts while the one before it still serves its last client answers for itself.
#[test]
fn server_that_stops_does_not_answer_for_the_next() {
    in_a_network_of_its_own("", || {
        let start =
            || Server::of(Process::spawn(program(&calm(&["--tcp-port", "9001", "--max-conns", "1"]))));
        let mut old = start();
        let mut client = old.connect();
        client.send("half");
        client.is_taken();
        old.signal(Signal::TERM);
        eventually(ms(2000), "the port is free", || TcpStream::connect(old.loopback()).is_err());
        let new = start();
        let idle = new.connect();
        idle.is_taken(); // it is full: a TCP client would wait
        let probes = || [run(&["--health"]).code, health(&[], 9001).code];
        assert_eq!(probes(), [Some(0); 2]);
        new.suspend();
        assert_eq!(probes(), [Some(1); 2]);
        new.wake();
        client.send("\n");
        assert_eq!(old.exited(PATIENCE).code, Some(0));
        assert_eq!(probes(), [Some(0); 2]);
    });
}
