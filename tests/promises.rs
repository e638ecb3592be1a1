//! What the server promises, a section each; the table in `tests/README.md` names the tests of each promise.

mod common;

use common::*;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::net::{SendFlags, sockopt};
use rustix::process::Signal;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

/// More bytes than the kernel's buffers hold.
const HUGE: usize = 5_000_000;

/// Runs `body` beside this many clients that send a line over and over and take its echo.
fn beside_a_flood<T>(address: SocketAddr, clients: usize, line: &str, body: impl FnOnce() -> T) -> T {
    raise_descriptor_limit();
    let lines = line.repeat(131_072 / line.len());
    let mut clients = Vec::from_iter((0..clients).map(|_| (Client::connect(address).0, 0)));
    clients.iter().for_each(|(client, _)| client.set_nonblocking(true).unwrap());
    let mut chunk = vec![0; 65_536];
    let load = || {
        thread::sleep(ms(1)); // which leaves much in the kernel's buffers
        let talk = |(client, sent): &mut (TcpStream, usize)| {
            let from = *sent % line.len();
            *sent += client.write(&lines.as_bytes()[from..from + 65_536]).unwrap_or(0);
            client.read(&mut chunk).unwrap_or(0) as u64
        };
        clients.iter_mut().map(talk).sum()
    };
    beside(vec![load], 100 << 10, body)
}

/// A client's line, the first bytes of which are sent ahead, is echoed within this time, in one of three
/// tries: a busy machine may be late once or twice.
#[track_caller]
fn assert_echoed_within(limit: Duration, address: SocketAddr, length: usize, first: usize) {
    let (mut times, line) = (vec![], line_of(length));
    let is_in_time = |_| {
        let start = Instant::now();
        let mut client = Client::connect(address);
        client.send(&line[..first]);
        if first < length {
            client.wait_until_taken();
        }
        client.send(&line[first..]);
        client.expect(&line);
        times.push(start.elapsed());
        times.last() < Some(&limit)
    };
    assert!((0..3).any(is_in_time), "the echo of {length} bytes, {first} of them sent ahead, took {times:?}");
}

// ------------------------------------------------- the echo is the acknowledgement

/// A line whose echo was sent is printed and observed, though the signal to stop comes right behind the echo.
#[test]
fn echoed_line_is_printed_and_observed() {
    for options in ["", "--keep-open"].repeat(20) {
        let mut server = Server::calm(options);
        let mut client = server.connect();
        client.send("foo\n");
        client.expect("foo\n");
        server.stop().tells_of("foo", client.port());
    }
}

// ------------------------------------------------------------------------- a line

/// The echo of a small line does not wait until the client acknowledges the one before it.
#[test]
fn pipelined_echoes_are_not_held_back() {
    let server = Server::calm("--keep-open");
    let lines = "small\n".repeat(1000);
    let gap = |_| {
        let mut client = server.connect();
        sockopt::set_tcp_quickack(&client.0, false).unwrap(); // as in the middle of a conversation
        client.send(&lines);
        client.wait_for_bytes(1); // not read: reading would acknowledge
        let first = Instant::now();
        client.wait_for_bytes(lines.len());
        first.elapsed()
    };
    let mut gaps: Vec<Duration> = (0..15).map(gap).collect();
    gaps.sort();
    // Held back, each would take 40 ms; a busy machine may hold up some, but hardly ten of fifteen.
    assert!(gaps[5] < ms(20), "the rest of an echo came so long after its beginning: {gaps:?}");
}

/// A byte sent as urgent is in its place in the echo like any other.
#[test]
fn urgent_byte_is_echoed_in_its_place() {
    let mut server = Server::calm("");
    let mut client = server.client_in("ab");
    assert_eq!(rustix::net::send(&client.0, b"c", SendFlags::OOB), Ok(1));
    client.send("d\n");
    client.finish();
    assert_eq!(client.rest(), b"abcd\n");
    server.stop().tells_of("abcd", client.port());
}

/// A client that leaves before its echo comes loses no line; a reset loses only what has no newline yet.
#[test]
fn lines_of_a_client_that_is_gone_are_received() {
    let many: String = (0..10_000).map(|i| format!("{i}\n")).collect();
    let some = (0..100).map(|i| format!("{i:059}\n")).collect::<String>() + "part of a line";
    let (drop, reset) = (drop as fn(Client), Client::reset as fn(Client));
    let cases = [
        // In the backlog: an echo to a client that has left makes its kernel drop what is under way.
        ("--keep-open", &*many, drop, true),
        ("--keep-open", &some, reset, true),
        ("--keep-open", &some, reset, false),
        ("--keep-open", "the last", drop, true),
        ("", "the last", drop, true),
        ("", "whole\n", drop, false),
        ("", "whole\npart of a line", reset, true),
        ("", "whole\npart of a line", reset, false),
    ];
    for (options, text, leave, in_the_backlog) in cases.repeat(10) {
        let mut server = Server::calm(options);
        if in_the_backlog {
            server.suspend();
        }
        let mut client = server.connect();
        client.send(text);
        let port = client.port();
        leave(client);
        server.wake();
        server.stdout.wait_for(CLOSE);
        let exit = server.stop();
        let lines: Vec<&str> = text.lines().filter(|line| *line != "part of a line").collect();
        let what = format!("{text:.60}, {options:?}, in the backlog: {in_the_backlog}");
        assert!(received_from(&exit.stdout, port) == lines, "{what}: {:?}", server.stdout);
        assert_eq!(observed(&exit.stdout), lines[lines.len() - 1..], "{what}");
    }
}

// ----------------------------------------------------------- silence for --timeout

/// A connection that sends nothing for `--timeout` is closed; part of a line is no event and is not printed.
#[test]
fn silent_connection_is_closed() {
    let (part, kept) = ("half a li", "--keep-open");
    let cases = [("", "", ""), ("", "", part), (kept, "", ""), (kept, "", part), (kept, "foo\n", part)];
    at_once(cases, |(options, line, part)| {
        let mut server = Server::calm(&format!("--timeout 1500 {options}"));
        let start = Instant::now();
        let mut client = server.connect();
        client.send(line);
        client.expect(line);
        thread::sleep(ms(500));
        client.send(part);
        assert_eq!(client.until_closed(), b"");
        let least = if part.is_empty() { ms(1495) } else { ms(1995) };
        let took = start.elapsed();
        assert!(took >= least && took < least + ms(2500), "after {took:?}");
        server.echo("bar\n");
        let exit = server.stop();
        assert_eq!(received_from(&exit.stdout, client.port()), Vec::from_iter(line.lines()));
        assert_eq!(observed(&exit.stdout), ["bar"]);
    });
}

/// A client that takes no echo for `--timeout`, though it sends on, is let go, and so is one that resets; its
/// line is observed.
#[test]
fn connection_that_does_not_take_its_echo_is_closed() {
    for (options, resets, timeout) in [("--keep-open", false, 1000), ("", false, 1000), ("", true, 60_000)] {
        let mut server = Server::calm(&format!("{options} --timeout {timeout} --max-line 6000000"));
        let before = server.descriptors();
        let mut client = server.connect_with_small_window();
        let start = Instant::now();
        client.send(format!("start{}", line_of(HUGE)));
        client.expect("start");
        if !resets {
            while client.0.write_all(&[b'x'; 2000]).is_ok() {}
            let took = start.elapsed();
            assert!(took >= ms(995) && took < ms(2800), "after {took:?}");
        }
        drop(client); // with bytes unread, it resets
        eventually(PATIENCE, "its descriptor is open no more", || server.descriptors() == before);
        let exit = server.stop();
        assert!(exit.stdout.last().unwrap().starts_with("Observing startxxx"), "not observed");
    }
}

/// A slow client is not cut off, though its line takes longer than `--timeout`, and so does its echo.
#[test]
fn slow_client_is_not_cut() {
    let server = Server::calm("--timeout 3000 --max-line 9000000");
    let (line, mut client) = (line_of(8_000_000), server.connect());
    for piece in line.as_bytes().chunks(900_000) {
        client.send(piece);
        thread::sleep(ms(400));
    }
    let mut bytes = vec![0; 800_000];
    for chunk in bytes.chunks_mut(20_000) {
        client.0.read_exact(chunk).expect("the server goes on with its echo");
        thread::sleep(ms(100));
    }
    bytes.extend(client.until_closed());
    assert!(bytes == line.as_bytes(), "cut after {} of {} bytes", bytes.len(), line.len());
}

/// A line that arrives in time counts, even if the server sleeps past the timeout and has many to look at.
#[test]
fn lines_that_came_in_time_beat_the_timeout() {
    const CLIENTS: usize = 500; // more than have a turn at once
    let holds = |options, timeout| {
        let mut server = Server::calm(&format!("{options} --timeout {timeout}"));
        let before = server.descriptors();
        server.suspend();
        let mut clients = server.clients(CLIENTS, "in ");
        let accepting = Instant::now();
        server.wake();
        let is_late = || accepting.elapsed() > ms(timeout - 100);
        eventually(ms(timeout) + PATIENCE, "all are accepted, or it is too late", || {
            is_late() || server.descriptors() == before + CLIENTS && clients[CLIENTS - 1].is_read()
        });
        server.suspend();
        if is_late() {
            return false;
        }
        clients.iter_mut().for_each(|client| client.send("time\n"));
        thread::sleep(ms(timeout + 300));
        server.wake();
        clients.iter().for_each(Client::finish);
        clients.iter_mut().for_each(|client| assert_eq!(client.until_closed(), b"in time\n"));
        assert_eq!(observed(&server.stop().stdout), ["in time"]);
        true
    };
    at_once(["", "--keep-open"], |options| {
        // On a busy machine it takes longer to connect them all.
        if ![1500, 6000, 48_000].into_iter().any(|timeout| holds(options, timeout)) {
            skip("this machine is too slow to connect 500 clients in time");
        }
    });
}

// ------------------------------------------------------------------------ an echo

/// Bytes behind the line do not cost a client its echo, whenever they come.
#[test]
fn more_sent_at_any_moment_does_not_cut_the_echo() {
    let server = Server::calm("");
    for i in 0..1000 {
        let mut client = server.connect();
        client.send("foo\n");
        let moment = Instant::now() + Duration::from_micros(i % 100);
        while Instant::now() < moment {}
        client.send("more\n");
        assert_eq!(client.until_closed(), b"foo\n", "when the rest comes after {} µs", i % 100);
    }
    let mut client = server.connect();
    client.send("foo\n".to_owned() + &"more".repeat(1000));
    assert_eq!(client.rest(), b"foo\n", "in good order, as the server knows that there is more");
}

/// A long echo arrives whole although its client reads late and sends one more byte, at whatever stage.
#[test]
fn byte_after_a_long_line_does_not_cut_the_echo() {
    let server = Server::calm("--max-line 6000000");
    // The byte comes before the echo begins, while it is sent, and when the kernel has all of it.
    let cases = [[(60_000, 0, 0), (60_000, 1, 0), (60_000, 1, 50)].repeat(10), vec![(HUGE, 1, 0)]];
    at_once(cases.concat(), |(length, begun, pause)| {
        byte_after_a_long_line(server.connect_with_small_window(), length, begun, pause, 200);
    });
}

/// A long echo arrives whole over a slow network although its client sends one more byte.
#[test]
fn byte_after_a_long_line_does_not_cut_the_echo_over_a_slow_network() {
    let slow = "ip link set lo mtu 1500; tc qdisc add dev lo root tbf rate 8mbit burst 10kb latency 400ms";
    in_a_network_of_its_own(slow, || {
        let server = Server::calm("--max-line 65536");
        (20..200).step_by(10).for_each(|pause| byte_after_a_long_line(server.connect(), 60_000, 0, pause, 0));
    });
}

/// The byte comes `pause` ms after this many bytes of the echo; the client reads `later` ms after that.
fn byte_after_a_long_line(mut client: Client, length: usize, begun: usize, pause: u64, later: u64) {
    let line = line_of(length);
    client.send(&line);
    client.wait_for_bytes(begun);
    thread::sleep(ms(pause));
    client.send("+");
    thread::sleep(ms(later));
    let echo = client.until_closed();
    assert!(echo == line.as_bytes(), "{} of {length} bytes, the other one after {pause} ms", echo.len());
}

/// A client that never closes is let go five seconds after its long echo, and gets all of it, whether it
/// takes it at once, late amid a flood of its own, or only once the server has let go.
#[test]
fn client_that_never_closes_is_let_go() {
    let server = Server::calm("--max-line 65536");
    let before = server.descriptors();
    let line = line_of(60_000);
    let mut clients = [(); 3].map(|()| server.connect_with_small_window());
    for client in &mut clients {
        client.send(&line);
        client.wait_for_bytes(1);
    }
    let [prompt, late, last] = &mut clients;
    prompt.send("+");
    prompt.expect(&line);
    let sent = Instant::now();
    while sent.elapsed() < ms(4000) {
        late.send([b'-'; 10_000]);
        thread::sleep(ms(1));
    }
    let open = server.descriptors();
    if sent.elapsed() > ms(4500) {
        return skip("this machine is too slow to look before the five seconds are over");
    }
    assert_eq!(open, before + 3, "some are let go early");
    late.expect(&line);
    eventually(ms(3000), "they are let go", || {
        let _ = late.0.write(&[b'-'; 10_000]);
        server.descriptors() == before
    });
    last.expect(&line);
}

// ------------------------------------------------------------------- hostile input

/// Whatever a line holds, it is echoed as it came, and shown so that it can do no harm: an event is one line,
/// and no client writes to the terminal. Blanks at its ends and a byte order mark before it are not shown.
#[test]
fn hostile_text_is_echoed_exactly_and_shown_harmlessly() {
    let (nul, shown_nul) = ("\0".repeat(2000) + "\n", r"\u{0}".repeat(2000));
    let cases: &[(&[u8], &str)] = &[
        (b"\x1b[2J\x1b]0;owned\x07\x1bP+q\x1b\\\n", r"\u{1b}[2J\u{1b}]0;owned\u{7}\u{1b}P+q\u{1b}\"),
        (b"fake\rReceived me from 127.0.0.1:1\r\n", r"fake\rReceived me from 127.0.0.1:1"),
        (nul.as_bytes(), &shown_nul),
        (b"a\tb\x0bc\x0cd\x7fe\0f C:\\new \\u{1b}\n", r"a\tb\u{b}c\u{c}d\u{7f}e\u{0}f C:\new \u{1b}"),
        ("csi \u{9b}31m nel \u{85}x \u{202e}b\n".as_bytes(), r"csi \u{9b}31m nel \u{85}x \u{202e}b"),
        ("\u{2066}d\u{200f}e\u{61c}f\n".as_bytes(), r"\u{2066}d\u{200f}e\u{61c}f"),
        ("one\u{2028}event\u{2029}\x1b\n".as_bytes(), r"one\u{2028}event\u{2029}\u{1b}"),
        (b"caf\xe9 \xff\xfe\xf0\x9f\x92x\n", "caf\u{fffd} \u{fffd}\u{fffd}\u{fffd}x"),
        (b"\xed\xa0\x80 \xc0\xaf\n", "\u{fffd}\u{fffd}\u{fffd} \u{fffd}\u{fffd}"),
        ("naïve ✓ 🦀 עברית \u{ffff}\u{10ffff}.\n".as_bytes(), "naïve ✓ 🦀 עברית \u{ffff}\u{10ffff}."),
        // Blanks at the ends are not shown, control characters or not, and no byte order mark at the start.
        ("\t\u{a0}foo\r\rbar \u{3000}\u{2028}\r\r\n".as_bytes(), r"foo\r\rbar"),
        ("\u{feff}foo\u{feff}bar\r\n".as_bytes(), "foo\u{feff}bar"),
        (b"\r\n", ""),
        ("\u{feff}\n".as_bytes(), ""),
        (" \u{feff} foo \n".as_bytes(), "foo"),
        ("\u{feff}\x1b[2J\n".as_bytes(), r"\u{1b}[2J"),
        (b"\xef\xbbno whole mark\n", "\u{fffd}no whole mark"),
        (b"no ending\r", "no ending"),
    ];
    for (line, on_screen) in cases {
        assert_eq!(shown(line), *on_screen, "the tests' own model");
        assert!(!on_screen.contains(is_hostile));
        let mut server = Server::calm("");
        let port = server.echo(line);
        server.stop().tells_of(on_screen, port);
    }
}

/// A line longer than `--max-line`, its ending included, gets a sentence on stderr that names the option, no
/// echo, no event and no memory, be it a byte longer or endless; the limit is 2048 bytes when none is given.
#[test]
fn longer_line_is_refused() {
    let (few, few_kept) = ("--max-line 16", "--max-line 16 --keep-open");
    for (limit, options) in [(16, few), (16, few_kept), (2048, ""), (2048, "--keep-open")] {
        let mut server = Server::calm(options);
        let longest = line_of(limit);
        let port = server.echo(&longest);
        let before = server.memory_kb();
        let (over, crlf) = (line_of(limit + 1), longest.replace('\n', "\r\n"));
        let (begun, endless) = ("x".repeat(limit + 1), "x".repeat(40_000_000));
        let messages = [over, crlf, begun, endless].map(|text| {
            let mut client = server.connect();
            let is_sent = client.0.write_all(text.as_bytes()).is_ok();
            assert_eq!(is_sent, text.len() <= limit + 1, "of {} bytes", text.len());
            assert_eq!(client.until_closed(), b"", "though it does not end its sending side");
            let who = format!("127.0.0.1:{}", client.port());
            format!("smolrx: line from {who} is longer than {limit} bytes; --max-line allows more")
        });
        let grown = server.memory_kb().saturating_sub(before);
        assert!(grown <= 64, "{grown} kB more");
        let exit = server.stop();
        assert_eq!(exit.stderr, messages, "{options:?}");
        exit.tells_of(longest.trim(), port);
    }
}

// ------------------------------------------------------------------- a full server

/// As many clients as `--max-conns` says are served at once, 512 without it; the others wait in the backlog
/// until one has left, are served in the order in which they came, and none is refused. Each gets its bytes.
#[test]
fn clients_beyond_the_limit_wait_and_are_served() {
    for (limit, options) in [(1, "--max-conns 1"), (512, "")] {
        let mut server = Server::calm(options);
        let before = server.descriptors();
        let mut served = server.clients(limit, "begun, ");
        let mut waiting = server.clients(100, "sent\n");
        eventually(PATIENCE, "all that may be are accepted", || server.descriptors() == before + limit);
        assert!(waiting[0].hears_nothing_for(ms(300)));
        let mut ends = |client: &mut Client| {
            client.send(format!("{}\n", client.port()));
            let line = format!("begun, {}", client.port());
            assert_eq!(String::from_utf8(client.rest()).unwrap(), format!("{line}\n"));
            conversation(&line, client.port())
        };
        let mut expected = ends(&mut served[0]).to_vec();
        for client in &mut waiting {
            assert_eq!(client.rest(), b"sent\n", "a client beyond the limit is served");
            expected.extend(conversation("sent", client.port()));
        }
        expected.extend(served[1..].iter_mut().flat_map(&mut ends));
        expected.push(expected[expected.len() - 2].replace("Send: ", "Observing "));
        let exit = server.stop();
        assert!(exit.stdout[1..] == expected, "not in their order, {options:?}: {exit:?}");
    }
}

/// Without descriptors the server waits, does not spin, warns once a second at most, and serves all later.
#[test]
fn server_out_of_descriptors_waits_and_goes_on() {
    let mut server = Server::start_after("ulimit -n 64", &calm(""));
    let mut clients = server.clients(100, "");
    server.stderr.wait_for_count(1);
    assert!(server.descriptors() > 50, "the limit is 64, and only {} are open", server.descriptors());
    let (start, warnings) = (Instant::now(), server.stderr.lines().len());
    let busy = server.busy_during(ms(3000));
    let (seconds, warnings) = (start.elapsed().as_secs() as usize, server.stderr.lines().len() - warnings);
    assert!(warnings <= seconds + 1, "{warnings} warnings in {seconds} s: {:?}", server.stderr);
    assert!(busy < ms(150), "busy for {busy:?} of three seconds");
    clients.iter_mut().for_each(|client| client.send("foo\n"));
    clients.iter_mut().for_each(|client| assert_eq!(client.rest(), b"foo\n"));
    let exit = server.stop();
    assert!(exit.stderr.iter().all(|line| line.starts_with("smolrx: cannot accept: ")), "{:?}", exit.stderr);
}

// --------------------------------------------------------------------------- memory

/// With the default options the server has held no more than it may; it gives none back to the system.
#[track_caller]
fn assert_memory_is_bounded(server: &Server) {
    let memory = server.memory_kb();
    assert!(memory <= 4096, "{memory} kB");
}

/// Unfinished lines of many lengths, lines of DEL, which are shown six times as long, and HTTP requests whose
/// first line is long, and behind which more comes, take bounded memory.
#[test]
fn texts_of_many_lengths_take_bounded_memory() {
    let server = Server::calm("");
    let lengths = (1..=12).map(|twelfths| 1948 * twelfths / 12).chain([10_000, 30_000, 65_436]);
    let unfinished = lengths.map(|length| ("x".repeat(length), 1020));
    let lines_of_del = [2047, 65_535].map(|length| ("\x7f".repeat(length) + "\n", 12));
    let request = format!("GET{}/ HTTP/1.1\n{}", " ".repeat(2034), "x".repeat(2031));
    for (text, count) in unfinished.chain(lines_of_del).chain([(request, 512)]) {
        let mut clients = server.clients(count, "");
        // Text that is too long is refused, perhaps before all of it is sent.
        clients.iter_mut().for_each(|client| _ = client.0.write_all(text.as_bytes()));
        server.comes_to_rest();
        assert_memory_is_bounded(&server);
        clients.into_iter().for_each(Client::reset);
    }
    server.echo("last\n");
}

/// Clients that hold the longest unfinished lines take bounded memory, no processor time, and nobody's turn.
#[test]
fn longest_unfinished_lines_take_bounded_memory_and_nobodys_time() {
    at_once([("", ""), ("--keep-open", &*line_of(2000))], |(options, line_before)| {
        let mut server = Server::calm(options);
        let mut holders = server.clients(511, &[line_before, &"h".repeat(2047)].concat());
        holders.iter_mut().for_each(|holder| holder.expect(line_before));
        server.comes_to_rest(); // all is taken
        for (length, parts) in [6, 300, 1000, 2000, 2048].into_iter().flat_map(|n| [(n, 1), (n, 2)]) {
            assert_echoed_within(ms(1000), server.address, length, length / parts);
        }
        assert_healthy(server.address.port());
        assert_memory_is_bounded(&server);
        let busy = server.busy_during(ms(3000));
        assert!(busy < ms(15), "busy for {busy:?} of three seconds");
        // A reset: after an orderly close, an unfinished line counts.
        holders.into_iter().for_each(Client::reset);
        server.echo("last\n");
        assert_eq!(observed(&server.stop().stdout), ["last"]);
    });
}

/// Hundreds of clients that send lines and take no echo take bounded memory, and nobody's turn.
#[test]
fn echoes_not_taken_take_bounded_memory_and_nobodys_time() {
    raise_descriptor_limit();
    let server = Server::calm("--keep-open");
    let sender = |_| Flood::new(server.connect_with_small_window(), false);
    let mut senders: Vec<Flood> = (0..400).map(sender).collect();
    let end = Instant::now() + ms(4000);
    while Instant::now() < end {
        senders.iter_mut().for_each(|sender| _ = sender.pump(true));
    }
    assert_echoed_within(ms(1000), server.address, 2000, 2000);
    assert_memory_is_bounded(&server);
}

/// Clients that come and leave without a word while nobody reads stdout take bounded memory.
#[test]
fn silent_clients_take_bounded_memory() {
    let server = Server::calm("--keep-open");
    server.stdout.pause();
    Flood::pump_until_stalled(&mut [Flood::new(server.connect(), true)], ms(300));
    let before = server.memory_kb();
    (0..4000).for_each(|_| _ = server.echo(""));
    let after = server.memory_kb();
    assert!(after < before + 80, "{before} kB before, {after} kB after");
}

/// Text that waits for its reader, six times as long as its bytes, takes bounded memory.
#[test]
fn text_that_waits_takes_bounded_memory() {
    let server = Server::calm("");
    let line = "\x7f".repeat(2047) + "\n";
    server.stdout.pause();
    let mut clients = server.clients(500, &line);
    assert!(clients[499].hears_nothing_for(ms(1000)));
    assert_healthy(server.address.port());
    assert_memory_is_bounded(&server);
    server.stdout.resume();
    assert!(clients.iter_mut().all(|client| client.rest() == line.as_bytes()), "an echo differs");
    assert_memory_is_bounded(&server);
}

// ------------------------------------------------- stdout and stderr that nobody reads

/// A line is served as soon as there is room for its text, beside a flood and a reader that takes 300 kB/s.
#[test]
fn lines_are_served_beside_a_slow_reader_of_stdout() {
    let (mut reader, writer) = io::pipe().unwrap();
    let server = Server::on_loopback(calm_on_loopback("--keep-open").stdout(writer));
    thread::spawn(move || {
        let mut chunk = [0; 16_384];
        while let Ok(length @ 1..) = reader.read(&mut chunk) {
            thread::sleep(Duration::from_secs_f64(length as f64 / 300_000.0));
        }
    });
    let _holders = server.clients(9, &"h".repeat(2000));
    beside_a_flood(server.address, 4, &line_of(101), || {
        for length in [6, 300, 1000, 1500, 2000].repeat(2) {
            // 128 KiB wait before it, for half a second; and the flood's lines beside it.
            assert_echoed_within(ms(3000), server.address, length, length);
        }
    });
}

/// Runs `check` for each kind of stdout that nobody reads (alone, with stderr on it, or made non-blocking by
/// whoever shares it), on a server that takes no more from its clients.
fn with_every_stalled_stdout(check: impl Fn(Server, [Flood; 4]) + Sync) {
    let blocking = OFlags::empty();
    let ways = [(false, blocking), (true, blocking), (false, OFlags::NONBLOCK)];
    let cases = ways.into_iter().flat_map(|way| outputs().map(|output| (output, way)));
    at_once(cases, |((_, reader, writer), (is_stderr_too, mode))| {
        let holder = writer.try_clone().unwrap();
        let mut command = calm_on_loopback("--keep-open --timeout 3000");
        if is_stderr_too {
            command.stderr(writer.try_clone().unwrap());
        }
        let mut server = Server::on_loopback(command.stdout(writer));
        drop(command);
        server.stdout = Transcript::of(reader);
        server.stdout.pause();
        fcntl_setfl(&holder, fcntl_getfl(&holder).unwrap() | mode).unwrap();
        let mut floods = [(); 4].map(|()| Flood::new(server.connect(), true));
        Flood::pump_until_stalled(&mut floods, ms(500));
        let echoed: usize = floods.iter().map(|flood| flood.echoed).sum();
        // Each prints more than twice its 100 bytes; 128 KiB are queued, and a pipe holds 64 KiB.
        assert!(echoed * 200 < 200 << 10, "{echoed} lines were echoed");
        assert_healthy(server.address.port());
        assert_eq!(fcntl_getfl(&holder).unwrap() & OFlags::NONBLOCK, mode, "whether it blocks others");
        drop(holder);
        check(server, floods);
    });
}

/// Reads stdout again, and looks for all that is echoed.
fn assert_complete(mut server: Server, mut floods: [Flood; 4], is_stopping: bool) {
    server.stdout.resume();
    Flood::complete(&mut floods);
    if !is_stopping {
        server.signal(Signal::TERM);
    }
    let exit = server.exited(PATIENCE);
    assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{:?}", exit.stderr);
    for flood in &floods {
        let (echoed, received) = (flood.echoed, received_from(&exit.stdout, flood.client.port()));
        assert!(received.len() >= echoed, "{echoed} lines echoed, {} received", received.len());
        assert!(is_stopping || echoed == flood.lines, "not all lines are echoed");
        (0..).zip(received).for_each(|(number, line)| assert_eq!(line, flood.line(number)));
    }
    let event = exit.stdout.last().unwrap();
    assert!(event.starts_with("Observing line "), "the last line is not observed, but: {event}");
}

/// A stdout that nobody reads, of whatever kind, holds up neither `--health` nor a second signal.
#[test]
fn second_signal_ends_it_beside_any_stalled_stdout() {
    with_every_stalled_stdout(|mut server, _floods| {
        server.signal_twice(Signal::TERM, Signal::TERM);
        assert_eq!(server.status(ms(1500)).code(), Some(143));
    });
}

/// Beside a stalled stdout few lines are echoed, no waiting client is cut off, no processor time is spent, and
/// no line is missing once somebody reads again.
#[test]
fn nothing_is_lost_beside_any_stalled_stdout() {
    with_every_stalled_stdout(|server, floods| {
        let busy = server.busy_during(ms(3500)); // longer than `--timeout`
        assert!(busy < ms(100), "busy for {busy:?} of 3.5 seconds");
        assert_complete(server, floods, false);
    });
}

/// A server that stops writes all that it owes, even if its stdout is read again only long after the grace.
#[test]
fn all_is_written_after_a_stop_beside_any_stalled_stdout() {
    with_every_stalled_stdout(|mut server, floods| {
        server.signal(Signal::TERM);
        server.wait_until_refused();
        thread::sleep(ms(7000));
        assert!(server.is_running(), "it has ended before its output was read");
        assert_complete(server, floods, true);
    });
}

/// The clock goes on beside a flood of lines, whether somebody reads stdout or nobody does.
#[test]
fn clock_goes_on_beside_a_flood_and_a_stalled_stdout() {
    for stalled in [false, true] {
        let server = Server::start("--interval 50 --keep-open");
        if stalled {
            server.stdout.pause();
        }
        let (start, mut flood) = (Instant::now(), [Flood::new(server.connect(), true)]);
        while start.elapsed() < ms(3000) {
            (0..100).for_each(|_| _ = flood[0].pump(true));
            thread::sleep(ms(1));
        }
        let due = start.elapsed().as_millis() / 50;
        server.stdout.resume();
        Flood::complete(&mut flood);
        let last = format!("Observing {}", flood[0].line(flood[0].lines - 1));
        let tick = server.stdout.wait_until("a tick behind the last line", |lines| {
            let place = lines.iter().rposition(|line| *line == last)?;
            observed(&lines[place + 1..]).first()?.parse::<u128>().ok()
        });
        assert!(tick >= due / 2, "the clock came to {tick} while {due} were due, stalled: {stalled}");
    }
}

/// Messages to a stderr that nobody reads, or that is closed, hold up neither clients nor the end, and take
/// little memory.
#[test]
fn stalled_or_closed_stderr_holds_nobody_up() {
    let (_, closed) = io::pipe().unwrap();
    let closed: Output = ("a closed pipe", Box::new(io::empty()), closed.into());
    at_once(outputs().into_iter().chain([closed]), |(kind, _reader, end)| {
        let mut server = Server::on_loopback(calm_on_loopback("--max-line 16").stderr(end));
        let memory = [3500, 2000].map(|messages| {
            for i in 0..messages {
                let mut client = server.connect();
                client.send("longer than sixteen bytes");
                assert!(!client.hears_nothing_for(ms(2000)), "{kind}: held up at message {i}");
            }
            server.memory_kb()
        });
        assert!(memory[1] <= memory[0] + 64, "{kind}: {memory:?} kB");
        assert_healthy(server.address.port());
        let signalled = Instant::now();
        server.stop();
        assert!(signalled.elapsed() < ms(2500), "{kind}: ended after {:?}", signalled.elapsed());
    });
}

/// A stdout file that may not grow any more ends the server with a message and code 1, not by a signal; what
/// was in it before stays there.
#[test]
fn stdout_at_its_size_limit_ends_it_with_a_message() {
    let path = scratch().join("log");
    let mut file = File::create(&path).unwrap();
    file.write_all(b"before\n").unwrap();
    let exit = run(after("ulimit -f 1", &program("--tcp-port 0 --interval 10")).stdout(file));
    assert_eq!((exit.code, exit.signal), (Some(1), None), "{exit:?}");
    assert_eq!(exit.stderr, ["smolrx: cannot write to stdout: no storage space (error 27)"]);
    let log = fs::read_to_string(&path).unwrap();
    assert!(log.len() >= 512 && log.starts_with("before\nServing on "), "{log}");
    assert!(log.contains("\nObserving 0\n"), "{log}");
}

// ------------------------------------------------------------------------- stopping

/// The process ends within six seconds of SIGTERM beside clients that send without a pause, and prints its
/// pending event.
#[test]
fn sigterm_ends_a_flood_of_lines() {
    for (clients, length) in [(4, 2001), (500, 1)] {
        let command = &mut calm_on_loopback("--keep-open");
        let command = if clients == 4 { command.arg("--quiet") } else { command.stdout(Stdio::null()) };
        let mut server = Server::on_loopback(command);
        let exit = beside_a_flood(server.address, clients, &line_of(length), || server.stop());
        let event = (clients == 4).then(|| line_of(length).trim().to_owned());
        assert_eq!(exit.stdout, Vec::from_iter(event), "{clients} clients with lines of {length} bytes");
        assert_eq!(exit.stderr, [""; 0]);
    }
}

/// The process ends within six seconds of SIGTERM whatever its clients hold, and however late they end their
/// lines. A client in the middle of a line gets five seconds, and its part of a line is no event.
#[test]
fn sigterm_ends_it_whatever_its_clients_hold() {
    let (echo, part) = (&*line_of(1_000_000), &*"x".repeat(2000));
    let cases = [
        ("echoes", "--keep-open --max-line 1000000", None, 4, 0, echo, ""),
        ("echoes of late lines", "", None, 500, 0, part, "\nmore"),
        ("connections", "--max-conns 2", None, 2, 98, "begun", "-"),
        ("descriptors, none for a client", "", Some(0), 0, 1, "", ""),
        ("descriptors, silently", "", Some(2), 2, 1, "", ""),
        ("descriptors, in their lines", "", Some(2), 2, 1, "begun", "-"),
    ];
    at_once(cases, |(what, options, descriptors, holders, others, text, late)| {
        raise_descriptor_limit();
        let mut server = Server::calm(options);
        descriptors.inspect(|count| server.limit_descriptors(*count));
        let connect = |_| server.connect_with_small_window();
        let mut clients: Vec<Client> = (0..holders + others).map(connect).collect();
        clients.iter_mut().for_each(|client| client.send(text));
        clients[..holders].last().inspect(|last| last.wait_until_taken());
        if descriptors.is_some() {
            server.stderr.wait_for_count(1); // the warning that it cannot accept
        }
        let signalled = server.ask_to_stop();
        if !late.is_empty() {
            thread::sleep(ms(4200));
            while server.is_running() && signalled.elapsed() < PATIENCE {
                clients[..holders].iter_mut().for_each(|client| _ = client.0.write(late.as_bytes()));
                thread::sleep(ms(100));
            }
        }
        let exit = server.stopped(signalled);
        let took = signalled.elapsed();
        assert!(late.is_empty() || took >= ms(4900), "{what}: ended {took:?} after the signal");
        let are_lines = text == echo || text == part;
        assert!(are_lines || exit.stdout[1..] == ["Observing 0"], "{what}: {exit:?}");
    });
}

/// A stop closes connections between two lines at once, silent ones after 250 ms, and refuses new ones.
#[test]
fn stop_closes_idle_connections() {
    let mut server = Server::calm("--keep-open");
    let (mut fresh, mut used) = (server.connect(), server.client_in("foo\n"));
    used.expect("foo\n");
    let signalled = server.ask_to_stop();
    assert_eq!((used.rest(), fresh.rest()), (vec![], vec![]));
    server.wait_until_refused();
    let exit = server.stopped(signalled);
    assert!(signalled.elapsed() < ms(1800), "after {:?}", signalled.elapsed());
    assert_eq!(exit.stdout.last().unwrap(), "Observing foo");
}

/// A line that comes up to 200 ms after the signal counts if its client had connected or was in the backlog.
#[test]
fn line_right_after_the_signal_is_echoed() {
    for pause in [1, 1, 1, 1, 1, 20, 100, 200] {
        let is_in_time = |_| {
            let mut server = Server::calm("");
            let connected = server.client_in("");
            server.suspend();
            let mut clients = [connected, server.connect()];
            let signalled = server.ask_to_stop();
            server.wake();
            thread::sleep(ms(pause));
            let sent = clients.each_mut().map(|client| client.0.write_all(b"foo\n").is_ok());
            // The machine may have been too slow.
            if signalled.elapsed() > ms(230) {
                return false;
            }
            for (client, is_sent) in clients.iter_mut().zip(sent) {
                assert!(is_sent && client.until_closed() == b"foo\n", "not echoed {pause} ms after it");
            }
            let exit = server.stopped(signalled);
            assert!(clients.iter().all(|client| received_from(&exit.stdout, client.port()) == ["foo"]));
            true
        };
        if !(0..20).any(is_in_time) {
            skip(format!("this machine is too slow for {pause} ms after the signal"));
        }
    }
}

/// A client in the middle of a line has five seconds to finish it, though nobody new is let in.
#[test]
fn stop_lets_a_line_be_finished() {
    let cases = [("", "ish\n", 0), ("--keep-open", "ish\n", 0), ("", "ish", 0), ("", "ish\n", 4000)];
    at_once(cases, |(options, rest, pause)| {
        let mut server = Server::calm(options);
        let mut client = server.client_in("fin");
        let signalled = server.ask_to_stop();
        server.wait_until_refused();
        thread::sleep(ms(pause).saturating_sub(signalled.elapsed()));
        client.send(rest);
        if !rest.ends_with('\n') {
            client.finish();
        }
        assert_eq!(client.rest(), format!("fin{rest}").as_bytes());
        let exit = server.stopped(signalled);
        assert!(signalled.elapsed() < ms(pause + 2500), "ended after {:?}", signalled.elapsed());
        exit.tells_of("finish", client.port());
    });
}

/// An echo that is under way when the signal comes arrives whole, though its client sends one byte more.
#[test]
fn stop_lets_an_echo_be_taken() {
    let kept = "--keep-open";
    for (options, length) in [("", 60_000), (kept, 60_000), ("", 1_000_000), (kept, 1_000_000)] {
        let line = line_of(length);
        let mut server = Server::calm(&format!("--max-line 6000000 {options}"));
        let mut client = server.connect_with_small_window();
        client.send(&line);
        client.wait_for_bytes(1);
        let signalled = server.ask_to_stop();
        server.wait_until_refused();
        client.send("+");
        assert!(client.until_closed() == line.as_bytes(), "{length} bytes: not whole with {options:?}");
        drop(client);
        let exit = server.stopped(signalled);
        assert!(observed(&exit.stdout) == [line.trim()]);
    }
}

/// Clients in the backlog when the signal comes are served like those who are connected.
#[test]
fn stop_serves_the_backlog() {
    at_once(["", "--keep-open"], |options| {
        let mut server = Server::calm(options);
        let mut early = server.client_in("ear");
        server.suspend();
        let mut clients = server.clients(200, "late\n");
        let mut silent = server.clients(10, "");
        let signalled = server.ask_to_stop();
        server.wake();
        clients.iter_mut().for_each(|client| assert_eq!(client.rest(), b"late\n"));
        silent.iter_mut().for_each(|client| assert_eq!(client.rest(), b""));
        server.wait_until_refused();
        early.send("ly\n");
        assert_eq!(early.rest(), b"early\n");
        let exit = server.stopped(signalled);
        for client in clients {
            assert_eq!(received_from(&exit.stdout, client.port()), ["late"]);
        }
        assert_eq!(exit.stdout.iter().filter(|line| *line == CLOSE).count(), 201);
        assert_eq!(observed(&exit.stdout), ["early"]);
    });
}

// --------------------------------------------------------------------------- health

/// A server whose connections are all taken is healthy, whatever address it listens on and is asked by, and a
/// probe leaves no trace there.
#[test]
fn full_server_is_healthy_at_any_address() {
    for bind in ["0.0.0.0", "127.0.0.1", "::", "::1"] {
        if bind.contains(':') && no_ipv6(&format!("--health of a server on {bind}")) {
            continue;
        }
        let mut server = Server::calm(&format!("--max-conns 2 --bind {bind}"));
        let before = server.descriptors();
        let idle = server.clients(3, "");
        eventually(PATIENCE, "it is full", || server.descriptors() == before + 2);
        for options in ["", &format!("--bind {bind}"), "--bind 0.0.0.0", "--bind 127.0.0.1"] {
            let exit = health(options, server.address.port());
            assert_eq!(exit.code, Some(0), "bound to {bind}, asked with {options}: {exit:?}");
        }
        drop(idle);
        let exit = server.stop();
        assert_eq!((&exit.stdout[1..], exit.stderr.len()), (&["Observing 0".into()][..], 0), "{bind}");
    }
}

/// A server whose name another process has warns of it. A probe asks that process, or the server by TCP once
/// it is gone, or if the sandbox forbids Unix sockets; one that does not answer is not healthy.
#[test]
fn probe_asks_whoever_has_the_name_or_else_by_tcp() {
    let (_socket, number) = reserve_port();
    let name = net::SocketAddr::from_abstract_name(format!("smolrx {number}")).unwrap();
    let mute = net::UnixDatagram::bind_addr(&name).unwrap();
    let mut server = Server::of(program(&calm(&format!("--tcp-port {number}"))));
    let (start, exit) = (Instant::now(), health("", number));
    assert_eq!(exit.stderr, ["smolrx: the server is not healthy: it does not answer"]);
    // It takes two seconds at most; a third is what a busy machine may take.
    assert!(exit.code == Some(1) && start.elapsed() < ms(3000), "after {:?}: {exit:?}", start.elapsed());
    for (call, error) in
        [("socket", "EAFNOSUPPORT"), ("bind", "EINVAL"), ("connect", "EACCES"), ("sendto", "EPERM")]
    {
        let Some(mut strace) = strace(&format!("{call}:error={error}:when=1")) else { break };
        strace.arg("-f");
        let exit = run(within(strace, &program(&format!("--health --tcp-port {number}"))));
        assert_eq!(exit.code, Some(0), "{call} fails with {error}: {exit:?}");
    }
    drop(mute);
    assert_healthy(number);
    let exit = server.stop();
    let warning = format!("smolrx: cannot answer --health for port {number}: address in use (error 98)");
    assert_eq!((&exit.stdout[1..], exit.stderr), (&["Observing 0".into()][..], vec![warning]));
}

/// A probe without options asks the first server in its network, wherever it listens; one with a port asks
/// the server there: full, hanging, killed, or started while the one before it serves its last client.
#[test]
fn probe_asks_the_first_server_or_the_one_on_its_port() {
    in_a_network_of_its_own("", || {
        let answers = || [run(program("--health")), health("", 9001), health("", 9002)].map(|exit| exit.code);
        // A TCP client would wait for it.
        let start_full = |port| {
            let server = Server::of(program(&calm(&format!("--tcp-port {port} --max-conns 1"))));
            let idle = server.client_in("");
            (server, idle)
        };
        assert_eq!(answers(), [Some(1); 3], "nobody is there");
        // Not a full one, whose backlog keeps its port until the client has left.
        let mut old = Server::of(program(&calm("--tcp-port 9001")));
        let mut client = old.client_in("half");
        let (other, _idle) = start_full(9002);
        assert_eq!(answers(), [Some(0); 3]);
        old.signal(Signal::TERM);
        old.wait_until_refused();
        assert_eq!(answers(), [Some(1), Some(1), Some(0)], "one is stopping");
        let (new, _idle) = start_full(9001);
        assert_eq!(answers(), [Some(0); 3]);
        new.suspend();
        assert_eq!(answers(), [Some(1), Some(1), Some(0)], "one hangs");
        new.wake();
        client.send("\n");
        assert_eq!(client.rest(), b"half\n");
        assert_eq!(old.exited(PATIENCE).code, Some(0));
        assert_eq!(answers(), [Some(0); 3]);
        drop(new);
        assert_eq!(answers(), [Some(1), Some(1), Some(0)], "one was killed");
        drop(other);
        assert_eq!(answers(), [Some(1); 3], "both were killed");
    });
}
