//! Being a process: signals, as process 1 and elsewhere, and outputs that are closed or fail.

mod common;

use common::*;
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::Signal;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Instant;

/// A server ends well once this client, which is in the middle of a line, has ended it; the line is observed.
#[track_caller]
fn ends_well(mut server: Server, mut client: Client) {
    server.wait_until_refused();
    assert!(server.is_running(), "it does not wait for the client's line: {:?}", server.exited(PATIENCE));
    client.send("ish\n");
    assert_eq!(client.rest(), b"finish\n");
    let exit = server.exited(PATIENCE);
    assert_eq!((exit.code, exit.signal), (Some(0), None), "{exit:?}");
    assert_eq!(observed(&exit.stdout), ["finish"]);
}

fn dev_full() -> File {
    File::options().write(true).open("/dev/full").unwrap()
}

// -------------------------------------------------------------------- signals

/// As process 1 it ends well at SIGHUP, which a terminal that closes sends, and at SIGTERM and SIGINT.
#[test]
fn signals_stop_process_one() {
    for signal in [Signal::HUP, Signal::TERM, Signal::INT] {
        let Some(server) = as_process_one("true", &calm_on_loopback("")) else { return };
        let client = server.client_in("fin");
        server.signal(signal);
        ends_well(server, client);
    }
}

/// A second signal ends process 1 at once, with 128 and the number of the second one, be it SIGHUP, too.
#[test]
fn second_signal_ends_it_at_once() {
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
        assert_eq!((exit.code, exit.signal), (Some(code), None), "{first:?}, {second:?}: {exit:?}");
        assert_eq!(observed(&exit.stdout), [""; 0], "{first:?}, {second:?}");
    }
}

/// Elsewhere than as process 1, SIGHUP does what it does to any program: it kills, but not under nohup.
#[test]
fn hangup_is_for_process_one_alone() {
    let mut server = Server::calm("");
    server.signal(Signal::HUP);
    let exit = server.exited(PATIENCE);
    assert_eq!((exit.code, exit.signal), (None, Some(1)), "{exit:?}");
    let mut server = Server::start_after("exec nohup \"$0\" \"$@\"", &calm(""));
    for _ in 0..3 {
        server.signal(Signal::HUP);
        server.echo("foo\n");
    }
    server.stop();
}

/// Signals are blocked first of all in `main`: one that comes when the program first touches its signal mask
/// is not lost, and kills nobody. (As process 1 it would be lost; that is harder to see.)
#[test]
fn signal_at_the_very_start_is_not_lost() {
    for signal in ["TERM", "INT"] {
        for moment in 1..=4 {
            let Some(strace) = strace(&format!("rt_sigprocmask:signal={signal}:when={moment}")) else {
                return;
            };
            let exit = run(within(strace, &calm_on_loopback("")));
            let what = format!("{signal} at the {moment}. change of its mask: {exit:?}");
            assert_eq!((exit.code, exit.signal), (Some(0), None), "{what}");
            assert_eq!(observed(&exit.stdout), ["0"], "{what}");
        }
    }
}

/// Signals within 100 ms of the first one are the same signal, as many as come.
#[test]
fn signals_within_100_ms_are_one() {
    for signals in [[Signal::TERM, Signal::TERM], [Signal::TERM, Signal::INT], [Signal::INT, Signal::TERM]] {
        let (server, client) = (0..20)
            .find_map(|_| {
                let server = Server::calm("");
                let client = server.client_in("fin");
                let first = Instant::now();
                for signal in signals.iter().cycle().take(6) {
                    server.signal(*signal);
                    thread::sleep(ms(10));
                }
                // On a busy machine a pause may have been longer, and proves nothing.
                (first.elapsed() < ms(80)).then_some((server, client))
            })
            .expect("six pauses of 10 ms that take less than 80 ms");
        ends_well(server, client);
    }
}

// --------------------------------------------------- stdout is closed, or fails

/// When the reader of stdout goes, the server ends at once, as by SIGPIPE, and without a word.
#[track_caller]
fn ends_with_its_reader(process: &mut Process, reader: impl Sized, what: &str) {
    drop(reader);
    let exit = process.exited(ms(2000));
    assert_eq!((exit.code, exit.signal, exit.stderr.len()), (Some(141), None, 0), "{what}: {exit:?}");
}

/// Whoever closes its stdout, pipe, socket or terminal, ends it at once, not at its next output: silently,
/// with 141, as if by SIGPIPE.
#[test]
fn closed_stdout_ends_it_at_once() {
    for options in ["", "--quiet", "--quiet --interval 0"] {
        for (what, reader, output) in outputs() {
            let mut server = Server::on_loopback(calm_on_loopback(options).stdout(output));
            let _client = server.client_in("fin");
            ends_with_its_reader(&mut server, reader, &format!("{what}, {options}"));
        }
    }
}

/// A stdout whose reader had gone before the start ends it in the same way; a terminal that hung up may also
/// be the error that it is to who writes to it.
#[test]
fn stdout_closed_before_the_start_ends_it() {
    for options in ["", "--quiet"] {
        for (what, reader, output) in outputs() {
            drop(reader);
            let exit = run(calm_on_loopback(options).stdout(output));
            match (exit.code, &exit.stderr[..]) {
                (Some(141), []) => {}
                (Some(1), [said]) if said.starts_with("smolrx: cannot write to stdout: ") => {
                    assert_eq!(what, "a terminal", "{options}: {said}");
                }
                _ => panic!("{what}, {options}: {exit:?}"),
            }
        }
    }
}

/// A reader that leaves while text waits for it ends the server with 141, too, and one that stops already.
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
            assert!(server.is_running());
        }
        ends_with_its_reader(&mut server, reader, &format!("stopping {stopping}"));
    }
}

/// An output of any kind, a half-closed socket included, costs no processor time while nothing is written.
#[test]
fn quiet_output_costs_nothing() {
    let scratch = Scratch::new();
    let mut outputs = Vec::from(outputs());
    let mut add = |what, reader: Box<dyn Read + Send>, output: OwnedFd| outputs.push((what, reader, output));
    for half in [Shutdown::Write, Shutdown::Read] {
        let (peer, socket) = UnixStream::pair().unwrap();
        peer.shutdown(half).unwrap();
        add("a half-closed socket", Box::new(peer), socket.into());
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    peer.shutdown(Shutdown::Write).unwrap();
    add("a half-closed TCP connection", Box::new(peer), listener.accept().unwrap().0.into());
    add("/dev/null", Box::new(io::empty()), File::create("/dev/null").unwrap().into());
    add("a file", Box::new(io::empty()), File::create(scratch.file("log")).unwrap().into());
    at_once(outputs, |(what, _reader, output)| {
        let mut server = Server::on_loopback(calm_on_loopback("--quiet").stdout(output));
        server.echo("foo\n");
        server.comes_to_rest();
        assert!(server.is_running(), "beside {what} it has ended: {:?}", server.exited(PATIENCE));
    });
}

/// A stdout that fails, as on a full disk, is an error, for the server and for a text that is printed once;
/// one that is closed is none for such a text.
#[test]
fn failed_stdout_is_an_error() {
    for option in ["--help", "--version"] {
        let exit = run(program(option).stdout(io::pipe().unwrap().1));
        assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{option}: {exit:?}");
    }
    let servers = [calm_on_loopback(""), calm_on_loopback("-q --debounce 1")];
    for mut command in servers.into_iter().chain(["--help", "--version"].map(program)) {
        let exit = run(command.stdout(dev_full()));
        assert_eq!((exit.code, exit.signal), (Some(1), None), "{command:?}: {exit:?}");
        assert_eq!(exit.stderr, ["smolrx: cannot write to stdout: no storage space (error 28)"]);
    }
}

// -------------------------------------------------------------------- stderr

/// A stderr that nobody reads holds up no end by an error, be it a stdout that fails or a wrong option.
#[test]
fn stalled_stderr_holds_up_no_end() {
    let (_reader, mut stderr) = io::pipe().unwrap();
    fcntl_setfl(&stderr, OFlags::NONBLOCK).unwrap();
    while stderr.write(&[b'x'; 4096]).is_ok() {}
    fcntl_setfl(&stderr, OFlags::empty()).unwrap();
    for (mut command, code) in [(calm_on_loopback(""), 1), (program("--frobnicate"), 2)] {
        command.stdout(dev_full()).stderr(stderr.try_clone().unwrap());
        assert_eq!(Process::spawn(&mut command).exited(ms(6000)).code, Some(code), "{command:?}");
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
    assert!(probe.is_running());
    probe.signal(Signal::TERM);
    let exit = probe.exited(PATIENCE);
    server.wake();
    assert_eq!((exit.code, exit.signal), (None, Some(15)), "{exit:?}");
}
