//! Every point of what the server does and of what bad input gets, on the real binary over real sockets.

mod common;

use common::*;
use rustix::process::Signal;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

/// These options, and a clock that keeps out of the way.
fn calm<'a>(options: &[&'a str]) -> Vec<&'a str> {
    [&CALM, options].concat()
}

// ------------------------------------------------------------------ it listens

/// `--bind` takes an IPv4 address, and the first line names the port that was really got.
#[test]
fn binds_to_an_ipv4_address() {
    let server = Server::start(&calm(&["--bind", "127.0.0.1", "--tcp-port", "0"]));
    assert_eq!(server.address.ip().to_string(), "127.0.0.1");
    assert_ne!(server.address.port(), 0);
    server.echo("foo\n");
}

/// Without `--bind` it listens on every IPv4 address.
#[test]
fn binds_to_every_ipv4_address_by_default() {
    assert_eq!(Server::start(&CALM).address.ip().to_string(), "0.0.0.0");
}

/// `--bind` takes an IPv6 address.
#[test]
fn binds_to_an_ipv6_address() {
    if no_ipv6("an IPv6 address to bind to") {
        return;
    }
    let server = Server::start(&calm(&["--bind", "::1"]));
    let port = server.echo("foo\n");
    server.stdout.wait_for(&format!("Received foo from [::1]:{port}"));
    assert_eq!(server.stdout.lines()[0], format!("Serving on [::1]:{}", server.address.port()));
}

/// `--bind ::` serves both families, and shows a client of either as it knows itself.
#[test]
fn bind_to_any_ipv6_address_serves_both_families() {
    if no_ipv6("a server of both families") {
        return;
    }
    let server = Server::start(&calm(&["--bind", "::"]));
    for address in ["127.0.0.1", "::1"] {
        let mut client = Client::connect(SocketAddr::new(address.parse().unwrap(), server.address.port()));
        client.send("foo\n");
        assert_eq!(client.rest(), b"foo\n");
        server.stdout.wait_for(&format!("Received foo from {}", client.0.local_addr().unwrap()));
    }
}

/// A port that is taken gets one sentence on stderr, and exit code 1.
#[test]
fn port_in_use_is_one_sentence() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let exit = run(&["--bind", "127.0.0.1", "--tcp-port", &port]);
    cannot_listen(&exit, &format!("127.0.0.1:{port}"), &["address in use"]);
}

/// So does an address that is not this machine's.
#[test]
fn foreign_address_is_one_sentence() {
    let exit = run(&["--bind", "192.0.2.1", "--tcp-port", "8888"]);
    cannot_listen(&exit, "192.0.2.1:8888", &["address not available"]);
}

/// So does a link-local one, which needs a scope, also on a machine without IPv6.
#[test]
fn link_local_address_is_one_sentence() {
    let exit = run(&["--bind", "fe80::1", "--tcp-port", "8888"]);
    let reasons = ["invalid argument", "address family not supported", "address not available"];
    cannot_listen(&exit, "[fe80::1]:8888", &reasons);
}

#[track_caller]
fn cannot_listen(exit: &Exit, address: &str, reasons: &[&str]) {
    assert_eq!(exit.code, Some(1), "{exit:?}");
    assert!(exit.stdout.is_empty(), "{exit:?}");
    assert_eq!(exit.stderr.len(), 1, "{exit:?}");
    let start = format!("smolrx: cannot listen on {address}: ");
    let reason = exit.stderr[0].strip_prefix(&start).unwrap_or_else(|| panic!("no `{start}`: {exit:?}"));
    assert!(reasons.iter().any(|words| reason.starts_with(words)), "{exit:?}");
}

// ---------------------------------------------------------------- its options

const OPTIONS: [(&str, &str); 11] = [
    ("--tcp-port", "8888"),
    ("--interval", "60000"),
    ("--debounce", "a tenth"),
    ("--max-wait", "none"),
    ("--bind", "0.0.0.0"),
    ("--keep-open", ""),
    ("--max-conns", "1024"),
    ("--max-line", "65536"),
    ("--timeout", "60000"),
    ("--quiet", ""),
    ("--health", ""),
];

/// `-h` and `--help` print every option with its default, in the order of the table.
#[test]
fn help_lists_every_option_in_order() {
    for option in ["-h", "--help"] {
        let exit = run(&[option]);
        assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{exit:?}");
        let mut rest = &exit.stdout[..];
        for (name, default) in OPTIONS {
            // A line that begins with the option; a usage line above may name it too.
            let is_its_line = |line: &String| {
                let line = line.trim_start();
                let line = line.strip_prefix("-q, ").unwrap_or(line);
                line.starts_with(name)
            };
            let at = rest
                .iter()
                .position(is_its_line)
                .unwrap_or_else(|| panic!("{name} is not in its place: {exit:#?}"));
            let end = (at + 3).min(rest.len());
            assert!(
                rest[at..end].join(" ").contains(default),
                "{name} without its default {default}: {exit:#?}"
            );
            rest = &rest[at + 1..];
        }
        for short in ["-q", "-h", "-V"] {
            assert!(
                exit.stdout.iter().any(|line| line.contains(short)),
                "{short} is not in the help: {exit:#?}"
            );
        }
        assert!(
            exit.stdout.iter().all(|line| line.chars().count() <= 80),
            "wider than a terminal: {exit:#?}"
        );
    }
}

/// `-V` and `--version` print the version.
#[test]
fn version() {
    for option in ["-V", "--version"] {
        let exit = run(&[option]);
        assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{exit:?}");
        assert_eq!(exit.stdout, [concat!("smolrx ", env!("CARGO_PKG_VERSION"))]);
    }
}

/// Values are taken as `--name VALUE` and as `--name=VALUE`.
#[test]
fn values_follow_a_blank_or_an_equals_sign() {
    let values = [
        ["--bind", "127.0.0.1"],
        ["--interval", "10"],
        ["--debounce", "1"],
        ["--max-wait", "5"],
        ["--max-conns", "1"],
        ["--max-line", "9"],
        ["--timeout", "99"],
    ];
    let equals = values.map(|pair| pair.join("="));
    for options in [values.concat(), equals.iter().map(|option| &**option).collect()] {
        let server = Server::start(&options);
        assert_eq!(server.address.ip().to_string(), "127.0.0.1");
        server.stdout.wait_for("Observing 3");
        server.echo("12345678\n");
    }
    let mut process = Process::spawn(program(&["--tcp-port=0"]));
    process.stdout.wait_for_count(1);
    process.stop();
}

/// Anything else gets one sentence that names the option as typed, a hint at `--help`, and exit code 2.
#[test]
fn wrong_options_are_named_as_typed() {
    let cases: &[(&[&str], &str)] = &[
        (&["--frobnicate"], "--frobnicate"),
        (&["--frobnicate=3"], "--frobnicate"),
        (&["-x"], "-x"),
        (&["foo"], "foo"),
        (&["--keep-open", "8888"], "8888"),
        (&["--keep-open=yes"], "--keep-open"),
        (&["--quiet=1"], "--quiet"),
        (&["--tcp-port"], "--tcp-port"),
        (&["--interval"], "--interval"),
        (&["--tcp-port", "http"], "--tcp-port"),
        (&["--tcp-port", "-1"], "--tcp-port"),
        (&["--tcp-port", "65536"], "--tcp-port"),
        (&["--tcp-port=65536"], "--tcp-port"),
        (&["--tcp-port", ""], "--tcp-port"),
        (&["--tcp-port="], "--tcp-port"),
        (&["--interval", "9"], "--interval"),
        (&["--interval=9"], "--interval"),
        (&["--interval", "1.5"], "--interval"),
        (&["--interval", "99999999999999999999999999"], "--interval"),
        (&["--debounce"], "--debounce"),
        (&["--max-wait"], "--max-wait"),
        (&["--debounce", "0"], "--debounce"),
        (&["--debounce", "-1"], "--debounce"),
        (&["--debounce", "1.5"], "--debounce"),
        (&["--debounce", "4294967296"], "--debounce"),
        (&["--max-wait", "0"], "--max-wait"),
        (&["--max-wait", "-1"], "--max-wait"),
        (&["--max-wait", "1.5"], "--max-wait"),
        (&["--max-wait", "4294967296"], "--max-wait"),
        (&["--bind", "localhost"], "--bind"),
        (&["--bind", "1.2.3"], "--bind"),
        (&["--max-conns", "0"], "--max-conns"),
        (&["--max-conns", "many"], "--max-conns"),
        (&["--max-line", "-5"], "--max-line"),
        (&["--timeout", "soon"], "--timeout"),
        (&["--tcp-port", "0", "--Interval", "50"], "--Interval"),
        (&["--bind", "--tcp-port", "0", "127.0.0.1"], "--bind"),
        (&["--interval", "--tcp-port", "0", "1000"], "--interval"),
        (&["--interval", "50", "", "--tcp-port", "0"], "''"),
    ];
    for (options, name) in cases {
        let exit = run(options);
        assert_eq!(exit.code, Some(2), "{options:?}: {exit:?}");
        assert!(exit.stdout.is_empty(), "{options:?}: {exit:?}");
        assert!((1..=2).contains(&exit.stderr.len()), "{options:?}: {exit:?}");
        assert!(exit.stderr[0].starts_with("smolrx: "), "{options:?}: {exit:?}");
        assert!(exit.stderr[0].contains(name), "{options:?}: {exit:?}");
        assert!(exit.stderr.join(" ").contains("--help"), "{options:?}: {exit:?}");
    }
}

/// Values at both ends of their range are taken, alone and together, and serve.
#[test]
fn values_at_the_ends_of_their_range() {
    let smallest = [
        ["--interval", "10"],
        ["--debounce", "1"],
        ["--max-wait", "1"],
        ["--max-conns", "1"],
        ["--max-line", "1"],
        ["--timeout", "1"],
    ];
    let largest = [
        ["--interval", "4294967295"],
        ["--debounce", "4294967295"],
        ["--max-wait", "4294967295"],
        ["--max-conns", "4294967295"],
        ["--max-line", "4294967294"],
        ["--timeout", "4294967295"],
    ];
    let all = largest.concat();
    for options in smallest.iter().chain(&largest).map(|pair| &pair[..]).chain([&all[..]]) {
        let mut server = Server::start(options);
        if options != ["--timeout", "1"] {
            // One that can be served in a millisecond and has only a byte.
            server.echo("\n");
        }
        thread::sleep(ms(50)); // long enough for a sum that overflows
        assert!(server.is_running(), "{options:?}: {:?}", server.exited(PATIENCE));
        let exit = server.stop();
        assert_eq!(exit.stderr, [""; 0], "{options:?}");
    }
}

/// Values beyond the ends are refused, however large.
#[test]
fn values_beyond_the_ends_of_their_range() {
    let beyond = [
        ("--tcp-port", "65536"),
        ("--interval", "9"),
        ("--interval", "4294967296"),
        ("--debounce", "0"),
        ("--debounce", "4294967296"),
        ("--max-wait", "0"),
        ("--max-wait", "4294967296"),
        ("--max-conns", "0"),
        ("--max-conns", "4294967296"),
        ("--max-line", "0"),
        ("--max-line", "4294967295"),
        ("--timeout", "0"),
        ("--timeout", "4294967296"),
    ];
    let largest = u64::MAX.to_string();
    let names =
        ["--tcp-port", "--interval", "--debounce", "--max-wait", "--max-conns", "--max-line", "--timeout"];
    for (name, value) in beyond.into_iter().chain(names.map(|name| (name, &*largest))) {
        let exit = run(&["--tcp-port", "0", name, value]);
        assert_eq!((exit.code, exit.stdout.len()), (Some(2), 0), "{name} {value}: {exit:?}");
        let sentence = format!("smolrx: option '{name}' takes a whole number from ");
        assert!(exit.stderr[0].starts_with(&sentence), "{name} {value}: {exit:?}");
    }
}

/// An option may be given twice; the last value counts.
#[test]
fn last_value_counts() {
    let twice = ["--keep-open", "--keep-open", "--interval", "99999", "--debounce=1", "--interval=10"];
    let server = Server::start(&twice);
    server.stdout.wait_for("Observing 3");
}

/// An option that is not even text is refused like any other.
#[test]
fn option_that_is_not_utf8_is_refused() {
    use std::os::unix::ffi::OsStrExt;
    for options in [[&b"--bind"[..], b"\xff"], [b"--tcp-port", b"0\xff"], [b"--quiet", b"-\xff\x1b"]] {
        let mut command = program(&[]);
        command.args(options.map(std::ffi::OsStr::from_bytes));
        let exit = Process::spawn(command).exited(PATIENCE);
        assert_eq!(exit.code, Some(2), "{exit:?}");
    }
}

// ---------------------------------------------------------- each connection

/// Without `--keep-open` a connection is one line, whatever else came with it.
#[test]
fn one_line_a_connection() {
    let mut server = Server::start(&CALM);
    let mut client = server.connect();
    client.send("foo\nbar\nbaz");
    assert_eq!(client.until_closed(), b"foo\n");
    let port = client.port();
    drop(client);
    let exit = server.stop();
    assert_eq!(exit.stdout[1..4], conversation("foo", port));
    assert_eq!(observed(&exit.stdout), ["foo"]);
}

/// A connection that sends nothing and closes is no event, and prints nothing.
#[test]
fn nothing_sent_is_no_event() {
    for options in [&calm(&[])[..], &calm(&["--keep-open"])] {
        let mut server = Server::start(options);
        let mut silent = server.connect();
        silent.finish();
        assert_eq!(silent.rest(), b"");
        let port = server.echo("foo\n");
        assert_eq!(server.stop().stdout[1..4], conversation("foo", port));
    }
}

/// An empty line is an event.
#[test]
fn empty_line_is_an_event() {
    for line in ["\n", "\r\n"] {
        let mut server = Server::start(&CALM);
        let port = server.echo(line);
        let exit = server.stop();
        assert_eq!(exit.stdout[1..4], conversation("", port));
        assert_eq!(exit.stdout[4], "Observing ");
    }
}

/// `\r\n` ends a line just as `\n` does, and is echoed.
#[test]
fn crlf_ends_a_line() {
    let mut server = Server::start(&CALM);
    let port = server.echo("foo\r\n");
    let exit = server.stop();
    assert_eq!(exit.stdout[1..4], conversation("foo", port));
    assert_eq!(exit.stdout[4], "Observing foo");
}

/// A line is shown without the blanks at its ends, in all three places, and echoed with them.
#[test]
fn shown_stripped_and_echoed_as_it_came() {
    let mut server = Server::start(&CALM);
    let port = server.echo("  foo bar  \n");
    let exit = server.stop();
    assert_eq!(exit.stdout[1..4], conversation("foo bar", port));
    assert_eq!(exit.stdout[4..], ["Observing foo bar"]);
}

/// A line may come byte by byte.
#[test]
fn line_in_pieces_is_one_line() {
    let mut server = Server::start(&CALM);
    let mut client = server.connect();
    for byte in "héllo\r\n".bytes() {
        client.send([byte]);
        thread::sleep(ms(2));
    }
    assert_eq!(client.rest(), "héllo\r\n".as_bytes());
    assert_eq!(server.stop().stdout[1..4], conversation("héllo", client.port()));
}

/// With `--keep-open` every line is answered at once, and the close is printed once, at the end.
#[test]
fn keep_open_serves_every_line() {
    let server = Server::start(&calm(&["--keep-open"]));
    let mut client = server.connect();
    let mut expected = vec![];
    for line in ["one", "two", "", "three"] {
        client.send(format!("{line}\n"));
        client.expect(format!("{line}\n"));
        expected.extend_from_slice(&conversation(line, client.port())[..2]);
    }
    client.send("four");
    client.finish();
    assert_eq!(client.rest(), b"four");
    expected.extend(conversation("four", client.port()));
    server.stdout.wait_for(CLOSE);
    assert_eq!(server.stdout.lines()[1..], expected);
}

/// Pipelined lines come back in order.
#[test]
fn keep_open_answers_pipelined_lines_in_order() {
    let mut server = Server::start(&calm(&["--keep-open"]));
    let lines: Vec<String> = (0..2000).map(|i| format!("line {i}")).collect();
    let text = lines.join("\n");
    let mut client = server.connect();
    client.send(&text);
    client.finish();
    assert_eq!(String::from_utf8(client.rest()).unwrap(), text);
    let exit = server.stop();
    let mut expected: Vec<String> =
        lines.iter().flat_map(|line| conversation(line, client.port())[..2].to_vec()).collect();
    expected.extend([CLOSE.into(), "Observing line 1999".into()]);
    assert_eq!(exit.stdout[1..], expected);
}

/// A connection is over when its line is answered, though the client leaves its own side open:
/// nothing is held for it any more, however its bytes came.
#[test]
fn connection_ends_though_the_client_stays() {
    let line = b"abcdefg\n";
    for border in 1..line.len() {
        let server = Server::start(&CALM);
        let before = server.descriptors();
        let mut client = server.connect();
        client.send(&line[..border]);
        client.is_taken();
        client.send(&line[border..]);
        assert_eq!(client.rest(), line);
        let what = format!("the connection is over, its line sent in parts of {border} and the rest");
        eventually(ms(3000), &what, || server.descriptors() == before && server.stdout.lines().len() == 4);
    }
}

/// Bytes beyond the line cost a client neither its echo nor the end in good order, whenever they come.
#[test]
fn more_sent_at_any_moment_is_passed_over() {
    let server = Server::start(&CALM);
    for i in 0..1000 {
        let mut client = server.connect();
        client.send("foo\n");
        let moment = Instant::now() + Duration::from_micros(i % 100);
        while Instant::now() < moment {}
        client.send("more\n");
        assert_eq!(client.rest(), b"foo\n", "when the rest comes after {} µs", i % 100);
    }
}

/// Nor do those that are sent while the server waits for the client to take the echo.
#[test]
fn more_sent_during_the_echo_is_passed_over() {
    let server = Server::start(&calm(&["--max-line", "20000000"]));
    let mut client = Client::with_small_window(server.loopback());
    let line = format!("{}\n", "x".repeat(12_000_000)); // more than the kernel's buffers hold
    client.send(&line);
    server.stdout.wait_until("it is received", |lines| (lines.len() > 1).then_some(()));
    client.send("more\n");
    assert!(client.rest() == line.as_bytes(), "the echo differs");
}

/// Nor do those that are sent while it waits for room in the log.
#[test]
fn more_sent_before_the_echo_is_passed_over() {
    let server = Server::start(&CALM);
    server.stdout.pause();
    let (line, mut client) = line_that_waits_for_the_log(&server);
    client.send("more\n");
    server.stdout.resume();
    assert!(client.rest() == line.as_bytes(), "the echo differs");
}

/// Fills the log, nobody reading it, until a line finds no room; returns the line and its client.
fn line_that_waits_for_the_log(server: &Server) -> (String, Client) {
    let line = format!("{}\n", "x".repeat(60_000));
    let waiting = (0..10).find_map(|_| {
        let mut client = server.connect();
        client.send(&line);
        client.hears_nothing_for(ms(300)).then_some(client)
    });
    (line, waiting.expect("the log is full after a megabyte"))
}

/// A flood of lines does not hold up the clock, nor the clock the lines.
#[test]
fn flood_does_not_hold_up_the_clock() {
    let mut server = Server::start(&["--interval", "50", "--keep-open"]);
    let mut client = server.connect();
    let lines = "flood\n".repeat(300);
    let start = Instant::now();
    while start.elapsed() < ms(1500) {
        client.send(&lines);
        client.expect(&lines);
        thread::sleep(ms(1));
    }
    let due = start.elapsed().as_millis() as u64 / 50;
    let from = server.stdout.lines().len();
    let tick = server.stdout.wait_until("a tick after the flood", |lines| {
        observed(&lines[from..]).iter().find_map(|event| event.parse::<u64>().ok())
    });
    assert!(tick >= due / 2, "the clock came to {tick} while {due} were due");
    server.stop();
}

/// `-q` and `--quiet` print only what is observed.
#[test]
fn quiet_prints_only_what_is_observed() {
    for option in ["-q", "--quiet"] {
        let mut process = Process::spawn(program(&calm(&["--bind", "127.0.0.1", "--tcp-port", "0", option])));
        let mut client = Client::connect(SocketAddr::new([127, 0, 0, 1].into(), process.listening_port()));
        client.send("foo\n");
        assert_eq!(client.rest(), b"foo\n");
        assert_eq!(process.stop().stdout, ["foo"]);
    }
}

/// An event is then a line of its own and nothing else: a tick, a line without the blanks at its ends, or nothing at all.
#[test]
fn quiet_prints_bare_events() {
    let options = ["--bind", "127.0.0.1", "--tcp-port", "0", "-q"];
    let mut process = Process::spawn(program(&[&options[..], &["--interval", "200"]].concat()));
    process.stdout.wait_for_count(4);
    assert_eq!(process.stop().stdout[..4], ["0", "1", "2", "3"]);

    let mut process =
        Process::spawn(program(&calm(&[&options[..], &["--debounce", "50", "--keep-open"]].concat())));
    process.stdout.wait_for_count(1);
    let mut client = Client::connect(process.listening_address());
    let lines = ["foo\n", "\n", "  two words\t\n", "\r\n"];
    for (i, line) in lines.iter().enumerate() {
        client.send(line);
        process.stdout.wait_for_count(i + 2);
    }
    client.send("\n"); // which the end gives out
    client.expect(lines.concat() + "\n");
    assert_eq!(process.stop().stdout, ["0", "foo", "", "two words", "", ""]);
}

// -------------------------------------------------------------------- bursts

/// `--debounce` is the silence that ends a burst, be it longer than a tenth of the interval or shorter.
#[test]
fn debounce_is_the_silence_that_ends_a_burst() {
    for interval in ["5000", "600000"] {
        let started = Instant::now();
        let server = Server::start(&["--interval", interval, "--debounce", "1000", "--keep-open"]);
        server.stdout.wait_for("Observing 0");
        assert!(started.elapsed() >= ms(1000), "the first tick after {:?}", started.elapsed());
        if interval == "5000" {
            continue; // a tick would get into the burst
        }
        let mut client = server.connect();
        let mut last = Instant::now();
        for i in 1..=20 {
            last = Instant::now();
            client.send(format!("line {i}\n"));
            thread::sleep(ms(20));
        }
        server.stdout.wait_for("Observing line 20");
        let silence = last.elapsed();
        assert!((ms(1000)..ms(10_000)).contains(&silence), "after {silence:?} of silence");
        assert_eq!(observed(&server.stdout.lines()), ["0", "line 20"]);
    }
}

/// A client that pokes more often than that holds back every event, unless there is a `--max-wait`: then they keep coming.
#[test]
fn steady_pokes_hold_back_events_only_without_a_longest_wait() {
    let window = ["--debounce", "1000"];
    let wait = ["--max-wait", "500"];
    let both = [window, wait].concat();
    let pokes = |options: &[&str]| {
        let mut server = Server::start(&[&["--interval", "1000", "--keep-open"], options].concat());
        let mut client = server.connect();
        let started = Instant::now();
        let mut pokes = 0;
        while started.elapsed() < ms(5000) {
            client.send(format!("poke {pokes}\n"));
            pokes += 1;
            thread::sleep(ms(50));
        }
        let lines = server.stdout.lines();
        let events = observed(&lines);
        println!("{options:?}: {pokes} pokes, {events:?}");
        if options == window {
            assert_eq!(events, [""; 0], "with {options:?}");
        } else {
            assert!(events.len() >= 5, "with {options:?} only {events:?}");
        }
        if options.len() == 4 {
            // Nor more often than asked for.
            let most = started.elapsed().as_millis() as usize / 500 + 1;
            assert!(events.len() <= most, "with {options:?} {events:?}");
        }
        drop(client);
        server.stop();
    };
    // The debounce of the first is long, lest a busy machine makes a pause that ends the burst.
    thread::scope(|scope| {
        for options in [&window[..], &both, &wait] {
            scope.spawn(move || pokes(options));
        }
    });
}

/// A thousand clients at once each get exactly their own bytes, and the transcript accounts for every line.
#[test]
fn thousand_clients_at_once() {
    raise_descriptor_limit();
    for options in [&calm(&[])[..], &calm(&["--keep-open"])] {
        let mut server = Server::start(options);
        let mut clients: Vec<(Client, String)> =
            (0..1000).map(|i| (server.connect(), format!("client {i} {}", "z".repeat(i + 1)))).collect();
        for (client, line) in &mut clients {
            client.send(&*line);
        }
        for (client, _) in clients.iter_mut().rev() {
            client.send("\n");
            client.finish();
        }
        for (client, line) in &mut clients {
            assert_eq!(String::from_utf8(client.rest()).unwrap(), format!("{line}\n"));
        }
        let exit = server.stop();
        assert_eq!(exit.stderr, [""; 0]);
        let mut got = exit.stdout[1..exit.stdout.len() - 1].to_vec();
        let mut expected: Vec<String> =
            clients.iter().flat_map(|(client, line)| conversation(line, client.port())).collect();
        got.sort();
        expected.sort();
        assert!(got == expected, "the transcript differs from what was sent: {:?}", server.stdout);
        let last = observed(&exit.stdout);
        assert!(last.len() == 1 && clients.iter().any(|(_, line)| line == last[0]), "{last:?}");
    }
}

// ----------------------------------------------------------------- bad input

/// Control characters and bytes that are not UTF-8 are echoed as they came, and shown so that they can do no harm.
#[test]
fn hostile_text_is_echoed_exactly_and_shown_harmlessly() {
    let cases: &[(&[u8], &str)] = &[
        (b"\x1b[2J\x1b]0;owned\x07", r"\u{1b}[2J\u{1b}]0;owned\u{7}"),
        (b"foo\rbar", r"foo\rbar"),
        (b"foo\r\rbar\r", r"foo\r\rbar"), // the last \r and the newline are the ending
        (b"foo\0bar", r"foo\u{0}bar"),
        (b"a\tb", r"a\tb"),
        (b"a\x0bb\x0cc\x7fd", r"a\u{b}b\u{c}c\u{7f}d"),
        ("csi \u{9b}31m nel \u{85}x".as_bytes(), r"csi \u{9b}31m nel \u{85}x"),
        ("a\u{202e}b\u{2066}c\u{2069}d\u{200f}e".as_bytes(), r"a\u{202e}b\u{2066}c\u{2069}d\u{200f}e"),
        ("a\u{2028}b\u{2029}c".as_bytes(), r"a\u{2028}b\u{2029}c"),
        (br"C:\new \u{1b}", r"C:\new \u{1b}"),
        (b"caf\xe9", "caf\u{fffd}"),
        (b"\xff\xfe\xf0\x9f\x92x", "\u{fffd}\u{fffd}\u{fffd}x"),
        (b"\xed\xa0\x80 \xc0\xaf", "\u{fffd}\u{fffd}\u{fffd} \u{fffd}\u{fffd}"),
        ("naïve ✓ 🦀 עברית".as_bytes(), "naïve ✓ 🦀 עברית"),
    ];
    for (text, on_screen) in cases {
        let line = [text, &b"\n"[..]].concat();
        assert_eq!(shown(&line), *on_screen, "the tests' own model");
        let mut server = Server::start(&CALM);
        let port = server.echo(&line);
        let exit = server.stop();
        assert_eq!(exit.stdout[1..4], conversation(on_screen, port));
        assert_eq!(exit.stdout[4..], [format!("Observing {on_screen}")]);
        assert!(!exit.stdout.iter().any(|line| line.contains(is_hostile)), "{exit:?}");
    }
}

/// Blanks at the ends of a line are not shown, be they control characters or not; those within are.
#[test]
fn strips_before_it_escapes() {
    let mut server = Server::start(&CALM);
    let port = server.echo("\t\u{a0}foo\rbar \u{3000}\u{2028}\r\r\n");
    let exit = server.stop();
    assert_eq!(exit.stdout[1..4], conversation(r"foo\rbar", port));
    assert_eq!(exit.stdout[4..], [r"Observing foo\rbar"]);
}

/// A line of exactly `--max-line` bytes passes, its ending included, or at the end of a connection without one.
#[test]
fn longest_line_passes() {
    let mut server = Server::start(&calm(&["--max-line", "16"]));
    let mut ports = vec![];
    for line in ["123456789012345\n", "12345678901234\r\n", "1234567890123456"] {
        ports.push((line, server.echo(line)));
    }
    let exit = server.stop();
    for (line, port) in ports {
        assert!(exit.stdout.contains(&format!("Received {} from 127.0.0.1:{port}", line.trim())), "{exit:?}");
    }
    assert_eq!(exit.stderr, [""; 0]);
}

/// One byte more gets a sentence on stderr, and the connection is closed: no echo, no event.
#[test]
fn longer_line_is_refused() {
    for (over, limit) in [("1234567890123456\n", 16), ("123456789012345\r\n", 16), ("12345678901234567", 16)]
    {
        for options in [&calm(&["--max-line", "16"])[..], &calm(&["--max-line", "16", "--keep-open"])] {
            let mut server = Server::start(options);
            let mut client = server.connect();
            client.send(over); // and does not end its sending side
            assert_eq!(client.until_closed(), b"");
            let sentence =
                format!("smolrx: line from 127.0.0.1:{} is longer than {limit} bytes", client.port());
            server.stderr.wait_for(&sentence);
            let exit = server.stop();
            assert_eq!(exit.stderr, [sentence]);
            assert!(!exit.stdout.iter().any(|line| line.starts_with("Received") || line.starts_with("Send")));
            assert_eq!(observed(&exit.stdout), ["0"]);
        }
    }
}

/// The limit is 65536 bytes when none is given, and a client that ignores it does not make memory grow.
#[test]
fn endless_line_is_cut_at_the_limit() {
    let mut server = Server::start(&calm(&["--keep-open"]));
    server.echo("z".repeat(65535) + "\n");
    let before = server.memory_kb();
    let mut client = server.connect();
    let endless = vec![b'x'; 1 << 20];
    use std::io::Write;
    let mut sent = 0;
    while let Ok(length) = client.0.write(&endless) {
        sent += length;
        assert!(sent < 256 << 20, "nobody stops an endless line");
    }
    client.until_closed();
    let sentence = format!("smolrx: line from 127.0.0.1:{} is longer than 65536 bytes", client.port());
    server.stderr.wait_for(&sentence);
    let grown = server.memory_kb().saturating_sub(before);
    assert!(grown <= 256, "{grown} kB more");
    assert_eq!(server.stop().stderr, [sentence]);
}

/// With `--keep-open` the lines before the one that is too long are served.
#[test]
fn lines_before_a_longer_one_are_served() {
    let mut server = Server::start(&calm(&["--keep-open", "--max-line", "16"]));
    let mut client = server.connect();
    client.send("one\ntwo\n");
    client.expect("one\ntwo\n");
    client.send("three\n12345678901234567890\nfour\n");
    client.until_closed();
    server.stderr.wait_for_count(1);
    drop(client);
    let exit = server.stop();
    let received: Vec<&String> = exit.stdout.iter().filter(|line| line.starts_with("Received")).collect();
    assert_eq!(received.len(), 3, "{exit:?}");
    assert_eq!(observed(&exit.stdout), ["three"]);
}

// ------------------------------------------------------------------ timeouts

/// A connection that sends nothing is closed after `--timeout`, and leaves nothing in the transcript.
#[test]
fn idle_connection_is_closed() {
    for options in [&calm(&["--timeout", "300"])[..], &calm(&["--timeout", "300", "--keep-open"])] {
        let mut server = Server::start(options);
        let connected = Instant::now();
        let mut client = server.connect();
        assert_eq!(client.until_closed(), b"");
        assert!(connected.elapsed() >= ms(295), "after {:?}", connected.elapsed());
        let port = server.echo("foo\n");
        assert_eq!(server.stop().stdout[1..4], conversation("foo", port));
    }
}

/// One that stops in the middle of a line is closed as well: part of a line is no event.
#[test]
fn connection_that_stops_mid_line_is_closed() {
    let mut server = Server::start(&calm(&["--timeout", "300", "--keep-open"]));
    let mut client = server.connect();
    client.send("foo\n");
    client.expect("foo\n");
    let sent = Instant::now();
    client.send("half a li");
    assert_eq!(client.until_closed(), b"");
    assert!(sent.elapsed() >= ms(295), "after {:?}", sent.elapsed());
    let exit = server.stop();
    assert!(!exit.stdout.iter().any(|line| line.contains("half")), "{exit:?}");
    assert_eq!(observed(&exit.stdout), ["foo"]);
}

/// A client that does not take its echo is let go, and what it sent is observed all the same.
#[test]
fn connection_that_does_not_take_its_echo_is_closed() {
    let mut server = Server::start(&calm(&["--timeout", "500", "--max-line", "20000000"]));
    let before = server.descriptors();
    server.echo("foo\n");
    let mut client = Client::with_small_window(server.loopback());
    let line = format!("{}{}\n", "start", "x".repeat(12_000_000)); // more than the kernel's buffers hold
    client.send(&line);
    eventually(PATIENCE, "its descriptor is open no more", || server.descriptors() == before);
    let exit = server.stop();
    assert!(exit.stdout.last().unwrap().starts_with("Observing startxxx"), "not observed");
}

/// Time for which the server itself keeps a client waiting does not count.
#[test]
fn connection_that_waits_for_the_log_is_not_closed() {
    let server = Server::start(&calm(&["--timeout", "500", "--keep-open"]));
    server.stdout.pause();
    line_that_waits_for_the_log(&server);
    let mut client = server.connect();
    thread::sleep(ms(100)); // the server waits for it, not yet the other way round
    client.send("foo\n");
    assert!(client.hears_nothing_for(ms(1000)));
    server.stdout.resume();
    client.expect("foo\n");
    client.send("bar\n");
    client.expect("bar\n");
}

/// A client that is slow but goes on is not cut off, however long its line takes.
#[test]
fn slow_connection_is_not_closed() {
    let server = Server::start(&calm(&["--timeout", "1500"]));
    let mut client = server.connect();
    for _ in 0..10 {
        client.send("x");
        thread::sleep(ms(200));
    }
    client.send("\n");
    assert_eq!(client.rest(), b"xxxxxxxxxx\n");
}

// --------------------------------------------------------------- --max-conns

/// Beyond `--max-conns` a connection waits until another one ends, and is then served.
#[test]
fn connection_beyond_the_limit_waits() {
    let server = Server::start(&calm(&["--max-conns", "2", "--keep-open"]));
    let (mut one, mut two) = (server.connect(), server.connect());
    for client in [&mut one, &mut two] {
        client.send("here\n");
        client.expect("here\n");
    }
    let mut three = server.connect();
    three.send("waiting\n");
    assert!(three.hears_nothing_for(ms(300)));
    drop(one);
    three.expect("waiting\n");
    two.send("still here\n");
    two.expect("still here\n");
}

// ------------------------------------------------------------------ --health

/// `--health` answers 0 for a server that serves, on whatever it is bound to, and leaves no trace there.
#[test]
fn health_of_a_live_server() {
    for bind in ["0.0.0.0", "127.0.0.1", "::", "::1"] {
        if bind.contains(':') && no_ipv6(&format!("--health of a server on {bind}")) {
            continue;
        }
        for options in [&calm(&["--bind", bind])[..], &calm(&["--bind", bind, "--keep-open"])] {
            let mut server = Server::start(options);
            let exit = health(&["--bind", bind], server.address.port());
            assert_eq!(exit.code, Some(0), "{bind}: {exit:?}");
            let exit = server.stop();
            assert_eq!(exit.stdout[1..], ["Observing 0"], "{bind}");
            assert_eq!(exit.stderr, [""; 0], "{bind}");
        }
    }
}

/// It answers 1 when nobody listens.
#[test]
fn health_of_nobody() {
    let port = Port::reserve();
    let exit = health(&[], port.number());
    assert_eq!(exit.code, Some(1), "{exit:?}");
    unhealthy_in_time(&exit);
}

/// It answers 1 when the server hangs, although the kernel still accepts connections for it.
#[test]
fn health_of_a_hanging_server() {
    let mut server = Server::start(&CALM);
    server.signal(Signal::STOP);
    let exit = health(&[], server.address.port());
    server.signal(Signal::CONT);
    assert_eq!(exit.code, Some(1), "{exit:?}");
    // It answers by its port, whatever address it listens on.
    assert_eq!(exit.stderr, ["smolrx: the server is not healthy: it does not answer"]);
    unhealthy_in_time(&exit);
    let exit = server.stop();
    assert_eq!(exit.stdout[1..], ["Observing 0"]);
}

/// Within two seconds; the rest is what a busy machine may take to start and end a process.
#[track_caller]
fn unhealthy_in_time(exit: &Exit) {
    assert!(exit.lifetime < ms(3000), "{exit:?}");
}

// ------------------------------------------------------------- it stops well

/// Idle connections do not hold up the end; new ones are refused.
#[test]
fn stop_closes_idle_connections_at_once() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut server = Server::start(&calm(&["--keep-open"]));
        let (mut fresh, mut used) = (server.connect(), server.connect());
        used.send("foo\n");
        used.expect("foo\n");
        let signalled = Instant::now();
        server.signal(signal);
        assert_eq!(fresh.rest(), b"");
        assert_eq!(used.rest(), b"");
        let exit = server.exited(PATIENCE);
        assert_eq!(exit.code, Some(0), "{exit:?}");
        assert!(signalled.elapsed() < ms(2500), "after {:?}", signalled.elapsed());
        assert_eq!(exit.stdout.last().unwrap(), "Observing foo");
    }
}

/// A connection in the middle of a line may finish it, though nobody new is let in.
#[test]
fn stop_lets_a_line_be_finished() {
    for (rest, options) in [("ish\n", calm(&[])), ("ish\n", calm(&["--keep-open"])), ("ish", calm(&[]))] {
        let mut server = Server::start(&options);
        let mut client = server.connect();
        client.send("fin");
        client.is_taken();
        server.signal(Signal::TERM);
        server.refuses();
        client.send(rest);
        if !rest.ends_with('\n') {
            client.finish();
        }
        assert_eq!(client.rest(), format!("fin{rest}").as_bytes());
        let signalled = Instant::now();
        let exit = server.exited(PATIENCE);
        assert_eq!(exit.code, Some(0), "{exit:?}");
        assert!(signalled.elapsed() < ms(2500), "after {:?}", signalled.elapsed());
        assert_eq!(exit.stdout[1..4], conversation("finish", client.port()));
        assert_eq!(exit.stdout[4..], ["Observing finish"]);
    }
}

/// A client gets the whole of its echo, and that of what it had sent before the signal as well.
#[test]
fn stop_lets_an_echo_be_taken() {
    let mut server = Server::start(&calm(&["--max-line", "20000000", "--keep-open"]));
    let mut client = Client::with_small_window(server.loopback());
    let line = format!("{}\n", "x".repeat(12_000_000)); // more than the kernel's buffers hold
    client.send(&line);
    server.stdout.wait_until("it is received", |lines| (lines.len() > 1).then_some(()));
    client.send("more\n");
    server.signal(Signal::TERM);
    assert!(client.rest() == (line + "more\n").as_bytes(), "the echo differs");
    let exit = server.exited(PATIENCE);
    assert_eq!(exit.code, Some(0), "{exit:?}");
}

/// After five seconds it is cut, even if it goes on sending; part of a line is no event.
#[test]
fn stop_cuts_a_line_after_five_seconds() {
    let mut server = Server::start(&CALM);
    let mut client = server.connect();
    client.send("never");
    client.is_taken();
    let signalled = Instant::now();
    server.signal(Signal::TERM);
    use std::io::Write;
    let trickle = thread::spawn(move || {
        while client.0.write_all(b"-").is_ok() {
            thread::sleep(ms(100));
        }
    });
    let exit = server.exited(PATIENCE);
    let elapsed = signalled.elapsed();
    assert_eq!(exit.code, Some(0), "{exit:?}");
    assert!((ms(4900)..ms(6000)).contains(&elapsed), "after {elapsed:?}");
    assert_eq!(observed(&exit.stdout), ["0"]);
    assert!(!exit.stdout.iter().any(|line| line.starts_with("Received")), "{exit:?}");
    trickle.join().unwrap();
}

/// So is a line whose client sends nothing any more.
#[test]
fn stop_cuts_a_silent_client_after_five_seconds() {
    let mut server = Server::start(&CALM);
    let mut client = server.connect();
    client.send("never");
    client.is_taken();
    let signalled = Instant::now();
    server.signal(Signal::TERM);
    let exit = server.exited(PATIENCE);
    let elapsed = signalled.elapsed();
    assert_eq!(exit.code, Some(0), "{exit:?}");
    assert!((ms(4900)..ms(6000)).contains(&elapsed), "after {elapsed:?}");
    assert!(!exit.stdout.iter().any(|line| line.starts_with("Received")), "{exit:?}");
}

/// A second signal ends it immediately, with 128 and the signal's number.
#[test]
fn second_signal_ends_it_immediately() {
    for (first, second, code) in [
        (Signal::TERM, Signal::TERM, 143),
        (Signal::INT, Signal::INT, 130),
        (Signal::TERM, Signal::INT, 130),
        (Signal::INT, Signal::TERM, 143),
    ] {
        let mut server = Server::start(&CALM);
        let mut client = server.connect();
        client.send("mid-line");
        client.is_taken();
        server.signal(first);
        server.refuses();
        let signalled = Instant::now();
        server.signal(second);
        let exit = server.exited(PATIENCE);
        assert_eq!((exit.code, exit.signal), (Some(code), None), "{exit:?}");
        assert!(signalled.elapsed() < ms(1500), "after {:?}", signalled.elapsed());
    }
}

// ------------------------------------------------------------ standard output

/// `smolrx | head -1` ends by itself, without a word.
#[test]
fn closed_stdout_ends_it_silently() {
    let (reader, writer) = io::pipe().unwrap();
    let mut command = program(&["--tcp-port", "0", "--interval", "300"]);
    command.stdout(writer);
    let mut process = Process::spawn_with_stdout(command);
    let mut first = String::new();
    BufReader::new(reader).read_line(&mut first).unwrap(); // and drops the reader
    assert!(first.starts_with("Serving on "));
    let exit = process.exited(PATIENCE);
    assert_eq!((exit.code, exit.signal), (Some(0), None), "{exit:?}");
    assert_eq!(exit.stderr, [""; 0]);
}

/// So does one whose reader had gone before it started.
#[test]
fn stdout_closed_before_the_start_ends_it_silently() {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let mut command = program(&["--tcp-port", "0", "--interval", "300"]);
    command.stdout(writer);
    let exit = Process::spawn_with_stdout(command).exited(PATIENCE);
    assert_eq!((exit.code, exit.signal), (Some(0), None), "{exit:?}");
    assert_eq!(exit.stderr, [""; 0]);
}

/// What is in a file already stays there, and what others add to it meanwhile, too.
#[test]
fn stdout_in_a_file_is_appended_to() {
    let scratch = Scratch::new();
    let path = scratch.file("log");
    let mut file = File::create(&path).unwrap();
    io::Write::write_all(&mut file, b"before\n").unwrap();
    let mut command = program(&calm(&["--bind", "127.0.0.1", "--tcp-port", "0"]));
    command.stdout(file.try_clone().unwrap());
    let mut process = Process::spawn_with_stdout(command);
    let address = process.listening_address();
    let text = || std::fs::read_to_string(&path).unwrap();
    eventually(PATIENCE, "it says where it serves", || text().contains(&address.to_string()));
    io::Write::write_all(&mut file, b"meanwhile\n").unwrap();
    process.stop();
    assert_eq!(text(), format!("before\nServing on {address}\nmeanwhile\nObserving 0\n"));
}

/// A full disk under stdout ends it with an error message.
#[test]
fn full_stdout_ends_it_with_an_error() {
    for options in [["--interval", "300"].as_slice(), &["--interval", "300", "--quiet"]] {
        let mut command = program(&[&["--tcp-port", "0"], options].concat());
        command.stdout(Stdio::from(File::options().write(true).open("/dev/full").unwrap()));
        let exit = Process::spawn_with_stdout(command).exited(PATIENCE);
        assert_eq!((exit.code, exit.signal), (Some(1), None), "{exit:?}");
        assert_eq!(exit.stderr.len(), 1, "{exit:?}");
        assert!(exit.stderr[0].starts_with("smolrx: cannot write to stdout: no storage space"), "{exit:?}");
    }
}

/// So do the texts of `--help` and `--version`; a pipe that is closed has been read enough.
#[test]
fn full_stdout_under_help_is_an_error() {
    for option in ["--help", "--version"] {
        let mut command = program(&[option]);
        command.stdout(Stdio::from(File::options().write(true).open("/dev/full").unwrap()));
        let exit = Process::spawn_with_stdout(command).exited(PATIENCE);
        assert_eq!(exit.code, Some(1), "{exit:?}");
        assert_eq!(exit.stderr, ["smolrx: cannot write to stdout: no storage space (error 28)"]);
        let mut command = program(&[option]);
        command.stdout(Stdio::from(std::io::pipe().unwrap().1));
        let exit = Process::spawn_with_stdout(command).exited(PATIENCE);
        assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{exit:?}");
    }
}

// ---------------------------------------------------------- what it asks for

/// An idle server, with idle connections or without, does not run at all between two ticks of its clock.
#[test]
fn idle_server_does_nothing() {
    let server = Server::start(&["--interval", "12000", "--keep-open"]);
    let mut clients: Vec<Client> = (0..3).map(|_| server.connect()).collect();
    clients[0].send("foo\n");
    clients[0].expect("foo\n");
    server.stdout.wait_for("Observing foo");
    // Whatever the last event started comes to rest...
    let mut before = server.activity();
    eventually(ms(3000), "it comes to rest", || {
        thread::sleep(ms(200));
        let earlier = std::mem::replace(&mut before, server.activity());
        earlier == before
    });
    // ...and nothing runs any more: a thread that makes a system call has to run for it.
    thread::sleep(ms(2000));
    assert_eq!(server.activity(), before);
}

/// At start the soft limit of descriptors is raised to the hard one.
#[test]
fn descriptor_limit_is_raised() {
    let server = Server::start_after("ulimit -S -n 256; ulimit -H -n 1000", &CALM);
    assert_eq!(server.descriptor_limits(), ("1000".into(), "1000".into()));
}
