//! `smolrx [OPTION]... -- COMMAND [ARG]...`: what the command gets, when it runs, and what it can't do to the server.
//!
//! What takes a privilege or a tool (another user, a process namespace, strace) is skipped where that is not to be
//! had, and says so; with SMOLRX_NO_SKIPS set, that fails.

mod common;

use common::*;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Resource, Signal, getrlimit, kill_process};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use std::collections::BTreeMap;
use std::env;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A free port of the loopback interface.
const LOCAL: [&str; 4] = ["--bind", "127.0.0.1", "--tcp-port", "0"];

/// No clock, and each poke an event.
const POKED: [&str; 4] = ["--interval", "0", "--debounce", "1"];

/// A clock and a debounce so slow that an event is pending until the end.
const PENDING: [&str; 4] = ["--interval", "0", "--debounce", "600000"];

/// A script that notes its begin and its end, and lasts for as long as it is held.
const HELD: &str = r#"echo "begin $SMOLRX_EVENT" >> "$D/notes"
    while [ -e "$D/hold" ]; do sleep 0.02; done
    echo "end $SMOLRX_EVENT" >> "$D/notes""#;

/// The same, for a script that notes which signals it gets, and ends by them.
const TRAPS: &str = r#"exec > /dev/null 2>&1
    trap 'echo "got TERM" >> "$D/notes"; exit' TERM
    trap 'echo "got INT" >> "$D/notes"; exit' INT
    echo "begin $SMOLRX_EVENT" >> "$D/notes"
    while [ -e "$D/hold" ]; do sleep 0.02; done
    echo "end $SMOLRX_EVENT" >> "$D/notes""#;

/// A script that notes its event, and that is all.
const NOTE: &str = r#"echo "$SMOLRX_EVENT" >> "$D/notes""#;

/// A folder, `$D` for the server and its command, in which the command leaves notes.
struct Notes(Scratch);

impl Notes {
    fn new() -> Self {
        let notes = Self(Scratch::new());
        fs::set_permissions(notes.file(""), Permissions::from_mode(0o777)).unwrap();
        notes
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.file(name)
    }

    /// Makes an executable file. (Not by this process: what another test starts at that moment would have it open
    /// for writing, and nobody could run it then.)
    fn executable(&self, name: &str, text: &str) -> String {
        let path = self.file(name);
        let mut install = Command::new("install");
        install.args(["-m", "755", "/dev/stdin"]).arg(&path).stdin(Stdio::piped());
        let mut child = install.spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success(), "no {path:?}");
        path.to_str().unwrap().into()
    }

    /// The server with these options and this command, started by a shell after `setup`.
    fn command_after(&self, setup: &str, options: &[&str], command: &[&str]) -> Command {
        let mut server = program_after(
            &format!("echo $$ > \"$D/pid\"; {setup}"),
            &[&LOCAL, options, &["--"], command].concat(),
        );
        server.env("D", self.file("")).env("MALLOC_ARENA_MAX", "1").env("MALLOC_MMAP_THRESHOLD_", "131072");
        server
    }

    fn server_after(&self, setup: &str, options: &[&str], script: &str) -> Server {
        Server::of(Process::spawn(self.command_after(setup, options, &["sh", "-c", script])))
    }

    /// A server that runs this script.
    fn server(&self, options: &[&str], script: &str) -> Server {
        self.server_after("true", options, script)
    }

    /// The same with `--quiet`, and its address.
    fn quiet_server(&self, options: &[&str], script: &str) -> (Process, SocketAddr) {
        let options = [options, &["-q"]].concat();
        let server = Process::spawn(self.command_after("true", &options, &["sh", "-c", script]));
        let address = server.listening_address();
        (server, address)
    }

    /// The server's process.
    fn pid(&self) -> u32 {
        fs::read_to_string(self.file("pid")).unwrap().trim().parse().unwrap()
    }

    fn hold(&self) {
        File::create(self.file("hold")).unwrap();
    }

    fn release(&self) {
        fs::remove_file(self.file("hold")).unwrap();
    }

    /// Pokes a server, and waits until the run has begun.
    #[track_caller]
    fn begin_first(&self, server: &Server) {
        server.echo("first\n");
        self.wait_for("begin first");
    }

    /// Lets the run under way go on, waits for the good end of a server that has been told to stop, and
    /// compares what its runs have noted in all.
    #[track_caller]
    fn ends_well(&self, server: &mut Server, notes: &[&str]) {
        self.release();
        ends_well(server);
        assert_eq!(self.lines(), notes);
    }

    fn lines(&self) -> Vec<String> {
        let text = fs::read(self.file("notes")).unwrap_or_default();
        String::from_utf8_lossy(&text).lines().map(String::from).collect()
    }

    fn wait_for(&self, line: &str) {
        let what = format!("a note that says `{line}`");
        eventually(PATIENCE, &what, || self.lines().iter().any(|note| note == line));
    }

    fn wait_for_count(&self, count: usize) {
        eventually(PATIENCE, &format!("{count} notes"), || self.lines().len() >= count);
    }
}

/// Sends a line on a connection of its own, and takes the echo.
fn poke(address: SocketAddr, line: impl AsRef<[u8]>) {
    let mut client = Client::connect(address);
    let line = [line.as_ref(), b"\n"].concat();
    client.send(&line);
    assert_eq!(client.rest(), line, "the echo of a poke");
}

/// Says past cargo's capture what is left out.
fn skipped(what: &str) {
    assert!(env::var_os("SMOLRX_NO_SKIPS").is_none(), "skipped: {what}");
    let _ = writeln!(io::stderr(), "skipped: {what}");
}

/// Whether a command can be run here at all.
fn works(command: &mut Command) -> bool {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// The state of each child of a process, by its id.
fn children(parent: u32) -> BTreeMap<u32, char> {
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let pid: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let mut fields = stat.rsplit(") ").next()?.split(' ');
        let state = fields.next()?.chars().next()?;
        (fields.next()?.parse() == Ok(parent)).then_some((pid, state))
    });
    processes.collect()
}

fn kill(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
}

/// The server as process 1 of a namespace of its own, where it is what `inside` becomes, a shell's script; and its
/// process as seen from here. None, and the reason shown, where that can't be.
fn as_process_1(notes: &Notes, inside: &str, options: &[&str], command: &[&str]) -> Option<(Server, u32)> {
    let ways = [&["--pid"][..], &["--user", "--map-root-user", "--pid"]];
    let Some(way) = ways.iter().find(|way| {
        works(Command::new("unshare").args(**way).args(["--fork", "--kill-child", "--mount-proc", "true"]))
    }) else {
        skipped("a server as process 1: there is no namespace for it here");
        return None;
    };
    let mut unshare = Command::new("unshare");
    unshare.args(*way).args(["--fork", "--kill-child", "--mount-proc"]);
    unshare.args(["sh", "-c", &format!("{inside}; exec \"$0\" \"$@\"")]);
    unshare.arg(program(&[]).get_program()).args([&LOCAL, options].concat());
    if !command.is_empty() {
        unshare.arg("--").args(command);
    }
    let mut outer = Command::new("sh");
    outer.args(["-c", "echo $$ > \"$D/pid\"; exec \"$0\" \"$@\""]).arg("unshare").args(unshare.get_args());
    outer.env("D", notes.file(""));
    let server = Server::of(Process::spawn(outer));
    let inner = *children(notes.pid()).keys().next().expect("process 1");
    Some((server, inner))
}

/// Waits for the end of a server that has been told to stop: in good order, and without a word.
#[track_caller]
fn ends_well(server: &mut Server) -> Exit {
    let exit = server.exited(ms(6000));
    assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{exit:?}");
    exit
}

// ------------------------------------------------------- what the command gets

/// The command finds the event in `SMOLRX_EVENT`, as the transcript shows it, whatever a client sends.
#[test]
fn event_is_in_the_environment() {
    let notes = Notes::new();
    let server = notes.server(&POKED, r#"printf '<%s>\n' "$SMOLRX_EVENT" >> "$D/notes""#);
    let lines: [&[u8]; 18] = [
        b"foo",
        b"",
        b"   ",
        b"0",
        b"-rf",
        b"--help",
        b"--",
        b"SMOLRX_EVENT=x",
        b"PATH=/nowhere",
        b"=",
        b"$(touch x) `id` \"'; exit 9 #",
        b"two  spaces\tand a tab",
        "ünï→☃".as_bytes(),
        b"esc \x1b[31m and nul \0 and cr \r within",
        "\u{202e}right to left\u{2028}".as_bytes(),
        b"\xff\xfe no UTF-8 \xc3",
        b"%s %n \\0 \\n",
        b"last",
    ];
    for (i, line) in lines.iter().enumerate() {
        server.echo([line, &b"\n"[..]].concat());
        notes.wait_for_count(i + 1);
        assert_eq!(notes.lines()[i], format!("<{}>", shown(line)), "the event of {line:?}");
    }
    assert!(server.stderr.lines().is_empty(), "{:?}", server.stderr);
}

/// The clock's events are in `SMOLRX_EVENT` as well, from 0 on.
#[test]
fn tick_is_in_the_environment() {
    let notes = Notes::new();
    let _server = notes.server(&["--interval", "100", "--debounce", "1"], NOTE);
    notes.wait_for_count(3);
    assert_eq!(notes.lines()[..3], ["0", "1", "2"]);
}

/// The command has the server's environment to the byte, but for one `SMOLRX_EVENT`, which is the event's.
#[test]
fn environment_is_the_servers() {
    let notes = Notes::new();
    let copy = notes.file("environment");
    let mut command = program(&[&LOCAL[..], &POKED, &["--", "cp", "/proc/self/environ"]].concat());
    command.arg(&copy);
    command.env("SMOLRX_EVENT", "an older one").env("SMOLRX_EVENTS", "1").env("SMOLRX_EVEN", "2");
    command.env("XSMOLRX_EVENT", "3").env("EMPTY", "").env("NOT_UTF_8", OsStr::from_bytes(b"\xff\xfe"));
    command.env("LINES", "a\nb=c");
    let server = Server::of(Process::spawn(command));
    let sorted = |bytes: Vec<u8>| {
        let mut all: Vec<String> =
            bytes.split(|&byte| byte == 0).map(|variable| variable.escape_ascii().to_string()).collect();
        all.sort();
        all
    };
    server.echo("poke\n");
    let mut got = vec![];
    eventually(PATIENCE, "the copy of the environment", || {
        got = fs::read(&copy).unwrap_or_default();
        !got.is_empty()
    });
    thread::sleep(ms(50)); // whole
    let got = sorted(fs::read(&copy).unwrap());
    let mut command = Command::new("cat");
    command.arg("/proc/self/environ");
    command.env("MALLOC_ARENA_MAX", "1").env("MALLOC_MMAP_THRESHOLD_", "131072").env("SMOLRX_EVENT", "poke");
    command.env("SMOLRX_EVENTS", "1").env("SMOLRX_EVEN", "2");
    command.env("XSMOLRX_EVENT", "3").env("EMPTY", "").env("NOT_UTF_8", OsStr::from_bytes(b"\xff\xfe"));
    command.env("LINES", "a\nb=c");
    assert_eq!(got, sorted(command.output().unwrap().stdout));
}

/// A server without any environment finds the command at the places where a shell looks then, and the event is all
/// that the command has.
#[test]
fn empty_environment() {
    let mut command = program(&[&LOCAL[..], &POKED, &["--", "env"]].concat());
    command.env_clear();
    let mut server = Server::of(Process::spawn(command));
    server.echo("poke\n");
    server.stdout.wait_for("SMOLRX_EVENT=poke");
    let exit = server.stop();
    assert!(exit.stderr.is_empty(), "{exit:?}");
    assert_eq!(exit.stdout.iter().filter(|line| line.contains('=')).count(), 1, "{exit:?}");
}

/// Everything behind `--` reaches the command exactly, be it no UTF-8, empty, or like an option of the server's.
#[test]
fn arguments_are_the_commands() {
    let arguments: [&[u8]; 17] = [
        b"\xff\xfe",
        b"",
        b"--help",
        b"-h",
        b"--version",
        b"-V",
        b"--health",
        b"--",
        b"-q",
        b"--interval",
        b"nonsense",
        b"--tcp-port=99999999",
        b"a b",
        b"line\nend",
        b"$D",
        b"*",
        b"\x1b[31m",
    ];
    let notes = Notes::new();
    let mut command = program(&[&LOCAL[..], &POKED, &["--", "sh", "-c"]].concat());
    command.env("D", notes.file("")).arg("cp /proc/$$/cmdline \"$D/new\"; mv \"$D/new\" \"$D/cmdline\"");
    command.args(arguments.map(OsStr::from_bytes));
    let server = Server::of(Process::spawn(command));
    server.echo("poke\n");
    eventually(PATIENCE, "the command line", || notes.file("cmdline").exists());
    let bytes = fs::read(notes.file("cmdline")).unwrap();
    let words: Vec<&[u8]> = bytes.strip_suffix(b"\0").unwrap().split(|&byte| byte == 0).collect();
    assert_eq!(words[..2], [b"sh", b"-c"]);
    assert_eq!(words[3..], arguments);
}

/// A command whose name looks like an option is a command.
#[test]
fn command_like_an_option() {
    let notes = Notes::new();
    notes.executable("--help", "#!/bin/sh\necho \"$0 $1\" > \"$D/notes\"\n");
    let mut command = program(&[&LOCAL[..], &POKED, &["--", "--help", "--version"]].concat());
    command.env("D", notes.file("")).env("PATH", format!("{}:{}", notes.file(".").display(), path()));
    let server = Server::of(Process::spawn(command));
    server.echo("poke\n");
    notes.wait_for(&format!("{} --version", notes.file("./--help").display()));
}

fn path() -> String {
    env::var("PATH").unwrap()
}

/// What stands before `--` is the server's: a `--help` is answered, a stray word and a `--` with nothing behind it are
/// errors of usage.
#[test]
fn options_before_the_command() {
    let exit = run(&["--help", "--", "sh", "-c", "exit 3"]);
    assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{exit:?}");
    assert!(exit.stdout[0].starts_with("Usage: smolrx [OPTION]... [-- COMMAND"), "{exit:?}");
    for (arguments, message) in [
        (&["--"][..], "no command follows '--'"),
        (&["-q", "--"], "no command follows '--'"),
        (&["./sync.sh"], "unexpected argument './sync.sh'; a command follows '--'"),
        (&["sh", "--", "sh"], "unexpected argument 'sh'; a command follows '--'"),
        (&["--foo", "--", "sh"], "unknown option '--foo'"),
    ] {
        let exit = run(arguments);
        let expected = [format!("smolrx: {message}; see smolrx --help")];
        assert_eq!((exit.code, &exit.stderr[..]), (Some(2), &expected[..]), "{arguments:?}");
        assert!(exit.stdout.is_empty(), "{arguments:?}: {exit:?}");
    }
}

/// The command's standard input is the server's: each run goes on where the one before has stopped reading.
#[test]
fn stdin_is_the_servers() {
    let notes = Notes::new();
    fs::write(notes.file("input"), "one\ntwo\n").unwrap();
    let script = r#"if read -r line; then :; else line=end; fi; echo "$SMOLRX_EVENT $line" >> "$D/notes""#;
    let server = notes.server_after("exec < \"$D/input\"", &POKED, script);
    for (i, note) in ["a one", "b two", "c end"].into_iter().enumerate() {
        server.echo(format!("{}\n", &note[..1]));
        notes.wait_for_count(i + 1);
        assert_eq!(notes.lines()[i], note);
    }
}

/// A command that reads all of its standard input, as ssh does, takes no event from those that follow.
#[test]
fn command_that_reads_stdin_takes_no_event() {
    let notes = Notes::new();
    let server = notes.server(&POKED, r#"cat > "$D/taken"; echo "$SMOLRX_EVENT" >> "$D/notes""#);
    for i in 0..5 {
        server.echo(format!("event {i}\n"));
        notes.wait_for_count(i + 1);
    }
    assert_eq!(notes.lines(), (0..5).map(|i| format!("event {i}")).collect::<Vec<_>>());
    assert_eq!(fs::read_to_string(notes.file("taken")).unwrap(), "");
}

/// Signals are blocked, ignored or at their default for the command as they were when the server was started.
#[test]
fn signals_are_as_before() {
    let fields = |lines: &[String]| -> Vec<String> {
        let of_signals = |line: &&String| {
            ["SigBlk:", "SigIgn:", "SigPnd:", "ShdPnd:"].iter().any(|name| line.starts_with(name))
        };
        lines.iter().filter(of_signals).cloned().collect()
    };
    for signals in [
        &[][..],
        &["--block-signal=USR1,WINCH", "--ignore-signal=USR2,HUP"],
        &["--block-signal=INT,TERM,HUP,CHLD,PIPE,XFSZ"],
        &["--ignore-signal=INT,QUIT"],
        &["--ignore-signal=XFSZ"],
        &["--ignore-signal=TERM,INT,HUP"],
    ] {
        let before = Command::new("env").args(signals).args(["cat", "/proc/self/status"]).output().unwrap();
        let before: Vec<String> =
            String::from_utf8(before.stdout).unwrap().lines().map(String::from).collect();
        let mut command = Command::new("env");
        command.args(signals).arg(program(&[]).get_program());
        command.args([&LOCAL[..], &POKED, &["--", "cat", "/proc/self/status"]].concat());
        let server = Server::of(Process::spawn(command));
        server.echo("poke\n");
        server.stdout.wait_until("the command's status", |lines| {
            lines.iter().any(|line| line.starts_with("nonvoluntary_ctxt_switches")).then_some(())
        });
        assert_eq!(fields(&before).len(), 4);
        assert_eq!(fields(&server.stdout.lines()), fields(&before), "started by env {signals:?}");
    }
}

/// A reader that leaves ends a command in its pipe, as SIGPIPE does anywhere.
#[test]
fn sigpipe_is_at_its_default() {
    let notes = Notes::new();
    let script = r#"(yes; echo "$?" >> "$D/notes") | head -n 1 > /dev/null"#;
    let server = notes.server(&POKED, script);
    server.echo("poke\n");
    notes.wait_for("141");
}

/// The limits of descriptors are those of before the server raised its own.
#[test]
fn descriptor_limits_are_as_before() {
    let notes = Notes::new();
    let setup = "ulimit -Sn 256";
    let server = notes.server_after(setup, &POKED, r#"echo "$(ulimit -Sn) $(ulimit -Hn)" >> "$D/notes""#);
    let hard = server.descriptor_limits().1;
    server.echo("poke\n");
    notes.wait_for_count(1);
    assert_eq!(notes.lines(), [format!("256 {hard}")]);
    assert_eq!(server.descriptor_limits(), (hard.clone(), hard), "the server's own limits after a run");
}

/// So they are while the server has more descriptors in use than the old soft limit allows: a run works, and the
/// server's own limit stays raised.
#[test]
fn descriptor_limits_are_as_before_with_more_clients_than_that() {
    if getrlimit(Resource::Nofile).maximum.is_some_and(|hard| hard < 4096) {
        return skipped("more clients than the soft limit: the hard one is too low here");
    }
    raise_descriptor_limit();
    let notes = Notes::new();
    let options = [&POKED[..], &["--max-conns", "300"]].concat();
    let script = r#"echo "$SMOLRX_EVENT $(ulimit -Sn) $(ulimit -Hn)" >> "$D/notes""#;
    let server = notes.server_after("ulimit -Sn 64; ulimit -Hn 4096", &options, script);
    let before = server.descriptors();
    let mut clients: Vec<Client> = (0..200).map(|_| server.connect()).collect();
    eventually(PATIENCE, "all are accepted", || server.descriptors() == before + 200);
    for i in 0..3 {
        server.echo(format!("{i}\n"));
        notes.wait_for_count(i + 1);
    }
    assert_eq!(notes.lines(), ["0 64 4096", "1 64 4096", "2 64 4096"]);
    let more: Vec<Client> = (0..50).map(|_| server.connect()).collect();
    eventually(PATIENCE, "more are accepted", || server.descriptors() == before + 250);
    clients.extend(more);
    for client in &mut clients {
        client.send("x\n");
        client.expect("x\n");
    }
    assert!(server.stderr.lines().is_empty(), "{:?}", server.stderr);
}

/// A run needs no descriptor that clients could take from it: with all of them in use, it works.
#[test]
fn run_with_no_descriptor_left() {
    let notes = Notes::new();
    let options = [&POKED[..], &["--keep-open"]].concat();
    let server = notes.server_after("ulimit -n 64", &options, NOTE);
    let mut clients: Vec<Client> = (0..80).map(|_| server.connect()).collect();
    server.stderr.wait_until("its complaint", |lines| {
        lines.iter().any(|line| line.starts_with("smolrx: cannot accept: ")).then_some(())
    });
    for i in 0..5 {
        clients[0].send(format!("{i}\n"));
        notes.wait_for_count(i + 1);
    }
    assert_eq!(notes.lines(), ["0", "1", "2", "3", "4"]);
    assert!(!server.stderr.lines().iter().any(|line| line.contains("cannot run")), "{:?}", server.stderr);
}

/// The command has no descriptor of the server's but the three standard ones, with clients connected or not.
#[test]
fn no_descriptor_is_the_servers() {
    let before = Command::new("ls").args(["-1", "/proc/self/fd"]).output().unwrap();
    let before: Vec<String> = String::from_utf8(before.stdout).unwrap().lines().map(String::from).collect();
    for clients in [0, 20] {
        let options = [&POKED[..], &["--keep-open", "--", "ls", "-1", "/proc/self/fd"]].concat();
        let server = Server::of(Process::spawn(program(&[&LOCAL[..], &options].concat())));
        let mut clients: Vec<Client> = (0..clients).map(|_| server.connect()).collect();
        for client in &mut clients {
            client.send("half");
            client.is_taken();
        }
        server.echo("poke\n");
        let number = |line: &&String| line.bytes().all(|byte| byte.is_ascii_digit());
        let listed = |lines: &[String]| lines.iter().filter(number).cloned().collect::<Vec<_>>();
        server
            .stdout
            .wait_until("the descriptors", |lines| (listed(lines).len() >= before.len()).then_some(()));
        server.echo("again\n");
        server.stdout.wait_until("again", |lines| (listed(lines).len() >= 2 * before.len()).then_some(()));
        thread::sleep(ms(50)); // whatever is too much
        assert_eq!(listed(&server.stdout.lines()), [&before[..], &before].concat());
    }
}

/// The command is in the server's folder, with its mask for new files, in its session and its process group.
#[test]
fn folder_and_group_are_the_servers() {
    let notes = Notes::new();
    let script = r#"echo "$(pwd) $(umask) $(cut -d ' ' -f 5,6 /proc/$$/stat)" >> "$D/notes""#;
    let server = notes.server_after("cd \"$D\"; umask 027", &POKED, script);
    server.echo("poke\n");
    notes.wait_for_count(1);
    let stat = fs::read_to_string(format!("/proc/{}/stat", notes.pid())).unwrap();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    let folder = notes.file("").canonicalize().unwrap();
    assert_eq!(notes.lines(), [format!("{} 0027 {} {}", folder.display(), fields[2], fields[3])]);
}

// ------------------------------------------------------------- one run at a time

/// Runs never overlap, however fast pokes come, and the last poke's event is the last run's.
#[test]
fn one_run_at_a_time() {
    let notes = Notes::new();
    let script = r#"echo "begin $SMOLRX_EVENT" >> "$D/notes"; sleep 0.02; echo end >> "$D/notes""#;
    let mut server = notes.server(&["--interval", "10", "--debounce", "1", "--max-wait", "5"], script);
    thread::scope(|scope| {
        for name in ["a", "b", "c", "d"] {
            let server = &server;
            scope.spawn(move || (0..400).for_each(|i| _ = server.echo(format!("{name} {i}\n"))));
        }
    });
    server.echo("last\n");
    let exit = server.stop();
    assert!(exit.stderr.is_empty(), "{exit:?}");
    let lines = notes.lines();
    for (i, line) in lines.iter().enumerate() {
        assert_eq!(line.starts_with("begin "), i % 2 == 0, "line {i} of {lines:?}");
        assert_eq!(line == "end", i % 2 == 1, "line {i} of {lines:?}");
    }
    assert!(lines.len() >= 6, "{lines:?}");
    assert_eq!(lines[lines.len() - 2..], ["begin last", "end"], "{lines:?}");
}

/// Of what comes during a run the latest is kept, and is run next, once.
#[test]
fn latest_event_is_run_next() {
    let notes = Notes::new();
    let mut server = notes.server(&POKED, HELD);
    notes.hold();
    notes.begin_first(&server);
    for i in 0..10 {
        server.echo(format!("meanwhile {i}\n"));
        thread::sleep(ms(20)); // each an event of its own
    }
    assert_eq!(notes.lines(), ["begin first"]);
    notes.release();
    notes.wait_for("end meanwhile 9");
    server.stop();
    assert_eq!(notes.lines(), ["begin first", "end first", "begin meanwhile 9", "end meanwhile 9"]);
}

/// A tick never replaces a poke that waits for its run, nor does it in a burst.
#[test]
fn tick_never_replaces_a_pending_poke() {
    let notes = Notes::new();
    notes.hold();
    let server = notes.server(&["--interval", "10", "--debounce", "1"], HELD);
    notes.wait_for("begin 0");
    server.echo("poke\n");
    thread::sleep(ms(300)); // thirty ticks
    assert_eq!(notes.lines(), ["begin 0"]);
    notes.release();
    notes.wait_for_count(4);
    assert_eq!(notes.lines()[..4], ["begin 0", "end 0", "begin poke", "end poke"]);
    // And the clock goes on.
    notes.wait_for_count(6);

    let notes = Notes::new();
    let options = ["--interval", "50", "--debounce", "1000", "--max-wait", "1000"];
    let server = notes.server(&options, NOTE);
    server.echo("poke\n");
    notes.wait_for_count(1);
    assert_eq!(notes.lines(), ["poke"]);
}

/// A poke during a run replaces the tick that waits.
#[test]
fn poke_replaces_a_pending_tick() {
    let notes = Notes::new();
    notes.hold();
    let server = notes.server(&["--interval", "10", "--debounce", "1"], HELD);
    notes.wait_for("begin 0");
    thread::sleep(ms(100)); // a tick is pending
    server.echo("poke\n");
    notes.release();
    notes.wait_for_count(3);
    assert_eq!(notes.lines()[2], "begin poke");
}

/// A fast clock with a slow command does not fall behind: each run has the latest tick.
#[test]
fn slow_command_does_not_fall_behind() {
    let notes = Notes::new();
    let script = r#"echo "$SMOLRX_EVENT" >> "$D/notes"; sleep 0.4"#;
    let _server = notes.server(&["--interval", "10", "--debounce", "1"], script);
    notes.wait_for_count(6);
    let ticks: Vec<u64> = notes.lines().iter().map(|line| line.parse().unwrap()).collect();
    // A busy machine's clock leaves some out, and never so many.
    assert!(ticks.windows(2).all(|pair| pair[1] >= pair[0] + 8), "{ticks:?}");
}

/// A run of many seconds delays no echo, no health check and no idle client's end.
#[test]
fn long_run_delays_nobody() {
    let notes = Notes::new();
    notes.hold();
    let server = notes.server(&[&POKED[..], &["--timeout", "1000"]].concat(), HELD);
    notes.begin_first(&server);
    let mut idle = server.connect();
    idle.send("half");
    let start = Instant::now();
    let mut slowest = Duration::ZERO;
    while start.elapsed() < ms(3000) {
        let sent = Instant::now();
        server.echo("meanwhile\n");
        slowest = slowest.max(sent.elapsed());
        thread::sleep(ms(10));
    }
    println!("the slowest echo: {slowest:?}");
    assert!(slowest < ms(1000), "an echo took {slowest:?}");
    is_healthy(server.address.port());
    assert!(idle.hears_nothing_for(ms(1)) || idle.until_closed().is_empty());
    assert_eq!(idle.until_closed(), b"", "the idle client");
    assert_eq!(notes.lines(), ["begin first"]);
    notes.release();
    notes.wait_for("end meanwhile");
}

/// Clients that send without a pause starve no run, and runs starve none of them.
#[test]
fn flood_starves_no_run() {
    let notes = Notes::new();
    let options = [&POKED[..], &["--keep-open", "--max-wait", "50"]].concat();
    let (mut server, address) = notes.quiet_server(&options, r#"echo x >> "$D/notes"; sleep 0.02"#);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..4 {
            let client = Client::connect(address);
            let (mut writer, mut reader) = (client.0.try_clone().unwrap(), client.0);
            let over = &over;
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed)
                    && writer.write_all("flood flood\n".repeat(1000).as_bytes()).is_ok()
                {}
                let _ = writer.shutdown(std::net::Shutdown::Both);
            });
            scope.spawn(move || while reader.read(&mut [0; 65536]).is_ok_and(|length| length > 0) {});
        }
        notes.wait_for_count(1);
        let start = Instant::now();
        notes.wait_for_count(21);
        println!("20 runs in {:?}", start.elapsed());
        let took = start.elapsed();
        is_healthy(address.port());
        over.store(true, Ordering::Relaxed);
        assert!(took < ms(10_000), "20 runs of 20 ms took {took:?}");
    });
    server.stop();
}

// ---------------------------------------------------------------- the transcript

/// Without `--quiet` the transcript goes on, with the command's own output beside it.
#[test]
fn transcript_goes_on() {
    let notes = Notes::new();
    let mut server = notes.server(&POKED, "echo \"ran $SMOLRX_EVENT\"; echo \"told $SMOLRX_EVENT\" >&2");
    let mut expected = vec![format!("Serving on {}", server.address)];
    for event in ["foo", "bar"] {
        let port = server.echo(format!("{event}\n"));
        server.stdout.wait_for(&format!("ran {event}"));
        expected.extend(conversation(event, port));
        expected.extend([format!("Observing {event}"), format!("ran {event}")]);
    }
    let mut exit = server.stop();
    // Which of the two comes first of what is written at the same moment, is nobody's promise.
    exit.stdout.sort();
    expected.sort();
    assert_eq!(exit.stdout, expected);
    assert_eq!(exit.stderr, ["told foo", "told bar"]);
}

/// With `--quiet` there is the command's output alone.
#[test]
fn quiet_is_the_commands_output_alone() {
    let notes = Notes::new();
    let (mut server, address) = notes.quiet_server(&POKED, "echo \"ran $SMOLRX_EVENT\"");
    for event in ["foo", "bar"] {
        poke(address, event);
        server.stdout.wait_for(&format!("ran {event}"));
    }
    let exit = server.stop();
    assert_eq!(exit.stdout, ["ran foo", "ran bar"]);
    assert!(exit.stderr.is_empty(), "{exit:?}");
}

/// A run that fails is told in a sentence, with `--quiet` or without, and is not repeated.
#[test]
fn failed_run_is_told() {
    let notes = Notes::new();
    for quiet in [false, true] {
        let script = r#"echo x >> "$D/notes"; eval "$SMOLRX_EVENT""#;
        let options = if quiet { [&POKED[..], &["-q"]].concat() } else { POKED.to_vec() };
        let mut server = Process::spawn(notes.command_after("true", &options, &["sh", "-c", script]));
        let address = server.listening_address();
        let _ = fs::remove_file(notes.file("notes"));
        let mut expected = vec![];
        for (i, (event, message)) in [
            ("exit 3", "the command exited with 3"),
            ("exit 0", ""),
            ("exit 1", "the command exited with 1"),
            ("exit 255", "the command exited with 255"),
            ("exit 137", "the command exited with 137"),
            ("kill -9 $$", "the command was ended by signal 9"),
            ("kill -15 $$", "the command was ended by signal 15"),
            ("kill -2 $$", "the command was ended by signal 2"),
            ("kill -6 $$", "the command was ended by signal 6"), // SIGABRT, a core may be dumped
            ("kill -17 $$; exit 4", "the command exited with 4"), // SIGCHLD
            ("kill -40 $$", "the command was ended by signal 40"), // a real-time signal, of which nix knows none
            ("kill -64 $$", "the command was ended by signal 64"),
            ("exit 5", "the command exited with 5"),
        ]
        .into_iter()
        .enumerate()
        {
            poke(address, event);
            notes.wait_for_count(i + 1);
            if !message.is_empty() {
                expected.push(format!("smolrx: {message}"));
                server.stderr.wait_for_count(expected.len());
            }
            assert_eq!(server.stderr.lines(), expected, "of `{event}`");
        }
        assert_eq!(server.stop().stderr, expected);
        assert_eq!(notes.lines().len(), 13);
    }
}

/// A command may be any of the line's words, `sh -c 'exit 3'` with the clock alone, too.
#[test]
fn clock_runs_a_command_that_fails() {
    let command = program(&[&LOCAL[..], &["--debounce", "1", "--", "sh", "-c", "exit 3"]].concat());
    let mut server = Server::of(Process::spawn(command));
    server.stderr.wait_for("smolrx: the command exited with 3");
    assert_eq!(server.stop().stderr, ["smolrx: the command exited with 3"]);
}

/// Server and command share a file as their output, and neither overwrites what the other has written.
#[test]
fn output_to_a_file_is_whole() {
    let notes = Notes::new();
    let log = notes.file("log");
    let mut command =
        notes.command_after("true", &POKED, &["sh", "-c", "echo \"ran $SMOLRX_EVENT\"; echo x >> $D/notes"]);
    command.stdout(File::create(&log).unwrap());
    let mut server = Process::spawn_with_stdout(command);
    let address = server.listening_address();
    for i in 0..20 {
        poke(address, format!("{i}"));
        notes.wait_for_count(i + 1);
    }
    server.stop();
    let log = fs::read_to_string(log).unwrap();
    for i in 0..20 {
        for line in [format!("Observing {i}"), format!("ran {i}")] {
            assert_eq!(log.lines().filter(|l| *l == line).count(), 1, "`{line}` in\n{log}");
        }
    }
    assert_eq!(log.lines().count(), 1 + 20 * 5, "{log}");
}

// ------------------------------------------------------------------------ the end

/// At SIGTERM or SIGINT the run under way is waited for, then the pending event is run, then it ends with 0.
#[test]
fn signal_waits_for_the_run_and_runs_what_is_pending() {
    for signal in [Signal::TERM, Signal::INT] {
        let notes = Notes::new();
        notes.hold();
        let mut server = notes.server(&POKED, TRAPS);
        notes.begin_first(&server);
        server.echo("second\n");
        server.echo("third\n");
        server.signal(signal);
        server.refuses();
        thread::sleep(ms(500));
        assert!(server.is_running(), "ended in the middle of a run");
        assert_eq!(notes.lines(), ["begin first"]);
        notes.release();
        let exit = ends_well(&mut server);
        assert_eq!(notes.lines(), ["begin first", "end first", "begin third", "end third"]);
        assert_eq!(observed(&exit.stdout).last(), Some(&"third"), "{exit:?}");
    }
}

/// A run that takes longer than the clients' grace is waited for all the same.
#[test]
fn run_longer_than_the_grace_is_waited_for() {
    let notes = Notes::new();
    notes.hold();
    let mut server = notes.server(&POKED, TRAPS);
    notes.begin_first(&server);
    server.echo("second\n");
    let mut silent = server.connect();
    silent.send("half");
    silent.is_taken();
    server.signal(Signal::TERM);
    thread::sleep(ms(7000));
    assert!(server.is_running(), "ended in the middle of a run");
    notes.ends_well(&mut server, &["begin first", "end first", "begin second", "end second"]);
}

/// An event that the debounce holds is run at once at the end, and without an event nothing is.
#[test]
fn signal_runs_what_the_debounce_holds() {
    for pokes in [0, 1, 5] {
        let notes = Notes::new();
        let mut server = notes.server(&PENDING, HELD);
        (0..pokes).for_each(|i| _ = server.echo(format!("{i}\n")));
        server.signal(Signal::TERM);
        let exit = server.exited(ms(5000));
        assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{exit:?}");
        let event = (pokes > 0).then(|| [format!("begin {}", pokes - 1), format!("end {}", pokes - 1)]);
        assert_eq!(notes.lines(), event.into_iter().flatten().collect::<Vec<_>>());
    }
}

/// A line that its client completes after the signal is run after the run that is under way.
#[test]
fn line_completed_in_the_grace_is_run() {
    let notes = Notes::new();
    notes.hold();
    let mut server = notes.server(&POKED, HELD);
    let mut client = server.connect();
    client.send("comp");
    client.is_taken();
    notes.begin_first(&server);
    server.signal(Signal::TERM);
    server.refuses();
    client.send("leted\n");
    assert_eq!(client.rest(), b"completed\n");
    notes.ends_well(&mut server, &["begin first", "end first", "begin completed", "end completed"]);
}

/// The last run may fail: that is told before the end, which is with 0 all the same.
#[test]
fn last_run_that_fails_is_told() {
    let notes = Notes::new();
    for _ in 0..10 {
        let mut server = notes.server(&PENDING, "exit 3");
        server.echo("poke\n");
        let exit = server.stop();
        assert_eq!(exit.stderr, ["smolrx: the command exited with 3"]);
    }
}

/// The last run's output is all there at the end, with all of the transcript.
#[test]
fn last_runs_output_is_whole() {
    let notes = Notes::new();
    let mut server =
        notes.server(&PENDING, "i=0; while [ $i -lt 5000 ]; do echo \"number $i\"; i=$((i + 1)); done");
    let port = server.echo("poke\n");
    let exit = server.stop();
    let numbers: Vec<&String> = exit.stdout.iter().filter(|line| line.starts_with("number ")).collect();
    assert_eq!(numbers.len(), 5000);
    for line in conversation("poke", port) {
        assert!(exit.stdout.contains(&line), "no `{line}`");
    }
    assert_eq!(exit.stdout.len(), 5000 + 5);
}

/// A second signal is passed on to the command, and ends the server at once, with 128 and its number.
#[test]
fn second_signal_is_passed_on_and_ends_it() {
    for (first, second, code, got) in [
        (Signal::TERM, Signal::TERM, 143, "got TERM"),
        (Signal::INT, Signal::TERM, 143, "got TERM"),
        (Signal::TERM, Signal::INT, 130, "got INT"),
        (Signal::INT, Signal::INT, 130, "got INT"),
    ] {
        let notes = Notes::new();
        notes.hold();
        let mut server = notes.server(&POKED, TRAPS);
        notes.begin_first(&server);
        server.echo("second\n");
        server.signal(first);
        server.refuses();
        thread::sleep(ms(200)); // within 100 ms it would be the same signal
        assert_eq!(notes.lines(), ["begin first"], "the first signal reaches the command");
        server.signal(second);
        let exit = server.exited(ms(2000));
        assert_eq!((exit.code, exit.stderr.len()), (Some(code), 0), "{exit:?}");
        notes.wait_for(got);
        assert_eq!(notes.lines(), ["begin first", got], "{first:?}, {second:?}");
    }
}

/// The run of the pending event is passed the second signal like any other.
#[test]
fn second_signal_is_passed_on_to_the_last_run() {
    let notes = Notes::new();
    notes.hold();
    let mut server = notes.server(&PENDING, TRAPS);
    server.echo("poke\n");
    server.signal(Signal::TERM);
    notes.wait_for("begin poke");
    thread::sleep(ms(200));
    server.signal(Signal::TERM);
    let exit = server.exited(ms(2000));
    assert_eq!((exit.code, exit.stderr.len()), (Some(143), 0), "{exit:?}");
    notes.wait_for("got TERM");
}

/// Two signals within 100 ms are one, as `timeout` sends them: the run is waited for.
#[test]
fn doubled_signal_is_one() {
    let notes = Notes::new();
    notes.hold();
    let mut server = notes.server(&POKED, TRAPS);
    notes.begin_first(&server);
    server.signal(Signal::TERM);
    thread::sleep(ms(10));
    server.signal(Signal::TERM);
    thread::sleep(ms(500));
    assert!(server.is_running(), "ended in the middle of a run");
    notes.ends_well(&mut server, &["begin first", "end first"]);
}

/// A command that ignores the second signal, or is stopped, does not hold up the server's end.
#[test]
fn command_that_ignores_signals_holds_up_nothing() {
    for script in [
        r#"trap '' TERM; exec > /dev/null 2>&1; echo begin >> "$D/notes"; while [ -e "$D/hold" ]; do sleep 0.02; done"#,
        r#"exec > /dev/null 2>&1; echo $$ >> "$D/command"; echo begin >> "$D/notes"; kill -STOP $$"#,
    ] {
        let notes = Notes::new();
        notes.hold();
        let mut server = notes.server(&POKED, script);
        server.echo("poke\n");
        notes.wait_for("begin");
        server.signal(Signal::TERM);
        thread::sleep(ms(200));
        assert!(server.is_running(), "ended in the middle of a run");
        server.signal(Signal::TERM);
        let exit = server.exited(ms(2000));
        assert_eq!((exit.code, exit.stderr.len()), (Some(143), 0), "{exit:?}");
        notes.release();
        if let Ok(command) = fs::read_to_string(notes.file("command")) {
            kill(command.trim().parse().unwrap(), Signal::CONT); // what SIGTERM has left to do
        }
    }
}

/// Ctrl-C in a terminal reaches both: the command, which may end by it, and the server, which then ends well.
#[test]
fn ctrl_c_reaches_both() {
    for (script, message) in [
        (TRAPS, None),
        // (The shell itself would wait for its sleep.)
        (
            r#"echo begin poke >> "$D/notes"; exec sleep 60"#,
            Some("smolrx: the command was ended by signal 2"),
        ),
    ] {
        let notes = Notes::new();
        notes.hold();
        let mut terminal = Terminal::start(&notes, script);
        poke(terminal.process.listening_address(), "poke");
        notes.wait_for("begin poke");
        terminal.types(b"\x03");
        let exit = terminal.process.exited(ms(6000));
        assert_eq!(exit.code, Some(0), "{exit:?}\n{:?}", terminal.screen);
        match message {
            Some(message) => terminal.shows(message),
            None => assert_eq!(notes.lines(), ["begin poke", "got INT"]),
        }
    }
}

/// A second Ctrl-C ends the server with 130, also while the command takes no notice.
#[test]
fn second_ctrl_c_ends_it() {
    let notes = Notes::new();
    notes.hold();
    let script = r#"trap '' INT; echo begin >> "$D/notes"; while [ -e "$D/hold" ]; do sleep 0.02; done"#;
    let mut terminal = Terminal::start(&notes, script);
    poke(terminal.process.listening_address(), "poke");
    notes.wait_for("begin");
    terminal.types(b"\x03");
    thread::sleep(ms(300));
    assert!(terminal.process.is_running(), "ended in the middle of a run");
    terminal.types(b"\x03");
    assert_eq!(terminal.process.exited(ms(2000)).code, Some(130));
}

/// A server in a terminal of its own, which controls it.
struct Terminal {
    process: Process,
    screen: Transcript,
    keys: File,
}

impl Terminal {
    fn start(notes: &Notes, script: &str) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let screen = openpt(flags).unwrap();
        grantpt(&screen).unwrap();
        unlockpt(&screen).unwrap();
        let end = ioctl_tiocgptpeer(&screen, flags).unwrap();
        let screen = File::from(screen);
        let keys = screen.try_clone().unwrap();
        let server = notes.command_after("true", &POKED, &["sh", "-c", script]);
        // The terminal that is to control the session is the one under stdin.
        let mut command = Command::new("sh");
        command
            .args(["-c", "exec setsid -c \"$@\" <&1", "sh"])
            .arg(server.get_program())
            .args(server.get_args());
        command.env("D", notes.file("")).stdout(end.try_clone().unwrap()).stderr(end);
        let process = Process::spawn_with_output(command);
        Self { process, screen: Transcript::of(screen), keys }
    }

    fn types(&mut self, keys: &[u8]) {
        self.keys.write_all(keys).unwrap();
    }

    fn shows(&self, line: &str) {
        self.screen
            .wait_until(line, |lines| lines.iter().any(|l| l.trim_end().ends_with(line)).then_some(()));
    }
}

// ------------------------------------------------------------------ what is left behind

/// As process 1 it reaps what twenty runs leave behind, each a child that ends later and fails.
#[test]
fn process_1_reaps_orphans_of_runs() {
    let notes = Notes::new();
    let script = r#"(sleep 0.3; exit 3) > /dev/null 2>&1 & echo "$SMOLRX_EVENT" >> "$D/notes""#;
    let Some((server, pid)) = as_process_1(&notes, "true", &POKED, &["sh", "-c", script]) else { return };
    for i in 0..20 {
        server.echo(format!("{i}\n"));
        notes.wait_for_count(i + 1);
    }
    eventually(PATIENCE, "no child and no zombie is left", || children(pid).is_empty());
    assert!(server.stderr.lines().is_empty(), "{:?}", server.stderr);
}

/// Also a hundred that end all at once, and those that end while a run is under way, which is not over then.
#[test]
fn process_1_reaps_many_orphans_during_a_run() {
    let notes = Notes::new();
    notes.hold();
    let script = r#"i=0; while [ $i -lt 100 ]; do (sleep 0.5 &) > /dev/null 2>&1; i=$((i + 1)); done
        echo "begin $SMOLRX_EVENT" >> "$D/notes"
        while [ -e "$D/hold" ]; do read -r _ < "$D/never" || sleep 0.02; done
        echo "end $SMOLRX_EVENT" >> "$D/notes""#;
    File::create(notes.file("never")).unwrap();
    let Some((server, pid)) = as_process_1(&notes, "true", &POKED, &["sh", "-c", script]) else { return };
    notes.begin_first(&server);
    server.echo("second\n");
    eventually(PATIENCE, "only the run is left", || children(pid).len() == 1);
    thread::sleep(ms(200));
    assert_eq!(notes.lines(), ["begin first"]);
    notes.release();
    notes.wait_for("end second");
    eventually(PATIENCE, "no child and no zombie is left", || children(pid).is_empty());
    assert!(server.stderr.lines().is_empty(), "{:?}", server.stderr);
}

/// As process 1 it ends well at SIGTERM, SIGINT and SIGHUP: after the run under way and the pending one, and whatever
/// the runs have left behind.
#[test]
fn process_1_ends_well() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let notes = Notes::new();
        notes.hold();
        let script = format!("sleep 1000 > /dev/null 2>&1 &\n{HELD}");
        let command = ["sh", "-c", &script];
        let Some((mut server, pid)) = as_process_1(&notes, "true", &POKED, &command) else { return };
        notes.begin_first(&server);
        server.echo("second\n");
        kill(pid, signal);
        server.refuses();
        thread::sleep(ms(300));
        assert_eq!(notes.lines(), ["begin first"]);
        notes.ends_well(&mut server, &["begin first", "end first", "begin second", "end second"]);
    }
}

/// As process 1, too, a second signal is passed on, and a command that is not there ends it with 127.
#[test]
fn process_1_ends_badly() {
    let notes = Notes::new();
    notes.hold();
    let Some((mut server, pid)) = as_process_1(&notes, "true", &POKED, &["sh", "-c", TRAPS]) else { return };
    notes.begin_first(&server);
    kill(pid, Signal::TERM);
    thread::sleep(ms(200));
    kill(pid, Signal::TERM);
    assert_eq!(server.exited(ms(2000)).code, Some(143));

    let Some((mut server, _)) = as_process_1(&notes, "true", &POKED, &["smolrx-no-such"]) else { return };
    server.echo("poke\n");
    assert_eq!(server.exited(ms(6000)).code, Some(127));
}

/// Without a command it reaps as well, as process 1 and elsewhere: the children of the shell that it has replaced.
#[test]
fn reaps_without_a_command() {
    let inherited = "(sleep 0.1; exit 7) & (sleep 0.3; exit 8) & sleep 0.5 & true";
    let notes = Notes::new();
    let setup = format!("echo $$ > \"$D/pid\"; {inherited}");
    let mut command = program_after(&setup, &[&LOCAL[..], &POKED].concat());
    command.env("D", notes.file(""));
    let server = Server::of(Process::spawn(command));
    eventually(PATIENCE, "no child and no zombie is left", || children(notes.pid()).is_empty());
    server.echo("poke\n");
    assert!(server.stderr.lines().is_empty(), "{:?}", server.stderr);

    let inherited = "(sleep 0.1 &) & (sleep 0.3; exit 8) & (sleep 0.5 &); true";
    let Some((server, pid)) = as_process_1(&notes, inherited, &POKED, &[]) else { return };
    eventually(PATIENCE, "no child and no zombie is left", || children(pid).is_empty());
    server.echo("poke\n");
    assert!(server.stderr.lines().is_empty(), "{:?}", server.stderr);
}

/// A child that has ended before the server took its parent's place is reaped, though no signal tells of it.
#[test]
fn reaps_what_has_ended_before_its_start() {
    if !works(Command::new("perl").args(["-e", "1"])) {
        return skipped("a child that ends before the server's start: there is no perl");
    }
    let notes = Notes::new();
    // A shell would wait for its child.
    let becomes = r#"exit 8 unless fork; open F, "<", "$ENV{D}/fifo"; <F>; exec @ARGV"#;
    let setup = format!("echo $$ > \"$D/pid\"; mkfifo \"$D/fifo\"; exec perl -e '{becomes}' \"$0\" \"$@\"");
    let mut command = program_after(&setup, &[&LOCAL[..], &POKED].concat());
    command.env("D", notes.file(""));
    let process = Process::spawn(command);
    eventually(PATIENCE, "its parent", || notes.file("fifo").exists());
    eventually(PATIENCE, "a zombie", || children(notes.pid()).values().eq(&['Z']));
    fs::write(notes.file("fifo"), "go on\n").unwrap();
    let _server = Server::of(process);
    eventually(PATIENCE, "no zombie is left", || children(notes.pid()).is_empty());
}

/// The end of a child that the server has inherited, or a stray SIGCHLD, is not the run's end.
#[test]
fn other_childrens_ends_are_not_the_runs() {
    let notes = Notes::new();
    notes.hold();
    let setup = "(while [ -e \"$D/pid\" ] && [ ! -e \"$D/go\" ]; do sleep 0.02; done; exit 7) & true";
    let server = notes.server_after(setup, &POKED, HELD);
    notes.begin_first(&server);
    server.echo("second\n");
    assert_eq!(children(notes.pid()).len(), 2, "the inherited child and the run");
    File::create(notes.file("go")).unwrap();
    eventually(PATIENCE, "only the run is left", || children(notes.pid()).len() == 1);
    (0..100).for_each(|_| server.signal(Signal::CHILD));
    thread::sleep(ms(200));
    assert_eq!(notes.lines(), ["begin first"]);
    assert!(server.stderr.lines().is_empty(), "{:?}", server.stderr);
    notes.release();
    notes.wait_for("end second");
}

/// A run is over when the command ends, not when what it has left behind closes the output.
#[test]
fn child_left_behind_with_the_output_holds_up_nothing() {
    let notes = Notes::new();
    notes.hold();
    let script = r#"(while [ -e "$D/hold" ]; do sleep 0.02; done) & echo "$SMOLRX_EVENT" >> "$D/notes""#;
    let mut server = notes.server(&POKED, script);
    for i in 0..3 {
        server.echo(format!("{i}\n"));
        notes.wait_for_count(i + 1);
    }
    server.signal(Signal::TERM);
    eventually(ms(6000), "it ends", || !server.is_running());
    assert_eq!(server.exit_code(), Some(0));
    notes.release();
}

/// Three hundred runs leave no descriptor, no memory and no child behind in the server, nor do as many that could not
/// be started.
#[test]
fn runs_leak_nothing() {
    let notes = Notes::new();
    let options = [&POKED[..], &["--max-line", "300000"]].concat();
    let (server, address) = notes.quiet_server(&options, NOTE);
    let long = "x".repeat(140_000);
    let mut count = 0;
    let mut runs = |number: usize| {
        for _ in 0..number {
            poke(address, "x");
            count += 1;
            notes.wait_for_count(count);
            if count % 3 == 0 {
                poke(address, &long);
                server.stderr.wait_for_count(count / 3);
            }
        }
    };
    runs(30);
    let settled = || {
        eventually(PATIENCE, "the runs are over", || children(notes.pid()).is_empty());
        (server.descriptors(), server.threads(), server.memory_kb())
    };
    let before = settled();
    runs(300);
    let after = settled();
    println!("descriptors, threads, kB: {before:?}, then {after:?}");
    assert_eq!((before.0, before.1), (after.0, after.1));
    assert!(after.2 <= before.2 + 150, "{before:?}, then {after:?}");
}

/// Commands that end at once, hundreds of them one after the other, never leave the server waiting for one.
#[test]
fn shortest_runs_are_noticed() {
    let notes = Notes::new();
    let command = notes.command_after("true", &["--interval", "10", "--debounce", "1"], &["true"]);
    let server = Server::of(Process::spawn(command));
    server.stdout.wait_until("200 runs", |lines| (observed(lines).len() >= 200).then_some(()));
    assert!(server.stderr.lines().is_empty(), "{:?}", server.stderr);
}

/// A server whose parent has it ignore SIGCHLD notices each run's end, also with another child alive, and ends well.
#[test]
fn ignored_sigchld_holds_up_nothing() {
    for others in ["true", "while [ -e \"$D/pid\" ]; do sleep 0.1; done > /dev/null 2>&1 &"] {
        let notes = Notes::new();
        // `env` comes last: a shell has a handler of its own.
        let script = format!("echo $$ > \"$D/pid\"; {others}\nexec env --ignore-signal=CHLD \"$0\" \"$@\"");
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).arg(program(&[]).get_program());
        command.args([&LOCAL[..], &POKED, &["--", "sh", "-c", NOTE]].concat()).env("D", notes.file(""));
        let mut server = Server::of(Process::spawn(command));
        for i in 0..4 {
            server.echo(format!("{i}\n"));
            notes.wait_for_count(i + 1);
        }
        server.signal(Signal::TERM);
        assert_eq!(server.exited(ms(6000)).code, Some(0));
        assert_eq!(notes.lines(), ["0", "1", "2", "3"]);
    }
}

/// A server whose parent has it block SIGCHLD notices each run's end, and how it ended.
#[test]
fn blocked_sigchld_is_no_trouble() {
    let mut command = Command::new("env");
    command.arg("--block-signal=CHLD").arg(program(&[]).get_program());
    command.args([&LOCAL[..], &POKED, &["--", "sh", "-c", "exit 3"]].concat());
    let mut server = Server::of(Process::spawn(command));
    for i in 0..5 {
        server.echo(format!("{i}\n"));
        server.stderr.wait_for_count(i + 1);
    }
    assert_eq!(server.stop().stderr, ["smolrx: the command exited with 3"; 5]);
}

// --------------------------------------------------------------- what can't be started

/// A server that has been poked once and has ended by itself.
fn ends_at_the_first_event(command: Command) -> Exit {
    let mut server = Server::of(Process::spawn(command));
    thread::sleep(ms(50));
    assert!(server.is_running(), "ended before the first event");
    let port = server.echo("poke\n");
    let exit = server.exited(ms(6000));
    for line in conversation("poke", port) {
        assert!(exit.stdout.contains(&line), "no `{line}`: {exit:?}");
    }
    exit
}

/// A command that is not found, or may not be run, or is no program, ends the server at the first event with a
/// sentence and the shells' code.
#[test]
fn command_that_cannot_be_started_ends_it() {
    let notes = Notes::new();
    let without_interpreter = notes.executable("interpreter", "#!/no/such/interpreter\n");
    let zeros = notes.executable("zeros", &"\0".repeat(1000));
    let empty = notes.executable("empty", "");
    let text = notes.executable("text", "echo no interpreter is named\n");
    let not_executable = notes.file("not-executable").to_str().unwrap().to_string();
    fs::write(&not_executable, "#!/bin/sh\n").unwrap();
    fs::set_permissions(&not_executable, Permissions::from_mode(0o644)).unwrap();
    let folder = notes.file("folder").to_str().unwrap().to_string();
    fs::create_dir(&folder).unwrap();
    for (command, code, why) in [
        ("smolrx-no-such", 127, "not found (error 2)"),
        ("./no/such", 127, "not found (error 2)"),
        ("/no/such", 127, "not found (error 2)"),
        (&without_interpreter, 127, "not found (error 2)"),
        (&not_executable, 126, "permission denied (error 13)"),
        (&folder, 126, "permission denied (error 13)"),
        (&zeros, 126, "(error 8)"),
        (&empty, 126, "(error 8)"),
        (&text, 126, "(error 8)"),
    ] {
        let options = [&LOCAL[..], &POKED, &["--", command, "--argument"]].concat();
        let exit = ends_at_the_first_event(program(&options));
        assert_eq!((exit.code, exit.stderr.len()), (Some(code), 1), "{command}: {exit:?}");
        let message = &exit.stderr[0];
        assert!(message.starts_with(&format!("smolrx: cannot run {command}: ")), "{command}: {exit:?}");
        assert!(message.ends_with(why), "{command}: {exit:?}");
    }
}

/// The same of names that no file can have: it does not go on with a command that never will be there.
#[test]
fn impossible_names_end_it() {
    let notes = Notes::new();
    let itself = notes.file("loop").to_str().unwrap().to_string();
    std::os::unix::fs::symlink(&itself, &itself).unwrap();
    let long = "x".repeat(300);
    let longer = format!("/{}", "x/".repeat(3000));
    for command in ["", "/dev/null/x", "/dev/null", &long, &longer, &itself, "/"] {
        let exit = ends_at_the_first_event(program(&[&LOCAL[..], &POKED, &["--", command]].concat()));
        assert!(matches!(exit.code, Some(126 | 127)), "{command:.20}: {exit:?}");
        assert_eq!(exit.stderr.len(), 1, "{command:.20}: {exit:?}");
        assert!(exit.stderr[0].starts_with("smolrx: cannot run "), "{command:.20}: {exit:?}");
    }
}

/// A hostile name is one harmless line of the message.
#[test]
fn hostile_name_is_told_harmlessly() {
    let mut command = program(&[&LOCAL[..], &POKED, &["--"]].concat());
    command.arg(OsStr::from_bytes(b"./\x1b[31m\n\xff\xe2\x80\xae"));
    let exit = ends_at_the_first_event(command);
    assert_eq!((exit.code, exit.stderr.len()), (Some(127), 1), "{exit:?}");
    assert!(!exit.stderr[0].chars().any(is_hostile), "{exit:?}");
}

/// With the clock alone a command that is not there ends it at the first tick, with `--quiet`, too.
#[test]
fn missing_command_ends_it_at_the_first_tick() {
    for quiet in [&[][..], &["-q"]] {
        let options = [&LOCAL[..], &["--debounce", "1"], quiet, &["--", "smolrx-no-such"]].concat();
        let exit = run(&options);
        assert_eq!(exit.code, Some(127), "{exit:?}");
        assert_eq!(exit.stderr, ["smolrx: cannot run smolrx-no-such: not found (error 2)"]);
    }
}

/// A command that is not there at the last event, or no more at a later one, is told and is the exit code.
#[test]
fn command_that_has_gone_ends_it() {
    let options = [&LOCAL[..], &PENDING, &["--", "smolrx-no-such"]].concat();
    let mut server = Server::of(Process::spawn(program(&options)));
    server.echo("poke\n");
    server.signal(Signal::TERM);
    let exit = server.exited(ms(6000));
    assert_eq!((exit.code, exit.stderr.len()), (Some(127), 1), "{exit:?}");

    let notes = Notes::new();
    let script = notes.executable("script", "#!/bin/sh\nrm \"$D/script\"; echo ran >> \"$D/notes\"\n");
    let mut server = Server::of(Process::spawn(notes.command_after("true", &POKED, &[&script])));
    server.echo("poke\n");
    notes.wait_for("ran");
    server.echo("poke\n");
    let exit = server.exited(ms(6000));
    assert_eq!((exit.code, exit.stderr.len()), (Some(127), 1), "{exit:?}");
}

/// The command is looked for along PATH, past what is no folder, is no program, or is not there.
#[test]
fn path_is_searched() {
    let notes = Notes::new();
    let folder = |name: &str| {
        let path = notes.file(name);
        fs::create_dir(&path).unwrap();
        path.to_str().unwrap().to_string()
    };
    let (first, second, third) = (folder("first"), folder("second"), folder("third"));
    fs::write(format!("{first}/smolrx-tool"), "#!/bin/sh\necho first\n").unwrap(); // of mode 644
    fs::set_permissions(format!("{first}/smolrx-tool"), Permissions::from_mode(0o644)).unwrap();
    notes.executable("second/smolrx-tool", "#!/bin/sh\necho second\n");
    notes.executable("third/smolrx-tool", "#!/bin/sh\necho third\n");
    notes.executable("smolrx-tool", "#!/bin/sh\necho here\n");
    let path = path();
    let long = "x".repeat(5000);
    for (places, says) in [
        (format!("{second}:{third}:{path}"), "second"),
        (format!("{third}:{second}:{path}"), "third"),
        (format!("{first}:{third}:{path}"), "third"),
        (format!("/no/such:/dev/null:{second}:{path}"), "second"),
        (format!("/{long}:{second}:{path}"), "second"),
        (format!(":{second}:{path}"), "here"),
        (format!("{path}::"), "here"),
    ] {
        let mut command = program(&[&LOCAL[..], &POKED, &["--", "smolrx-tool"]].concat());
        command.env("PATH", &places).current_dir(notes.file(""));
        let mut server = Server::of(Process::spawn(command));
        server.echo("poke\n");
        server.stdout.wait_for(says);
        assert!(server.stop().stderr.is_empty(), "{places:.100}");
    }
    for (places, codes) in
        [(first, &[126][..]), ("/no/such".into(), &[127]), ("/dev/null".into(), &[126, 127])]
    {
        let mut command = program(&[&LOCAL[..], &POKED, &["--", "smolrx-tool"]].concat());
        command.env("PATH", &places);
        let exit = ends_at_the_first_event(command);
        assert!(codes.contains(&exit.code.unwrap()), "{places}: {exit:?}");
    }
}

/// So it is past a folder that may not be read.
#[test]
fn unreadable_folder_in_the_path_is_passed() {
    let notes = Notes::new();
    let closed = notes.file("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, Permissions::from_mode(0o000)).unwrap();
    let start = |name: &str| {
        let options = [&LOCAL[..], &POKED, &["--", name, "-c", "echo ran"]].concat();
        let (mut command, scratch) = program_of_nobody(&options)?;
        command.env("PATH", format!("{}:{}", closed.display(), path()));
        Some((command, scratch))
    };
    let (Some((found, _scratch)), Some((missing, _other))) = (start("sh"), start("smolrx-no-such")) else {
        return skipped("a folder of another user");
    };
    let mut server = Server::of(Process::spawn(found));
    server.echo("poke\n");
    server.stdout.wait_for("ran");
    assert!(server.stop().stderr.is_empty());
    let exit = ends_at_the_first_event(missing);
    assert!(matches!(exit.code, Some(126 | 127)), "{exit:?}");
}

/// An event is whole up to the system's limit of 128 KiB a variable; a longer one is told, and the server goes on.
#[test]
fn long_event_is_whole_or_told() {
    let notes = Notes::new();
    let options = [&POKED[..], &["--max-line", "300000"]].concat();
    let script = r#"printf '%s\n' "$SMOLRX_EVENT" >> "$D/notes""#;
    let (mut server, address) = notes.quiet_server(&options, script);
    let fits = 131_072 - "SMOLRX_EVENT=\0".len();
    let line = |length: usize| -> String { ('a'..='z').cycle().take(length).collect() };
    let mut count = 0;
    let mut complaints = 0;
    for length in [4096, 70_000, fits, fits + 1, 200_000, 299_000] {
        poke(address, line(length));
        if length <= fits {
            count += 1;
            notes.wait_for_count(count);
            assert!(notes.lines()[count - 1] == line(length), "an event of {length} bytes is not whole");
        } else {
            complaints += 1;
            server.stderr.wait_for_count(complaints);
        }
        poke(address, "short");
        count += 1;
        notes.wait_for_count(count);
        assert_eq!(notes.lines()[count - 1], "short");
    }
    // Six bytes for each.
    poke(address, "\x7f".repeat(40_000));
    server.stderr.wait_for_count(complaints + 1);
    let exit = server.stop();
    assert_eq!(exit.stderr.len(), 4, "{exit:?}");
    for message in exit.stderr {
        assert!(
            message.starts_with("smolrx: cannot run sh: ") && message.ends_with(" (error 7)"),
            "{message}"
        );
    }
    assert_eq!(notes.lines().len(), count);
}

/// An event that is too long at the end is told as well, and is no failure of the server.
#[test]
fn long_event_at_the_end_is_told() {
    let notes = Notes::new();
    let mut server = notes.server(&[&PENDING[..], &["--max-line", "300000"]].concat(), NOTE);
    server.echo("x".repeat(200_000) + "\n");
    let exit = server.stop();
    assert_eq!(exit.stderr.len(), 1, "{exit:?}");
}

/// A program that is being written can't be run at that moment: that is told, and the server goes on.
#[test]
fn busy_program_is_told() {
    let notes = Notes::new();
    let path = notes.file("program");
    assert!(Command::new("install").args(["-m", "755", "/bin/sh"]).arg(&path).status().unwrap().success());
    let name = path.to_str().unwrap();
    let server = Server::of(Process::spawn(notes.command_after("true", &POKED, &[name, "-c", NOTE])));
    let writer = File::options().append(true).open(&path).unwrap();
    server.echo("poke\n");
    server.stderr.wait_for_count(1);
    let message = &server.stderr.lines()[0];
    assert!(message.starts_with(&format!("smolrx: cannot run {name}: ")), "{message}");
    assert!(message.ends_with("(error 26)"), "{message}");
    drop(writer);
    eventually(PATIENCE, "it runs", || {
        server.echo("poke\n");
        thread::sleep(ms(20));
        !notes.lines().is_empty()
    });
}

/// For want of processes or memory a run is left out, which is told, and the server goes on.
#[test]
fn want_of_processes_or_memory_is_told() {
    if !works(Command::new("strace").args([
        "-f",
        "-o",
        "/dev/null",
        "-e",
        "inject=clone:error=ENOMEM",
        "true",
    ])) {
        return skipped("the want of memory: there is no strace that injects it");
    }
    let notes = Notes::new();
    let mut server = notes.server(&POKED, NOTE);
    let pid = notes.pid().to_string();
    let traced = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        !status.lines().any(|line| line == "TracerPid:\t0")
    };
    for (error, told) in [("ENOMEM", "out of memory (error 12)"), ("EAGAIN", "no process is free (error 11)")]
    {
        let inject = format!("inject=clone,clone3,fork,vfork:error={error}");
        let mut strace = Command::new("strace");
        strace.args([
            "-f",
            "-o",
            "/dev/null",
            "-e",
            "trace=clone,clone3,fork,vfork",
            "-e",
            &inject,
            "-p",
            &pid,
        ]);
        let mut strace = strace.stderr(Stdio::null()).spawn().unwrap();
        eventually(PATIENCE, "strace has it", traced);
        server.echo("meanwhile\n");
        server.stderr.wait_for(&format!("smolrx: cannot run sh: {told}"));
        kill(strace.id(), Signal::TERM);
        strace.wait().unwrap();
        eventually(PATIENCE, "strace has left it", || !traced());
    }
    server.echo("after\n");
    notes.wait_for("after");
    server.stop();
    assert_eq!(notes.lines(), ["after"]);
}

// ------------------------------------------------------------- commands that misbehave

/// Output that nobody reads holds up the command, and the server not: pokes are echoed, health is answered, and what
/// was pending is run once somebody reads.
#[test]
fn command_whose_output_is_not_read_holds_up_itself() {
    let notes = Notes::new();
    let script = format!("yes \"of $SMOLRX_EVENT\" | head -n 100000; {NOTE}").replace("\"of ", "\"line of ");
    let (mut server, address) = notes.quiet_server(&POKED, &script);
    server.stdout.pause();
    poke(address, "first");
    for i in 0..50 {
        poke(address, format!("poke {i}"));
    }
    thread::sleep(ms(500));
    poke(address, "last");
    is_healthy(address.port());
    assert_eq!(notes.lines(), [""; 0], "the run has ended though its output is not read");
    let (cpu, _) = server.activity();
    thread::sleep(ms(500));
    let busy = server.activity().0 - cpu;
    assert!(busy < ms(100), "busy for {busy:?} of half a second");
    server.stdout.resume();
    notes.wait_for("last");
    let exit = server.stop();
    let of = |event: &str| exit.stdout.iter().filter(|line| **line == format!("line of {event}")).count();
    let events = notes.lines();
    assert_eq!(exit.stdout.len(), events.len() * 100_000, "the output of {events:?}");
    assert!(events.iter().all(|event| of(event) == 100_000), "the output of {events:?}");
}

/// The second signal ends the server at once, also then.
#[test]
fn second_signal_ends_it_while_its_output_is_not_read() {
    let notes = Notes::new();
    let (mut server, address) = notes.quiet_server(&POKED, r#"echo begin >> "$D/notes"; yes"#);
    server.stdout.pause();
    poke(address, "first");
    notes.wait_for("begin");
    server.signal(Signal::TERM);
    refuses(address);
    thread::sleep(ms(200));
    assert!(server.is_running(), "ended in the middle of a run");
    server.signal(Signal::TERM);
    eventually(ms(2000), "it ends", || !server.is_running());
    assert_eq!(server.exit_code(), Some(143));
    // (Its command was the shell: `yes` ends with the pipe.)
}

/// A command that makes the output non-blocking, as some leave it, loses none of the transcript, and costs no time.
#[test]
fn output_made_nonblocking_loses_nothing() {
    let (reader, writer) = io::pipe().unwrap();
    let mut command = program(&[&LOCAL[..], &["--interval", "600000", "--keep-open", "--", "true"]].concat());
    command.stdout(writer.try_clone().unwrap());
    let mut process = Process::spawn_with_stdout(command);
    process.stdout = Transcript::of_paused(reader);
    let address = process.listening_address();
    fcntl_setfl(&writer, fcntl_getfl(&writer).unwrap() | OFlags::NONBLOCK).unwrap();
    drop(writer);
    let mut floods: Vec<Flood> = (0..2).map(|_| Flood::new(Client::connect(address), true)).collect();
    Flood::pump_until_stalled(&mut floods, ms(500));
    let (cpu, _) = process.activity();
    thread::sleep(ms(500));
    let busy = process.activity().0 - cpu;
    process.stdout.resume();
    Flood::complete(&mut floods);
    process.signal(Signal::TERM);
    let exit = process.exited(PATIENCE);
    assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{:?}", exit.stderr);
    for flood in &floods {
        assert_eq!(received(&exit.stdout, flood), flood.lines);
    }
    assert!(busy < ms(100), "busy for {busy:?} of half a second");
}

/// A command that closes its output closes its own: the server goes on, and so does the next run.
#[test]
fn command_that_closes_its_output_closes_its_own() {
    let notes = Notes::new();
    let script =
        r#"echo "ran $SMOLRX_EVENT"; exec >&- 2>&- <&-; echo "$SMOLRX_EVENT" >> "$D/notes"; sleep 0.1"#;
    let mut server = notes.server(&POKED, script);
    for i in 0..3 {
        server.echo(format!("{i}\n"));
        notes.wait_for(&format!("{i}"));
        server.stdout.wait_for(&format!("ran {i}"));
    }
    assert!(server.stop().stderr.is_empty());
}

/// A reader that closes the server's output ends the server with 141 at once, silently, be it that a run is under way.
#[test]
fn closed_output_ends_it_during_a_run() {
    for quiet in [&[][..], &["-q"]] {
        let notes = Notes::new();
        notes.hold();
        let (mut reader, writer) = io::pipe().unwrap();
        let options = [&POKED[..], quiet].concat();
        let script = format!("exec > /dev/null 2>&1\n{HELD}");
        let mut command = notes.command_after("true", &options, &["sh", "-c", &script]);
        command.stdout(writer);
        let mut server = Process::spawn_with_stdout(command);
        poke(server.listening_address(), "poke");
        notes.wait_for("begin poke");
        if quiet.is_empty() {
            reader.read_exact(&mut [0; 8]).unwrap();
        }
        drop(reader);
        let exit = server.exited(ms(2000));
        notes.release();
        assert_eq!((exit.code, exit.stderr.len()), (Some(141), 0), "{exit:?}");
    }
}

/// A stopped command has not ended: the next event waits until it goes on.
#[test]
fn stopped_command_has_not_ended() {
    let notes = Notes::new();
    let script = r#"echo $$ > "$D/command"; echo "begin $SMOLRX_EVENT" >> "$D/notes"
        if [ "$SMOLRX_EVENT" = first ]; then kill -STOP $$; fi; echo "end $SMOLRX_EVENT" >> "$D/notes""#;
    let server = notes.server(&POKED, script);
    notes.begin_first(&server);
    let stopped = || children(notes.pid()).values().eq(&['T']);
    eventually(PATIENCE, "it is stopped", stopped);
    server.echo("second\n");
    thread::sleep(ms(300));
    assert_eq!(notes.lines(), ["begin first"]);
    assert!(server.stderr.lines().is_empty(), "{:?}", server.stderr);
    kill(fs::read_to_string(notes.file("command")).unwrap().trim().parse().unwrap(), Signal::CONT);
    notes.wait_for("end second");
    assert_eq!(notes.lines(), ["begin first", "end first", "begin second", "end second"]);
}

/// A command that leaves the server's group and session is waited for and signalled like any other.
#[test]
fn command_in_a_session_of_its_own_is_the_run() {
    let notes = Notes::new();
    notes.hold();
    let mut server = Server::of(Process::spawn(notes.command_after(
        "true",
        &POKED,
        &["sh", "-c", "exec setsid sh -c \"$0\"", TRAPS],
    )));
    notes.begin_first(&server);
    server.echo("second\n");
    thread::sleep(ms(200));
    assert_eq!(notes.lines(), ["begin first"]);
    server.signal(Signal::TERM);
    thread::sleep(ms(200));
    server.signal(Signal::TERM);
    assert_eq!(server.exited(ms(2000)).code, Some(143));
    notes.wait_for("got TERM");
}
