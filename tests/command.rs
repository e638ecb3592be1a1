//! `smolrx [OPTION]... -- COMMAND [ARG]...`: what the command gets, when it runs, and what it can't do to the server.
//!
//! What takes a privilege or a tool (another user, a process namespace, strace) is skipped where that is not to be
//! had, and says so; with SMOLRX_NO_SKIPS set, that fails.

mod common;

use common::*;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Resource, Signal, getrlimit, kill_process};
use std::collections::BTreeMap;
use std::env;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A free port of the loopback interface.
const LOCAL: [&str; 4] = ["--bind", "127.0.0.1", "--tcp-port", "0"];

/// No clock, and each poke an event.
const POKED: [&str; 4] = ["--interval", "0", "--debounce", "1"];

/// The same, and nothing is printed.
const QUIETLY_POKED: [&str; 5] = ["-q", "--interval", "0", "--debounce", "1"];

/// No clock, and a debounce so slow that an event is pending until the end.
const PENDING: [&str; 4] = ["--interval", "0", "--debounce", "600000"];

/// Ticks that come as fast as they may.
const TICKING: [&str; 4] = ["--interval", "10", "--debounce", "1"];

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
const NOTE: &str = r#"printf '%s\n' "$SMOLRX_EVENT" >> "$D/notes""#;

/// The server with these options and this command.
fn with_command(options: &[&str], command: &[&str]) -> Command {
    program(&[&LOCAL, options, &["--"], command].concat())
}

/// Starts it, and waits until it serves.
fn start(options: &[&str], command: &[&str]) -> Server {
    Server::of(Process::spawn(with_command(options, command)))
}

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

    /// The name of a file in the folder.
    fn name(&self, file: &str) -> String {
        self.file(file).to_str().unwrap().into()
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
        self.name(name)
    }

    /// The server with these options and this command, started by a shell after `setup`.
    fn command_after(&self, setup: &str, options: &[&str], command: &[&str]) -> Command {
        let mut server = program_after(setup, &[&LOCAL, options, &["--"], command].concat());
        server.env("D", self.file("")).env("MALLOC_ARENA_MAX", "1").env("MALLOC_MMAP_THRESHOLD_", "131072");
        server
    }

    fn server_after(&self, setup: &str, options: &[&str], command: &[&str]) -> Server {
        let process = Process::spawn(self.command_after(setup, options, command));
        if options.contains(&"-q") { Server::found(process) } else { Server::of(process) }
    }

    /// A server that runs this script.
    fn server(&self, options: &[&str], script: &str) -> Server {
        self.server_after("true", options, &["sh", "-c", script])
    }

    /// A server that runs this script, its process 1, and this process as seen from here; see `as_process_one`.
    fn process_one(&self, script: &str) -> Option<(Server, Pid)> {
        as_process_one("true", with_command(&POKED, &["sh", "-c", script]).env("D", self.file("")))
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

    /// Pokes a server so many times, and waits each time until the event is noted.
    #[track_caller]
    fn takes_pokes(&self, server: &Server, count: usize) {
        for i in 0..count {
            server.echo(format!("{i}\n"));
            self.wait_for_count(i + 1);
        }
        assert_eq!(self.lines(), (0..count).map(|i| i.to_string()).collect::<Vec<_>>());
    }

    /// Lets the run under way go on, waits for the good end of a server that has been told to stop, and
    /// compares what its runs have noted in all.
    #[track_caller]
    fn ends_well(&self, server: &mut Server, notes: &[&str]) {
        self.release();
        let exit = server.exited(ms(6000));
        assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{exit:?}");
        assert_eq!(self.lines(), notes);
    }

    /// What is noted, in whole lines.
    fn lines(&self) -> Vec<String> {
        let text = fs::read(self.file("notes")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        text.split_inclusive('\n').filter_map(|line| Some(line.strip_suffix('\n')?.into())).collect()
    }

    #[track_caller]
    fn wait_for(&self, line: &str) {
        let what = format!("a note that says `{line}`");
        eventually(PATIENCE, &what, || self.lines().iter().any(|note| note == line));
    }

    #[track_caller]
    fn wait_for_count(&self, count: usize) {
        eventually(PATIENCE, &format!("{count} notes"), || self.lines().len() >= count);
    }
}

#[track_caller]
fn has_said_nothing(server: &Server) {
    assert!(server.stderr.lines().is_empty(), "{:?}", server.stderr);
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

/// Waits until a process has so many children, zombies included.
#[track_caller]
fn wait_for_children(parent: u32, count: usize) {
    eventually(PATIENCE, &format!("{count} children"), || children(parent).len() == count);
}

fn path() -> String {
    env::var("PATH").unwrap()
}

// ------------------------------------------------------- what the command gets

/// The command finds the event in `SMOLRX_EVENT`: a line as the transcript shows it, whatever a client sends, or the
/// clock's numbers, from 0 on.
#[test]
fn event_is_in_the_environment() {
    let notes = Notes::new();
    let server = notes.server(&POKED, r#"printf '<%s>\n' "$SMOLRX_EVENT" >> "$D/notes""#);
    let text = "foo\n\n   \n0\n-rf\n--help\n--\nSMOLRX_EVENT=x\nPATH=/nowhere\n=\n$(touch x) `id` \"'; exit 9 #\n\
        two  spaces\tand a tab\nünï→☃\nesc \x1b[31m and nul \0 and cr \r within\n\
        \u{202e}right to left\u{2028}\n%s %n \\0 \\n\nlast\n";
    let text = [text.as_bytes(), b"\xff\xfe no UTF-8 \xc3\n"].concat();
    for (i, line) in text.split_inclusive(|&byte| byte == b'\n').enumerate() {
        server.echo(line);
        notes.wait_for_count(i + 1);
        assert_eq!(notes.lines()[i], format!("<{}>", shown(line)), "the event of {line:?}");
    }
    has_said_nothing(&server);

    let notes = Notes::new();
    let _server = notes.server(&["--interval", "100", "--debounce", "1"], NOTE);
    notes.wait_for_count(3);
    assert_eq!(notes.lines()[..3], ["0", "1", "2"]);
}

/// The command has the server's environment to the byte, but for one `SMOLRX_EVENT`, which is the event's.
#[test]
fn environment_is_the_servers() {
    let notes = Notes::new();
    let copy = notes.name("environment");
    let mut command = with_command(&POKED, &["cp", "/proc/self/environ", &copy]);
    command.env("SMOLRX_EVENT", "an older one").env("SMOLRX_EVENTS", "1").env("SMOLRX_EVEN", "2");
    command.env("XSMOLRX_EVENT", "3").env("EMPTY", "").env("NOT_UTF_8", OsStr::from_bytes(b"\xff\xfe"));
    command.env("LINES", "a\nb=c");
    let mut expected = Command::new("cat");
    expected.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    expected.arg("/proc/self/environ").env("SMOLRX_EVENT", "poke");
    let mut server = Server::of(Process::spawn(command));
    server.echo("poke\n");
    server.stop();
    let sorted = |bytes: Vec<u8>| {
        let mut all: Vec<_> =
            bytes.split(|&byte| byte == 0).map(|one| one.escape_ascii().to_string()).collect();
        all.sort();
        all
    };
    assert_eq!(sorted(fs::read(copy).unwrap()), sorted(expected.output().unwrap().stdout));
}

/// A server without any environment finds the command at the places where a shell looks then, and the event is all
/// that the command has.
#[test]
fn empty_environment() {
    let mut command = with_command(&POKED, &["env"]);
    command.env_clear();
    let mut server = Server::of(Process::spawn(command));
    server.echo("poke\n");
    server.stdout.wait_for("SMOLRX_EVENT=poke");
    let exit = server.stop();
    assert!(exit.stderr.is_empty(), "{exit:?}");
    assert_eq!(exit.stdout.iter().filter(|line| line.contains('=')).count(), 1, "{exit:?}");
}

/// Everything behind `--` reaches the command exactly, be it no UTF-8, empty, or like an option of the server's; and
/// a command whose own name looks like an option is a command.
#[test]
fn arguments_are_the_commands() {
    let arguments =
        b"\xff\xfe||--help|-h|--version|-V|--health|--|-q|--interval|nonsense|--tcp-port=99999999|a b|\
        line\nend|$D|*|\x1b[31m";
    let arguments: Vec<&[u8]> = arguments.split(|&byte| byte == b'|').collect();
    let notes = Notes::new();
    notes.executable("--help", "#!/bin/sh\ncp /proc/$$/cmdline \"$D/cmdline\"\n");
    let mut command = with_command(&POKED, &["--help"]);
    command.args(arguments.iter().copied().map(OsStr::from_bytes)).env("D", notes.file(""));
    command.env("PATH", format!("{}:{}", notes.name("."), path()));
    let mut server = Server::of(Process::spawn(command));
    server.echo("poke\n");
    server.stop();
    let bytes = fs::read(notes.file("cmdline")).unwrap();
    let words: Vec<&[u8]> = bytes.strip_suffix(b"\0").unwrap().split(|&byte| byte == 0).collect();
    assert_eq!(words[..2], [b"/bin/sh", notes.name("./--help").as_bytes()]);
    assert_eq!(words[2..], arguments);
}

/// The command's standard input is the server's, without the events: each run goes on where the one before has
/// stopped reading, and one that reads all of it, as ssh does, takes no event from those that follow.
#[test]
fn stdin_is_the_servers() {
    let notes = Notes::new();
    fs::write(notes.file("input"), "one\ntwo\nthree\n").unwrap();
    let script = r#"case $SMOLRX_EVENT in all*) text=$(cat);; *) read -r text;; esac
        echo "$SMOLRX_EVENT <$text>" >> "$D/notes""#;
    let server = notes.server_after("exec < \"$D/input\"", &POKED, &["sh", "-c", script]);
    for (i, note) in ["a <one>", "b <two>", "all <three>", "all again <>", "c <>"].into_iter().enumerate() {
        server.echo(note.split(" <").next().unwrap().to_owned() + "\n");
        notes.wait_for_count(i + 1);
        assert_eq!(notes.lines()[i], note);
    }
}

/// Signals are blocked, ignored or at their default for the command as they were when the server was started.
#[test]
fn signals_are_as_before() {
    let command = ["grep", "-E", "^(SigBlk|SigIgn|SigPnd|ShdPnd):", "/proc/self/status"];
    for signals in [
        "",
        "--block-signal=USR1,WINCH --ignore-signal=USR2,HUP",
        "--block-signal=INT,TERM,HUP,CHLD,PIPE,XFSZ",
        "--ignore-signal=INT,QUIT",
        "--ignore-signal=XFSZ",
        "--ignore-signal=TERM,INT,HUP",
    ] {
        let before = Command::new("env").args(signals.split_whitespace()).args(command).output().unwrap();
        let server = with_command(&QUIETLY_POKED, &command);
        let mut env = Command::new("env");
        env.args(signals.split_whitespace()).arg(server.get_program()).args(server.get_args());
        let server = Server::found(Process::spawn(env));
        server.echo("poke\n");
        server.stdout.wait_for_count(4);
        let before = String::from_utf8(before.stdout).unwrap();
        assert_eq!(server.stdout.lines(), before.lines().collect::<Vec<_>>(), "started by env {signals}");
    }
}

/// The limits of descriptors are those of before the server raised its own, also while it has more in use than the
/// old soft limit allows, and its own stay raised.
#[test]
fn descriptor_limits_are_as_before() {
    if getrlimit(Resource::Nofile).maximum.is_some_and(|hard| hard < 1024) {
        return skip("more clients than the soft limit: the hard one is too low here");
    }
    raise_descriptor_limit();
    let notes = Notes::new();
    let script = r#"echo "$SMOLRX_EVENT $(ulimit -Sn) $(ulimit -Hn)" >> "$D/notes""#;
    let options = [&POKED[..], &["--max-conns", "300"]].concat();
    let setup = "ulimit -Sn 64; ulimit -Hn 1024";
    let server = notes.server_after(setup, &options, &["sh", "-c", script]);
    let before = server.descriptors();
    let mut clients = vec![];
    for (i, count) in [0, 200, 250].into_iter().enumerate() {
        clients.resize_with(count, || server.connect());
        eventually(PATIENCE, "all are accepted", || server.descriptors() == before + count);
        server.echo(format!("beside {count}\n"));
        notes.wait_for_count(i + 1);
        assert_eq!(notes.lines()[i], format!("beside {count} 64 1024"));
    }
    for client in &mut clients {
        client.send("x\n");
        client.expect("x\n");
    }
    assert_eq!(server.descriptor_limits(), ("1024".into(), "1024".into()));
    has_said_nothing(&server);
}

/// A run needs no descriptor that clients could take from it: with all of them in use, it works.
#[test]
fn run_with_no_descriptor_left() {
    let notes = Notes::new();
    let options = [&POKED[..], &["--keep-open"]].concat();
    let server = notes.server_after("ulimit -n 64", &options, &["sh", "-c", NOTE]);
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
    let list = ["ls", "-1", "/proc/self/fd"];
    let before = Command::new(list[0]).args(&list[1..]).output().unwrap();
    let before: Vec<String> = String::from_utf8(before.stdout).unwrap().lines().map(String::from).collect();
    let options = [&QUIETLY_POKED[..], &["--keep-open"]].concat();
    let mut server = Server::found(Process::spawn(with_command(&options, &list)));
    server.echo("poke\n");
    server.stdout.wait_for_count(before.len());
    let mut clients: Vec<Client> = (0..20).map(|_| server.connect()).collect();
    for client in &mut clients {
        client.send("half");
        client.is_taken();
    }
    server.echo("again\n");
    server.stdout.wait_for_count(2 * before.len());
    clients.into_iter().for_each(Client::reset);
    assert_eq!(server.stop().stdout, [&before[..], &before].concat());
}

/// The command is in the server's folder, with its mask for new files, in its session and its process group.
#[test]
fn folder_and_group_are_the_servers() {
    let notes = Notes::new();
    let script = r#"echo "$(pwd) $(umask) $(cut -d ' ' -f 5,6 /proc/$$/stat)" >> "$D/notes""#;
    let server = notes.server_after("cd \"$D\"; umask 027", &POKED, &["sh", "-c", script]);
    server.echo("poke\n");
    notes.wait_for_count(1);
    let stat = fs::read_to_string(format!("/proc/{}/stat", server.id())).unwrap();
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
    let mut server = notes.server(&[&TICKING[..], &["--max-wait", "5"]].concat(), script);
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
        let is = (line.starts_with("begin "), line == "end");
        assert_eq!(is, (i % 2 == 0, i % 2 == 1), "line {i} of {lines:?}");
    }
    assert!(lines.len() >= 6, "{lines:?}");
    assert_eq!(lines[lines.len() - 2..], ["begin last", "end"], "{lines:?}");
}

/// Of what comes during a run the latest poke is run next, once: it replaces the tick that waits, and no tick
/// replaces it; then the clock goes on.
#[test]
fn latest_event_is_run_next() {
    let notes = Notes::new();
    notes.hold();
    let server = notes.server(&TICKING, HELD);
    notes.wait_for("begin 0");
    thread::sleep(ms(100)); // a tick is pending
    for i in 0..10 {
        server.echo(format!("poke {i}\n"));
        thread::sleep(ms(20)); // each an event of its own
    }
    thread::sleep(ms(300)); // thirty ticks
    assert_eq!(notes.lines(), ["begin 0"]);
    notes.release();
    notes.wait_for_count(6);
    let lines = notes.lines();
    assert_eq!(lines[..4], ["begin 0", "end 0", "begin poke 9", "end poke 9"]);
    assert!(lines[4]["begin ".len()..].parse::<u64>().is_ok(), "{lines:?}");
}

/// A fast clock with a slow command does not fall behind: each run has the latest tick.
#[test]
fn slow_command_does_not_fall_behind() {
    let notes = Notes::new();
    let _server = notes.server(&TICKING, &format!("{NOTE}; sleep 0.4"));
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
    assert!(slowest < ms(1000), "an echo took {slowest:?}");
    is_healthy(server.address.port());
    assert_eq!(idle.until_closed(), b"", "the idle client");
    assert_eq!(notes.lines(), ["begin first"]);
    notes.release();
    notes.wait_for("end meanwhile");
}

/// Clients that send without a pause starve no run, and runs starve none of them.
#[test]
fn flood_starves_no_run() {
    let notes = Notes::new();
    let options = [&QUIETLY_POKED[..], &["--keep-open", "--max-wait", "50"]].concat();
    let mut server = notes.server(&options, r#"echo x >> "$D/notes"; sleep 0.02"#);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..4 {
            let client = server.connect();
            let (mut writer, mut reader) = (client.0.try_clone().unwrap(), client.0);
            let over = &over;
            scope.spawn(move || {
                let lines = "flood flood\n".repeat(1000);
                while !over.load(Ordering::Relaxed) && writer.write_all(lines.as_bytes()).is_ok() {}
                let _ = writer.shutdown(std::net::Shutdown::Both);
            });
            scope.spawn(move || while reader.read(&mut [0; 65536]).is_ok_and(|length| length > 0) {});
        }
        notes.wait_for_count(1);
        let start = Instant::now();
        notes.wait_for_count(21);
        let took = start.elapsed();
        is_healthy(server.address.port());
        over.store(true, Ordering::Relaxed);
        assert!(took < ms(10_000), "20 runs of 20 ms took {took:?}");
    });
    server.stop();
}

// ---------------------------------------------------------------- the transcript

/// The transcript goes on beside the command's own output, which with `--quiet` is alone.
#[test]
fn transcript_goes_on_beside_the_output() {
    for (options, quiet) in [(&POKED[..], false), (&QUIETLY_POKED, true)] {
        let notes = Notes::new();
        let mut server = notes.server(options, "echo \"ran $SMOLRX_EVENT\"; echo \"told $SMOLRX_EVENT\" >&2");
        let mut transcript = vec![format!("Serving on {}", server.address)];
        for event in ["foo", "bar"] {
            let port = server.echo(format!("{event}\n"));
            server.stdout.wait_for(&format!("ran {event}"));
            transcript.extend(conversation(event, port));
            transcript.push(format!("Observing {event}"));
        }
        if quiet {
            transcript.clear();
        }
        let mut exit = server.stop();
        let mut expected = [transcript, vec!["ran foo".into(), "ran bar".into()]].concat();
        // Which of the two comes first of what is written at the same moment, is nobody's promise.
        exit.stdout.sort();
        expected.sort();
        assert_eq!(exit.stdout, expected, "quiet: {quiet}");
        assert_eq!(exit.stderr, ["told foo", "told bar"], "quiet: {quiet}");
    }
}

/// A run that fails is told in a sentence, with `--quiet` or without, and is not repeated.
#[test]
fn failed_run_is_told() {
    let exits = [3, 0, 1, 255, 137].map(|code| (format!("exit {code}"), format!("exited with {code}")));
    // SIGABRT (6) may dump a core; of the real-time signals, from 34 on, nix knows none.
    let kills = [9, 15, 2, 6, 40, 64]
        .map(|signal| (format!("kill -{signal} $$"), format!("was ended by signal {signal}")));
    let others = [("kill -17 $$; exit 4", "exited with 4"), ("exit 5", "exited with 5")] // SIGCHLD
        .map(|(event, end)| (event.to_string(), end.to_string()));
    let ends = exits.into_iter().chain(kills).chain(others);
    for options in [&POKED[..], &QUIETLY_POKED] {
        let notes = Notes::new();
        let mut server = notes.server(options, r#"echo x >> "$D/notes"; eval "$SMOLRX_EVENT""#);
        let mut expected = vec![];
        for (i, (event, end)) in ends.clone().enumerate() {
            server.echo(format!("{event}\n"));
            notes.wait_for_count(i + 1);
            if event != "exit 0" {
                expected.push(format!("smolrx: the command {end}"));
            }
            server.stderr.wait_for_count(expected.len());
            assert_eq!(server.stderr.lines(), expected, "of `{event}`");
        }
        assert_eq!(server.stop().stderr, expected);
        assert_eq!(notes.lines().len(), 13);
    }
}

/// Server and command share a file as their output, and neither overwrites what the other has written.
#[test]
fn output_to_a_file_is_whole() {
    let notes = Notes::new();
    let log = notes.file("log");
    let script = format!("echo \"ran $SMOLRX_EVENT\"; {NOTE}");
    let mut command = notes.command_after("true", &POKED, &["sh", "-c", &script]);
    command.stdout(File::create(&log).unwrap());
    let mut server = Server::found(Process::spawn_with_stdout(command));
    notes.takes_pokes(&server, 20);
    server.stop();
    let log = fs::read_to_string(log).unwrap();
    for line in (0..20).flat_map(|i| [format!("Observing {i}"), format!("ran {i}")]) {
        assert_eq!(log.lines().filter(|l| *l == line).count(), 1, "`{line}` in\n{log}");
    }
    assert_eq!(log.lines().count(), 1 + 20 * 5, "{log}");
}

// ------------------------------------------------------------------------ the end

/// At SIGTERM, SIGINT or both at once the run under way is waited for, longer than the clients' grace if it takes so
/// long; then the latest event is run, a line's that its client completes meanwhile included, and it ends with 0.
#[test]
fn signal_waits_for_the_run_and_runs_what_is_pending() {
    for (signals, time, last) in [
        (&[Signal::TERM][..], 7000, "third"),
        (&[Signal::INT], 500, "completed"),
        (&[Signal::INT, Signal::TERM], 500, "completed"),
    ] {
        let notes = Notes::new();
        notes.hold();
        let mut server = notes.server(&POKED, TRAPS);
        notes.begin_first(&server);
        server.echo("second\n");
        server.echo("third\n");
        let mut client = server.connect();
        client.send("comp");
        client.is_taken();
        server.suspend();
        signals.iter().for_each(|signal| server.signal(*signal));
        server.wake();
        server.refuses();
        if last == "completed" {
            client.send("leted\n");
            assert_eq!(client.rest(), b"completed\n");
        }
        thread::sleep(ms(time));
        assert!(server.is_running(), "{signals:?}: ended in the middle of a run");
        assert_eq!(notes.lines(), ["begin first"], "{signals:?}");
        let ends = [format!("begin {last}"), format!("end {last}")];
        notes.ends_well(&mut server, &["begin first", "end first", &ends[0], &ends[1]]);
        assert_eq!(observed(&server.stdout.lines()).last(), Some(&last), "{signals:?}");
    }
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

/// What becomes of the last run is told before the end, which is with 0 all the same, unless the command is not there.
#[test]
fn last_run_that_fails_is_told() {
    let long = "x".repeat(200_000);
    for (command, event, code, told) in [
        (&["sh", "-c", "exit 3"][..], "poke", 0, "the command exited with 3"),
        (&["true"], &long, 0, "cannot run true: too long for the system (error 7)"),
        (&["smolrx-no-such"], "poke", 127, "cannot run smolrx-no-such: not found (error 2)"),
    ] {
        for _ in 0..10 {
            let mut server = start(&[&PENDING[..], &["--max-line", "300000"]].concat(), command);
            server.echo(format!("{event}\n"));
            server.signal(Signal::TERM);
            let exit = server.exited(ms(6000));
            assert_eq!((exit.code, exit.stderr), (Some(code), vec![format!("smolrx: {told}")]));
        }
    }
}

/// A second signal is passed on to the command, as the first one is not, and ends the server at once with 128 and its
/// number: be the run the pending event's, or the command in a session of its own.
#[test]
fn second_signal_is_passed_on_and_ends_it() {
    let (term, int) = (Signal::TERM, Signal::INT);
    let command = ["sh", "-c", TRAPS];
    for (options, command, first, second, code, got) in [
        (&POKED, &command[..], term, term, 143, "got TERM"),
        (&POKED, &command, int, term, 143, "got TERM"),
        (&POKED, &command, term, int, 130, "got INT"),
        (&POKED, &command, int, int, 130, "got INT"),
        (&PENDING, &command, term, term, 143, "got TERM"),
        (&POKED, &["sh", "-c", "exec setsid sh -c \"$0\"", TRAPS], term, term, 143, "got TERM"),
    ] {
        let notes = Notes::new();
        notes.hold();
        let mut server = notes.server_after("true", options, command);
        server.echo("first\n");
        if *options == POKED {
            notes.wait_for("begin first");
            server.echo("second\n");
        }
        server.signal(first);
        server.refuses();
        notes.wait_for("begin first");
        thread::sleep(ms(200)); // within 100 ms it would be the same signal
        let what = format!("{options:?}, {command:?}, {first:?}, {second:?}");
        assert_eq!(notes.lines(), ["begin first"], "the first signal reaches the command: {what}");
        server.signal(second);
        let exit = server.exited(ms(2000));
        assert_eq!((exit.code, exit.stderr.len()), (Some(code), 0), "{what}: {exit:?}");
        notes.wait_for(got);
        assert_eq!(notes.lines(), ["begin first", got], "{what}");
    }
}

/// A command that ignores signals, or is stopped, which is no end, or has filled an output that nobody reads, holds up
/// neither the end by a second signal nor, silently and with 141, the end by an output that its reader closes.
#[test]
fn command_holds_up_no_end() {
    let ignores = r#"trap '' TERM; exec > /dev/null 2>&1; echo begin >> "$D/notes"
        while [ -e "$D/hold" ]; do sleep 0.02; done"#;
    let stops = r#"exec > /dev/null 2>&1; echo $$ > "$D/command"; echo begin >> "$D/notes"; kill -STOP $$"#;
    let fills = r#"echo begin >> "$D/notes"; yes"#; // it ends with the pipe
    for (script, code) in [(ignores, 143), (ignores, 141), (stops, 143), (stops, 141), (fills, 143)] {
        for options in [&POKED[..], &QUIETLY_POKED] {
            let what = format!("{options:?}, {code}, {script}");
            let notes = Notes::new();
            notes.hold();
            let (reader, writer) = io::pipe().unwrap();
            let mut command = notes.command_after("true", options, &["sh", "-c", script]);
            command.stdout(writer);
            let mut server = Server::found(Process::spawn_with_stdout(command));
            server.echo("poke\n");
            notes.wait_for("begin");
            let mut reader = Some(reader);
            if code == 141 {
                reader = None;
            } else {
                server.signal(Signal::TERM);
                server.refuses();
                thread::sleep(ms(200));
                assert!(server.is_running(), "ended in the middle of a run: {what}");
                server.signal(Signal::TERM);
            }
            eventually(ms(2000), &what, || !server.is_running());
            drop(reader.take());
            notes.release();
            if let Ok(command) = fs::read_to_string(notes.file("command")) {
                let command = Pid::from_raw(command.trim().parse().unwrap()).unwrap();
                kill_process(command, Signal::CONT).unwrap(); // what SIGTERM has left to do
            }
            let exit = server.exited(PATIENCE);
            assert_eq!((exit.code, exit.stderr.len()), (Some(code), 0), "{what}: {exit:?}");
        }
    }
}

/// Ctrl-C in a terminal reaches both: the command, which may end by it, and the server, which then ends well; if the
/// command takes no notice, a second one ends the server with 130.
#[test]
fn ctrl_c_reaches_both() {
    let ignores =
        r#"trap '' INT; echo "begin poke" >> "$D/notes"; while [ -e "$D/hold" ]; do sleep 0.02; done"#;
    // (The shell itself would wait for its sleep.)
    let sleeps = r#"echo "begin poke" >> "$D/notes"; exec sleep 60"#;
    for (script, code, noted, shown) in [
        (TRAPS, 0, &["begin poke", "got INT"][..], ""),
        (sleeps, 0, &["begin poke"], "smolrx: the command was ended by signal 2"),
        (ignores, 130, &["begin poke"], ""),
    ] {
        let notes = Notes::new();
        notes.hold();
        let (screen, end) = terminal();
        let mut keys = screen.keys();
        let screen = Transcript::of(screen);
        let server = notes.command_after("true", &POKED, &["sh", "-c", script]);
        // The terminal that is to control the session is the one under stdin.
        let mut command = Command::new("sh");
        command.args(["-c", "exec setsid -c \"$@\" <&1", "sh"]);
        command.arg(server.get_program()).args(server.get_args()).env("D", notes.file(""));
        command.stdout(end.try_clone().unwrap()).stderr(end);
        let mut server = Server::found(Process::spawn_with_output(command));
        server.echo("poke\n");
        notes.wait_for("begin poke");
        keys.write_all(b"\x03").unwrap();
        if code == 130 {
            thread::sleep(ms(300));
            assert!(server.is_running(), "ended in the middle of a run");
            keys.write_all(b"\x03").unwrap();
        }
        let exit = server.exited(ms(if code == 130 { 2000 } else { 6000 }));
        assert_eq!(exit.code, Some(code), "{script}: {screen:?}");
        assert_eq!(notes.lines(), noted);
        screen.wait_until(shown, |lines| lines.iter().any(|line| line.ends_with(shown)).then_some(()));
    }
}

// ------------------------------------------------------------------ what is left behind

/// As process 1 it reaps what runs leave behind, a hundred children each, which all end at once and fail, be it that a
/// run is under way, which is not over then.
#[test]
fn process_1_reaps_orphans() {
    let notes = Notes::new();
    notes.hold();
    let orphans =
        "i=0; while [ $i -lt 100 ]; do ((sleep 0.5; exit 3) &) > /dev/null 2>&1; i=$((i + 1)); done";
    let Some((server, pid)) = notes.process_one(&format!("{orphans}\n{HELD}")) else { return };
    let pid = pid.as_raw_nonzero().get() as u32;
    notes.begin_first(&server);
    server.echo("second\n");
    wait_for_children(pid, 1);
    thread::sleep(ms(200));
    assert_eq!(notes.lines(), ["begin first"]);
    notes.release();
    notes.wait_for("end second");
    wait_for_children(pid, 0);
    has_said_nothing(&server);
}

/// As process 1 it ends well at SIGTERM, SIGINT and SIGHUP: after the run under way and the pending one, and whatever
/// the runs have left behind; at a second signal, which is passed on, with 128 and its number.
#[test]
fn process_1_ends_like_any_other() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let notes = Notes::new();
        notes.hold();
        let script = format!("sleep 1000 > /dev/null 2>&1 &\n{HELD}");
        let Some((mut server, pid)) = notes.process_one(&script) else { return };
        notes.begin_first(&server);
        server.echo("second\n");
        kill_process(pid, signal).unwrap();
        server.refuses();
        thread::sleep(ms(300));
        assert_eq!(notes.lines(), ["begin first"], "{signal:?}");
        notes.ends_well(&mut server, &["begin first", "end first", "begin second", "end second"]);
    }

    let notes = Notes::new();
    notes.hold();
    let Some((mut server, pid)) = notes.process_one(TRAPS) else { return };
    notes.begin_first(&server);
    kill_process(pid, Signal::TERM).unwrap();
    thread::sleep(ms(200));
    kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(server.exited(ms(2000)).code, Some(143));
}

/// Without a command it reaps as well, as process 1 and elsewhere: the children of the shell that it has replaced.
#[test]
fn reaps_without_a_command() {
    let command = program(&[&LOCAL[..], &POKED].concat());
    let inherited = "(sleep 0.1; exit 7) & (sleep 0.3; exit 8) & sleep 0.5 & true";
    let server = Server::of(Process::spawn(program_after(inherited, &[&LOCAL[..], &POKED].concat())));
    wait_for_children(server.id(), 0);
    server.echo("poke\n");
    has_said_nothing(&server);

    let inherited = "(sleep 0.1 &) & (sleep 0.3; exit 8) & (sleep 0.5 &); true";
    let Some((server, pid)) = as_process_one(inherited, &command) else { return };
    wait_for_children(pid.as_raw_nonzero().get() as u32, 0);
    server.echo("poke\n");
    has_said_nothing(&server);
}

/// A child that has ended before the server took its parent's place is reaped, though no signal tells of it.
#[test]
fn reaps_what_has_ended_before_its_start() {
    if let Some(reason) = refusal(Command::new("perl").args(["-e", "1"])) {
        return skip(format!("a child that ends before the server's start: {reason}"));
    }
    let notes = Notes::new();
    // A shell would wait for its child.
    let becomes = r#"exit 8 unless fork; open F, "<", "$ENV{D}/fifo"; <F>; exec @ARGV"#;
    let setup = format!("mkfifo \"$D/fifo\"; exec perl -e '{becomes}' \"$0\" \"$@\"");
    let mut command = program_after(&setup, &[&LOCAL[..], &POKED].concat());
    command.env("D", notes.file(""));
    let process = Process::spawn(command);
    eventually(PATIENCE, "its parent", || notes.file("fifo").exists());
    eventually(PATIENCE, "a zombie", || children(process.id()).values().eq(&['Z']));
    fs::write(notes.file("fifo"), "go on\n").unwrap();
    let server = Server::of(process);
    wait_for_children(server.id(), 0);
}

/// The end of a child that the server has inherited, or a stray SIGCHLD, is not the run's end.
#[test]
fn other_childrens_ends_are_not_the_runs() {
    let notes = Notes::new();
    notes.hold();
    let setup = "(while [ -d \"$D\" ] && [ ! -e \"$D/go\" ]; do sleep 0.02; done; exit 7) & true";
    let server = notes.server_after(setup, &POKED, &["sh", "-c", HELD]);
    notes.begin_first(&server);
    server.echo("second\n");
    assert_eq!(children(server.id()).len(), 2, "the inherited child and the run");
    File::create(notes.file("go")).unwrap();
    wait_for_children(server.id(), 1);
    (0..100).for_each(|_| server.signal(Signal::CHILD));
    thread::sleep(ms(200));
    assert_eq!(notes.lines(), ["begin first"]);
    has_said_nothing(&server);
    notes.release();
    notes.wait_for("end second");
}

/// A run is over when the command ends, not when what it has left behind closes the output.
#[test]
fn child_left_behind_with_the_output_holds_up_nothing() {
    let notes = Notes::new();
    notes.hold();
    let script = format!("(while [ -e \"$D/hold\" ]; do sleep 0.02; done) & {NOTE}");
    let mut server = notes.server(&POKED, &script);
    notes.takes_pokes(&server, 3);
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
    let server = notes.server(&[&QUIETLY_POKED[..], &["--max-line", "300000"]].concat(), NOTE);
    let mut count = 0;
    let mut runs = |number: usize| {
        for _ in 0..number {
            server.echo("x\n");
            count += 1;
            notes.wait_for_count(count);
            if count % 3 == 0 {
                server.echo(line_of(140_001));
                server.stderr.wait_for_count(count / 3);
            }
        }
        wait_for_children(server.id(), 0);
        (server.descriptors(), server.threads(), server.memory_kb())
    };
    let (before, after) = (runs(30), runs(300));
    assert_eq!((before.0, before.1), (after.0, after.1), "descriptors and threads");
    assert!(after.2 <= before.2 + 150, "{} kB, then {}", before.2, after.2);
}

/// Commands that end at once, hundreds of them one after the other, never leave the server waiting for one, be it that
/// its parent has it block SIGCHLD; and how each of them ended is told.
#[test]
fn shortest_runs_are_noticed() {
    for setup in ["true", "exec env --block-signal=CHLD \"$0\" \"$@\""] {
        let notes = Notes::new();
        let server = notes.server_after(setup, &TICKING, &["false"]);
        server.stderr.wait_for_count(200);
        assert!(server.stderr.lines().iter().all(|line| line == "smolrx: the command exited with 1"));
    }
}

/// A server whose parent has it ignore SIGCHLD notices each run's end, also with another child alive, and ends well.
#[test]
fn ignored_sigchld_holds_up_nothing() {
    for others in ["true", "while [ -d \"$D\" ]; do sleep 0.1; done > /dev/null 2>&1 &"] {
        let notes = Notes::new();
        // `env` comes last: a shell has a handler of its own.
        let setup = format!("{others}\nexec env --ignore-signal=CHLD \"$0\" \"$@\"");
        let mut server = notes.server_after(&setup, &POKED, &["sh", "-c", NOTE]);
        notes.takes_pokes(&server, 4);
        server.signal(Signal::TERM);
        assert_eq!(server.exited(ms(6000)).code, Some(0));
        assert_eq!(notes.lines().len(), 4);
    }
}

// --------------------------------------------------------------- what can't be started

/// A server that has been poked once and has ended by itself.
#[track_caller]
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

/// A command that is not found, or may not be run, or is no program, or has a name that no file can have, ends the
/// server at the first event with the shells' code and a sentence, which is one harmless line; one that is not there
/// any more ends it at a later event.
#[test]
fn command_that_cannot_be_started_ends_it() {
    let notes = Notes::new();
    let without_interpreter = notes.executable("interpreter", "#!/no/such/interpreter\n");
    let zeros = notes.executable("zeros", &"\0".repeat(1000));
    let empty = notes.executable("empty", "");
    let text = notes.executable("text", "echo no interpreter is named\n");
    let (closed, folder, itself) = (notes.name("closed"), notes.name("folder"), notes.name("itself"));
    fs::write(&closed, "#!/bin/sh\n").unwrap();
    fs::set_permissions(&closed, Permissions::from_mode(0o644)).unwrap();
    fs::create_dir(&folder).unwrap();
    symlink(&itself, &itself).unwrap();
    let (long, longer) = ("x".repeat(300), format!("/{}", "x/".repeat(3000)));
    for (command, codes, why) in [
        ("smolrx-no-such".as_bytes(), &[127][..], "not found (error 2)"),
        (b"./no/such", &[127], "not found (error 2)"),
        (b"/no/such", &[127], "not found (error 2)"),
        (without_interpreter.as_bytes(), &[127], "not found (error 2)"),
        (closed.as_bytes(), &[126], "permission denied (error 13)"),
        (folder.as_bytes(), &[126], "permission denied (error 13)"),
        (zeros.as_bytes(), &[126], "(error 8)"),
        (empty.as_bytes(), &[126], "(error 8)"),
        (text.as_bytes(), &[126], "(error 8)"),
        (b"./\x1b[31m\n\xff\xe2\x80\xae", &[127], "not found (error 2)"),
        (b"", &[126, 127], ""),
        (b"/dev/null/x", &[126, 127], ""),
        (b"/dev/null", &[126, 127], ""),
        (long.as_bytes(), &[126, 127], ""),
        (longer.as_bytes(), &[126, 127], ""),
        (itself.as_bytes(), &[126, 127], ""),
        (b"/", &[126, 127], ""),
    ] {
        let mut program = with_command(&POKED, &[]);
        program.arg(OsStr::from_bytes(command)).arg("--argument");
        let exit = ends_at_the_first_event(program);
        let command = String::from_utf8_lossy(command);
        assert!(codes.contains(&exit.code.unwrap()), "{command:.99}: {exit:?}");
        assert_eq!(exit.stderr.len(), 1, "{command:.99}: {exit:?}");
        let message = &exit.stderr[0];
        let named = if command.contains(is_hostile) { "" } else { &format!("{command:.60}") };
        assert!(message.starts_with(&format!("smolrx: cannot run {named}")), "{command:.99}: {exit:?}");
        assert!(message.ends_with(why) && !message.contains(is_hostile), "{command:.99}: {exit:?}");
    }

    let script = notes.executable("script", "#!/bin/sh\nrm \"$D/script\"; echo ran >> \"$D/notes\"\n");
    let mut server = notes.server_after("true", &POKED, &[&script]);
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
    let [first, second, third] = ["first", "second", "third"].map(|name| notes.name(name));
    [&first, &second, &third].iter().for_each(|path| fs::create_dir(path).unwrap());
    let closed = format!("{first}/smolrx-tool");
    fs::write(&closed, "#!/bin/sh\necho first\n").unwrap();
    fs::set_permissions(&closed, Permissions::from_mode(0o644)).unwrap();
    for (file, says) in
        [("second/smolrx-tool", "second"), ("third/smolrx-tool", "third"), ("smolrx-tool", "here")]
    {
        notes.executable(file, &format!("#!/bin/sh\necho {says}\n"));
    }
    let path = path();
    let long = "x".repeat(5000);
    let start = |places: &str| {
        let mut command = with_command(&POKED, &["smolrx-tool"]);
        command.env("PATH", places).current_dir(notes.file(""));
        command
    };
    for (places, says) in [
        (format!("{second}:{third}:{path}"), "second"),
        (format!("{third}:{second}:{path}"), "third"),
        (format!("{first}:{third}:{path}"), "third"),
        (format!("/no/such:/dev/null:{second}:{path}"), "second"),
        (format!("/{long}:{second}:{path}"), "second"),
        (format!(":{second}:{path}"), "here"),
        (format!("{path}::"), "here"),
    ] {
        let mut server = Server::of(Process::spawn(start(&places)));
        server.echo("poke\n");
        server.stdout.wait_for(says);
        assert!(server.stop().stderr.is_empty(), "{places:.100}");
    }
    for (places, codes) in [(&*first, &[126][..]), ("/no/such", &[127]), ("/dev/null", &[126, 127])] {
        let exit = ends_at_the_first_event(start(places));
        assert!(codes.contains(&exit.code.unwrap()), "{places}: {exit:?}");
    }
}

/// A folder in PATH that may not be read is passed.
#[test]
fn unreadable_folder_in_the_path_is_passed() {
    let notes = Notes::new();
    let closed = notes.name("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, Permissions::from_mode(0o000)).unwrap();
    let start = |name: &str| {
        let options = [&LOCAL[..], &POKED, &["--", name, "-c", "echo ran"]].concat();
        let (mut command, scratch) = program_of_nobody(&options)?;
        command.env("PATH", format!("{closed}:{}", path()));
        Some((command, scratch))
    };
    let (Some((found, _scratch)), Some((missing, _other))) = (start("sh"), start("smolrx-no-such")) else {
        return;
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
    let mut server = notes.server(&[&QUIETLY_POKED[..], &["--max-line", "300000"]].concat(), NOTE);
    let fits = 131_072 - "SMOLRX_EVENT=\0".len();
    let line = |length: usize| -> String { ('a'..='z').cycle().take(length).collect() };
    let lines = [4096, 70_000, fits, fits + 1, 200_000, 299_000].map(line);
    let escaped = "\x7f".repeat(40_000); // six bytes for each
    let (mut expected, mut complaints) = (vec![], 0);
    for line in lines.iter().chain([&escaped]) {
        server.echo(format!("{line}\n"));
        if line.len() <= fits && *line != escaped {
            expected.push(line.as_str());
            notes.wait_for_count(expected.len());
        } else {
            complaints += 1;
            server.stderr.wait_for_count(complaints);
        }
        server.echo("short\n");
        expected.push("short");
        notes.wait_for_count(expected.len());
        assert!(notes.lines() == expected, "not whole beside an event of {} bytes", line.len());
    }
    let exit = server.stop();
    let message = "smolrx: cannot run sh: too long for the system (error 7)";
    assert_eq!(exit.stderr, [message; 4]);
    assert_eq!(notes.lines().len(), expected.len());
}

/// A program that is being written can't be run at that moment: that is told, and the server goes on.
#[test]
fn busy_program_is_told() {
    let notes = Notes::new();
    let name = notes.name("program");
    assert!(Command::new("install").args(["-m", "755", "/bin/sh", &name]).status().unwrap().success());
    let server = notes.server_after("true", &POKED, &[&name, "-c", NOTE]);
    let writer = File::options().append(true).open(&name).unwrap();
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
    let strace = |arguments: &[&str]| {
        let mut strace = Command::new("strace");
        strace.args(["-qq", "-f", "-o", "/dev/null", "-e"]).args(arguments);
        strace
    };
    if let Some(reason) = refusal(&mut strace(&["inject=clone:error=ENOMEM", "true"])) {
        return skip(format!("no strace that injects the want of memory: {reason}"));
    }
    let notes = Notes::new();
    let mut server = notes.server(&POKED, NOTE);
    let pid = server.id().to_string();
    let is_traced = || server.proc_field("status", "TracerPid:") != "0";
    for (error, told) in [("ENOMEM", "out of memory (error 12)"), ("EAGAIN", "no process is free (error 11)")]
    {
        let calls = "clone,clone3,fork,vfork";
        let (trace, inject) = (format!("trace={calls}"), format!("inject={calls}:error={error}"));
        let mut strace = Process::spawn(strace(&[&trace, "-e", &inject, "-p", &pid]));
        eventually(PATIENCE, "strace has it", is_traced);
        server.echo("meanwhile\n");
        server.stderr.wait_for(&format!("smolrx: cannot run sh: {told}"));
        strace.signal(Signal::TERM);
        strace.exited(PATIENCE);
        eventually(PATIENCE, "strace has left it", || !is_traced());
    }
    server.echo("after\n");
    notes.wait_for("after");
    server.stop();
    assert_eq!(notes.lines(), ["after"]);
}

// ------------------------------------------------------------- commands that misbehave

/// Output that nobody reads holds up the command, and the server not: pokes are echoed, health is answered, and what
/// was pending is run once somebody reads. One who leaves ends what writes to him by SIGPIPE, as anywhere.
#[test]
fn command_whose_output_is_not_read_holds_up_itself() {
    let notes = Notes::new();
    let script = format!("yes \"line of $SMOLRX_EVENT\" | head -n 100000; {NOTE}");
    let mut server = notes.server(&QUIETLY_POKED, &script);
    server.stdout.pause();
    server.echo("first\n");
    for i in 0..50 {
        server.echo(format!("poke {i}\n"));
    }
    thread::sleep(ms(500));
    server.echo("last\n");
    is_healthy(server.address.port());
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
    assert_eq!(exit.stderr, [""; 0], "yes has a word to say without SIGPIPE");
}

/// A command that makes the output non-blocking, as some leave it, loses none of the transcript, and costs no time.
#[test]
fn output_made_nonblocking_loses_nothing() {
    let (reader, writer) = io::pipe().unwrap();
    let mut command = with_command(&["--interval", "600000", "--keep-open"], &["true"]);
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
    let exit = process.stop();
    assert_eq!(exit.stderr, [""; 0]);
    for flood in &floods {
        assert_eq!(received(&exit.stdout, flood), flood.lines);
    }
    assert!(busy < ms(100), "busy for {busy:?} of half a second");
}

/// A command that closes its output closes its own: the server goes on, and so does the next run.
#[test]
fn command_that_closes_its_output_closes_its_own() {
    let notes = Notes::new();
    let script = format!("echo \"ran $SMOLRX_EVENT\"; exec >&- 2>&- <&-; {NOTE}; sleep 0.1");
    let mut server = notes.server(&POKED, &script);
    notes.takes_pokes(&server, 3);
    (0..3).for_each(|i| server.stdout.wait_for(&format!("ran {i}")));
    assert!(server.stop().stderr.is_empty());
}
