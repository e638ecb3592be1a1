//! What an event is: lines and ticks in a burst, no clock, blanks, byte order marks, and HTTP, which is none.

mod common;

use common::*;
use std::fs::{self, File};
use std::io::Write;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

// ------------------------------------------------------------- lines and ticks

/// A lone poke is observed, whenever it comes between two ticks of the clock: here the defaults, a hundred
/// times as fast.
#[test]
fn every_lone_poke_is_observed() {
    const SERVERS: usize = 20;
    const POKES: usize = 6;
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

/// A tick within a burst does not replace its last line, but prolongs the burst as any item does; the tick
/// itself is not observed.
#[test]
fn tick_in_a_burst_prolongs_it_and_no_more() {
    let (server, observed_0) = (0..10)
        .find_map(|_| {
            let server = Server::start(&["--interval", "2000", "--debounce", "1200"]);
            // Ticks come at 0, 2000 and 4000 ms, and `Observing 0` at 1200.
            server.stdout.wait_for("Observing 0");
            let observed_0 = Instant::now();
            let _ = ["early\n", "late\n", "poke\n"].map(|line| server.echo(line));
            // On a busy machine it may have taken longer, and proves nothing.
            (observed_0.elapsed() < ms(400)).then_some((server, observed_0))
        })
        .expect("three round trips that take less than 400 ms");
    server.stdout.wait_for("Observing poke");
    // Not at 2400, but at 2000 + 1200.
    let elapsed = observed_0.elapsed();
    assert!((ms(1900)..ms(2700)).contains(&elapsed), "observed after {elapsed:?}");
    assert_eq!(observed(&server.stdout.lines()), ["0", "poke"]);
}

/// A line within the burst of a tick takes its place, and the count goes on with the next tick.
#[test]
fn line_takes_the_place_of_a_tick() {
    let server = Server::start(&["--interval", "3000", "--debounce", "1000"]);
    server.echo("poke\n"); // in the burst of the tick at the start
    server.stdout.wait_for("Observing 1");
    assert_eq!(observed(&server.stdout.lines()), ["poke", "1"]);
}

/// Where nothing but ticks is in a burst, the last one is observed; and lines that look like ticks are lines.
#[test]
fn burst_of_ticks_is_its_last_unless_a_line_is_in_it() {
    for line in [None, Some("7"), Some("")] {
        let mut server = Server::start(&["--interval", "50", "--debounce", "100000"]);
        line.inspect(|line| _ = server.echo(format!("{line}\n")));
        thread::sleep(ms(500));
        let exit = server.stop();
        match (line, &observed(&exit.stdout)[..]) {
            (Some(line), events) => assert_eq!(events, [line]),
            (None, [tick]) => assert!(tick.parse::<u64>().unwrap() >= 2, "{tick}"),
            (None, events) => panic!("{events:?}"),
        }
    }
}

/// With `--max-wait` a line among ticks that never pause is observed in time, and the next burst has none of
/// it.
#[test]
fn longest_wait_emits_the_line_among_ticks() {
    let server = Server::start(&["--interval", "50", "--debounce", "100000", "--max-wait", "1000"]);
    let sent = Instant::now();
    server.echo("poke\n");
    server.stdout.wait_for("Observing poke");
    assert!(sent.elapsed() < ms(2000), "after {:?}", sent.elapsed());
    server.stdout.wait_until("two ticks", |lines| (observed(lines).len() >= 3).then_some(()));
    let lines = server.stdout.lines();
    let [first, ticks @ ..] = &observed(&lines)[..] else { unreachable!() };
    assert_eq!(*first, "poke");
    assert!(ticks.iter().all(|event| event.parse::<u64>().is_ok()), "{ticks:?}");
}

/// A client that pokes more often than `--debounce` holds back every event, unless there is a `--max-wait`;
/// then events come in time, and no more often than asked for.
#[test]
fn steady_pokes_hold_back_events_only_without_a_longest_wait() {
    let pokes = |longest_wait: &[_]| {
        // The debounce, a tenth, is long, lest a busy machine makes a pause that ends the burst.
        let options = ["--interval", "10000", "--keep-open"];
        let server = Server::start(&[&options, longest_wait].concat());
        let mut client = server.connect();
        let started = Instant::now();
        while started.elapsed() < ms(5000) {
            client.send("poke\n");
            thread::sleep(ms(50));
        }
        (observed(&server.stdout.lines()).len(), started.elapsed())
    };
    thread::scope(|scope| {
        let without = scope.spawn(|| pokes(&[]));
        let (events, time) = pokes(&["--max-wait", "500"]);
        assert_eq!(without.join().unwrap().0, 0, "events without a longest wait");
        let most = time.as_millis() as usize / 500 + 1;
        assert!((5..=most).contains(&events), "{events} events in {time:?}");
    });
}

/// `--debounce`, without a clock a second if it is not given, is the silence that ends a burst, be it longer
/// than a tenth of the interval or shorter; the last line is observed, once, and what is pending at the end.
#[test]
fn debounce_is_the_silence_that_ends_a_burst() {
    let cases: [(&[&str], _, &[&str]); 4] = [
        (&["--interval", "0"], 1000, &[]),
        (&["--interval", "0", "--debounce", "500"], 500, &[]),
        (&["--interval", "600000", "--debounce", "1000"], 1000, &["0"]),
        (&["--interval", "9000", "--debounce", "1500"], 1500, &["0"]),
    ];
    let burst = |options, debounce, ticks: &[_]| {
        let started = Instant::now();
        let mut server = Server::start(options);
        for tick in ticks {
            server.stdout.wait_for(&format!("Observing {tick}"));
            assert!(started.elapsed() >= ms(debounce), "the tick after {:?}", started.elapsed());
        }
        let mut last = Instant::now();
        for line in ["a\n", "b\n", "c\n", "d\n", "foo\n"] {
            thread::sleep(ms(debounce / 10)); // together half of a debounce
            last = Instant::now();
            server.echo(line);
        }
        server.stdout.wait_for("Observing foo");
        let silence = last.elapsed();
        assert!((ms(debounce)..ms(debounce + 700)).contains(&silence), "{options:?}: after {silence:?}");
        server.echo("pending\n");
        let exit = server.stop();
        assert_eq!(observed(&exit.stdout), [ticks, &["foo", "pending"]].concat(), "{options:?}");
    };
    thread::scope(|scope| {
        for (options, debounce, ticks) in cases {
            scope.spawn(move || burst(options, debounce, ticks));
        }
    });
}

/// With `--interval 0` there is no clock: no event at the start, none later, and none at the end.
#[test]
fn no_clock_no_event() {
    let cases: [&[&str]; 3] =
        [&["--interval", "0"], &["--interval=0", "--debounce", "10"], &["--interval=0", "--max-wait", "10"]];
    let mut servers = cases.map(Server::start);
    thread::sleep(ms(1500));
    for (server, options) in servers.iter_mut().zip(cases) {
        let exit = server.stop();
        assert_eq!((exit.stdout.len(), exit.stderr.len()), (1, 0), "{options:?}: {exit:?}");
    }
}

// ------------------------------------------------------------------- one line

/// A line comes back byte for byte, and is shown and observed without the blanks and the byte order mark
/// before it; what is no whole mark, or that of UTF-16, is shown as the bytes that it is.
#[test]
fn byte_order_mark_is_stripped_and_echoed() {
    let cases: [(&[u8], &str); 15] = [
        (b"\n", ""),
        (b"\r\n", ""),
        (b"\xef\xbb\xbffoo\n", "foo"),
        (b"\xef\xbb\xbffoo\r\n", "foo"),
        (b"\xef\xbb\xbf foo \n", "foo"),
        (b" \xef\xbb\xbffoo\n", "foo"),
        (b"\xef\xbb\xbf\n", ""),
        ("\u{feff}naïve\n".as_bytes(), "naïve"),
        (b"foo\xef\xbb\xbfbar\n", "foo\u{feff}bar"),
        (b"\xef\xbb\xbffoo\xef\xbb\xbfbar\n", "foo\u{feff}bar"),
        (b"\xef\xbb\xbf\x1b[2J\n", r"\u{1b}[2J"),
        (b"\xef\xbbfoo\n", "\u{fffd}foo"),
        (b"\xffoo\n", "\u{fffd}oo"),
        (b"\xff\xfefoo\n", "\u{fffd}\u{fffd}foo"),
        (b"\xfe\xfffoo\n", "\u{fffd}\u{fffd}foo"),
    ];
    for (line, shown) in cases {
        let mut server = Server::start(&CALM);
        let port = server.echo(line);
        let exit = server.stop();
        assert_eq!(exit.stdout[1..4], conversation(shown, port), "{line:?}");
        assert_eq!(observed(&exit.stdout), [shown], "{line:?}");
    }
    // Each line of a connection may have one: a script that starts anew for each line sends it.
    let mut server = Server::start(&calm(&["--keep-open"]));
    let port = server.echo("\u{feff}one\n\u{feff}two\n\u{feff}three");
    assert_eq!(received_from(&server.stop().stdout, port), ["one", "two", "three"]);
}

// ------------------------------------------------------------------------ HTTP

/// The message for a client that sent HTTP.
fn sent_http(port: u16) -> String {
    format!("smolrx: 127.0.0.1:{port} sent HTTP; send a line, for example by nc")
}

/// Servers of all kinds for whom HTTP is the same.
fn kinds() -> [Vec<&'static str>; 3] {
    [calm(&[]), calm(&["--keep-open"]), calm(&["--max-line", "100"])]
}

/// An HTTP request is no event, also in pieces or if it ends with the connection instead of a newline: nothing
/// is printed or echoed, the client gets a `400`, and a message on stderr says who sent it and what to send.
#[test]
fn http_request_is_no_event() {
    let lines = "GET / HTTP/1.1|GET / HTTP/1.0|HEAD / HTTP/1.1|OPTIONS * HTTP/1.1|CONNECT example.com:443 HTTP/1.1|\
        PROPFIND /x HTTP/1.1|X /%20?a=b#c HTTP/1.1|GET http://localhost:8888/ HTTP/1.1";
    // What follows, and where the first of them is cut.
    let requests = [
        ("", 0),
        ("", 2),
        ("\n\n", 0),
        ("\r\n", 12),
        ("\r\nHost: x\r\n\r\n", 0),
        ("\r\nContent-Length: 9\r\n\r\none\ntwo\nthree\n", 0),
    ];
    for options in kinds() {
        let mut server = Server::start(&options);
        let before = server.descriptors();
        let mut messages = vec![];
        for (line, (rest, cut)) in lines.split('|').flat_map(|line| requests.map(|request| (line, request))) {
            for finishes in [rest.is_empty(), true] {
                let mut client = server.connect();
                let (start, end) = line.split_at(if lines.starts_with(line) { cut } else { 0 });
                if !start.is_empty() {
                    client.send(start);
                    client.is_taken();
                }
                client.send([end, rest].concat());
                if finishes {
                    client.finish();
                }
                assert_eq!(client.rest(), BAD_REQUEST, "to {line:?} {rest:?}");
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

/// The answer arrives whole although the body of the request is long, of one write, and read by nobody.
#[test]
fn answer_arrives_whole_beside_a_large_body() {
    for (options, size) in kinds().iter().flat_map(|kind| [100, 5_000, 100_000, 3_000_000].map(|n| (kind, n)))
    {
        let mut server = Server::start(options);
        for _ in 0..5 {
            let mut client = server.connect();
            let head = format!("POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n");
            let body = "a line of the body\n".repeat(size / 19 + 1);
            let request = head + &body[..size];
            // The server may close its end while this is under way, as it is tired of it; not before the
            // answer.
            let mut writer = client.0.try_clone().unwrap();
            let sender = thread::spawn(move || writer.write_all(request.as_bytes()));
            assert_eq!(client.rest(), BAD_REQUEST);
            sender.join().unwrap().expect("the body is taken, as what comes is read and passed over");
        }
        let exit = server.stop();
        assert_eq!(exit.stderr.len(), 5, "{exit:?}");
        assert_eq!(exit.stdout[1..], ["Observing 0"], "{options:?}, a body of {size}");
    }
}

/// With `--keep-open` the lines before a request are served, and nothing behind it is.
#[test]
fn lines_before_http_are_served() {
    for at_once in [true, false] {
        let mut server = Server::start(&calm(&["--keep-open"]));
        let mut client = server.connect();
        client.send("one\ntwo\n");
        if !at_once {
            client.is_taken();
        }
        client.send("POST / HTTP/1.1\r\n\r\nthree\n");
        client.expect("one\ntwo\n");
        assert_eq!(client.rest(), BAD_REQUEST);
        let port = client.port();
        drop(client); // whose end the server would wait for
        let exit = server.stop();
        assert_eq!(exit.stderr, [sent_http(port)]);
        assert_eq!(received_from(&exit.stdout, port), ["one", "two"]);
        assert_eq!(observed(&exit.stdout), ["two"]);
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
    for options in [calm(&[]), calm(&["--keep-open"])] {
        let mut server = Server::start(&options);
        for line in lines.split('|') {
            let port = server.echo(format!("{line}\r\n"));
            server.stdout.wait_until(line, |lines| (received_from(lines, port) == [line]).then_some(()));
        }
        let exit = server.stop();
        assert_eq!(exit.stderr, [""; 0], "{options:?}");
        assert_eq!(observed(&exit.stdout), ["I SAID HTTP/1.1 twice"]);
    }
}

/// curl says that it was a bad request and what to do, for a GET and for a POST of any size, and so do its
/// exit codes; over `telnet://` it pokes.
#[test]
fn curl_says_something() {
    if let Some(reason) = refusal(Command::new("curl").arg("--version")) {
        return skip(format!("no curl: {reason}"));
    }
    let scratch = Scratch::new();
    let (poke, body) = (scratch.file("poke"), scratch.file("body"));
    fs::write(&poke, "foo\n").unwrap();
    fs::write(&body, "a line\n".repeat(300_000)).unwrap();
    let upload = format!("@{}", body.display());
    let curl = |arguments: &[&str]| {
        let mut command = Command::new("curl");
        command.args(["-sS", "--noproxy", "*", "--max-time", "20"]).args(arguments);
        let output = command.stdin(File::open(&poke).unwrap()).output().unwrap();
        let [text, error] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
        (output.status.code(), text, error)
    };
    for options in kinds() {
        let mut server = Server::start(&options);
        let http = format!("http://{}/", server.loopback());
        let requests: [&[&str]; 4] = [
            &[&http],
            &["--http1.0", &http],
            &["-d", "foo", &http],
            &["-H", "Expect:", "--data-binary", &upload, &http],
        ];
        for request in requests {
            let (code, text, error) = curl(&[request, &["-w", "%{http_code}"]].concat());
            assert_eq!(code, Some(0), "{request:?}: {text} {error}");
            assert!(text.contains("nc") && text.ends_with("\n400"), "{request:?}: {text}");
            let (code, text, error) = curl(&[request, &["--fail"]].concat());
            assert_eq!(code, Some(22), "{request:?}: {text} {error}");
        }
        let (_, text, error) = curl(&[&format!("telnet://{}", server.loopback()), "--max-time", "2"]);
        assert_eq!(text, "foo\n", "{error}");
        let exit = server.stop();
        assert_eq!(exit.stderr.len(), 2 * requests.len(), "{exit:?}");
        assert_eq!(observed(&exit.stdout), ["foo"], "{options:?}");
    }
}

/// A flood of requests beside a client that pokes costs it nothing, and leaves nothing open.
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
                    let mut client = server.connect();
                    client.send("POST / HTTP/1.1\r\n\r\nbody\n");
                    assert_eq!(client.rest(), BAD_REQUEST);
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
