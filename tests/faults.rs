//! Load, abuse and bad luck: fault runs against the real binary, each with its outcome.
//!
//! | setting | short form | `SMOLRX_LONG=1` | meaning |
//! |---|---|---|---|
//! | `SMOLRX_SOAK` | 5 | 600 | seconds of the soak |
//! | `SMOLRX_SIGTERMS` | 20 | 200 | servers stopped at random moments under load |
//! | `SMOLRX_SLOW` | 3 | 60 | seconds for which 2,000 slow clients send a byte a second |
//! | `SMOLRX_RESETS` | 50 | 1000 | resets at each stage |
//!
//! `SMOLRX_SEED` repeats the random moments of a run, which says its seed when it fails.

mod common;

use common::*;
use rustix::process::Signal;
use std::collections::HashSet;
use std::env;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// A setting: what the environment says, or else its long or its short form.
fn form(name: &str, short: u64, long: u64) -> u64 {
    let is_long = env::var("SMOLRX_LONG").is_ok_and(|value| value == "1");
    setting(name, if is_long { long } else { short })
}

/// A generator of random numbers, good enough to choose moments.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % limit
    }
}

// -------------------------------------------------------------- slow clients

/// 2,000 clients that send a byte a second do not keep another one waiting for 100 ms,
/// and when they stop sending the timeout frees them all.
#[test]
fn slow_clients_hold_nobody_up() {
    raise_descriptor_limit();
    let mut server = Server::start(&calm(&["--max-conns", "4096", "--timeout", "3000"]));
    let before = server.descriptors();
    let mut slow: Vec<Client> = (0..2000).map(|_| server.connect()).collect();
    eventually(PATIENCE, "2,000 clients are connected", || server.descriptors() >= before + slow.len());

    let (address, control) = (server.loopback(), control_server());
    let stop = AtomicBool::new(false);
    let (trips, controls) = thread::scope(|scope| {
        let trips = scope.spawn(|| round_trips(address, &stop));
        let controls = scope.spawn(|| round_trips(control, &stop));
        for _ in 0..form("SMOLRX_SLOW", 3, 60) {
            for some in slow.chunks_mut(100) {
                let next = Instant::now() + ms(50);
                some.iter_mut().for_each(|client| client.send("x"));
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        }
        assert!(server.descriptors() >= before + slow.len(), "a client that sends was cut");
        eventually(PATIENCE, "all are freed", || server.descriptors() <= before + 1); // and the round trip
        stop.store(true, Ordering::Relaxed);
        (trips.join().unwrap(), controls.join().unwrap())
    });
    within_100_ms(&trips, &controls);
    for mut client in slow {
        assert_eq!(client.until_closed(), b"");
    }
    server.echo("last\n");
    eventually(PATIENCE, "no descriptor is left", || server.descriptors() == before);
    let exit = server.stop();
    assert_eq!(observed(&exit.stdout), ["last"]);
    assert!(!exit.stdout.iter().any(|line| line.starts_with("Received xx")), "half a line was received");
}

/// A byte a second is too slow when the timeout is shorter: all of 2,000 are freed though they would go on.
#[test]
fn slow_clients_are_freed_between_two_bytes() {
    raise_descriptor_limit();
    let server = Server::start(&calm(&["--max-conns", "4096", "--timeout", "500"]));
    let before = server.descriptors();
    let mut slow: Vec<Client> = (0..2000).map(|_| server.connect()).collect();
    let start = Instant::now();
    while server.descriptors() > before || start.elapsed() < ms(1000) {
        for client in &mut slow {
            let _ = client.0.write(b"x"); // freed already: an error
        }
        thread::sleep(ms(1000));
        assert!(start.elapsed() < PATIENCE, "they are not freed");
    }
    server.echo("foo\n");
}

/// Round trips of one line to an address until told to stop: when each began, and the time it took.
fn round_trips(address: SocketAddr, stop: &AtomicBool) -> Vec<(Instant, Duration)> {
    let mut trips = vec![];
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        let mut client = Client::connect(address);
        client.send("ping\n");
        assert_eq!(client.rest(), b"ping\n");
        trips.push((start, start.elapsed()));
        thread::sleep(ms(20));
    }
    trips
}

/// The simplest server there is: what delays this one, too, is the machine.
fn control_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, mut line) = (client.unwrap(), [0; 5]);
            client.read_exact(&mut line).unwrap();
            client.write_all(&line).unwrap();
        }
    });
    address
}

/// No round trip took more than 100 ms, but for what the machine took from the control at that moment.
fn within_100_ms(trips: &[(Instant, Duration)], controls: &[(Instant, Duration)]) {
    for &(start, took) in trips {
        let meanwhile = controls.iter().filter(|(at, length)| *at < start + took && start < *at + *length);
        let machine = meanwhile.map(|(_, length)| *length).max().unwrap_or_default();
        assert!(took <= ms(100) + machine, "a client waited {took:?}, the control {machine:?}");
    }
    let mut times: Vec<Duration> = trips.iter().map(|(_, took)| *took).collect();
    times.sort();
    println!(
        "{} round trips, median {:?}, worst {:?}",
        times.len(),
        times[times.len() / 2],
        times[times.len() - 1]
    );
}

/// An echo of 30 MB, taken in small pieces, holds up no other client, and costs no seconds of processor time.
#[test]
fn long_echo_holds_nobody_up() {
    // No text for stdout, which clients wait for.
    let server = Process::spawn(program(&calm_on_loopback(&["--quiet", "--max-line", "40000000"])));
    let (address, control) = (server.listening_address(), control_server());
    let line = line_of(30_000_000);
    let mut client = Client::with_small_window(address);
    let before = server.activity().0;
    client.send(&line);
    client.wait_for_bytes(1);
    let stop = AtomicBool::new(false);
    let (trips, controls) = thread::scope(|scope| {
        let trips = scope.spawn(|| round_trips(address, &stop));
        let controls = scope.spawn(|| round_trips(control, &stop));
        assert!(client.rest() == line.as_bytes(), "the echo differs");
        stop.store(true, Ordering::Relaxed);
        (trips.join().unwrap(), controls.join().unwrap())
    });
    let spent = server.activity().0 - before;
    println!("{spent:?} of processor time");
    assert!(spent < ms(2000), "{spent:?} of processor time");
    within_100_ms(&trips, &controls);
}

// ------------------------------------------------------------ a kernel that lacks memory

/// A client for which the kernel has no room among those that it watches is served all the same, once there is some,
/// and a warning says why it waited.
#[test]
fn client_that_cannot_be_watched_is_served() {
    if let Some(reason) = refusal(Command::new("strace").args(["-o", "/dev/null", "true"])) {
        return skip(format!("no strace: {reason}"));
    }
    for (error, words) in [("ENOMEM", "out of memory (error 12)"), ("ENOSPC", "no storage space (error 28)")]
    {
        let warning = format!("smolrx: cannot wait for a client: {words}; trying again");
        // Which call adds the client depends on what else is done at that moment; only that one can fail for want
        // of memory.
        let hit = (1..=8).cycle().take(40).any(|number| {
            let scratch = Scratch::new();
            let log = scratch.file("log");
            let mut server = Server::start(&CALM);
            let inject = format!("inject=epoll_ctl:error={error}:when={number}");
            let tracer = trace(&server, &["-o", log.to_str().unwrap(), "-e", &inject]);
            let mut client = server.connect();
            client.send("fo");
            let injected = || {
                let calls = fs::read_to_string(&log).unwrap();
                calls.lines().find(|call| call.ends_with("(INJECTED)")).map(String::from)
            };
            thread::sleep(ms(100)); // now the server waits for the rest
            if !injected().is_some_and(|call| call.contains("EPOLL_CTL_ADD")) {
                return false;
            }
            server.stderr.wait_for(&warning);
            client.send("o\n");
            assert_eq!(client.rest(), b"foo\n", "{error}");
            drop(tracer);
            assert_eq!(server.stop().stdout[1..4], conversation("foo", client.port()));
            true
        });
        assert!(hit, "{error} met no client");
    }
}

/// A tracer of the thread of a running server that serves its clients.
fn trace(server: &Server, options: &[&str]) -> Process {
    let mut command = Command::new("strace");
    command.args(["-qq", "-p", &server.id().to_string()]).args(options);
    let tracer = Process::spawn(command);
    eventually(PATIENCE, "the server is traced", || {
        !fs::read_to_string(format!("/proc/{}/status", server.id())).unwrap().contains("TracerPid:\t0\n")
    });
    tracer
}

// -------------------------------------------------------------------- resets

/// A reset ends its own connection and nothing else, at whatever stage it comes.
#[test]
fn resets_at_every_stage() {
    for keep_open in [false, true] {
        let options = if keep_open { calm(&["--keep-open"]) } else { calm(&[]) };
        let mut server = Server::start(&options);
        let before = server.descriptors();
        server.echo("warm-up\n");
        for i in 0..form("SMOLRX_RESETS", 50, 1000) {
            server.connect().reset();

            let mut mid_line = server.connect();
            mid_line.send(format!("partial {i}"));
            mid_line.reset();

            let mut after_the_line = server.connect();
            after_the_line.send(format!("whole {i}\n"));
            after_the_line.reset();

            let mut after_the_echo = server.connect();
            after_the_echo.send(format!("answered {i}\n"));
            after_the_echo.expect(format!("answered {i}\n"));
            after_the_echo.reset();
        }
        server.echo("last\n");
        eventually(PATIENCE, "no descriptor is left", || server.descriptors() == before);
        let exit = server.stop();
        assert!(!exit.stdout.iter().any(|line| line.contains("partial")), "part of a line was received");
        assert_eq!(observed(&exit.stdout), ["last"]);
        assert!(!exit.stderr.iter().any(|line| line.contains("panicked")), "{exit:?}");
    }
}

/// A line that was received whole is observed, although its client has gone before or during the echo.
#[test]
fn line_of_a_client_that_resets_is_observed() {
    let mut server = Server::start(&calm(&["--max-line", "20000000"]));
    let before = server.descriptors();
    server.echo("warm-up\n");
    let mut client = server.connect();
    client.send("gone before\n");
    let received = format!("Received gone before from 127.0.0.1:{}", client.port());
    client.reset();
    server.stdout.wait_for(&received);

    let mut client = Client::with_small_window(server.loopback());
    client.send(format!("gone during {}\n", "x".repeat(12_000_000))); // more than the kernel's buffers hold
    client.expect("gone during ");
    client.reset();
    eventually(PATIENCE, "no descriptor is left", || server.descriptors() == before);
    let exit = server.stop();
    assert!(exit.stdout.last().unwrap().starts_with("Observing gone during xxx"), "not observed");
}

/// A client that leaves in good order before it has read its echo changes nothing either.
#[test]
fn client_that_leaves_before_the_echo() {
    let mut server = Server::start(&CALM);
    let before = server.descriptors();
    for i in 0..50 {
        let mut client = server.connect();
        client.send(format!("hasty {i}\n"));
        drop(client);
    }
    server.stdout.wait_until("all are received", |lines| {
        (lines.iter().filter(|line| line.starts_with("Received hasty")).count() == 50).then_some(())
    });
    eventually(PATIENCE, "no descriptor is left", || server.descriptors() == before);
    assert!(observed(&server.stop().stdout)[0].starts_with("hasty "));
}

// ------------------------------------------------------------------- signals

/// SIGTERM at a random moment under load: every line whose echo a client got is in the transcript,
/// no line of output is partial, the exit code is 0, in under six seconds.
#[test]
fn sigterm_at_random_moments() {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let seed = setting("SMOLRX_SEED", u64::from(now.subsec_nanos()));
    let mut random = Random(seed);
    for round in 0..form("SMOLRX_SIGTERMS", 20, 200) {
        let keep_open = round % 2 == 0;
        let what = format!("SMOLRX_SEED={seed}, round {round}");
        let mut options = vec!["--interval", if round % 4 < 2 { "10" } else { "600000" }];
        options.extend(keep_open.then_some("--keep-open"));
        let mut server = Server::start(&options);
        let moment = Duration::from_micros(random.below(150_000));
        let (address, sent, echoed) = (server.loopback(), Mutex::default(), Mutex::default());
        let exit = thread::scope(|scope| {
            for client in 0..8 {
                let (sent, echoed) = (&sent, &echoed);
                scope.spawn(move || talk_until_refused(client, address, keep_open, sent, echoed));
            }
            thread::sleep(moment);
            let signalled = Instant::now();
            server.signal(Signal::TERM);
            let exit = server.exited(PATIENCE);
            assert!(signalled.elapsed() < stop_limit(), "{what}: after {:?}", signalled.elapsed());
            exit
        });
        assert_eq!(exit.code, Some(0), "{what}: {exit:?}");
        assert_eq!(exit.stderr, [""; 0], "{what}");
        let (sent, echoed): (HashSet<String>, Vec<(String, u16)>) =
            (sent.into_inner().unwrap(), echoed.into_inner().unwrap());
        for line in &exit.stdout {
            assert!(is_whole(line, &sent), "{what}: not a whole line: {line}");
        }
        let transcript: HashSet<&str> = exit.stdout.iter().map(String::as_str).collect();
        for (line, port) in &echoed {
            let [received, send, _] = conversation(line, *port);
            assert!(transcript.contains(&*received), "{what}: echoed, but not in the transcript: {received}");
            assert!(transcript.contains(&*send), "{what}: echoed, but not in the transcript: {send}");
        }
        // What came last is observed last; with a debounce of a millisecond, perhaps before the end.
        let event = *observed(&exit.stdout).last().unwrap();
        let received = exit.stdout.iter().rev().find_map(|line| line.strip_prefix("Send: "));
        assert!(
            received.is_none_or(|line| line == event) || event.parse::<u64>().is_ok(),
            "{what}: the pending value is not flushed"
        );
        assert!(options[1] == "10" || exit.stdout.last().unwrap().starts_with("Observing "), "{what}");
    }
}

/// Sends line after line until nobody answers any more; notes what was sent, and what came back.
fn talk_until_refused(
    client: usize,
    address: SocketAddr,
    keep_open: bool,
    sent: &Mutex<HashSet<String>>,
    echoed: &Mutex<Vec<(String, u16)>>,
) {
    let lines = AtomicUsize::new(0);
    let talk = || -> io::Result<()> {
        let mut socket = TcpStream::connect(address)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let port = socket.local_addr()?.port();
        loop {
            let line = format!("client {client} line {}", lines.fetch_add(1, Ordering::Relaxed));
            sent.lock().unwrap().insert(line.clone());
            socket.write_all(format!("{line}\n").as_bytes())?;
            let mut echo = vec![0; line.len() + 1];
            socket.read_exact(&mut echo)?;
            assert_eq!(echo, format!("{line}\n").as_bytes());
            echoed.lock().unwrap().push((line, port));
            if !keep_open {
                return Ok(());
            }
        }
    };
    while talk().is_ok() {}
}

/// Whether this is a line that the server may print, with nothing missing, when clients have sent these.
fn is_whole(line: &str, sent: &HashSet<String>) -> bool {
    let received = |rest: &str| {
        let (text, port) = rest.rsplit_once(" from 127.0.0.1:").unwrap_or_default();
        sent.contains(text) && port.parse::<u16>().is_ok()
    };
    let known = |text: &str| sent.contains(text);
    match line.split_once(' ') {
        Some(("Serving", rest)) => rest.starts_with("on "),
        Some(("Received", rest)) => received(rest),
        Some(("Send:", rest)) => known(rest),
        Some(("Observing", rest)) => known(rest) || rest.parse::<u64>().is_ok(),
        _ => line == CLOSE,
    }
}

/// Ticks that were missed while the process was stopped do not come in a burst: none hides another,
/// and a line that comes after them is observed.
#[test]
fn ticks_missed_while_stopped_do_not_burst() {
    let mut server = Server::start(&["--interval", "1000"]);
    server.stdout.wait_for("Observing 0");
    server.signal(Signal::STOP);
    let mut client = server.connect();
    client.send("sent meanwhile\n");
    thread::sleep(ms(3500));
    assert!(client.hears_nothing_for(ms(1)));
    server.signal(Signal::CONT);
    assert_eq!(client.rest(), b"sent meanwhile\n");
    server.stdout.wait_for("Observing 2");
    server.echo("afterwards\n");
    server.stdout.wait_for("Observing afterwards");
    server.stdout.wait_until("two more ticks", |lines| {
        let numbers: Vec<u64> = observed(lines).iter().filter_map(|text| text.parse().ok()).collect();
        (numbers.last() >= Some(&4)).then_some(())
    });
    let exit = server.stop();
    let numbers: Vec<u64> = observed(&exit.stdout).iter().filter_map(|text| text.parse().ok()).collect();
    // The line that was sent meanwhile may have taken the place of the tick that came with it, but of one only.
    assert!(numbers.starts_with(&[0, 1, 2, 3, 4]) || numbers.starts_with(&[0, 2, 3, 4]), "{:?}", exit.stdout);
}

// ---------------------------------------------------------------------- soak

/// After a long time under every kind of client, memory and descriptors are what they were before.
#[test]
fn soak_leaves_nothing_behind() {
    let mut server =
        Server::start(&["--interval", "50", "--keep-open", "--timeout", "400", "--max-line", "4096"]);
    let rest = server.descriptors();
    // Until every buffer has had its largest size, and the allocator keeps no more than it does.
    let mut memory = 0;
    eventually(Duration::from_secs(30), "its memory stops growing", || {
        abuse(&server, Duration::from_secs(1));
        let before = std::mem::replace(&mut memory, server.memory_kb());
        memory <= before
    });
    eventually(PATIENCE, "no descriptor is left", || server.descriptors() == rest);
    let threads = server.threads();

    let conversations = abuse(&server, Duration::from_secs(form("SMOLRX_SOAK", 5, 600)));
    eventually(PATIENCE, "no descriptor is left", || server.descriptors() == rest);
    eventually(PATIENCE, "no thread is left", || server.threads() <= threads);
    let after = server.memory_kb();
    println!("{conversations} connections, {memory} kB before, {after} kB after");
    assert!(after <= memory + 64, "{memory} kB before, {after} kB after {conversations} connections");
    server.echo("last\n");
    server.stop();
}

/// Clients of every kind for so long; answers how many there were.
fn abuse(server: &Server, time: Duration) -> usize {
    let (end, count) = (Instant::now() + time, AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut idle = vec![];
                while Instant::now() < end {
                    let number = count.fetch_add(1, Ordering::Relaxed);
                    idle.extend(one_of_every_kind(server, number));
                    if idle.len() > 8 {
                        idle.remove(0);
                    }
                    if number.is_multiple_of(500) {
                        server.stdout.clear();
                        server.stderr.clear();
                    }
                    thread::sleep(ms(1));
                }
            });
        }
    });
    count.into_inner()
}

/// One client; the kinds take turns. A client that is to stay idle is handed back.
fn one_of_every_kind(server: &Server, number: usize) -> Option<Client> {
    let mut client = server.connect();
    match number % 9 {
        0 => {
            client.send("one line\n");
            client.expect("one line\n");
        }
        1 => {
            client.send("pipelined\n".repeat(50));
            client.expect("pipelined\n".repeat(50));
        }
        2 => {
            client.send("last line without newline");
            client.finish();
            assert_eq!(client.rest(), b"last line without newline");
        }
        3 => {
            client.send("half a li");
            client.reset();
        }
        4 => {
            client.send("gone before the echo\n".repeat(20));
            client.reset();
        }
        5 => {
            client.send("x".repeat(4097)); // too long by one
            assert_eq!(client.until_closed(), b"");
        }
        6 => {
            client.send(b"\xff\x1b[0m\0\n");
            client.expect(b"\xff\x1b[0m\0\n");
        }
        7 => client.finish(),
        _ => {
            client.send("idle in mid-li");
            return Some(client);
        }
    }
    None
}
