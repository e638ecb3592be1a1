//! What the server does, point by point, on the real binary over real sockets.

mod common;

use common::*;
use std::fs::{self, File};
use std::io::Write;
use std::net::SocketAddr;
use std::thread;
use std::time::Instant;

// ---------------------------------------------------------------- it listens

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

/// A port that another server has gets one sentence on stderr, and exit code 1; the other server goes on.
#[test]
fn port_in_use_is_one_sentence() {
    let mut server = Server::start(&calm(&["--bind", "127.0.0.1"]));
    let address = server.address.to_string();
    let exit = run(&["--bind", "127.0.0.1", "--tcp-port", &server.address.port().to_string()]);
    cannot_listen(&exit, &address, &["address in use"]);
    let port = server.echo("foo\n");
    assert_eq!(server.stop().stdout[1..4], conversation("foo", port));
}

/// An address that is not this machine's gets one sentence, and exit code 1.
#[test]
fn foreign_address_is_one_sentence() {
    let exit = run(&["--bind", "192.0.2.1", "--tcp-port", "8888"]);
    cannot_listen(&exit, "192.0.2.1:8888", &["address not available"]);
}

/// A link-local address, which needs a scope, gets one sentence, also on a machine without IPv6.
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

/// Two servers at one port of two addresses do not get into each other's way.
#[test]
fn one_port_of_two_addresses() {
    let mut one = Server::start(&calm(&["--bind", "127.0.0.1"]));
    let port = one.address.port().to_string();
    let bind_two = calm(&["--bind", "127.0.0.2", "--tcp-port", &port]);
    let mut two = Server::of(Process::spawn(program(&bind_two)));
    one.echo("foo\n");
    two.echo("bar\n");
    assert_eq!(observed(&two.stop().stdout), ["bar"]);
    assert_eq!(observed(&one.stop().stdout), ["foo"]);
}

// ---------------------------------------------------------------- each connection

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

// ---------------------------------------------------------------- --quiet

/// `-q` and `--quiet` print only what is observed.
#[test]
fn quiet_prints_only_what_is_observed() {
    for option in ["-q", "--quiet"] {
        let mut process = Process::spawn(program(&calm_on_loopback(&[option])));
        let mut client = Client::connect(process.listening_address());
        client.send("foo\n");
        assert_eq!(client.rest(), b"foo\n");
        assert_eq!(process.stop().stdout, ["foo"]);
    }
}

/// With `-q` an event is a line of its own and nothing else: a tick, a line without the blanks at its ends, or nothing.
#[test]
fn quiet_prints_bare_events() {
    let mut process = Process::spawn(program(&["--tcp-port", "0", "-q", "--interval", "200"]));
    process.stdout.wait_for_count(4);
    assert_eq!(process.stop().stdout[..4], ["0", "1", "2", "3"]);

    let mut process = Process::spawn(program(&calm_on_loopback(&["-q", "--debounce", "50", "--keep-open"])));
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

// ---------------------------------------------------------------- bursts

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

/// A client that pokes more often than `--debounce` holds back every event, unless there is a `--max-wait`.
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

/// Of a burst the last line is observed, also when ticks of the clock come after it.
#[test]
fn tick_does_not_take_a_lines_place() {
    let server = Server::start(&["--interval", "200", "--debounce", "400", "--max-wait", "900"]);
    for i in 0..3 {
        let line = format!("line {i}");
        server.echo(&line);
        server.stdout.wait_for(&format!("Observing {line}"));
    }
}

// ---------------------------------------------------------------- what it asks for

/// What is in a file already stays there, and what others add to it meanwhile, too.
#[test]
fn stdout_in_a_file_is_appended_to() {
    let scratch = Scratch::new();
    let path = scratch.file("log");
    let mut file = File::create(&path).unwrap();
    file.write_all(b"before\n").unwrap();
    let mut command = program(&calm_on_loopback(&[]));
    command.stdout(file.try_clone().unwrap());
    let mut process = Process::spawn_with_stdout(command);
    let address = process.listening_address();
    let text = || fs::read_to_string(&path).unwrap();
    eventually(PATIENCE, "it says where it serves", || text().contains(&address.to_string()));
    file.write_all(b"meanwhile\n").unwrap();
    process.stop();
    assert_eq!(text(), format!("before\nServing on {address}\nmeanwhile\nObserving 0\n"));
}

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
