//! Being a process: signals, as process 1 and elsewhere, what is done about a stdout that is closed, and exit codes.

mod common;

use common::*;
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
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

/// A server that must end with this code once this client, which is in the middle of a line, has ended it; the line is
/// observed.
#[track_caller]
fn ends_with(code: i32, mut server: Server, mut client: Client) {
    server.refuses();
    assert!(server.is_running(), "it does not wait for the client's line: {:?}", server.exited(PATIENCE));
    client.send("ish\n");
    assert_eq!(String::from_utf8_lossy(&client.rest()), "finish\n");
    let exit = server.exited(PATIENCE);
    assert_eq!((exit.code, exit.signal), (Some(code), None), "{exit:?}");
    assert_eq!(observed(&exit.stdout), ["finish"]);
}

/// The program with this standard output, started.
fn with_stdout(options: &[&str], stdout: impl Into<Stdio>) -> Process {
    let mut command = program(options);
    command.stdout(stdout);
    Process::spawn_with_stdout(command)
}

/// The program as the last arguments of another one.
fn within(name: &str, arguments: &[&str], program: &Command) -> Command {
    let mut command = Command::new(name);
    command.args(arguments).arg(program.get_program()).args(program.get_args());
    command
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
        ends_with(0, server, client);
    }
}

/// A second signal ends it at once, as process 1 (with SIGHUP included) and elsewhere, with 128 and the number of the
/// second one.
#[test]
fn second_signal_ends_it_at_once() {
    for (is_process_one, first, second, code) in [
        (false, Signal::TERM, Signal::TERM, 143),
        (false, Signal::INT, Signal::INT, 130),
        (false, Signal::TERM, Signal::INT, 130),
        (false, Signal::INT, Signal::TERM, 143),
        (true, Signal::HUP, Signal::HUP, 129),
        (true, Signal::TERM, Signal::HUP, 129),
        (true, Signal::HUP, Signal::TERM, 143),
        (true, Signal::HUP, Signal::INT, 130),
    ] {
        let program = program(&calm_on_loopback(&[]));
        let (mut server, pid) = if is_process_one {
            let Some(started) = as_process_one("true", &program) else { return };
            started
        } else {
            let server = Server::of(Process::spawn(program));
            let pid = Pid::from_raw(server.id() as i32).unwrap();
            (server, pid)
        };
        let _client = client_in_a_line(&server);
        kill_process(pid, first).unwrap();
        server.refuses();
        thread::sleep(ms(150)); // sooner, it would be the same signal
        let signalled = Instant::now();
        kill_process(pid, second).unwrap();
        let exit = server.exited(PATIENCE);
        let what = format!("process 1: {is_process_one}, {first:?}, {second:?}: {exit:?}");
        assert_eq!((exit.code, exit.signal), (Some(code), None), "{what}");
        assert!(signalled.elapsed() < ms(1500), "after {:?}, {what}", signalled.elapsed());
        assert_eq!(observed(&exit.stdout), [""; 0], "{what}");
    }
}

/// Elsewhere than as process 1, SIGHUP does what it does to any program: it kills, and under nohup it is survived.
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

/// Signals are blocked first of all in `main`: one that comes when the program first touches its signal mask is not
/// lost, and kills nobody. (As process 1 it would be lost; that is harder to see.)
#[test]
fn signal_at_the_very_start_is_not_lost() {
    if let Some(reason) = refusal(Command::new("strace").args(["-o", "/dev/null", "true"])) {
        return skip(format!("no strace: {reason}"));
    }
    for signal in ["TERM", "INT"] {
        for moment in 1..=4 {
            let inject = format!("inject=rt_sigprocmask:signal={signal}:when={moment}");
            let strace = ["-o", "/dev/null", "-e", &inject];
            let exit =
                Process::spawn(within("strace", &strace, &program(&calm_on_loopback(&[])))).exited(PATIENCE);
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
        ends_with(0, server, client);
    }
}

/// timeout(1) sends its signal to its child and to its own process group: that is one signal, and the end a good one.
#[test]
fn end_by_timeout_is_a_good_one() {
    if let Some(reason) = refusal(Command::new("timeout").args(["9", "true"])) {
        return skip(format!("no timeout(1): {reason}"));
    }
    for _ in 0..5 {
        let (server, client) = (0..20)
            .find_map(|_| {
                let timeout = within("timeout", &["0.5"], &program(&calm_on_loopback(&[])));
                let (start, server) = (Instant::now(), Server::of(Process::spawn(timeout)));
                let client = client_in_a_line(&server);
                eventually(PATIENCE, "the listener is closed", || {
                    TcpStream::connect(server.address).is_err()
                });
                // On a busy machine the client's time may be over, which proves nothing.
                (start.elapsed() < ms(3000)).then_some((server, client))
            })
            .expect("a server that is stopped within three seconds");
        ends_with(124, server, client);
    }
}

// ------------------------------------------------------------ stdout is closed

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
    let closed = Instant::now();
    drop(reader);
    let exit = process.exited(PATIENCE);
    assert!(closed.elapsed() < ms(2000), "{what}: after {:?}", closed.elapsed());
    assert_eq!((exit.code, exit.signal, exit.stderr.len()), (Some(141), None, 0), "{what}: {exit:?}");
}

/// Whoever closes its stdout, pipe, socket or terminal, ends it at once, not at its next output: silently, with 141, as
/// if by SIGPIPE. It has nothing to write and a client in the middle of a line.
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

/// A stdout whose reader had gone before the start ends it in the same way; a terminal that hung up may also be the
/// error that it is to who writes to it.
#[test]
fn stdout_closed_before_the_start_ends_it() {
    for options in [&[][..], &["--quiet"]] {
        for (what, output, reader) in closable_outputs() {
            drop(reader);
            let exit = with_stdout(&calm_on_loopback(options), output).exited(PATIENCE);
            let (code, said) = (exit.code.unwrap(), exit.stderr.join("\n"));
            let is_error =
                code == 1 && said.starts_with("smolrx: cannot write to stdout: ") && exit.stderr.len() == 1;
            let is_end = code == 141 && said.is_empty();
            assert!(is_end || is_error && what == "a terminal", "{what}, {options:?}: {exit:?}");
        }
    }
}

/// A reader that leaves while text waits for it ends it with 141, too, be it that the server is stopping already.
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

/// What is not closed is let alone: beside an output of any kind that has nothing to say, a socket of which one half is
/// closed included, the server uses no processor, and serves.
#[test]
fn quiet_output_costs_nothing() {
    let scratch = Scratch::new();
    let (_reader, pipe) = io::pipe().unwrap();
    let (_peer, socket) = UnixStream::pair().unwrap();
    let (half_peer, half_socket) = UnixStream::pair().unwrap();
    half_peer.shutdown(Shutdown::Write).unwrap();
    let (deaf_peer, deaf_socket) = UnixStream::pair().unwrap();
    deaf_peer.shutdown(Shutdown::Read).unwrap();
    let (_screen, terminal) = terminal();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp_peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    tcp_peer.shutdown(Shutdown::Write).unwrap();
    let outputs: [(&str, OwnedFd); 8] = [
        ("/dev/null", File::options().write(true).open("/dev/null").unwrap().into()),
        ("a file", File::create(scratch.file("log")).unwrap().into()),
        ("a pipe", pipe.into()),
        ("a socket", socket.into()),
        ("a socket whose peer sends no more", half_socket.into()),
        ("a socket whose peer reads no more", deaf_socket.into()),
        ("a TCP connection whose peer sends no more", listener.accept().unwrap().0.into()),
        ("a terminal", terminal),
    ];
    let mut running = outputs.map(|(what, output)| {
        let server = Server::found(with_stdout(&calm_on_loopback(&["--quiet"]), output));
        server.echo("foo\n");
        (what, server)
    });
    for (what, server) in &mut running {
        let mut before = server.activity();
        eventually(ms(5000), &format!("beside {what} it comes to rest"), || {
            thread::sleep(ms(200));
            let earlier = std::mem::replace(&mut before, server.activity());
            earlier == before
        });
        assert!(server.is_running(), "beside {what} it has ended: {:?}", server.exited(PATIENCE));
    }
}

// -------------------------------------------------------------------- stderr

/// A stderr that nobody reads, with no room for a message, holds up no end: neither one by a signal, nor by a stdout
/// that fails, nor by a usage error.
#[test]
fn stalled_stderr_holds_up_no_end() {
    let (_reader, mut stderr) = io::pipe().unwrap();
    fcntl_setfl(&stderr, OFlags::NONBLOCK).unwrap();
    while stderr.write(&[b'x'; 4096]).is_ok() {}
    fcntl_setfl(&stderr, OFlags::empty()).unwrap();
    let start = |options: &[&str], stdout: Stdio| {
        let mut command = program(options);
        command.stdout(stdout).stderr(stderr.try_clone().unwrap());
        Process::spawn_with_output(command)
    };
    // It has a warning to print.
    let mut server = Server::found(start(&calm_on_loopback(&["--debounce", "600000"]), Stdio::piped()));
    server.echo("foo\n");
    let signalled = Instant::now();
    server.signal(Signal::TERM);
    assert_eq!(observed(&server.stopped(signalled).stdout), ["foo"]);
    assert_eq!(start(&calm_on_loopback(&[]), dev_full().into()).exited(ms(6000)).code, Some(1));
    assert_eq!(start(&["--frobnicate"], Stdio::piped()).exited(ms(6000)).code, Some(2));
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

// ---------------------------------------------------------------- exit codes

/// Each way to end has its exit code, as the conventions are.
#[test]
fn exit_codes() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken_port = taken.local_addr().unwrap().port().to_string();
    let free = Port::reserve();
    let free_port = free.number().to_string();
    let scratch = Scratch::new();
    let no_program = scratch.file("sync.sh");
    fs::write(&no_program, "echo no permission to run this").unwrap();
    let (first_event, quiet) = (["--debounce", "1", "--"], ["-q", "--debounce", "1", "--"]);
    let (first_event, quiet) = (calm_on_loopback(&first_event), calm_on_loopback(&quiet));
    let cases: &[(i32, &[&str], &[&str])] = &[
        (0, &["--help"], &[]),
        (0, &["--version"], &[]),
        (1, &["--bind", "127.0.0.1", "--tcp-port", &taken_port], &[]),
        (1, &["--health", "--tcp-port", &free_port], &[]),
        (2, &["--frobnicate"], &[]),
        (2, &["--frobnicate", "--", "sh"], &[]),
        (2, &["sh", "--", "sh"], &[]),
        (2, &["--interval", "9"], &[]),
        (2, &["--"], &[]),
        (126, &first_event, &[no_program.to_str().unwrap()]),
        (127, &first_event, &["/nowhere/sync.sh"]),
        (127, &quiet, &["no-such-command-anywhere"]),
    ];
    for (code, options, command) in cases {
        let exit = run(&[*options, command].concat());
        assert_eq!((exit.code, exit.signal), (Some(*code), None), "{options:?}: {exit:?}");
        assert_eq!(exit.stderr.len(), usize::from(*code != 0), "{options:?}: {exit:?}");
    }
    // A stdout that fails is an error, one that is closed is none for a text that is printed once.
    let texts: [&[&str]; 2] = [&["--help"], &["--version"]];
    for options in texts {
        let exit = with_stdout(options, io::pipe().unwrap().1).exited(PATIENCE);
        assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{options:?}: {exit:?}");
    }
    let events = ["-q", "--debounce", "1"];
    for options in [texts[0], texts[1], &calm_on_loopback(&[]), &calm_on_loopback(&events)] {
        let exit = with_stdout(options, dev_full()).exited(PATIENCE);
        assert_eq!((exit.code, exit.signal), (Some(1), None), "{options:?}: {exit:?}");
        assert_eq!(exit.stderr, ["smolrx: cannot write to stdout: no storage space (error 28)"]);
    }
}

/// A probe or a text that waits is ended by a signal as any program is.
#[test]
fn probe_is_ended_by_a_signal() {
    let server = Server::start(&CALM);
    server.suspend();
    let port = server.address.port().to_string();
    let mut probe = Process::spawn(program(&["--health", "--tcp-port", &port]));
    thread::sleep(ms(100)); // it waits for a second
    assert!(probe.is_running());
    probe.signal(Signal::TERM);
    let exit = probe.exited(ms(800));
    server.wake();
    assert_eq!((exit.code, exit.signal), (None, Some(15)), "{exit:?}");
}
