//! What the original experiment did, with its two options only. The Python baseline passes these tests, too:
//! `.ci/run` gives `SMOLRX_BIN` a script that starts it.

mod common;

use common::*;
use rustix::process::Signal;
use std::time::Instant;

/// A line comes back as it was sent, accents and line ending included, and the connection is closed; the line
/// is shown and observed without the blanks at its ends, and a connection leaves the lines of `conversation`,
/// in order. The last line of a client that has ended its sending side needs no newline.
#[test]
fn line_comes_back_as_sent_and_is_shown_stripped() {
    for (line, shown) in
        [("foo\n", "foo"), ("  foo bar \t \r\n", "foo bar"), ("naïve ✓ 🦀\n", "naïve ✓ 🦀"), ("foo", "foo")]
    {
        let mut server = Server::calm("");
        let mut client = server.connect();
        client.send(line);
        if !line.ends_with('\n') {
            client.finish();
        }
        assert_eq!(client.rest(), line.as_bytes());
        server.stdout.wait_for(CLOSE);
        server.stop().tells_of(shown, client.port());
    }
}

/// Of lines in quick succession only the last is observed, when a tenth of the interval has been silent.
#[test]
fn burst_is_debounced_to_its_last() {
    let server = Server::start("--interval 15000");
    // Now it is a long time to the clock's next tick, which in Python would take the line's place.
    server.stdout.wait_for("Observing 0");
    for line in ["a\n", "b\n", "c\n", "d\n"] {
        server.echo(line);
    }
    let sent = Instant::now();
    server.echo("foo\n");
    server.stdout.wait_for("Observing foo");
    assert!(sent.elapsed() >= ms(1495), "after {:?}", sent.elapsed());
    assert_eq!(observed(&server.stdout.lines()), ["0", "foo"]);
}

/// The clock counts from 0, at once and then every interval, and each tick is observed after the debounce.
#[test]
fn clock_ticks() {
    let started = Instant::now();
    let server = Server::start("--interval 700");
    server.stdout.wait_for("Observing 2");
    let elapsed = started.elapsed();
    assert_eq!(server.stdout.lines()[1..], ["Observing 0", "Observing 1", "Observing 2"]);
    assert!(elapsed >= ms(2 * 700 + 65), "after {elapsed:?}");
}

/// SIGTERM and SIGINT flush what is pending, a line or else the clock's first tick, and the exit code is 0.
#[test]
fn signals_flush_the_pending_value() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut server = Server::calm("");
        let port = server.echo("foo\n");
        server.signal(signal);
        let exit = server.exited(PATIENCE);
        assert_eq!(exit.code, Some(0), "{exit:?}");
        exit.tells_of("foo", port);
    }
    assert_eq!(Server::calm("").stop().stdout[1..], ["Observing 0"]);
}
