//! What an event is: lines and ticks in a burst, no clock, a byte order mark, and HTTP, which is none.

mod common;

use common::*;
use std::io::Write;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

// ------------------------------------------------------------- lines and ticks

/// A lone poke is observed, whenever it comes between two ticks of the clock: here the defaults, a hundred
/// times as fast.
#[test]
fn every_lone_poke_is_observed() {
    const SERVERS: usize = 8;
    const POKES: usize = 15;
    let interval = ms(600); // and 60 ms of debounce
    thread::scope(|scope| {
        for number in 0..SERVERS {
            scope.spawn(move || {
                let mut server = Server::start(&["--interval", "600"]);
                server.stdout.wait_for("Observing 0");
                // Each poke comes at a phase of its own, and two are never in one burst.
                let phase = interval / (SERVERS * POKES) as u32;
                let mut next = Instant::now() + phase * number as u32;
                for poke in 0..POKES {
                    thread::sleep(next.saturating_duration_since(Instant::now()));
                    server.echo(format!("poke {poke}\n"));
                    next += interval + phase * SERVERS as u32;
                }
                let exit = server.stop();
                let pokes: Vec<&str> =
                    observed(&exit.stdout).into_iter().filter(|event| event.starts_with("poke ")).collect();
                let all: Vec<String> = (0..POKES).map(|poke| format!("poke {poke}")).collect();
                assert_eq!(pokes, all, "server {number}: {:?}", exit.stdout);
            });
        }
    });
}

/// A tick within a burst does not replace the line, but prolongs the burst as any item does; the tick itself
/// is not observed. A line replaces a tick, and of several lines the last one counts.
#[test]
fn tick_in_a_burst_prolongs_it_and_no_more() {
    for lines in [&["poke\n"][..], &["early\n", "late\n", "poke\n"]] {
        let (mut server, observed_0) = (0..10)
            .find_map(|_| {
                let server = Server::start(&["--interval", "2000", "--debounce", "1200"]);
                // Ticks come at 0, 2000 and 4000 ms, and `Observing 0` at 1200.
                server.stdout.wait_for("Observing 0");
                let observed_0 = Instant::now();
                lines.iter().for_each(|line| _ = server.echo(line));
                // On a busy machine it may have taken longer, and proves nothing.
                (observed_0.elapsed() < ms(400)).then_some((server, observed_0))
            })
            .expect("three round trips that take less than 400 ms");
        server.stdout.wait_for("Observing poke");
        // Not at 2400, but at 2000 + 1200.
        let elapsed = observed_0.elapsed();
        assert!((ms(1900)..ms(2700)).contains(&elapsed), "observed after {elapsed:?}");
        assert_eq!(observed(&server.stdout.lines()), ["0", "poke"]);
        server.stop();
    }
}

/// A line within the burst of a tick takes its place, and the count goes on with the next tick.
#[test]
fn line_takes_the_place_of_a_tick() {
    let mut server = Server::start(&["--interval", "3000", "--debounce", "1000"]);
    server.echo("poke\n"); // in the burst of the tick at the start
    server.stdout.wait_for("Observing 1");
    let exit = server.stop();
    assert_eq!(observed(&exit.stdout)[..2], ["poke", "1"]);
}

/// Where nothing but ticks is in a burst, the last one is observed; and lines that look like ticks are lines.
#[test]
fn burst_of_ticks_is_its_last_unless_a_line_is_in_it() {
    for line in [None, Some("7"), Some("")] {
        let mut server = Server::start(&["--interval", "50", "--debounce", "100000"]);
        if let Some(line) = line {
            server.echo(format!("{line}\n"));
        }
        thread::sleep(ms(500));
        let exit = server.stop();
        let events = observed(&exit.stdout);
        assert_eq!(events.len(), 1, "{exit:?}");
        match line {
            Some(line) => assert_eq!(events, [line]),
            None => assert!(events[0].parse::<u64>().unwrap() >= 2, "{events:?}"),
        }
    }
}

/// With `--max-wait` a line among ticks that never pause is observed in time, and the next burst has none of
/// it.
#[test]
fn longest_wait_emits_the_line_among_ticks() {
    let mut server = Server::start(&["--interval", "50", "--debounce", "100000", "--max-wait", "1000"]);
    let sent = Instant::now();
    server.echo("poke\n");
    server.stdout.wait_for("Observing poke");
    assert!(sent.elapsed() < ms(2000), "after {:?}", sent.elapsed());
    server.stdout.wait_until("two ticks", |lines| (observed(lines).len() >= 3).then_some(()));
    let exit = server.stop();
    let (first, rest) = observed(&exit.stdout).split_first().map(|(a, b)| (*a, b.to_vec())).unwrap();
    assert_eq!(first, "poke");
    assert!(rest.iter().all(|event| event.parse::<u64>().is_ok()), "{rest:?}");
}

// ------------------------------------------------------------------- no clock

/// With `--interval 0` there is no clock: no event at the start, none later, and none at the end.
#[test]
fn no_clock_no_event() {
    for options in [
        &["--interval", "0"][..],
        &["--interval=0", "--debounce", "10"],
        &["--interval", "0", "--max-wait", "10"],
    ] {
        let mut server = Server::start(options);
        thread::sleep(ms(1500));
        let exit = server.stop();
        assert_eq!((exit.stdout.len(), exit.stderr.len()), (1, 0), "{options:?}: {exit:?}");
    }
}

/// Without a clock a burst ends after a second of silence, or after the `--debounce` that is given; its last
/// line is observed, once.
#[test]
fn debounce_without_a_clock() {
    for (options, least) in
        [(&["--interval", "0"][..], 1000), (&["--interval", "0", "--debounce", "200"], 200)]
    {
        let mut server = Server::start(options);
        server.echo("foo\n");
        let last = Instant::now();
        server.echo("bar\n");
        server.stdout.wait_for("Observing bar");
        let silence = last.elapsed();
        assert!((ms(least)..ms(least + 700)).contains(&silence), "{options:?}: after {silence:?}");
        let exit = server.stop();
        assert_eq!(observed(&exit.stdout), ["bar"], "{options:?}");
    }
}

/// Without a clock what is pending is observed at the end as well, and an idle server does nothing at all.
#[test]
fn end_without_a_clock() {
    let mut server = Server::start(&["--interval", "0", "--debounce", "600000"]);
    server.echo("foo\n");
    let mut before = server.activity();
    eventually(ms(5000), "it comes to rest", || {
        thread::sleep(ms(200));
        let earlier = std::mem::replace(&mut before, server.activity());
        earlier == before
    });
    assert_eq!(observed(&server.stop().stdout), ["foo"]);
}

// -------------------------------------------------------- a byte order mark

/// A byte order mark at the start of a line is stripped like white space in text and event, and kept in the
/// echo; elsewhere it is a character like any other.
#[test]
fn byte_order_mark_is_stripped_and_echoed() {
    let cases = [
        ("\u{feff}foo\n", "foo"),
        ("\u{feff}foo\r\n", "foo"),
        ("\u{feff} foo \n", "foo"),
        (" \u{feff}foo\n", "foo"),
        ("\u{feff}\n", ""),
        ("\u{feff}naïve\n", "naïve"),
        ("foo\u{feff}bar\n", "foo\u{feff}bar"),
        ("\u{feff}foo\u{feff}bar\n", "foo\u{feff}bar"),
        ("\u{feff}\u{1b}[2J\n", r"\u{1b}[2J"),
    ];
    for (line, shown) in cases {
        let mut server = Server::start(&CALM);
        let port = server.echo(line); // byte for byte
        let exit = server.stop();
        assert_eq!(exit.stdout[1..4], conversation(shown, port), "{line:?}");
        assert_eq!(observed(&exit.stdout), [shown], "{line:?}");
    }
    // Each line of a connection may have one: a script that starts anew for each line sends it.
    let mut server = Server::start(&calm(&["--keep-open"]));
    let port = server.echo("\u{feff}one\n\u{feff}two\n\u{feff}three");
    let exit = server.stop();
    assert_eq!(received_from(&exit.stdout, port), ["one", "two", "three"]);
}

/// What is no whole byte order mark, or that of UTF-16, is shown as the bytes that it is.
#[test]
fn other_marks_are_no_byte_order_marks() {
    for line in [&b"\xef\xbbfoo\n"[..], b"\xffoo\n", b"\xff\xfefoo\n", b"\xfe\xfffoo\n"] {
        let mut server = Server::start(&CALM);
        server.echo(line);
        let exit = server.stop();
        assert!(exit.stdout[4].starts_with("Observing \u{fffd}"), "{exit:?}");
        assert_eq!(observed(&exit.stdout), [shown(line)]);
    }
}

// ------------------------------------------------------------------------ HTTP

/// The message for a client that sent HTTP.
fn sent_http(port: u16) -> String {
    format!("smolrx: 127.0.0.1:{port} sent HTTP; send a line, for example by nc")
}

/// Whether this is a `400` that an HTTP client understands, with a text that says what to do.
#[track_caller]
fn is_bad_request(answer: &[u8]) {
    let answer = String::from_utf8_lossy(answer);
    assert!(answer.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{answer:?}");
    let (head, body) =
        answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no end of the head: {answer:?}"));
    assert!(head.lines().any(|line| line.eq_ignore_ascii_case("connection: close")), "{answer:?}");
    assert!(body.ends_with('\n') && body.contains("nc"), "{answer:?}");
    // Whoever counts must come to the same.
    let length = head
        .lines()
        .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ").map(String::from));
    assert!(length.is_none_or(|length| length == body.len().to_string()), "{answer:?}");
}

/// Servers of all kinds for whom HTTP is the same.
fn kinds() -> [Vec<&'static str>; 3] {
    [calm(&[]), calm(&["--keep-open"]), calm(&["--max-line", "100"])]
}

/// An HTTP request is no event: nothing is printed or echoed, the client gets a `400`, and a message on
/// stderr says who sent it and what to send instead.
#[test]
fn http_request_is_no_event() {
    let requests = [
        "GET / HTTP/1.1\r\nHost: localhost:8888\r\nUser-Agent: x\r\n\r\n",
        "GET / HTTP/1.0\r\n\r\n",
        "GET / HTTP/1.1\n\n",
        "GET / HTTP/1.1\r\n",
        "HEAD / HTTP/1.1\r\n\r\n",
        "OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "CONNECT example.com:443 HTTP/1.1\r\n\r\n",
        "PROPFIND /x HTTP/1.1\r\n\r\n",
        "X /%20?a=b#c HTTP/1.1\r\n\r\n",
        "GET http://localhost:8888/ HTTP/1.1\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\nfoo\n",
        "POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\none\ntwo\nthree\n",
    ];
    for options in kinds() {
        let mut server = Server::start(&options);
        let before = server.descriptors();
        let mut messages = vec![];
        for request in requests {
            for finishes in [false, true] {
                let mut client = server.connect();
                client.send(request);
                if finishes {
                    client.finish();
                }
                is_bad_request(&client.rest());
                messages.push(sent_http(client.port()));
                server.stderr.wait_for_count(messages.len());
            }
        }
        eventually(PATIENCE, "nothing is left of them", || server.descriptors() == before);
        let exit = server.stop();
        assert_eq!(exit.stderr, messages, "{options:?}");
        assert_eq!(exit.stdout[1..], ["Observing 0"], "{options:?}");
    }
}

/// A request line that comes in pieces, or ends with the connection instead of a newline, is one all the
/// same.
#[test]
fn http_request_in_pieces_is_no_event() {
    for options in kinds() {
        let mut server = Server::start(&options);
        let mut client = server.connect();
        for piece in ["G", "ET", " / HT", "TP/1.1", "\r", "\nHost: x\r\n\r\n"] {
            client.send(piece);
            if !piece.ends_with('\n') {
                client.is_taken();
            }
        }
        is_bad_request(&client.rest());
        let mut unended = server.connect();
        unended.send("GET / HTTP/1.1");
        unended.finish();
        is_bad_request(&unended.rest());
        server.stderr.wait_for_count(2);
        let exit = server.stop();
        assert_eq!(exit.stderr, [sent_http(client.port()), sent_http(unended.port())]);
        assert_eq!(exit.stdout[1..], ["Observing 0"]);
    }
}

/// The answer arrives whole although the body of the request is long, of one write, and read by nobody.
#[test]
fn answer_arrives_whole_beside_a_large_body() {
    for options in kinds() {
        for size in [100, 5_000, 100_000, 3_000_000] {
            let mut server = Server::start(&options);
            for _ in 0..5 {
                let mut client = server.connect();
                let head = format!("POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n");
                let body: String = ["a line of the body\n"].repeat(size / 19 + 1).concat();
                let request = [head.as_bytes(), &body.as_bytes()[..size]].concat();
                // The server may close its end while this is under way, as it is tired of it; not before the
                // answer.
                let mut writer = client.0.try_clone().unwrap();
                let sender = thread::spawn(move || writer.write_all(&request));
                is_bad_request(&client.rest());
                sender.join().unwrap().expect("the body is taken, as what comes is read and passed over");
            }
            let exit = server.stop();
            assert_eq!(exit.stderr.len(), 5, "{exit:?}");
            assert_eq!(exit.stdout[1..], ["Observing 0"], "{options:?}, a body of {size}");
        }
    }
}

/// With `--keep-open` the lines before a request are served, and nothing behind it is.
#[test]
fn lines_before_http_are_served() {
    for at_once in [true, false] {
        let mut server = Server::start(&calm(&["--keep-open"]));
        let mut client = server.connect();
        let (lines, request) = ("one\ntwo\n", "POST / HTTP/1.1\r\n\r\nthree\n");
        if at_once {
            client.send([lines, request].concat());
        } else {
            client.send(lines);
            client.is_taken();
            client.send(request);
        }
        client.expect(lines);
        is_bad_request(&client.rest());
        server.stderr.wait_for(&sent_http(client.port()));
        let exit = server.stop();
        assert_eq!(received_from(&exit.stdout, client.port()), ["one", "two"]);
        assert_eq!(observed(&exit.stdout), ["two"]);
    }
    // Without it a connection is its first line, whatever comes behind.
    let mut server = Server::start(&CALM);
    assert!(server.echo_of_the_first("one\nGET / HTTP/1.1\r\n\r\n") == b"one\n");
    let exit = server.stop();
    assert_eq!((observed(&exit.stdout), exit.stderr.len()), (vec!["one"], 0));
}

trait EchoOfTheFirst {
    fn echo_of_the_first(&self, bytes: &str) -> Vec<u8>;
}

impl EchoOfTheFirst for Server {
    /// Sends these bytes on a connection of their own, and returns all that comes back.
    fn echo_of_the_first(&self, bytes: &str) -> Vec<u8> {
        let mut client = self.connect();
        client.send(bytes);
        client.rest()
    }
}

/// What is almost an HTTP request line is a line like any other: it is echoed, printed and observed.
#[test]
fn what_is_almost_http_is_a_line() {
    let lines = [
        "get / HTTP/1.1",
        "Get / HTTP/1.1",
        "GET /",
        "GET",
        "GET HTTP/1.1",
        "HTTP/1.1",
        "/ HTTP/1.1",
        "GET / HTTP/2.0",
        "GET / HTTP/2",
        "GET / HTTP/0.9",
        "GET / HTTP/1.2",
        "GET / HTTP/1.10",
        "GET / HTTP/1.",
        "GET / http/1.1",
        "GET / HTTP/1.1 x",
        "GET / x HTTP/1.1",
        "GET /HTTP/1.1",
        "G3T / HTTP/1.1",
        "GET: / HTTP/1.1",
        "GÉT / HTTP/1.1",
        "\"GET / HTTP/1.1\"",
        "HTTP/1.1 200 OK",
        "HTTP/1.1 400 Bad Request",
        "PROXY TCP4 192.0.2.1 192.0.2.2 5555 8888",
        "deploy main HTTP/1.1",
        "I SAID HTTP/1.1 twice",
    ];
    for options in [calm(&[]), calm(&["--keep-open"])] {
        let mut server = Server::start(&options);
        for line in lines {
            let port = server.echo(format!("{line}\r\n"));
            server.stdout.wait_until(line, |lines| (received_from(lines, port) == [line]).then_some(()));
        }
        let exit = server.stop();
        assert_eq!(exit.stderr, [""; 0], "{options:?}");
        assert_eq!(observed(&exit.stdout), [lines[lines.len() - 1]]);
    }
}

/// curl says that it was a bad request and what to do, for a GET and for a POST of any size, and so do its
/// exit codes; over `telnet://` it pokes.
#[test]
fn curl_says_something() {
    let curl = |arguments: &[&str], input: &str| {
        let mut command = Command::new("curl");
        command.args(["-sS", "--noproxy", "*", "--max-time", "20"]).args(arguments);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // Dropped, it is closed. A curl that has ended takes no more.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let output = child.wait_with_output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    if let Err(error) = Command::new("curl").arg("--version").output() {
        return skip(format!("no curl: {error}"));
    }
    let scratch = Scratch::new();
    let file = scratch.file("body");
    std::fs::write(&file, "a line\n".repeat(300_000)).unwrap();
    let upload = format!("@{}", file.display());
    for options in kinds() {
        let mut server = Server::start(&options);
        let http = format!("http://{}/", server.loopback());
        let status = ["-w", "%{http_code}"];
        let requests: [&[&str]; 4] = [
            &[&http],
            &["--http1.0", &http],
            &["-d", "foo", &http],
            &["-H", "Expect:", "--data-binary", &upload, &http],
        ];
        for request in requests {
            let (code, text, error) = curl(&[request, &status].concat(), "");
            assert_eq!(code, Some(0), "{request:?}: {text} {error}");
            assert!(text.contains("nc") && text.ends_with("\n400"), "{request:?}: {text}");
            let (code, text, error) = curl(&[request, &["--fail"]].concat(), "");
            assert_eq!(code, Some(22), "{request:?}: {text} {error}");
        }
        let (_, text, error) =
            curl(&[&format!("telnet://{}", server.loopback()), "--max-time", "2"], "foo\n");
        assert_eq!(text, "foo\n", "{error}");
        let exit = server.stop();
        assert_eq!(exit.stderr.len(), 2 * requests.len(), "{exit:?}");
        assert_eq!(observed(&exit.stdout), ["foo"], "{options:?}");
    }
}

/// A flood of requests beside a client that pokes costs it nothing, and takes no memory that stays.
#[test]
fn flood_of_http_holds_nobody_up() {
    let mut server = Server::start(&calm(&["--keep-open"]));
    let mut client = server.connect();
    client.send("here\n");
    client.expect("here\n");
    let before = server.descriptors();
    let slowest = thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..100 {
                    is_bad_request(&server.echo_of_the_first("POST / HTTP/1.1\r\n\r\nbody\n"));
                }
            });
        }
        (0..100).fold(Duration::ZERO, |slowest, i| {
            let sent = Instant::now();
            client.send(format!("poke {i}\n"));
            client.expect(format!("poke {i}\n"));
            slowest.max(sent.elapsed())
        })
    });
    assert!(slowest < ms(1000), "a poke took {slowest:?}");
    eventually(PATIENCE, "nothing is left of them", || server.descriptors() == before);
    drop(client);
    let exit = server.stop();
    assert_eq!(exit.stderr.len(), 400);
    assert_eq!(observed(&exit.stdout), ["poke 99"]);
}
