//! Being a process: signals, as process 1 and elsewhere, and outputs that are closed or fail.

mod common;

use common::*;
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::Signal;
use std::fs::File;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Instant;

// -------------------------------------------------------------------- signals

/// Process 1 stops at SIGHUP (a terminal that closes sends it) as at SIGTERM and SIGINT; a second one of them
/// ends it at once, with 128 + its number.
#[test]
fn second_signal_ends_process_one_at_once() {
    for (first, second, code) in [
        (Signal::HUP, Signal::HUP, 129),
        (Signal::TERM, Signal::HUP, 129),
        (Signal::HUP, Signal::INT, 130),
        (Signal::INT, Signal::TERM, 143),
    ] {
        let Some(mut server) = as_process_one("true", &calm_on_loopback("")) else { return };
        let _client = server.client_in("fin");
        server.signal_twice(first, second);
        let exit = server.exited(ms(1500));
        assert_eq!(exit.code, Some(code), "{first:?}, {second:?}: {exit:?}");
        assert_eq!(observed(&exit.stdout), [""; 0], "{first:?}, {second:?}");
    }
}

/// To any process but process 1, SIGHUP does what it does to any program: it kills, but not under nohup.
#[test]
fn hangup_is_for_process_one_alone() {
    let mut server = Server::calm("");
    server.signal(Signal::HUP);
    assert_eq!(server.exited(PATIENCE).signal, Some(1));
    let mut server = Server::start_after("exec nohup \"$0\" \"$@\"", &calm(""));
    server.signal(Signal::HUP);
    server.echo("foo\n");
    server.stop();
}

/// Signals are blocked first of all in `main`: one that comes at a change of the signal mask is neither lost
/// nor deadly. (Otherwise it would kill here; process 1 would lose it, which is harder to see.)
#[test]
fn signal_at_the_very_start_is_not_lost() {
    for moment in 1..=4 {
        let Some(strace) = strace(&format!("rt_sigprocmask:signal=TERM:when={moment}")) else { return };
        let exit = run(within(strace, &calm_on_loopback("")));
        assert_eq!(exit.code, Some(0), "at change {moment} of its mask: {exit:?}");
        assert_eq!(observed(&exit.stdout), ["0"], "at change {moment} of its mask");
    }
}

/// Signals within 100 ms of the first count as one, however many come.
#[test]
fn signals_within_100_ms_are_one() {
    for signals in [[Signal::TERM, Signal::TERM], [Signal::TERM, Signal::INT], [Signal::INT, Signal::TERM]] {
        let is_quick = (0..20).any(|_| {
            let mut server = Server::calm("");
            let mut client = server.client_in("fin");
            let first = Instant::now();
            for signal in signals.repeat(3) {
                server.signal(signal);
                thread::sleep(ms(10));
            }
            // On a busy machine a pause may have been longer, and proves nothing.
            if first.elapsed() >= ms(80) {
                return false;
            }
            server.wait_until_refused();
            client.send("ish\n");
            assert_eq!(client.rest(), b"finish\n", "{signals:?}");
            server.stopped(first).tells_of("finish", client.port());
            true
        });
        assert!(is_quick, "six pauses of 10 ms take 80 ms or more, twenty times");
    }
}

// --------------------------------------------------- stdout is closed, or fails

/// A reader that closes stdout (a pipe, socket or terminal) ends the server at once, not at its next output:
/// silently, with 141, as if by SIGPIPE.
#[test]
fn closed_stdout_ends_it_at_once() {
    for options in ["", "--quiet", "--quiet --interval 0"] {
        for (what, reader, output) in outputs() {
            let mut server = Server::on_loopback(calm_on_loopback(options).stdout(output));
            let _client = server.client_in("fin");
            drop(reader);
            let exit = server.exited(ms(2000));
            assert_eq!((exit.code, exit.stderr.len()), (Some(141), 0), "{what}, {options}: {exit:?}");
        }
    }
}

/// A stdout whose reader had gone before the start ends it in the same way; a terminal that hung up may be
/// reported as a write error instead.
#[test]
fn stdout_closed_before_the_start_ends_it() {
    for options in ["", "--quiet"] {
        for (what, reader, output) in outputs() {
            drop(reader);
            let exit = run(calm_on_loopback(options).stdout(output));
            match (exit.code, &exit.stderr[..]) {
                (Some(141), []) => {}
                (Some(1), [said]) if what == "a terminal" => {
                    assert!(said.starts_with("smolrx: cannot write to stdout: "), "{options}: {said}");
                }
                _ => panic!("{what}, {options}: {exit:?}"),
            }
        }
    }
}

/// A reader that leaves while text waits for it ends the server with 141, even one that is stopping.
#[test]
fn stdout_closed_while_text_waits_ends_it() {
    for stopping in [false, true] {
        let (reader, writer) = io::pipe().unwrap();
        let mut server = Server::on_loopback(calm_on_loopback("--keep-open --timeout 600000").stdout(writer));
        let mut floods = [Flood::new(server.connect(), true)];
        Flood::pump_until_stalled(&mut floods, ms(500));
        if stopping {
            server.signal(Signal::TERM);
            server.wait_until_refused();
        }
        drop(reader);
        let exit = server.exited(ms(2000));
        assert_eq!((exit.code, exit.stderr.len()), (Some(141), 0), "stopping {stopping}: {exit:?}");
    }
}

/// An output of any kind, a half-closed socket included, costs no processor time while nothing is written.
#[test]
fn quiet_output_costs_nothing() {
    let mut outputs = Vec::from(outputs());
    for half in [Shutdown::Write, Shutdown::Read] {
        let (peer, socket) = UnixStream::pair().unwrap();
        peer.shutdown(half).unwrap();
        outputs.push(("a half-closed socket", Box::new(peer), socket.into()));
    }
    for (what, path) in [("/dev/null", "/dev/null".into()), ("a file", scratch().join("log"))] {
        outputs.push((what, Box::new(io::empty()), File::create(path).unwrap().into()));
    }
    at_once(outputs, |(what, _reader, output)| {
        let mut server = Server::on_loopback(calm_on_loopback("--quiet").stdout(output));
        server.echo("foo\n");
        server.comes_to_rest();
        assert!(server.is_running(), "beside {what} it has ended: {:?}", server.exited(PATIENCE));
    });
}

/// A stdout that fails, as on a full disk, is an error, for the server as for `--help` and `--version`; one
/// that its reader has closed is none for these two.
#[test]
fn failed_stdout_is_an_error() {
    for option in ["--help", "--version"] {
        let (_, closed) = io::pipe().unwrap();
        let exit = run(program(option).stdout(closed));
        assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{option}: {exit:?}");
    }
    let servers = [calm_on_loopback(""), calm_on_loopback("-q --debounce 1")];
    for mut command in servers.into_iter().chain(["--help", "--version"].map(program)) {
        let exit = run(command.stdout(File::create("/dev/full").unwrap()));
        assert_eq!(exit.code, Some(1), "{command:?}: {exit:?}");
        assert_eq!(exit.stderr, ["smolrx: cannot write to stdout: no storage space (error 28)"]);
    }
}

// -------------------------------------------------------------------- stderr

/// A stderr that nobody reads does not delay an end by an error: a stdout that fails, or a wrong option.
#[test]
fn stalled_stderr_delays_no_end() {
    let (_reader, mut stderr) = io::pipe().unwrap();
    fcntl_setfl(&stderr, OFlags::NONBLOCK).unwrap();
    while stderr.write(&[b'x'; 4096]).is_ok() {}
    fcntl_setfl(&stderr, OFlags::empty()).unwrap();
    for (mut command, code) in [(calm_on_loopback(""), 1), (program("--frobnicate"), 2)] {
        command.stdout(File::create("/dev/full").unwrap()).stderr(stderr.try_clone().unwrap());
        assert_eq!(Process::spawn(&mut command).exited(ms(2000)).code, Some(code), "{command:?}");
    }
}

// ------------------------------------------------------------------ the probe

/// A probe that waits is ended by a signal as any program is.
#[test]
fn probe_is_ended_by_a_signal() {
    let server = Server::calm("");
    server.suspend();
    let mut probe = Process::spawn(program(&format!("--health --tcp-port {}", server.address.port())));
    thread::sleep(ms(100)); // it waits for a second
    probe.signal(Signal::TERM);
    assert_eq!(probe.exited(PATIENCE).signal, Some(15));
}
