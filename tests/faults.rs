//! Load, abuse and bad luck: fault runs against the real binary, each with its outcome.
//!
//! | setting | short form | `SMOLRX_LONG=1` | meaning |
//! |---|---|---|---|
//! | `SMOLRX_SOAK` | 5 | 600 | seconds of the soak |
//! | `SMOLRX_SIGTERMS` | 20 | 200 | servers stopped at random moments under load |
//! | `SMOLRX_STALL` | 2 | 10 | seconds for which nobody reads standard output |
//! | `SMOLRX_SLOW` | 3 | 60 | seconds for which 2,000 slow clients send a byte a second |
//! | `SMOLRX_RESETS` | 50 | 1000 | resets at each stage |
//!
//! `SMOLRX_SEED` repeats the random moments of a run, which says its seed when it fails.

mod common;

use common::*;
use rustix::process::Signal;
use std::collections::HashSet;
use std::env;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// A setting: what the environment says, or else its long or its short form.
fn form(name: &str, short: u64, long: u64) -> u64 {
    let is_long = env::var("SMOLRX_LONG").is_ok_and(|value| value == "1");
    setting(name, if is_long { long } else { short })
}

/// These options, and a clock that keeps out of the way.
fn calm<'a>(options: &[&'a str]) -> Vec<&'a str> {
    [&CALM, options].concat()
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

// -------------------------------------------------------------- many clients

/// At `--max-conns` the next clients wait and are served one after another; none is refused.
#[test]
fn clients_beyond_the_limit_wait_and_are_served() {
    let mut server = Server::start(&calm(&["--max-conns", "1"]));
    let mut first = server.connect();
    first.send("fir");
    let mut waiting: Vec<Client> = (0..100).map(|_| server.connect()).collect();
    for (i, client) in waiting.iter_mut().enumerate() {
        client.send(format!("waiting {i}\n"));
    }
    assert!(waiting[0].hears_nothing_for(ms(300)));
    first.send("st\n");
    assert_eq!(first.rest(), b"first\n");
    for (i, client) in waiting.iter_mut().enumerate() {
        assert_eq!(client.rest(), format!("waiting {i}\n").as_bytes());
    }
    let exit = server.stop();
    let mut expected = conversation("first", first.port()).to_vec();
    expected.extend(
        waiting.iter().enumerate().flat_map(|(i, c)| conversation(&format!("waiting {i}"), c.port())),
    );
    expected.push("Observing waiting 99".into());
    assert_eq!(exit.stdout[1..], expected, "one at a time, in the order in which they came");
}

/// Out of descriptors it waits without spinning, warns once a second at most, and goes on when there are some:
/// every client is served in the end.
#[test]
fn descriptors_exhausted_and_recovered() {
    let mut server = Server::start_after("ulimit -n 64", &CALM);
    let before = server.descriptors();
    let mut clients: Vec<Client> = (0..100).map(|_| server.connect()).collect();
    server.stderr.wait_for_count(1);
    assert!(server.descriptors() > 50, "the limit is 64, and only {} are open", server.descriptors());

    let (start, (cpu, _)) = (Instant::now(), server.activity());
    let warnings = server.stderr.lines().len();
    thread::sleep(ms(3000));
    let (seconds, spent) = (start.elapsed().as_secs() as usize, server.activity().0 - cpu);
    let warnings = server.stderr.lines().len() - warnings;
    assert!(warnings <= seconds + 1, "{warnings} warnings in {seconds} s: {:?}", server.stderr);
    assert!(spent < ms(150), "{spent:?} of processor time in {seconds} s");
    assert!(server.is_running());

    for (i, client) in clients.iter_mut().enumerate() {
        client.send(format!("client {i}\n"));
    }
    for (i, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.rest(), format!("client {i}\n").as_bytes());
    }
    eventually(PATIENCE, "no descriptor is left", || server.descriptors() == before);
    let exit = server.stop();
    assert_eq!(exit.stdout.iter().filter(|line| *line == CLOSE).count(), 100);
    assert!(exit.stderr.iter().all(|line| line.starts_with("smolrx: ")), "{:?}", exit.stderr);
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

// ------------------------------------------------------- nobody takes the bytes

/// Echo that nobody reads holds up its own connection only: memory is bounded, the timeout frees it.
#[test]
fn client_that_never_reads_is_freed() {
    let mut server = Server::start(&calm(&["--keep-open", "--timeout", "1500"]));
    let before = server.descriptors();
    server.echo("warm-up\n");
    let memory = server.memory_kb();
    let mut floods: Vec<Flood> =
        (0..4).map(|_| Flood::new(Client::with_small_window(server.loopback()), false)).collect();
    Flood::pump_until_stalled(&mut floods, ms(300));
    server.echo("neighbour\n");
    let grown = server.memory_kb().saturating_sub(memory);
    assert!(grown <= 1024, "{grown} kB more for four connections");
    eventually(PATIENCE, "they are freed", || server.descriptors() == before);
    server.echo("last\n");
    assert_eq!(observed(&server.stop().stdout), ["last"]);
}

/// A server whose standard output nobody reads, and clients that send until it takes no more.
fn stalled() -> (Server, Vec<Flood>) {
    let server = Server::start(&calm(&["--keep-open"]));
    server.echo("warm-up\n");
    let memory = server.memory_kb();
    server.stdout.pause();
    let mut floods: Vec<Flood> = (0..8).map(|_| Flood::new(server.connect(), true)).collect();
    let start = Instant::now();
    Flood::pump_until_stalled(&mut floods, ms(1000));
    let stall = Duration::from_secs(form("SMOLRX_STALL", 2, 10));
    thread::sleep(stall.saturating_sub(start.elapsed()));
    let grown = server.memory_kb().saturating_sub(memory);
    assert!(grown <= 2048, "{grown} kB more for eight connections");
    (server, floods)
}

/// While nobody reads standard output everything waits; when somebody does again, nothing is lost.
#[test]
fn stalled_stdout_loses_nothing() {
    let (mut server, mut floods) = stalled();
    server.stdout.resume();
    Flood::complete(&mut floods);
    let exit = server.stop();
    for flood in &floods {
        assert_eq!(flood.echoed, flood.lines);
        assert_eq!(received(&exit.stdout, flood), flood.lines);
    }
}

/// SIGTERM is answered during the stall: nobody new is let in, and it ends when the reader has taken all that is owed.
#[test]
fn stalled_stdout_and_sigterm() {
    let (mut server, mut floods) = stalled();
    server.signal(Signal::TERM);
    server.refuses();
    thread::sleep(Duration::from_secs(form("SMOLRX_STALL", 2, 10)));
    assert!(server.is_running(), "ended although the reader had not taken what is owed");
    server.stdout.resume();
    Flood::complete(&mut floods);
    let exit = server.exited(PATIENCE);
    assert_eq!(exit.code, Some(0), "{:?}", exit.stderr);
    let mut lines = HashSet::new();
    for flood in &floods {
        assert!(received(&exit.stdout, flood) >= flood.echoed, "an echoed line is not in the transcript");
        lines.extend((0..flood.lines).map(|i| flood.line(i)));
    }
    assert!(exit.stdout.iter().all(|line| is_whole(line, &lines)));
    assert_eq!(observed(&exit.stdout[exit.stdout.len() - 1..]).len(), 1, "the pending value is not flushed");
}

/// A second signal during the stall ends it at once.
#[test]
fn stalled_stdout_and_two_signals() {
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let (mut server, _floods) = stalled();
        server.signal(Signal::TERM);
        server.refuses();
        let signalled = Instant::now();
        server.signal(signal);
        eventually(ms(1500), "the second signal ends it", || !server.is_running());
        println!("ended after {:?}", signalled.elapsed());
        assert_eq!(server.exit_code(), Some(code));
    }
}

/// Standard output is closed under load: it ends by itself, in silence.
#[test]
fn stdout_closed_under_load() {
    let (mut reader, writer) = io::pipe().unwrap();
    let mut command = program(&calm(&["--tcp-port", "0", "--bind", "127.0.0.1", "--keep-open"]));
    command.stdout(writer);
    let mut process = Process::spawn_with_stdout(command);
    let address = SocketAddr::new([127, 0, 0, 1].into(), process.listening_port());
    let mut floods: Vec<Flood> = (0..8).map(|_| Flood::new(Client::connect(address), true)).collect();
    let pump = |floods: &mut Vec<Flood>| floods.iter_mut().for_each(|flood| _ = flood.pump(true));
    reader.read_exact(&mut [0; 10]).unwrap();
    pump(&mut floods);
    drop(reader);
    eventually(PATIENCE, "it ends", || {
        pump(&mut floods);
        !process.is_running()
    });
    let exit = process.exited(PATIENCE);
    assert_eq!((exit.code, exit.signal), (Some(0), None), "{exit:?}");
    assert_eq!(exit.stderr, [""; 0]);
}

/// Standard output on a full disk: it ends with a sentence, and does not panic.
#[test]
fn stdout_on_a_full_disk() {
    let mut command = program(&["--tcp-port", "0", "--interval", "100"]);
    command.stdout(std::fs::File::options().write(true).open("/dev/full").unwrap());
    let exit = Process::spawn_with_stdout(command).exited(PATIENCE);
    assert_eq!((exit.code, exit.signal), (Some(1), None), "{exit:?}");
    assert_eq!(exit.stderr.len(), 1, "{exit:?}");
    assert!(exit.stderr[0].starts_with("smolrx: cannot write to stdout: "), "{exit:?}");
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
            assert!(signalled.elapsed() < ms(6000), "{what}: after {:?}", signalled.elapsed());
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
        (sent.contains(text) || text == "warm-up") && port.parse::<u16>().is_ok()
    };
    let known = |text: &str| sent.contains(text) || text == "warm-up";
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

/// A second server on the same port says so and ends; the first one goes on.
#[test]
fn two_servers_on_one_port() {
    let mut server = Server::start(&calm(&["--bind", "127.0.0.1"]));
    let address = server.address;
    let exit = run(&["--bind", "127.0.0.1", "--tcp-port", &address.port().to_string()]);
    assert_eq!(exit.code, Some(1), "{exit:?}");
    assert_eq!((exit.stdout.len(), exit.stderr.len()), (0, 1), "{exit:?}");
    assert!(exit.stderr[0].starts_with(&format!("smolrx: cannot listen on {address}: ")), "{exit:?}");
    let port = server.echo("foo\n");
    assert_eq!(server.stop().stdout[1..4], conversation("foo", port));
}

/// Two servers at one port of two addresses do not get into each other's way, nor does their health.
#[test]
fn one_port_of_two_addresses() {
    let mut one = Server::start(&calm(&["--bind", "127.0.0.1"]));
    let port = one.address.port();
    let bind_two = ["--bind", "127.0.0.2", "--tcp-port", &port.to_string()];
    let mut two = Server::of(Process::spawn(program(&calm(&bind_two))));
    one.echo("foo\n");
    two.echo("bar\n");
    assert_eq!(health(&["--bind", "127.0.0.1"], port).code, Some(0));
    assert_eq!(health(&["--bind", "127.0.0.2"], port).code, Some(0));
    assert_eq!(observed(&two.stop().stdout), ["bar"]);
    assert_eq!(health(&["--bind", "127.0.0.1"], port).code, Some(0));
    assert_eq!(observed(&one.stop().stdout), ["foo"]);
}

// -------------------------------------------------------------- hostile text

/// Hostile text is echoed as it came, and is one harmless line of the transcript for each event.
#[test]
fn hostile_text() {
    let nul = [vec![0; 65535], b"\n".to_vec()].concat();
    let bidi = "a\u{202e}\u{202d}\u{2066}\u{2067}\u{2068}\u{2069}\u{61c}z \u{2028}\u{2029}\u{85}.\n";
    let lines: &[&[u8]] = &[
        b"\x1b[2J\x1b[H\x1b]0;title\x07\x1bP+q\x1b\\\n",
        b"\x9b31m \x90 \x9d raw C1\n",
        "\u{9b}31m encoded C1\n".as_bytes(),
        bidi.as_bytes(),
        &nul,
        b"\r\n",
        b"\r\r\n",
        b"\n",
        b"a\rb\r\r\n",
        b"fake\rReceived trust me from 127.0.0.1:1\r\n",
        b"\x0b\x0c\x1c\x1d\x1e\x1f\x7f\n",
        b"\xf0\x9f\xa6\n",
        b"\xc3\x28 \xa0\xa1 \xe2\x28\xa1 \xfc\xa1\xa1\xa1\xa1\xa1\n",
        "\u{feff}\u{fffd}\u{ffff}\u{10ffff} non-characters\n".as_bytes(),
        b"no ending\r",
    ];
    let mut server = Server::start(&calm(&["--keep-open"]));
    let mut client = server.connect();
    let writer = client.0.try_clone().unwrap();
    let bytes = lines.concat();
    thread::spawn({
        let bytes = bytes.clone();
        move || (&writer).write_all(&bytes).and_then(|()| writer.shutdown(Shutdown::Write))
    });
    assert_eq!(client.rest(), bytes);
    let exit = server.stop();
    let mut expected: Vec<String> =
        lines.iter().flat_map(|line| conversation(&shown(line), client.port())[..2].to_vec()).collect();
    expected.extend([CLOSE.into(), "Observing no ending".into()]);
    assert_eq!(exit.stdout[1..], expected);
    assert!(!exit.stdout.iter().any(|line| line.contains(is_hostile)));
}

/// A character may be cut anywhere between two packets, and an invalid one as well.
#[test]
fn characters_across_chunk_borders() {
    let bytes = "é✓🦀\u{202e}\r\n".as_bytes();
    for line in [bytes, &[&bytes[..8], &b"\xff\xe2\x9c"[..], &bytes[9..]].concat()] {
        for border in 1..line.len() {
            let server = Server::start(&CALM);
            let mut client = server.connect();
            client.send(&line[..border]);
            thread::sleep(ms(5)); // for the server to see the first part alone
            client.send(&line[border..]);
            assert_eq!(client.rest(), line);
            server.stdout.wait_for(CLOSE);
            assert_eq!(server.stdout.lines()[1..4], conversation(&shown(line), client.port()));
        }
    }
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
