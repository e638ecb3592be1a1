//! Load, abuse and bad luck: fault runs against the real binary, each with its outcome.
//!
//! `SMOLRX_SOAK=600`, `SMOLRX_SLOW=60` (seconds) and `SMOLRX_SIGTERMS=200` (servers) make them longer.

mod common;

use common::*;
use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

/// 2,000 clients that send a byte a second do not keep another one waiting for 100 ms, and when they stop
/// sending the timeout frees them all.
#[test]
fn slow_clients_hold_nobody_up() {
    let mut server = Server::calm("--max-conns 4096 --timeout 3000");
    let before = server.descriptors();
    let mut slow = server.clients(2000, "");
    eventually(PATIENCE, "2,000 clients are connected", || server.descriptors() >= before + slow.len());
    beside_quick_round_trips(server.address, || {
        for _ in 0..setting("SMOLRX_SLOW", 3) {
            for some in slow.chunks_mut(100) {
                some.iter_mut().for_each(|client| client.send("x"));
                thread::sleep(ms(50));
            }
        }
        assert!(server.descriptors() >= before + slow.len(), "a client that sends was cut");
        eventually(PATIENCE, "all are freed", || server.descriptors() <= before + 1); // and the round trip
    });
    slow.iter_mut().for_each(|client| assert_eq!(client.until_closed(), b""));
    server.echo("last\n");
    eventually(PATIENCE, "no descriptor is left", || server.descriptors() == before);
    let exit = server.stop();
    assert_eq!(observed(&exit.stdout), ["last"]);
    assert!(!exit.stdout.iter().any(|line| line.starts_with("Received xx")), "half a line was received");
}

/// An echo of 30 MB, taken in small pieces, holds up no other client, and costs less than
/// two seconds of processor time.
#[test]
fn long_echo_holds_nobody_up() {
    // Quiet, or clients would wait for stdout to take the line.
    let server = Server::on_loopback(calm_on_loopback("--quiet --max-line 40000000"));
    let line = line_of(30_000_000);
    let mut client = server.connect_with_small_window();
    let before = server.activity().0;
    client.send(&line);
    client.wait_for_bytes(1);
    beside_quick_round_trips(server.address, || {
        assert!(client.rest() == line.as_bytes(), "the echo differs")
    });
    let spent = server.activity().0 - before;
    assert!(spent < ms(2000), "{spent:?} of processor time");
}

/// Runs `body` beside round trips of one line to an address, none of which may take more than 100 ms plus
/// what the simplest server there is takes at that moment.
fn beside_quick_round_trips(address: SocketAddr, body: impl FnOnce()) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let control = listener.local_addr().unwrap();
    thread::spawn(move || {
        for client in listener.incoming() {
            let client = client.unwrap();
            io::copy(&mut (&client).take(5), &mut &client).unwrap();
        }
    });
    // When each began, and the time it took.
    let times: [Mutex<Vec<(Instant, Duration)>>; 2] = Default::default();
    let round_trip = |(address, times)| {
        let times: &Mutex<Vec<_>> = times;
        move || {
            let start = Instant::now();
            let mut client = Client::connect(address);
            client.send("ping\n");
            assert_eq!(client.rest(), b"ping\n");
            times.lock().unwrap().push((start, start.elapsed()));
            thread::sleep(ms(20));
            1
        }
    };
    beside([(address, &times[0]), (control, &times[1])].map(round_trip).into(), 2, body);
    let [trips, controls] = times.map(|times| times.into_inner().unwrap());
    for (start, took) in trips {
        let meanwhile = controls.iter().filter(|(at, length)| *at < start + took && start < *at + *length);
        let machine = meanwhile.map(|(_, length)| *length).max().unwrap_or_default();
        assert!(took <= ms(100) + machine, "a client waited {took:?}, the control {machine:?}");
    }
}

/// A client for which the kernel has no room among those that it watches is served all the same, once there
/// is some, and a warning says why it waited.
#[test]
fn client_that_cannot_be_watched_is_served() {
    // Which call adds the client depends on what else is done at that moment; only that one can fail for
    // want of memory.
    let hit = (1..=8).cycle().take(40).any(|number| {
        let mut server = Server::calm("");
        let Some(mut strace) = strace(&format!("epoll_ctl:error=ENOMEM:when={number}")) else { return true };
        strace.args(["-o", "/dev/stderr"]);
        let tracer = server.traced_by(strace);
        let mut client = server.connect();
        client.send("fo");
        thread::sleep(ms(100)); // now the server waits for the rest
        let is_hit = |call: &String| call.contains("EPOLL_CTL_ADD") && call.ends_with("(INJECTED)");
        if !tracer.stderr.lines().iter().any(is_hit) {
            return false;
        }
        server.stderr.wait_for("smolrx: cannot wait for a client: out of memory (error 12); trying again");
        client.send("o\n");
        assert_eq!(client.rest(), b"foo\n");
        drop(tracer);
        server.stop().tells_of("foo", client.port());
        true
    });
    assert!(hit, "no client was met");
}

/// After SIGTERM at a random moment under load, every line whose echo a client got is in the transcript, what
/// came last is observed, no line of output is partial, and the server exits with 0 in under six seconds.
#[test]
fn sigterm_at_random_moments() {
    for round in 0..setting("SMOLRX_SIGTERMS", 20) {
        let (option, lines) = if round % 2 == 0 { ("--keep-open", usize::MAX) } else { ("", 1) };
        let interval = if round % 4 < 2 { 10 } else { 600_000 };
        let server = Server::start(&format!("--interval {interval} {option}"));
        let moment = Duration::from_micros(RandomState::new().hash_one(round) % 150_000);
        let what = format!("round {round}, SIGTERM after {moment:?}");
        let (address, talk) = (server.address, Talk::default());
        let exit = thread::scope(|scope| {
            let mut server = server; // if it does not stop, it is killed here, and the clients end
            for client in 0..8 {
                let (talk, name) = (&talk, move |i| format!("client {client} connection {i}"));
                scope.spawn(move || (0..).all(|i| converse(&name(i), address, lines, talk).is_ok()));
            }
            thread::sleep(moment);
            server.stop()
        });
        assert_eq!(exit.stderr, [""; 0], "{what}");
        let [begun, echoed] = talk.map(|texts| texts.into_inner().unwrap());
        let printed = HashSet::from_iter(exit.stdout[1..].iter().cloned());
        assert_eq!(echoed.difference(&printed).next(), None, "{what}: echoed, but not in the transcript");
        let is_tick = |event: &str| event.parse::<u64>().is_ok();
        let is_no_tick = |line: &&String| !line.strip_prefix("Observing ").is_some_and(is_tick);
        let partial = printed.difference(&begun).find(is_no_tick);
        assert_eq!(partial, None, "{what}: not a whole line");
        // What came last is observed last; with a debounce of a millisecond, perhaps before the end.
        let from = if interval == 10 { 0 } else { exit.stdout.len() - 1 };
        let event = *observed(&exit.stdout[from..]).last().expect("an event, and last of all");
        let last = exit.stdout.iter().rev().find_map(|line| line.strip_prefix("Send: ")).unwrap_or("0");
        let is_flushed = event == last || interval == 10 && is_tick(event);
        assert!(is_flushed, "{what}: the pending value is not flushed, but: {event}");
    }
}

/// What may be printed of the lines that clients have begun to send, and what must be of those echoed.
type Talk = [Mutex<HashSet<String>>; 2];

/// Opens a connection and sends this many lines on it, each after the echo of the one before.
fn converse(name: &str, address: SocketAddr, lines: usize, [begun, echoed]: &Talk) -> io::Result<()> {
    let mut socket = TcpStream::connect(address)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let port = socket.local_addr()?.port();
    for number in 0..lines {
        let line = format!("{name} line {number}\n");
        let shown = conversation(line.trim(), port);
        begun.lock().unwrap().extend([&shown[..], &[format!("Observing {}", line.trim())]].concat());
        socket.write_all(line.as_bytes())?;
        let mut echo = vec![0; line.len()];
        socket.read_exact(&mut echo)?;
        assert_eq!(echo, line.as_bytes());
        echoed.lock().unwrap().extend(shown);
    }
    Ok(())
}

/// After a long time under every kind of client, memory and descriptors are what they were before.
#[test]
fn soak_leaves_nothing_behind() {
    let mut server = Server::start("--interval 50 --keep-open --timeout 2000 --max-line 4096");
    let rest = server.descriptors();
    // Until every buffer has had its largest size, the text for a stdout that lags included.
    server.stdout.pause();
    Flood::pump_until_stalled(&mut [Flood::new(server.connect(), false)], ms(300));
    server.stdout.resume();
    let mut memory = 0;
    eventually(PATIENCE, "its memory stops growing", || {
        abuse(&server, Duration::from_secs(1));
        let before = std::mem::replace(&mut memory, server.memory_kb());
        memory <= before
    });
    abuse(&server, Duration::from_secs(setting("SMOLRX_SOAK", 5)));
    eventually(PATIENCE, "no descriptor is left", || server.descriptors() == rest);
    let after = server.memory_kb();
    assert!(after <= memory + 64, "{memory} kB before, {after} kB after");
    server.echo("last\n");
    let exit = server.stop();
    assert!(!exit.stderr.iter().any(|line| line.contains("panicked")), "{exit:?}");
}

/// Runs four loads for this long: each has clients of each kind in turn, beside an idle one.
fn abuse(server: &Server, time: Duration) {
    let client_with = |text: &[u8]| {
        thread::sleep(ms(1));
        let mut client = server.connect();
        client.send(text);
        client
    };
    let load = || {
        let _idle = client_with(b"idle in mid-li");
        for text in [&b"\xff\x1b[0m\0\n"[..], &b"pipelined\n".repeat(50)] {
            client_with(text).expect(text);
        }
        server.echo("last line without newline");
        server.echo("");
        // The first two are no line, and nobody takes the echo of the third.
        for text in [&b""[..], b"reset in mid-li", &b"gone before the echo\n".repeat(20)] {
            client_with(text).reset();
        }
        let mut gone = client_with(b"gone after the echo\n");
        gone.expect("gone after the echo\n");
        gone.reset();
        assert_eq!(client_with(&[b'x'; 4097]).until_closed(), b""); // too long by one
        assert_eq!(client_with(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").rest(), BAD_REQUEST);
        assert!(!server.stdout.lines().iter().any(|line| line.contains("reset in mid-li")));
        server.stdout.clear();
        1
    };
    beside(vec![load; 4], 0, || thread::sleep(time));
}
