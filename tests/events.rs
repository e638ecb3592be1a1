//! What an event is: lines and ticks in a burst, no clock, and HTTP, which is none.

mod common;

use common::*;
use rustix::net::sockopt;
use std::process::Command;
use std::thread;
use std::time::Instant;

// ------------------------------------------------------------- lines and ticks

/// A lone poke is observed, wherever between two ticks it comes: here the defaults, a hundred times as fast.
#[test]
fn every_lone_poke_is_observed() {
    const SERVERS: u32 = 20;
    const POKES: u32 = 6;
    let interval = ms(600); // and 60 ms of debounce
    let phase = interval / (SERVERS * POKES);
    at_once(0..SERVERS, |number| {
        let mut server = Server::start("--interval 600");
        server.stdout.wait_for("Observing 0");
        let start = Instant::now();
        for poke in 0..POKES {
            // Each at a phase of its own.
            let due = start + interval * poke + phase * (SERVERS * poke + number);
            thread::sleep(due.saturating_duration_since(Instant::now()));
            server.echo(format!("poke {poke}\n"));
            server.stdout.wait_for(&format!("Observing poke {poke}"));
        }
        let exit = server.stop();
        let pokes = observed(&exit.stdout).into_iter().filter(|event| event.starts_with("poke "));
        assert_eq!(pokes.count(), POKES as usize, "server {number}: {:?}", exit.stdout);
    });
}

/// Ticks prolong a burst as lines do. With a line in it, be it empty or a number, the burst is that line, and
/// no tick; without one it is its last tick.
#[test]
fn burst_of_ticks_is_its_last_unless_a_line_is_in_it() {
    let servers = [None, Some("7"), Some("")].map(|line| {
        let server = Server::start("--interval 50 --debounce 2000");
        line.inspect(|line| _ = server.echo(format!("{line}\n")));
        (line, server)
    });
    thread::sleep(ms(3500));
    for (line, mut server) in servers {
        assert_eq!(observed(&server.stdout.lines()), [""; 0], "the burst of {line:?} is still going on");
        let exit = server.stop();
        let [event] = observed(&exit.stdout)[..] else { panic!("not one event: {exit:?}") };
        match line {
            Some(line) => assert_eq!(event, line),
            None => assert!(event.parse::<u64>().unwrap() >= 2, "{event}"),
        }
    }
}

/// With `--max-wait` a line among ticks that never pause is observed in time, and then the ticks are again.
#[test]
fn longest_wait_emits_the_line_among_ticks() {
    let server = Server::start("--interval 50 --debounce 100000 --max-wait 1000");
    server.echo("poke\n");
    // The line's burst is usually the first. A burst has 20 ticks; fewer on a busy machine.
    let (poke, tick) = server.stdout.wait_until("a tick behind the line", |lines| {
        let events = observed(lines);
        let poke = events.iter().position(|event| *event == "poke")?;
        Some((poke, events.get(poke + 1)?.parse::<usize>().expect("a tick")))
    });
    assert!(tick <= 25 * (poke + 2), "tick {tick} ends burst {}", poke + 2);
}

/// `--debounce`, by default a tenth of the interval or without a clock a second, is the silence that ends a
/// burst. The burst's last line is observed, once; so is what is pending at a stop.
#[test]
fn debounce_is_the_silence_that_ends_a_burst() {
    let cases: [(_, _, &[_]); 5] = [
        ("--interval 0", 1000, &[]),
        ("--interval 9000", 900, &["0"]),
        ("--interval 0 --debounce 500", 500, &[]),
        ("--interval 600000 --debounce 1000", 1000, &["0"]),
        ("--interval 9000 --debounce 1500", 1500, &["0"]),
    ];
    // Panics if it is wrong; false if the machine was too slow to prove it.
    let is_proven = |options, debounce, ticks: &[_]| {
        let started = Instant::now();
        let mut server = Server::start(options);
        for tick in ticks {
            server.stdout.wait_for(&format!("Observing {tick}"));
            assert!(started.elapsed() >= ms(debounce), "the tick after {:?}", started.elapsed());
        }
        let begun = Instant::now();
        for line in ["a\n", "b\n", "c\n", "d\n"] {
            server.echo(line);
            thread::sleep(ms(debounce / 10)); // together less than half of a debounce
        }
        let sent = Instant::now();
        server.echo("foo\n");
        let burst = begun.elapsed();
        server.stdout.wait_for("Observing foo");
        let silence = sent.elapsed();
        assert!(silence >= ms(debounce), "{options:?}: after {silence:?}");
        server.echo("pending\n");
        let exit = server.stop();
        let is_quick = burst < ms(debounce) && silence < ms(debounce + 700);
        if is_quick {
            assert_eq!(observed(&exit.stdout), [ticks, &["foo", "pending"]].concat(), "{options:?}");
        }
        is_quick
    };
    at_once(cases, |(options, debounce, ticks)| {
        assert!((0..5).any(|_| is_proven(options, debounce, ticks)), "{options}");
    });
}

/// With `--interval 0` there is no clock: no event at the start, none later, and none at the end.
#[test]
fn no_clock_no_event() {
    let cases = ["--interval 0", "--interval=0 --debounce 10", "--interval=0 --max-wait 10"];
    at_once(cases, |options| {
        let mut server = Server::start(options);
        thread::sleep(ms(1500));
        let exit = server.stop();
        assert_eq!((exit.stdout.len(), exit.stderr.len()), (1, 0), "{options}: {exit:?}");
    });
}

// ------------------------------------------------------------------------ HTTP

/// Servers of all kinds, by their options: HTTP is the same for each.
const KINDS: [&str; 3] = ["", "--keep-open", "--max-line 100"];

/// An HTTP request is no event, even in pieces, or ended by the connection instead of a newline: nothing is
/// printed or echoed, and a message on stderr says who sent it and what to send. The client gets a `400`,
/// even if it first sends a large body.
#[test]
fn http_request_is_no_event() {
    let lines = "GET / HTTP/1.1|GET / HTTP/1.0|HEAD / HTTP/1.1|OPTIONS * HTTP/1.1|\
        CONNECT example.com:443 HTTP/1.1|PROPFIND /x HTTP/1.1|X /%20?a=b#c HTTP/1.1|GET http://localhost:8888/ HTTP/1.1";
    // What follows, and where the line is cut.
    let requests = [("", 0), ("", 2), ("\n\n", 0), ("\r\n", 12), ("\r\nHost: x\r\n\r\n", 0)];
    let body = String::from("\r\n\r\n") + &"of a body\n".repeat(100_000);
    for options in KINDS {
        let mut server = Server::calm(options);
        let before = server.descriptors();
        let mut messages = vec![];
        let small = lines.split('|').flat_map(|line| requests.map(|request| (line, request)));
        for (line, (rest, cut)) in small.chain([("POST / HTTP/1.1", (&*body, 0))]) {
            for finishes in [rest.is_empty(), true] {
                let (start, end) = line.split_at(cut);
                let mut client = if cut > 0 { server.client_in(start) } else { server.connect() };
                // With so little room, all of a large body goes only if the server takes it.
                sockopt::set_socket_send_buffer_size(&client.0, 64 << 10).unwrap();
                client.send([end, rest].concat());
                if finishes {
                    client.finish();
                }
                assert_eq!(client.rest(), BAD_REQUEST, "to {line:?} {rest:.20}");
                let port = client.port();
                messages.push(format!("smolrx: 127.0.0.1:{port} sent HTTP; send a line, for example by nc"));
                server.stderr.wait_for_count(messages.len());
            }
        }
        eventually(PATIENCE, "nothing is left of them", || server.descriptors() == before);
        let exit = server.stop();
        assert_eq!(exit.stderr, messages, "{options:?}");
        assert_eq!(exit.stdout[1..], ["Observing 0"], "{options:?}");
    }
}

/// What is almost an HTTP request line is a line like any other: it is echoed, printed and observed.
#[test]
fn what_is_almost_http_is_a_line() {
    let lines = "get / HTTP/1.1|Get / HTTP/1.1|GET /|GET|GET HTTP/1.1|HTTP/1.1|/ HTTP/1.1|GET / HTTP/2.0|\
        GET / HTTP/2|GET / HTTP/0.9|GET / HTTP/1.2|GET / HTTP/1.10|GET / HTTP/1.|GET / http/1.1|\
        GET / HTTP/1.1 x|GET / x HTTP/1.1|GET /HTTP/1.1|G3T / HTTP/1.1|GET: / HTTP/1.1|GÉT / HTTP/1.1|\
        \"GET / HTTP/1.1\"|HTTP/1.1 200 OK|HTTP/1.1 400 Bad Request|\
        PROXY TCP4 192.0.2.1 192.0.2.2 5555 8888|deploy main HTTP/1.1|I SAID HTTP/1.1 twice";
    for options in &KINDS[..2] {
        let mut server = Server::calm(options);
        for line in lines.split('|') {
            let port = server.echo(format!("{line}\r\n"));
            server.stdout.wait_for(&conversation(line, port)[0]);
        }
        let exit = server.stop();
        assert_eq!(exit.stderr, [""; 0], "{options:?}");
        assert_eq!(observed(&exit.stdout), ["I SAID HTTP/1.1 twice"]);
    }
}

/// curl says what to send, for a GET and for a POST of any size, fails with `--fail-with-body`, and pokes by
/// `telnet://`.
#[test]
fn curl_says_what_to_send() {
    if let Some(reason) = refusal(Command::new("curl").arg("--version")) {
        return skip(format!("no curl: {reason}"));
    }
    let curl = |input: &str, arguments: String| {
        let command = format!("{input} | curl -s --noproxy '*' --max-time 20 {arguments}; echo $?");
        String::from_utf8(Command::new("sh").args(["-c", &command]).output().unwrap().stdout).unwrap()
    };
    let requests = ["", "--http1.0", "-d foo", "-H Expect: --data-binary @-", "--fail-with-body"];
    for options in KINDS {
        let mut server = Server::calm(options);
        let address = server.address;
        for request in requests {
            let status = if request == "--fail-with-body" { 22 } else { 0 };
            let arguments = format!("{request} -w '%{{http_code}} ' http://{address}/");
            let said = curl("head -c 2100000 /dev/zero", arguments);
            assert_eq!(said, format!("send a line, for example by nc\n400 {status}\n"), "{request}");
        }
        let said = curl("echo foo", format!("--max-time 2 telnet://{address}"));
        assert!(said.starts_with("foo\n"), "{said}");
        let exit = server.stop();
        assert_eq!(exit.stderr.len(), requests.len(), "{exit:?}");
        assert_eq!(observed(&exit.stdout), ["foo"], "{options:?}");
    }
}
