//! Being a process: signals, as process 1 and elsewhere, what is done about a stdout that is closed, and exit
//! codes.

mod common;

use common::*;
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{Shutdown, TcpListener};
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

/// Ends its line, which must be echoed.
#[track_caller]
fn end_the_line(mut client: Client) {
    client.send("ish\n");
    assert_eq!(String::from_utf8_lossy(&client.rest()), "finish\n");
}

/// A server that must end well once this client, which is in the middle of a line, has ended it; the line is
/// observed.
#[track_caller]
fn ends_well(mut server: Server, client: Client) {
    server.refuses();
    assert!(server.is_running(), "it does not wait for the client's line: {:?}", server.exited(PATIENCE));
    end_the_line(client);
    let exit = server.exited(PATIENCE);
    assert_eq!((exit.code, exit.signal), (Some(0), None), "{exit:?}");
    assert_eq!(observed(&exit.stdout), ["finish"]);
}

// --------------------------------------------------------------- as process 1

/// A server that is process 1 of a PID namespace, as in a container; none, and the test skipped, where that
/// can't be.
struct ProcessOne {
    server: Server,
    pid: Pid,
}

impl ProcessOne {
    fn start(options: &[&str]) -> Option<Self> {
        let unshare = ["--pid", "--fork", "--kill-child"];
        if let Some(reason) = refusal(Command::new("unshare").args(unshare).arg("true")) {
            skip(format!("no PID namespace: {reason}"));
            return None;
        }
        let program = program(options);
        let mut command = Command::new("unshare");
        command.args(unshare).arg(program.get_program()).args(program.get_args());
        let server = Server::of(Process::spawn(command));
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", server.id())).unwrap();
        let pid = Pid::from_raw(children.trim().parse().unwrap()).unwrap();
        let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap();
        assert!(
            status.contains(&format!("NSpid:\t{}\t1\n", pid.as_raw_nonzero())),
            "not process 1: {status}"
        );
        Some(Self { server, pid })
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).expect("process 1 is there to be signalled");
    }
}

/// As process 1 it ends well at SIGHUP, which a terminal that closes sends, and at SIGTERM and SIGINT.
#[test]
fn signals_stop_process_one() {
    for signal in [Signal::HUP, Signal::TERM, Signal::INT] {
        let Some(process) = ProcessOne::start(&calm_on_loopback(&[])) else { return };
        let client = client_in_a_line(&process.server);
        process.signal(signal);
        ends_well(process.server, client);
    }
}

/// As process 1 it ends at once at a second signal, SIGHUP included, with 128 and the number of the second
/// one.
#[test]
fn second_signal_ends_process_one() {
    let pairs = [
        (Signal::HUP, Signal::HUP, 129),
        (Signal::TERM, Signal::HUP, 129),
        (Signal::HUP, Signal::TERM, 143),
        (Signal::HUP, Signal::INT, 130),
    ];
    for (first, second, code) in pairs {
        let Some(mut process) = ProcessOne::start(&calm_on_loopback(&[])) else { return };
        let _client = client_in_a_line(&process.server);
        process.signal(first);
        process.server.refuses();
        thread::sleep(ms(150)); // sooner, it would be the same signal
        let signalled = Instant::now();
        process.signal(second);
        let exit = process.server.exited(PATIENCE);
        assert_eq!((exit.code, exit.signal), (Some(code), None), "{first:?}, {second:?}: {exit:?}");
        assert!(signalled.elapsed() < ms(1500), "after {:?}", signalled.elapsed());
    }
}

/// Elsewhere SIGHUP keeps its default: it kills.
#[test]
fn hangup_kills_what_is_not_process_one() {
    let mut server = Server::start(&CALM);
    server.signal(Signal::HUP);
    let exit = server.exited(PATIENCE);
    assert_eq!((exit.code, exit.signal), (None, Some(1)), "{exit:?}");
}

/// Under nohup it survives SIGHUP, and serves.
#[test]
fn hangup_is_survived_under_nohup() {
    let mut server = Server::start_after("exec nohup \"$0\" \"$@\"", &CALM);
    for _ in 0..3 {
        server.signal(Signal::HUP);
        server.echo("foo\n");
    }
    server.stop();
}

/// Signals are blocked first of all in `main`, before it has done anything else: one that comes when the
/// program first touches its signal mask is not lost, and kills nobody. (As process 1 it would be lost; that
/// is harder to see.)
#[test]
fn signal_at_the_very_start_is_not_lost() {
    if let Some(reason) = refusal(Command::new("strace").args(["-o", "/dev/null", "true"])) {
        return skip(format!("no strace: {reason}"));
    }
    for (signal, name) in [(Signal::TERM, "TERM"), (Signal::INT, "INT")] {
        for moment in 1..=4 {
            let program = program(&calm_on_loopback(&[]));
            let mut command = Command::new("strace");
            let inject = format!("inject=rt_sigprocmask:signal={name}:when={moment}");
            command
                .args(["-o", "/dev/null", "-e", &inject])
                .arg(program.get_program())
                .args(program.get_args());
            let mut process = Process::spawn(command);
            let exit = process.exited(PATIENCE);
            let what = format!("{signal:?} at the {moment}. change of its mask: {exit:?}");
            assert_eq!((exit.code, exit.signal), (Some(0), None), "{what}");
            assert_eq!(observed(&exit.stdout), ["0"], "{what}");
        }
    }
}

// -------------------------------------------------------------------- signals

/// Two signals that are found pending at once, be they different ones, are one: it ends well, with 0.
#[test]
fn signals_that_come_at_once_are_one() {
    let at_once: [&[Signal]; 4] = [
        &[Signal::INT, Signal::TERM],
        &[Signal::TERM, Signal::INT],
        &[Signal::TERM, Signal::TERM, Signal::TERM],
        &[Signal::INT, Signal::TERM, Signal::INT, Signal::TERM],
    ];
    for signals in at_once {
        let server = Server::start(&CALM);
        let client = client_in_a_line(&server);
        server.suspend();
        signals.iter().for_each(|signal| server.signal(*signal));
        server.wake();
        ends_well(server, client);
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

/// timeout(1) sends its signal to its child and to its own process group: that is one signal, and the end a
/// good one.
#[test]
fn end_by_timeout_is_a_good_one() {
    for round in 0..5 {
        let program = program(&calm_on_loopback(&[]));
        let mut command = Command::new("timeout");
        command.arg("0.5").arg(program.get_program()).args(program.get_args());
        if let Some(reason) = refusal(Command::new("timeout").args(["9", "true"])) {
            return skip(format!("no timeout(1): {reason}"));
        }
        let mut server = Server::of(Process::spawn(command));
        let client = client_in_a_line(&server);
        eventually(PATIENCE, "the listener is closed", || {
            std::net::TcpStream::connect(server.address).is_err()
        });
        end_the_line(client);
        let exit = server.exited(PATIENCE);
        assert_eq!((exit.code, exit.signal), (Some(124), None), "round {round}: {exit:?}");
        assert_eq!(observed(&exit.stdout), ["finish"], "round {round}");
    }
}

/// A second signal that comes later than that ends it at once, with 128 and the number of the second one.
#[test]
fn second_signal_ends_it_at_once() {
    for (first, second, code) in [
        (Signal::TERM, Signal::TERM, 143),
        (Signal::INT, Signal::INT, 130),
        (Signal::TERM, Signal::INT, 130),
        (Signal::INT, Signal::TERM, 143),
    ] {
        let mut server = Server::start(&CALM);
        let _client = client_in_a_line(&server);
        server.signal(first);
        server.refuses();
        thread::sleep(ms(150));
        let signalled = Instant::now();
        server.signal(second);
        let exit = server.exited(PATIENCE);
        assert_eq!((exit.code, exit.signal), (Some(code), None), "{first:?}, {second:?}: {exit:?}");
        assert!(signalled.elapsed() < ms(1500), "after {:?}", signalled.elapsed());
        assert_eq!(observed(&exit.stdout), [""; 0], "{first:?}, {second:?}");
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

/// Whoever closes its stdout, pipe, socket or terminal, ends it at once, not at its next output: silently,
/// with 141, as if by SIGPIPE. It has nothing to write and a client in the middle of a line.
#[test]
fn closed_stdout_ends_it_at_once() {
    for options in [&[][..], &["--quiet"], &["--quiet", "--interval", "0"]] {
        for (what, output, reader) in closable_outputs() {
            let mut command = program(&calm_on_loopback(options));
            command.stdout(output);
            let mut process = Process::spawn_with_stdout(command);
            let mut client = Client::connect(process.listening_address());
            client.send("fin");
            client.is_taken();
            ends_with_its_reader(&mut process, reader, &format!("{what}, {options:?}"));
        }
    }
}

/// When the reader of stdout goes, the server ends at once, as by SIGPIPE, and without a word.
#[track_caller]
fn ends_with_its_reader(process: &mut Process, reader: impl Sized, what: &str) {
    let closed = Instant::now();
    drop(reader);
    let exit = process.exited(PATIENCE);
    assert!(closed.elapsed() < ms(2000), "{what}: after {:?}", closed.elapsed());
    assert_eq!((exit.code, exit.signal), (Some(141), None), "{what}: {exit:?}");
    assert_eq!(exit.stderr, [""; 0], "{what}");
}

/// A stdout whose reader had gone before the start ends it in the same way; a terminal that hung up may also
/// be the error that it is to who writes to it.
#[test]
fn stdout_closed_before_the_start_ends_it() {
    for options in [&[][..], &["--quiet"]] {
        for (what, output, reader) in closable_outputs() {
            drop(reader);
            let mut command = program(&calm_on_loopback(options));
            command.stdout(output);
            let exit = Process::spawn_with_stdout(command).exited(PATIENCE);
            if what == "a terminal" && exit.code == Some(1) {
                assert_eq!(exit.stderr.len(), 1, "{exit:?}");
                assert!(exit.stderr[0].starts_with("smolrx: cannot write to stdout: "), "{exit:?}");
                continue;
            }
            assert_eq!((exit.code, exit.signal), (Some(141), None), "{what}, {options:?}: {exit:?}");
            assert_eq!(exit.stderr, [""; 0], "{what}, {options:?}");
        }
    }
}

/// A reader that leaves while text waits for it ends it with 141, too, be it that the server is stopping
/// already.
#[test]
fn stdout_closed_while_text_waits_ends_it() {
    for stopping in [false, true] {
        let (reader, writer) = io::pipe().unwrap();
        let mut command = program(&calm_on_loopback(&["--keep-open", "--timeout", "600000"]));
        command.stdout(writer);
        let mut process = Process::spawn_with_stdout(command);
        let address = process.listening_address();
        let mut floods = [Flood::new(Client::connect(address), true)];
        Flood::pump_until_stalled(&mut floods, ms(500));
        if stopping {
            process.signal(Signal::TERM);
            refuses(address);
            assert!(process.is_running());
        }
        ends_with_its_reader(&mut process, reader, &format!("stopping {stopping}"));
    }
}

/// `smolrx | head -1` ends by itself, and a shell sees 141.
#[test]
fn pipe_into_head_ends() {
    let program = program(&calm_on_loopback(&[]));
    let mut command = Command::new("sh");
    command.args(["-c", "{ \"$0\" \"$@\"; echo $? >&2; } | head -n 1"]);
    command.arg(program.get_program()).args(program.get_args());
    let exit = Process::spawn(command).exited(PATIENCE);
    assert_eq!(exit.stdout.len(), 1, "{exit:?}");
    assert!(exit.stdout[0].starts_with("Serving on "), "{exit:?}");
    assert_eq!(exit.stderr, ["141"]);
}

/// What is not closed is let alone: beside an output of any kind that has nothing to say, a socket of which
/// one half is closed included, the server uses no processor, and serves.
#[test]
fn quiet_output_costs_nothing() {
    let scratch = Scratch::new();
    let (pipe_reader, pipe) = io::pipe().unwrap();
    let (peer, socket) = UnixStream::pair().unwrap();
    let (half_peer, half_socket) = UnixStream::pair().unwrap();
    half_peer.shutdown(Shutdown::Write).unwrap();
    let (deaf_peer, deaf_socket) = UnixStream::pair().unwrap();
    deaf_peer.shutdown(Shutdown::Read).unwrap();
    let (screen, terminal) = terminal();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp_peer = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let tcp = listener.accept().unwrap().0;
    tcp_peer.shutdown(Shutdown::Write).unwrap();
    let null = File::options().write(true).open("/dev/null").unwrap();
    let outputs: Vec<(&str, OwnedFd)> = vec![
        ("/dev/null", null.into()),
        ("a file", File::create(scratch.file("log")).unwrap().into()),
        ("a pipe", pipe.into()),
        ("a socket", socket.into()),
        ("a socket whose peer sends no more", half_socket.into()),
        ("a socket whose peer reads no more", deaf_socket.into()),
        ("a TCP connection whose peer sends no more", tcp.into()),
        ("a terminal", terminal),
    ];
    let mut running = vec![];
    for (what, output) in outputs {
        let mut command = program(&calm_on_loopback(&["--quiet"]));
        command.stdout(output);
        let process = Process::spawn_with_stdout(command);
        let mut client = Client::connect(process.listening_address());
        client.send("foo\n");
        assert_eq!(client.rest(), b"foo\n", "{what}");
        running.push((what, process));
    }
    for (what, process) in &mut running {
        let mut before = process.activity();
        eventually(ms(5000), &format!("beside {what} it comes to rest"), || {
            thread::sleep(ms(200));
            let earlier = std::mem::replace(&mut before, process.activity());
            earlier == before
        });
        assert!(process.is_running(), "beside {what} it has ended: {:?}", process.exited(PATIENCE));
    }
    drop((pipe_reader, peer, half_peer, deaf_peer, screen, tcp_peer));
}

// -------------------------------------------------------------------- stderr

/// A stderr that nobody reads, a full pipe or a terminal, holds up no end: neither one by a signal, nor by a
/// usage error, nor by a stdout that fails.
#[test]
fn stalled_stderr_holds_up_no_end() {
    let full_pipe = || {
        let (reader, mut writer) = io::pipe().unwrap();
        fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
        while writer.write(&[b'x'; 4096]).is_ok() {}
        fcntl_setfl(&writer, OFlags::empty()).unwrap();
        (reader, writer)
    };
    // It has a warning to print that does not fit.
    let (_reader, stderr) = full_pipe();
    let mut command =
        program(&["--bind", "127.0.0.1", "--tcp-port", "0", "--interval", "600000", "--debounce", "600000"]);
    command.stdout(Stdio::piped()).stderr(stderr);
    let mut process = Process::spawn_with_output(command);
    let mut client = Client::connect(process.listening_address());
    client.send("foo\n");
    assert_eq!(client.rest(), b"foo\n");
    let signalled = Instant::now();
    process.signal(Signal::TERM);
    let exit = process.stopped(signalled);
    assert_eq!(observed(&exit.stdout), ["foo"]);

    let (_reader, stderr) = full_pipe();
    let mut command = program(&calm_on_loopback(&[]));
    command.stdout(File::options().write(true).open("/dev/full").unwrap()).stderr(stderr);
    assert_eq!(Process::spawn_with_output(command).exited(ms(6000)).code, Some(1));
}

/// A stderr that is closed ends nothing: it is written to in vain.
#[test]
fn closed_stderr_ends_nothing() {
    let (reader, stderr) = io::pipe().unwrap();
    drop(reader);
    let mut command = program(&calm_on_loopback(&["--max-line", "4", "--debounce", "600000"]));
    command.stdout(Stdio::piped()).stderr(stderr);
    let mut process = Process::spawn_with_output(command);
    let address = process.listening_address();
    let mut client = Client::connect(address);
    client.send("too long\n");
    assert_eq!(client.until_closed(), b"");
    let mut client = Client::connect(address);
    client.send("foo\n");
    assert_eq!(client.rest(), b"foo\n");
    assert_eq!(observed(&process.stop().stdout), ["foo"]);
}

// ---------------------------------------------------------------- exit codes

/// Each way to end has its exit code, as the conventions are.
#[test]
fn exit_codes() {
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken_port = taken.local_addr().unwrap().port().to_string();
    let free = Port::reserve();
    let free_port = free.number().to_string();
    let scratch = Scratch::new();
    let no_program = scratch.file("sync.sh");
    fs::write(&no_program, "echo no permission to run this").unwrap();
    let no_program = no_program.to_str().unwrap();
    let first_event =
        ["--bind", "127.0.0.1", "--tcp-port", "0", "--interval", "600000", "--debounce", "1", "--"];
    let cases: Vec<(i32, Vec<&str>)> = vec![
        (0, vec!["--help"]),
        (0, vec!["--version"]),
        (1, vec!["--bind", "127.0.0.1", "--tcp-port", &taken_port]),
        (1, vec!["--health", "--tcp-port", &free_port]),
        (2, vec!["--frobnicate"]),
        (2, vec!["--interval", "9"]),
        (2, vec!["--"]),
        (126, [&first_event[..], &[no_program]].concat()),
        (127, [&first_event[..], &["/nowhere/sync.sh"]].concat()),
        (127, [&first_event[..], &["no-such-command-anywhere"]].concat()),
    ];
    for (code, options) in cases {
        let exit = run(&options);
        assert_eq!((exit.code, exit.signal), (Some(code), None), "{options:?}: {exit:?}");
        assert_eq!(exit.stderr.len(), usize::from(code != 0), "{options:?}: {exit:?}");
    }
    // A stdout that fails is an error, one that is closed is none for a text that is printed once.
    for option in ["--help", "--version"] {
        let mut command = program(&[option]);
        command.stdout(full());
        let exit = Process::spawn_with_stdout(command).exited(PATIENCE);
        assert_eq!(exit.code, Some(1), "{option}: {exit:?}");
        assert_eq!(exit.stderr, ["smolrx: cannot write to stdout: no storage space (error 28)"]);
        let mut command = program(&[option]);
        command.stdout(io::pipe().unwrap().1);
        let exit = Process::spawn_with_stdout(command).exited(PATIENCE);
        assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{option}: {exit:?}");
    }
    for options in [&[][..], &["--quiet", "--debounce", "1"]] {
        let mut command = program(&calm_on_loopback(options));
        command.stdout(full());
        let exit = Process::spawn_with_stdout(command).exited(PATIENCE);
        assert_eq!(exit.code, Some(1), "{options:?}: {exit:?}");
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
