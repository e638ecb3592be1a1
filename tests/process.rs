//! Being a process: signals, as process 1 and elsewhere, and outputs that are closed or fail.

mod common;

use common::*;
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::{Signal, kill_process};
use std::fs::File;
use std::io::{self, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

/// A client in the middle of a line: it holds up the end of a server that ends well, and nothing else.
fn client_in_a_line(server: &Server) -> Client {
    let mut client = server.connect();
    client.send("fin");
    client.is_taken();
    client
}

/// A server ends well once this client, which is in the middle of a line, has ended it; the line is observed.
#[track_caller]
fn ends_well(mut server: Server, mut client: Client) {
    server.refuses();
    assert!(server.is_running(), "it does not wait for the client's line: {:?}", server.exited(PATIENCE));
    client.send("ish\n");
    assert_eq!(client.rest(), b"finish\n");
    let exit = server.exited(PATIENCE);
    assert_eq!((exit.code, exit.signal), (Some(0), None), "{exit:?}");
    assert_eq!(observed(&exit.stdout), ["finish"]);
}

/// The program with this standard output, started.
fn with_stdout(options: &[&str], stdout: impl Into<Stdio>) -> Process {
    let mut command = program(options);
    command.stdout(stdout);
    Process::spawn_with_stdout(command)
}

fn dev_full() -> File {
    File::options().write(true).open("/dev/full").unwrap()
}

// -------------------------------------------------------------------- signals

/// As process 1 it ends well at SIGHUP, which a terminal that closes sends, and at SIGTERM and SIGINT.
#[test]
fn signals_stop_process_one() {
    for signal in [Signal::HUP, Signal::TERM, Signal::INT] {
        let Some((server, pid)) = as_process_one("true", &program(&calm_on_loopback(&[]))) else { return };
        let client = client_in_a_line(&server);
        kill_process(pid, signal).unwrap();
        ends_well(server, client);
    }
}

/// A second signal ends it at once, with 128 and the number of the second one, as process 1, too, where
/// SIGHUP counts.
#[test]
fn second_signal_ends_it_at_once() {
    for (first, second, code) in [
        (Signal::HUP, Signal::HUP, 129),
        (Signal::TERM, Signal::HUP, 129),
        (Signal::HUP, Signal::INT, 130),
        (Signal::INT, Signal::TERM, 143),
    ] {
        let Some((mut server, pid)) = as_process_one("true", &program(&calm_on_loopback(&[]))) else {
            return;
        };
        let _client = client_in_a_line(&server);
        kill_process(pid, first).unwrap();
        server.refuses();
        thread::sleep(ms(150)); // sooner, it would be the same signal
        kill_process(pid, second).unwrap();
        let exit = server.exited(ms(1500));
        assert_eq!((exit.code, exit.signal), (Some(code), None), "{first:?}, {second:?}: {exit:?}");
        assert_eq!(observed(&exit.stdout), [""; 0], "{first:?}, {second:?}");
    }
}

/// Elsewhere than as process 1, SIGHUP does what it does to any program: it kills, but not under nohup.
#[test]
fn hangup_is_for_process_one_alone() {
    let mut server = Server::start(&CALM);
    server.signal(Signal::HUP);
    let exit = server.exited(PATIENCE);
    assert_eq!((exit.code, exit.signal), (None, Some(1)), "{exit:?}");
    let mut server = Server::start_after("exec nohup \"$0\" \"$@\"", &CALM);
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
    if let Some(reason) = refusal(Command::new("strace").args(["-o", "/dev/null", "true"])) {
        return skip(format!("no strace: {reason}"));
    }
    for signal in ["TERM", "INT"] {
        for moment in 1..=4 {
            let inject = format!("inject=rt_sigprocmask:signal={signal}:when={moment}");
            let program = program(&calm_on_loopback(&[]));
            let mut strace = Command::new("strace");
            strace.args(["-o", "/dev/null", "-e", &inject]).arg(program.get_program());
            strace.args(program.get_args());
            let exit = Process::spawn(strace).exited(PATIENCE);
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
                let server = Server::start(&CALM);
                let client = client_in_a_line(&server);
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

/// An output, and what closes it: its reader's end.
type Closable = (&'static str, OwnedFd, Box<dyn Send>);

fn closable_outputs() -> Vec<Closable> {
    let (reader, writer) = io::pipe().unwrap();
    let (peer, socket) = UnixStream::pair().unwrap();
    let (screen, terminal) = terminal();
    vec![
        ("a pipe", writer.into(), Box::new(reader)),
        ("a socket", socket.into(), Box::new(peer)),
        ("a terminal", terminal, Box::new(screen)),
    ]
}

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
    for options in [&[][..], &["--quiet"], &["--quiet", "--interval", "0"]] {
        for (what, output, reader) in closable_outputs() {
            let mut server = Server::found(with_stdout(&calm_on_loopback(options), output));
            let _client = client_in_a_line(&server);
            ends_with_its_reader(&mut server, reader, &format!("{what}, {options:?}"));
        }
    }
}

/// A stdout whose reader had gone before the start ends it in the same way; a terminal that hung up may also
/// be the error that it is to who writes to it.
#[test]
fn stdout_closed_before_the_start_ends_it() {
    for options in [&[][..], &["--quiet"]] {
        for (what, output, reader) in closable_outputs() {
            drop(reader);
            let exit = with_stdout(&calm_on_loopback(options), output).exited(PATIENCE);
            match (exit.code, &exit.stderr[..]) {
                (Some(141), []) => {}
                (Some(1), [said]) if said.starts_with("smolrx: cannot write to stdout: ") => {
                    assert_eq!(what, "a terminal", "{options:?}: {said}");
                }
                _ => panic!("{what}, {options:?}: {exit:?}"),
            }
        }
    }
}

/// A reader that leaves while text waits for it ends it with 141, too, be it that the server is stopping
/// already.
#[test]
fn stdout_closed_while_text_waits_ends_it() {
    for stopping in [false, true] {
        let (reader, writer) = io::pipe().unwrap();
        let options = calm_on_loopback(&["--keep-open", "--timeout", "600000"]);
        let mut server = Server::found(with_stdout(&options, writer));
        let mut floods = [Flood::new(server.connect(), true)];
        Flood::pump_until_stalled(&mut floods, ms(500));
        if stopping {
            server.signal(Signal::TERM);
            server.refuses();
            assert!(server.is_running());
        }
        ends_with_its_reader(&mut server, reader, &format!("stopping {stopping}"));
    }
}

/// An output that is not closed, of any kind, a half-closed socket included, costs no processor time while
/// there is nothing to write.
#[test]
fn quiet_output_costs_nothing() {
    let scratch = Scratch::new();
    let mut outputs = closable_outputs();
    for half in [Shutdown::Write, Shutdown::Read] {
        let (peer, socket) = UnixStream::pair().unwrap();
        peer.shutdown(half).unwrap();
        outputs.push(("a half-closed socket", socket.into(), Box::new(peer)));
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    peer.shutdown(Shutdown::Write).unwrap();
    outputs.push(("a half-closed TCP connection", listener.accept().unwrap().0.into(), Box::new(peer)));
    outputs.push(("/dev/null", File::create("/dev/null").unwrap().into(), Box::new(())));
    outputs.push(("a file", File::create(scratch.file("log")).unwrap().into(), Box::new(())));
    let start = |(what, output, reader)| {
        let server = Server::found(with_stdout(&calm_on_loopback(&["--quiet"]), output));
        server.echo("foo\n");
        (what, server, reader)
    };
    for (what, server, _reader) in &mut outputs.into_iter().map(start).collect::<Vec<_>>() {
        let mut before = server.activity();
        eventually(ms(5000), &format!("beside {what} it comes to rest"), || {
            thread::sleep(ms(200));
            let earlier = std::mem::replace(&mut before, server.activity());
            earlier == before
        });
        assert!(server.is_running(), "beside {what} it has ended: {:?}", server.exited(PATIENCE));
    }
}

/// A stdout that fails, as on a full disk, is an error, for the server and for a text that is printed once;
/// one that is closed is none for such a text.
#[test]
fn failed_stdout_is_an_error() {
    let texts: [&[&str]; 2] = [&["--help"], &["--version"]];
    for options in texts {
        let (_, closed) = io::pipe().unwrap();
        let exit = with_stdout(options, closed).exited(PATIENCE);
        assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{options:?}: {exit:?}");
    }
    let events = ["-q", "--debounce", "1"];
    for options in [texts[0], texts[1], &calm_on_loopback(&[]), &calm_on_loopback(&events)] {
        let exit = with_stdout(options, dev_full()).exited(PATIENCE);
        assert_eq!((exit.code, exit.signal), (Some(1), None), "{options:?}: {exit:?}");
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
    for (options, code) in [(&*calm_on_loopback(&[]), 1), (&["--frobnicate"], 2)] {
        let mut command = program(options);
        command.stdout(dev_full()).stderr(stderr.try_clone().unwrap());
        assert_eq!(Process::spawn_with_output(command).exited(ms(6000)).code, Some(code), "{options:?}");
    }
}

/// A stderr that is closed ends nothing: it is written to in vain.
#[test]
fn closed_stderr_ends_nothing() {
    let mut command = program(&calm_on_loopback(&["--max-line", "4", "--debounce", "600000"]));
    command.stdout(Stdio::piped()).stderr(io::pipe().unwrap().1);
    let mut server = Server::found(Process::spawn_with_output(command));
    let mut client = server.connect();
    client.send("too long\n");
    assert_eq!(client.until_closed(), b"");
    server.echo("foo\n");
    assert_eq!(observed(&server.stop().stdout), ["foo"]);
}

// ------------------------------------------------------------------ the probe

/// A probe that waits is ended by a signal as any program is.
#[test]
fn probe_is_ended_by_a_signal() {
    let server = Server::start(&CALM);
    server.suspend();
    let port = server.address.port().to_string();
    let mut probe = Process::spawn(program(&["--health", "--tcp-port", &port]));
    thread::sleep(ms(100)); // it waits for a second
    assert!(probe.is_running());
    probe.signal(Signal::TERM);
    let exit = probe.exited(PATIENCE);
    server.wake();
    assert_eq!((exit.code, exit.signal), (None, Some(15)), "{exit:?}");
}
