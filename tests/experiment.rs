//! What the original experiment did, with its two options only: the Python baseline passes these as well
//! (`SMOLRX_BIN=path/to/its/wrapper cargo test --test experiment`).

mod common;

use common::*;
use rustix::process::Signal;
use std::time::Instant;

/// It says where it serves, and serves there.
#[test]
fn serves_where_it_says() {
    let server = Server::of(program(&calm("--tcp-port 0")));
    assert_ne!(server.address.port(), 0);
    server.echo("foo\n");
}

/// A line comes back as it was sent, accents and line ending included, and the connection is closed; it is shown
/// and observed without the blanks at its ends, and a connection leaves three lines, in this order.
#[test]
fn line_comes_back_as_sent_and_is_shown_stripped() {
    for (line, shown) in
        [("foo\n", "foo"), ("foo\r\n", "foo"), ("  foo bar \t \n", "foo bar"), ("naïve ✓ 🦀\n", "naïve ✓ 🦀")]
    {
        let mut server = Server::calm("");
        let mut client = server.connect();
        client.send(line);
        assert_eq!(client.rest(), line.as_bytes());
        server.stdout.wait_for(CLOSE);
        server.stop().tells_of(shown, client.port());
    }
}

/// A last line without a newline counts once the client has ended its sending side.
#[test]
fn last_line_without_newline_counts() {
    let mut server = Server::calm("");
    let port = server.echo("foo");
    server.stop().tells_of("foo", port);
}

/// A received line is observed, stripped, when nothing else has come for a tenth of the interval.
#[test]
fn observes_a_line_after_the_debounce() {
    let server = Server::start("--interval 4000");
    // Now it is a long time to the clock's next tick, which would take the line's place.
    server.stdout.wait_for("Observing 0");
    let sent = Instant::now();
    server.echo("  foo\t \n");
    server.stdout.wait_for("Observing foo");
    assert!(sent.elapsed() >= ms(395), "after {:?}", sent.elapsed());
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

/// Of lines in quick succession only the last is observed.
#[test]
fn burst_is_debounced_to_its_last() {
    let server = Server::start("--interval 15000");
    server.stdout.wait_for("Observing 0");
    for line in ["a\n", "b\n", "c\n", "d\n", "e\n"] {
        server.echo(line);
    }
    server.stdout.wait_for("Observing e");
    assert_eq!(observed(&server.stdout.lines()), ["0", "e"]);
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
