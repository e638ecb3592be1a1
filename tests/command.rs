//! `smolrx [OPTION]... -- COMMAND [ARG]...`: what the command gets, when it runs, and what it can't do to the server.

mod common;

use common::*;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;
use std::env;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;
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

/// A script that notes its begin and its end, lasts for as long as it is held, notes which signals it gets, and ends by
/// them.
const HELD: &str = r#"exec > /dev/null 2>&1
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

/// A folder, `$D` for the server and its command, in which the command leaves notes.
struct Notes(Scratch);

/// The folder, and a server with these options that runs this script.
fn noted(options: &[&str], script: &str) -> (Notes, Server) {
    let notes = Notes::new();
    let server = notes.server("true", options, &["sh", "-c", script]);
    (notes, server)
}

impl Notes {
    fn new() -> Self {
        let notes = Self(Scratch::new());
        fs::set_permissions(notes.name(""), Permissions::from_mode(0o777)).unwrap();
        notes
    }

    fn held() -> Self {
        let notes = Self::new();
        notes.hold();
        notes
    }

    fn hold(&self) {
        fs::write(self.name("hold"), "").unwrap();
    }

    fn release(&self) {
        fs::remove_file(self.name("hold")).unwrap();
    }

    /// The full name of a file in the folder.
    fn name(&self, file: &str) -> String {
        self.0.file(file).to_str().unwrap().into()
    }

    /// Makes a file of this mode. (Not by this process: what another test starts at that moment would have it open
    /// for writing, and nobody could run it then.)
    fn install(&self, file: &str, mode: &str, text: &str) -> String {
        let (source, name) = (self.name("source"), self.name(file));
        fs::write(&source, text).unwrap();
        assert!(Command::new("install").args(["-m", mode, &source, &name]).status().unwrap().success());
        name
    }

    /// The server with these options and this command, started by a shell after `setup`.
    fn command(&self, setup: &str, options: &[&str], command: &[&str]) -> Command {
        let mut server = program_after(setup, &[&LOCAL, options, &["--"], command].concat());
        server.env("D", self.name("")).env("MALLOC_ARENA_MAX", "1").env("MALLOC_MMAP_THRESHOLD_", "131072");
        server
    }

    /// The same, started.
    fn server(&self, setup: &str, options: &[&str], command: &[&str]) -> Server {
        let process = Process::spawn(self.command(setup, options, command));
        if options.contains(&"-q") { Server::found(process) } else { Server::of(process) }
    }

    /// Pokes a server, and waits until the run has begun.
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

    /// Lets the run under way go on, and waits for the good end of a server that has been told to stop: there were
    /// runs for these events, one after the other.
    #[track_caller]
    fn ends_well(&self, server: &mut Server, events: &[&str]) {
        self.release();
        let exit = server.exited(ms(6000));
        assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{exit:?}");
        let runs = events.iter().flat_map(|event| [format!("begin {event}"), format!("end {event}")]);
        assert_eq!(self.lines(), runs.collect::<Vec<_>>());
    }

    /// What is noted, in whole lines.
    fn lines(&self) -> Vec<String> {
        let text = fs::read(self.name("notes")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        text.split_inclusive('\n').filter_map(|line| Some(line.strip_suffix('\n')?.into())).collect()
    }

    fn wait_for(&self, line: &str) {
        let what = format!("a note that says `{line}`");
        eventually(PATIENCE, &what, || self.lines().iter().any(|note| note == line));
    }

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
fn wait_for_children(parent: u32, count: usize) {
    eventually(PATIENCE, &format!("{count} children"), || children(parent).len() == count);
}

/// A search path with these places before all others.
fn path(places: &str) -> String {
    format!("{places}:{}", env::var("PATH").unwrap())
}

// ------------------------------------------------------- what the command gets

/// The command finds the event in `SMOLRX_EVENT`: a line as the transcript shows it, whatever a client sends, or the
/// clock's numbers, from 0 on.
#[test]
fn event_is_in_the_environment() {
    let (notes, server) = noted(&POKED, r#"printf '<%s>\n' "$SMOLRX_EVENT" >> "$D/notes""#);
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

    let (notes, _server) = noted(&["--interval", "500", "--debounce", "1"], NOTE);
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
    let sorted = |bytes: &[u8]| {
        let mut all: Vec<_> =
            bytes.split(|&byte| byte == 0).map(|one| one.escape_ascii().to_string()).collect();
        all.sort();
        all
    };
    assert_eq!(sorted(&fs::read(copy).unwrap()), sorted(&expected.output().unwrap().stdout));
}

/// A server without any environment finds the command at the places where a shell looks then, and the event is all
/// that the command has.
#[test]
fn empty_environment() {
    let mut command = with_command(&POKED, &["env"]);
    command.env_clear();
    let mut server = Server::of(Process::spawn(command));
    server.echo("poke\n");
    let exit = server.stop();
    assert!(exit.stderr.is_empty(), "{exit:?}");
    let variables: Vec<_> = exit.stdout.iter().filter(|line| line.contains('=')).collect();
    assert_eq!(variables, ["SMOLRX_EVENT=poke"]);
}

/// Everything behind `--` reaches the command exactly, be it no UTF-8, empty, or like an option of the server's; and
/// a command whose own name looks like an option is a command.
#[test]
fn arguments_are_the_commands() {
    let arguments =
        b"\xff\xfe||--help|-h|--version|-V|--health|--|-q|--interval|nonsense|--tcp-port=99999999|\
        a b|line\nend|$D|*|\x1b[31m";
    let arguments: Vec<&[u8]> = arguments.split(|&byte| byte == b'|').collect();
    let notes = Notes::new();
    notes.install("--help", "755", "#!/bin/sh\ncp /proc/$$/cmdline \"$D/cmdline\"\n");
    let mut command = with_command(&POKED, &["--help"]);
    command.args(arguments.iter().copied().map(OsStr::from_bytes));
    command.env("D", notes.name("")).env("PATH", path(&notes.name(".")));
    let mut server = Server::of(Process::spawn(command));
    server.echo("poke\n");
    server.stop();
    let bytes = fs::read(notes.name("cmdline")).unwrap();
    let words: Vec<&[u8]> = bytes.strip_suffix(b"\0").unwrap().split(|&byte| byte == 0).collect();
    assert_eq!(words[..2], [b"/bin/sh", notes.name("./--help").as_bytes()]);
    assert_eq!(words[2..], arguments);
}

/// The command's standard input is the server's, without the events: each run goes on where the one before has
/// stopped reading, and one that reads all of it, as ssh does, takes no event from those that follow.
#[test]
fn stdin_is_the_servers() {
    let notes = Notes::new();
    fs::write(notes.name("input"), "one\ntwo\nthree\n").unwrap();
    let script = r#"case $SMOLRX_EVENT in all*) text=$(cat);; *) read -r text;; esac
        echo "$SMOLRX_EVENT <$text>" >> "$D/notes""#;
    let server = notes.server("exec < \"$D/input\"", &POKED, &["sh", "-c", script]);
    for (i, note) in ["a <one>", "b <two>", "all <three>", "all again <>", "c <>"].into_iter().enumerate() {
        server.echo(format!("{}\n", &note[..note.find(" <").unwrap()]));
        notes.wait_for_count(i + 1);
        assert_eq!(notes.lines()[i], note);
    }
}

/// Signals are blocked, ignored or at their default for the command as they were when the server was started.
#[test]
fn signals_are_as_before() {
    let command = ["grep", "-E", "^(SigBlk|SigIgn|SigPnd|ShdPnd):", "/proc/self/status"];
    let server = with_command(&QUIETLY_POKED, &command);
    for signals in [
        "",
        "--block-signal=USR1,WINCH --ignore-signal=USR2,HUP",
        "--block-signal=INT,TERM,HUP,CHLD,PIPE,XFSZ --ignore-signal=USR1",
        "--ignore-signal=INT,QUIT,TERM,HUP,XFSZ",
    ] {
        let mut env = Command::new("env");
        let before = env.args(signals.split_whitespace()).args(command).output().unwrap().stdout;
        let mut env = Command::new("env");
        env.args(signals.split_whitespace()).arg(server.get_program()).args(server.get_args());
        let server = Server::found(Process::spawn(env));
        server.echo("poke\n");
        server.stdout.wait_for_count(4);
        assert_eq!(
            server.stdout.lines().join("\n") + "\n",
            String::from_utf8_lossy(&before),
            "env {signals}"
        );
    }
}

/// The command is in the server's folder, with its mask for new files, in its session and its process group. Its limits
/// of descriptors are those of before the server raised its own, also while the server has more in use than the old
/// soft limit allows.
#[test]
fn folder_group_and_descriptor_limits_are_as_before() {
    raise_descriptor_limit();
    let notes = Notes::new();
    let script = r#"echo "$SMOLRX_EVENT $(ulimit -Sn) $(ulimit -Hn) $(pwd) $(umask) $(cut -d ' ' -f 5,6 /proc/$$/stat)" \
        >> "$D/notes""#;
    let options = [&POKED[..], &["--max-conns", "300"]].concat();
    let setup = "cd \"$D\"; umask 027; ulimit -Sn 64; ulimit -Hn 1024";
    let server = notes.server(setup, &options, &["sh", "-c", script]);
    let stat = fs::read_to_string(format!("/proc/{}/stat", server.id())).unwrap();
    let stat: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    let folder = fs::canonicalize(notes.name("")).unwrap();
    let expected = format!("64 1024 {} 0027 {} {}", folder.display(), stat[2], stat[3]);
    let before = server.descriptors();
    let mut clients = vec![];
    for (i, count) in [0, 200, 250].into_iter().enumerate() {
        clients.resize_with(count, || server.connect());
        eventually(PATIENCE, "all are accepted", || server.descriptors() == before + count);
        server.echo(format!("beside {count}\n"));
        notes.wait_for_count(i + 1);
        assert_eq!(notes.lines()[i], format!("beside {count} {expected}"));
    }
    for client in &mut clients {
        client.send("x\n");
        client.expect("x\n");
    }
    assert_eq!(server.descriptor_limits(), ("1024".into(), "1024".into()), "the server's own, after runs");
    has_said_nothing(&server);
}

/// A run needs no descriptor that clients could take from it: with all of them in use, it works.
#[test]
fn run_with_no_descriptor_left() {
    let notes = Notes::new();
    let options = [&POKED[..], &["--keep-open"]].concat();
    let server = notes.server("ulimit -n 64", &options, &["sh", "-c", NOTE]);
    let mut clients: Vec<Client> = (0..80).map(|_| server.connect()).collect();
    let is_full = |line: &String| line.starts_with("smolrx: cannot accept: ");
    server.stderr.wait_until("its complaint", |lines| lines.iter().any(is_full).then_some(()));
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
    let list = ["-1", "/proc/self/fd"];
    let before = Command::new("ls").args(list).output().unwrap().stdout;
    let before: Vec<_> = str::from_utf8(&before).unwrap().lines().collect();
    let command = with_command(&[&QUIETLY_POKED[..], &["--keep-open"]].concat(), &["ls", list[0], list[1]]);
    let mut server = Server::found(Process::spawn(command));
    server.echo("poke\n");
    server.stdout.wait_for_count(before.len());
    wait_for_children(server.id(), 0);
    let descriptors = server.descriptors();
    let mut clients: Vec<Client> = (0..20).map(|_| server.connect()).collect();
    clients.iter_mut().for_each(|client| client.send("half"));
    eventually(PATIENCE, "all are accepted", || server.descriptors() == descriptors + 20);
    server.echo("again\n");
    server.stdout.wait_for_count(2 * before.len());
    clients.into_iter().for_each(Client::reset);
    assert_eq!(server.stop().stdout, before.repeat(2));
}

// ------------------------------------------------------------- one run at a time

/// Runs never overlap, however fast pokes come, and the last poke's event is the last run's.
#[test]
fn one_run_at_a_time() {
    let script = r#"echo "begin $SMOLRX_EVENT" >> "$D/notes"; sleep 0.02; echo end >> "$D/notes""#;
    let (notes, mut server) = noted(&[&TICKING[..], &["--max-wait", "5"]].concat(), script);
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
    let is_a_run = |run: &[String]| run.len() == 2 && run[0].starts_with("begin ") && run[1] == "end";
    assert!(lines.chunks(2).all(is_a_run) && lines.len() >= 6, "{lines:?}");
    assert_eq!(lines[lines.len() - 2..], ["begin last", "end"], "{lines:?}");
}

/// Of what comes during a run the latest poke is run next, once: it replaces the tick that waits, and no tick
/// replaces it; then the clock goes on.
#[test]
fn latest_event_is_run_next() {
    let notes = Notes::held();
    let server = notes.server("true", &TICKING, &["sh", "-c", HELD]);
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
    let (notes, _server) = noted(&TICKING, &format!("{NOTE}; sleep 0.4"));
    notes.wait_for_count(6);
    let ticks: Vec<u64> = notes.lines().iter().map(|line| line.parse().unwrap()).collect();
    // A busy machine's clock leaves some out, and never so many.
    assert!(ticks.windows(2).all(|pair| pair[1] >= pair[0] + 8), "{ticks:?}");
}

/// A run of many seconds, as nobody reads its output, delays no echo, no health check and no idle client's end, and
/// costs no time; what is pending is run once somebody reads. (And `head` ends `yes` by SIGPIPE, as anywhere.)
#[test]
fn long_run_delays_nobody() {
    let script = format!("yes \"line of $SMOLRX_EVENT\" | head -n 100000; {NOTE}");
    let (notes, mut server) = noted(&[&QUIETLY_POKED[..], &["--timeout", "1000"]].concat(), &script);
    server.stdout.pause();
    server.echo("first\n");
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
    server.echo("last\n");
    is_healthy(server.address.port());
    assert_eq!(idle.until_closed(), b"", "the idle client");
    let (cpu, _) = server.activity();
    thread::sleep(ms(500));
    let busy = server.activity().0 - cpu;
    assert!(busy < ms(100), "busy for {busy:?} of half a second");
    assert_eq!(notes.lines(), [""; 0], "the run has ended though its output is not read");
    server.stdout.resume();
    notes.wait_for("last");
    let exit = server.stop();
    let of = |event: &str| exit.stdout.iter().filter(|line| **line == format!("line of {event}")).count();
    let events = notes.lines();
    assert_eq!(exit.stdout.len(), events.len() * 100_000, "the output of {events:?}");
    assert!(events.iter().all(|event| of(event) == 100_000), "the output of {events:?}");
    assert_eq!(exit.stderr, [""; 0], "`yes` has a word to say without SIGPIPE");
}

/// Clients that send without a pause starve no run, and runs starve none of them.
#[test]
fn flood_starves_no_run() {
    let options = [&QUIETLY_POKED[..], &["--keep-open", "--max-wait", "50"]].concat();
    let (notes, server) = noted(&options, r#"echo x >> "$D/notes"; sleep 0.02"#);
    let port = server.address.port();
    let script = format!("exec 3<>/dev/tcp/127.0.0.1/{port}; cat <&3 > /dev/null & exec yes flood >&3");
    let mut floods = [(); 4].map(|()| {
        let mut bash = Command::new("bash");
        bash.args(["-c", &script]);
        Process::spawn(bash)
    });
    notes.wait_for_count(1);
    let start = Instant::now();
    notes.wait_for_count(21);
    let took = start.elapsed();
    is_healthy(port);
    assert!(floods.iter_mut().all(Process::is_running), "a flood is over");
    assert!(took < ms(10_000), "20 runs of 20 ms took {took:?}");
}

// ---------------------------------------------------------------- the transcript

/// The transcript goes on beside the command's own output, which with `--quiet` is alone.
#[test]
fn transcript_goes_on_beside_the_output() {
    for (options, quiet) in [(&POKED[..], false), (&QUIETLY_POKED, true)] {
        let script = "echo \"ran $SMOLRX_EVENT\"; echo \"told $SMOLRX_EVENT\" >&2";
        let (_notes, mut server) = noted(options, script);
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
    let sigchld = ("kill -17 $$; exit 4".into(), "exited with 4".into());
    let ends = exits.into_iter().chain(kills).chain([sigchld]);
    for options in [&POKED[..], &QUIETLY_POKED] {
        let (notes, mut server) = noted(options, r#"echo x >> "$D/notes"; eval "$SMOLRX_EVENT""#);
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
        assert_eq!(notes.lines().len(), 12);
    }
}

// ------------------------------------------------------------------------ the end

/// At SIGTERM, SIGINT or both at once the run under way is waited for, longer than the clients' grace if it takes so
/// long; then the latest event is run, a line's that its client completes meanwhile included, and it ends with 0.
#[test]
fn signal_waits_for_the_run_and_runs_what_is_pending() {
    let waits = |signals: &[Signal], time, last| {
        let notes = Notes::held();
        let mut server = notes.server("true", &POKED, &["sh", "-c", HELD]);
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
        notes.ends_well(&mut server, &["first", last]);
        assert_eq!(observed(&server.stdout.lines()).last(), Some(&last), "{signals:?}");
    };
    thread::scope(|scope| {
        scope.spawn(|| waits(&[Signal::TERM], 7000, "third"));
        scope.spawn(|| waits(&[Signal::INT], 500, "completed"));
        scope.spawn(|| waits(&[Signal::INT, Signal::TERM], 500, "completed"));
    });
}

/// An event that the debounce holds is run at once at the end, and without an event nothing is.
#[test]
fn signal_runs_what_the_debounce_holds() {
    for pokes in [0, 1, 5] {
        let (notes, mut server) = noted(&PENDING, HELD);
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
            let options = [&PENDING[..], &["--max-line", "300000"]].concat();
            let mut server = Server::of(Process::spawn(with_command(&options, command)));
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
    let command = ["sh", "-c", HELD];
    for (options, command, first, second, code, got) in [
        (&POKED, &command[..], term, term, 143, "got TERM"),
        (&POKED, &command, int, term, 143, "got TERM"),
        (&POKED, &command, term, int, 130, "got INT"),
        (&POKED, &command, int, int, 130, "got INT"),
        (&PENDING, &command, term, term, 143, "got TERM"),
        (&POKED, &["sh", "-c", "exec setsid sh -c \"$0\"", HELD], term, term, 143, "got TERM"),
    ] {
        let notes = Notes::held();
        let mut server = notes.server("true", options, command);
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
    let ignores = r#"trap '' TERM; exec > /dev/null 2>&1; echo $$ > "$D/notes"
        while [ -e "$D/hold" ]; do sleep 0.02; done"#;
    let stops = r#"exec > /dev/null 2>&1; echo $$ > "$D/notes"; kill -STOP $$"#;
    let fills = r#"echo $$ > "$D/notes"; yes"#; // which ends with the pipe
    for (script, code) in [(ignores, 143), (ignores, 141), (stops, 143), (stops, 141), (fills, 143)] {
        for options in [&POKED[..], &QUIETLY_POKED] {
            let what = format!("{options:?}, {code}, {script}");
            let notes = Notes::held();
            let (reader, writer) = io::pipe().unwrap();
            let mut command = notes.command("true", options, &["sh", "-c", script]);
            command.stdout(writer);
            let mut server = Server::found(Process::spawn_with_stdout(command));
            server.echo("poke\n");
            notes.wait_for_count(1);
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
            // What is stopped has SIGTERM before it, or its end. (What has ended already can't be signalled.)
            let _ = kill_process(Pid::from_raw(notes.lines()[0].parse().unwrap()).unwrap(), Signal::CONT);
            let exit = server.exited(PATIENCE);
            assert_eq!((exit.code, exit.stderr.len()), (Some(code), 0), "{what}: {exit:?}");
        }
    }
}

/// Ctrl-C in a terminal reaches both: the command, which may end by it, and the server, which then ends well; if the
/// command takes no notice, a second one ends the server with 130.
#[test]
fn ctrl_c_reaches_both() {
    let ignores = HELD.replace("echo \"got INT\" >> \"$D/notes\"; exit", "");
    for (script, code, noted) in [(HELD, 0, &["begin poke", "got INT"][..]), (&ignores, 130, &["begin poke"])]
    {
        let notes = Notes::held();
        let (screen, end) = terminal();
        let mut keys = screen.try_clone().unwrap();
        let screen = Transcript::of(screen);
        let server = notes.command("true", &POKED, &["sh", "-c", script]);
        // The terminal that is to control the session is the one under stdin.
        let mut command = Command::new("sh");
        command.args(["-c", "exec setsid -c \"$@\" <&1", "sh"]);
        command.arg(server.get_program()).args(server.get_args()).env("D", notes.name(""));
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
    }
}

// ------------------------------------------------------------------ what is left behind

/// As process 1 it reaps what runs leave behind, be it a hundred children that all end at once and fail, during a run,
/// which is not over then, or later; and those who stay hold up no good end, which SIGHUP brings about, too.
#[test]
fn process_1_reaps_orphans() {
    let notes = Notes::held();
    let script = r#"i=0; while [ $i -lt 100 ]; do ((sleep 0.5; exit 3) &) > /dev/null 2>&1; i=$((i + 1)); done
        sleep 1000 > /dev/null 2>&1 &"#;
    let mut command = with_command(&POKED, &["sh", "-c", &format!("{script}\n{HELD}")]);
    let Some((mut server, one)) = as_process_one("true", command.env("D", notes.name(""))) else { return };
    let pid = one.as_raw_nonzero().get() as u32;
    notes.begin_first(&server);
    server.echo("second\n");
    wait_for_children(pid, 1);
    thread::sleep(ms(200));
    assert_eq!(notes.lines(), ["begin first"]);
    notes.release();
    notes.wait_for("end second");
    wait_for_children(pid, 2); // those who stay
    has_said_nothing(&server);
    notes.hold();
    server.echo("third\n");
    notes.wait_for("begin third");
    server.echo("fourth\n");
    kill_process(one, Signal::HUP).unwrap();
    server.refuses();
    thread::sleep(ms(300));
    assert_eq!(notes.lines().last().unwrap(), "begin third");
    notes.ends_well(&mut server, &["first", "second", "third", "fourth"]);
}

/// Without a command it reaps as well, as process 1 and elsewhere: the children of the shell that it has replaced, also
/// one that has ended before that, of which no signal tells.
#[test]
fn reaps_without_a_command() {
    let options = [&LOCAL[..], &POKED].concat();
    let reaps = |server: Server, pid: u32| {
        wait_for_children(pid, 0);
        server.echo("poke\n");
        has_said_nothing(&server);
    };
    let inherited = "(sleep 0.1; exit 7) & (sleep 0.3; exit 8) & (sleep 0.2 &) & sleep 0.5 & true";
    let server = Server::of(Process::spawn(program_after(inherited, &options)));
    let pid = server.id();
    reaps(server, pid);
    if let Some((server, pid)) = as_process_one(inherited, &program(&options)) {
        reaps(server, pid.as_raw_nonzero().get() as u32);
    }

    if let Some(reason) = refusal(Command::new("perl").args(["-e", "1"])) {
        return skip(format!("a child that ends before the server's start: {reason}"));
    }
    let notes = Notes::new();
    // A shell would wait for its child.
    let becomes = r#"exit 8 unless fork; open F, "<", "$ENV{D}/fifo"; <F>; exec @ARGV"#;
    assert!(Command::new("mkfifo").arg(notes.name("fifo")).status().unwrap().success());
    let mut command = program_after(&format!("exec perl -e '{becomes}' \"$0\" \"$@\""), &options);
    command.env("D", notes.name(""));
    let process = Process::spawn(command);
    let pid = process.id();
    eventually(PATIENCE, "a zombie", || children(pid).values().eq(&['Z']));
    fs::write(notes.name("fifo"), "go on\n").unwrap();
    reaps(Server::of(process), pid);
}

/// A run is over when the command ends: not when it closes its output, which is its own and nobody else's, not at a
/// stray SIGCHLD or when another child of the server ends, and no later because what it has left behind keeps the
/// output open.
#[test]
fn run_is_over_when_the_command_ends() {
    let notes = Notes::held();
    let setup = "(while [ -d \"$D\" ] && [ ! -e \"$D/go\" ]; do sleep 0.02; done; exit 7) & true";
    let stays = "(while [ -d \"$D\" ]; do sleep 0.02; done) & echo \"ran $SMOLRX_EVENT\"; exec >&- 2>&- <&-";
    let mut server = notes.server(setup, &POKED, &["sh", "-c", &format!("{stays}\n{HELD}")]);
    notes.begin_first(&server);
    server.echo("second\n");
    assert_eq!(children(server.id()).len(), 2, "the inherited child and the run");
    fs::write(notes.name("go"), "").unwrap();
    wait_for_children(server.id(), 1);
    (0..100).for_each(|_| server.signal(Signal::CHILD));
    thread::sleep(ms(200));
    assert_eq!(notes.lines(), ["begin first"]);
    notes.release();
    notes.wait_for("end second");
    server.stdout.wait_for("ran second");
    has_said_nothing(&server);
    server.signal(Signal::TERM);
    eventually(ms(6000), "it ends", || !server.is_running());
    assert_eq!(server.exit_code(), Some(0));
    assert_eq!(notes.lines(), ["begin first", "end first", "begin second", "end second"]);
}

/// Three hundred runs leave no descriptor, no memory and no child behind in the server, nor do as many that could not
/// be started.
#[test]
fn runs_leak_nothing() {
    let (notes, server) = noted(&[&QUIETLY_POKED[..], &["--max-line", "300000"]].concat(), NOTE);
    notes.takes_pokes(&server, 1);
    wait_for_children(server.id(), 0);
    let (descriptors, mut count) = (server.descriptors(), 1);
    let mut memory_after = |runs: usize| {
        for _ in 0..runs {
            server.echo("x\n");
            count += 1;
            notes.wait_for_count(count);
            if count % 3 == 0 {
                server.echo(line_of(140_001));
                server.stderr.wait_for_count(count / 3);
            }
        }
        wait_for_children(server.id(), 0);
        eventually(PATIENCE, "no descriptor is left", || server.descriptors() == descriptors);
        (server.memory_kb(), server.threads())
    };
    let (before, after) = (memory_after(30), memory_after(300));
    assert!(after.0 <= before.0 + 150 && after.1 == before.1, "{before:?} kB and threads, then {after:?}");
}

/// Commands that end at once, hundreds of them one after the other, never leave the server waiting for one, be it that
/// its parent has it block SIGCHLD; and how each of them ended is told.
#[test]
fn shortest_runs_are_noticed() {
    for setup in ["true", "exec env --block-signal=CHLD \"$0\" \"$@\""] {
        let notes = Notes::new();
        let server = notes.server(setup, &TICKING, &["false"]);
        server.stderr.wait_for_count(200);
        assert!(server.stderr.lines().iter().all(|line| line == "smolrx: the command exited with 1"));
    }
}

/// A server whose parent has it ignore SIGCHLD notices each run's end, also with another child alive, and ends well.
#[test]
fn ignored_sigchld_holds_up_nothing() {
    let goes_on_beside = |others: &str| {
        let notes = Notes::new();
        // `env` comes last: a shell has a handler of its own.
        let setup = format!("{others}\nexec env --ignore-signal=CHLD \"$0\" \"$@\"");
        let mut server = notes.server(&setup, &POKED, &["sh", "-c", NOTE]);
        notes.takes_pokes(&server, 4);
        server.signal(Signal::TERM);
        assert_eq!(server.exited(ms(6000)).code, Some(0), "beside {others}");
        assert_eq!(notes.lines().len(), 4);
    };
    thread::scope(|scope| {
        scope.spawn(|| goes_on_beside("true"));
        scope.spawn(|| goes_on_beside("while [ -d \"$D\" ]; do sleep 0.1; done > /dev/null 2>&1 &"));
    });
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
    let without_interpreter = notes.install("interpreter", "755", "#!/no/such/interpreter\n");
    let zeros = notes.install("zeros", "755", &"\0".repeat(1000));
    let empty = notes.install("empty", "755", "");
    let text = notes.install("text", "755", "echo no interpreter is named\n");
    let closed = notes.install("closed", "644", "#!/bin/sh\n");
    let (folder, itself) = (notes.name("folder"), notes.name("itself"));
    fs::create_dir(&folder).unwrap();
    symlink(&itself, &itself).unwrap();
    let (long, longer) = ("x".repeat(300), format!("/{}", "x/".repeat(3000)));
    let cases = [
        (
            &[127][..],
            "not found (error 2)",
            &["smolrx-no-such", "./no/such", "/no/such", &without_interpreter][..],
        ),
        (&[126], "permission denied (error 13)", &[&closed, &folder]),
        (&[126], "(error 8)", &[&zeros, &empty, &text]),
        (&[126, 127], "", &["", "/dev/null/x", "/dev/null", &long, &longer, &itself, "/"]),
    ];
    for (codes, why, commands) in cases {
        for command in commands {
            let exit = ends_at_the_first_event(with_command(&POKED, &[command, "--argument"]));
            let beginning = format!("smolrx: cannot run {command:.60}");
            let what = format!("{command:.60}: {exit:?}");
            assert!(codes.contains(&exit.code.unwrap()) && exit.stderr.len() == 1, "{what}");
            assert!(exit.stderr[0].starts_with(&beginning) && exit.stderr[0].ends_with(why), "{what}");
        }
    }
    let mut hostile = with_command(&POKED, &[]);
    hostile.arg(OsStr::from_bytes(b"./\x1b[31m\n\xff\xe2\x80\xae"));
    let exit = ends_at_the_first_event(hostile);
    assert_eq!((exit.code, exit.stderr.len()), (Some(127), 1), "{exit:?}");
    assert!(!exit.stderr[0].contains(is_hostile), "{exit:?}");

    let script = notes.install("script", "755", "#!/bin/sh\nrm \"$D/script\"; echo ran >> \"$D/notes\"\n");
    let mut server = notes.server("true", &POKED, &[&script]);
    server.echo("poke\n");
    notes.wait_for("ran");
    server.echo("poke\n");
    let exit = server.exited(ms(6000));
    assert_eq!((exit.code, exit.stderr.len()), (Some(127), 1), "{exit:?}");
}

/// Once the command is not there any more, no event is run: nor the one that the debounce holds, though the command is
/// back by then.
#[test]
fn missing_command_is_not_tried_again() {
    let notes = Notes::held();
    let script = notes.install("script", "755", &format!("#!/bin/sh\n{HELD}"));
    let mut server = notes.server("true", &["-q", "--interval", "0", "--debounce", "1500"], &[&script]);
    notes.begin_first(&server);
    fs::remove_file(&script).unwrap();
    server.echo("second\n");
    thread::sleep(ms(2500)); // now it is pending
    server.echo("third\n");
    notes.release();
    let exit = server.exited(ms(6000));
    assert_eq!((exit.code, exit.stderr.len()), (Some(127), 1), "{exit:?}");
    assert_eq!(notes.lines(), ["begin first", "end first"]);
}

/// The command is looked for along PATH, past what is no folder, may not be run, or is not there.
#[test]
fn path_is_searched() {
    let notes = Notes::new();
    let [first, second, third] = ["first", "second", "third"].map(|name| notes.name(name));
    [&first, &second, &third].iter().for_each(|path| fs::create_dir(path).unwrap());
    notes.install("first/smolrx-tool", "644", "#!/bin/sh\necho first\n");
    notes.install("second/smolrx-tool", "755", "#!/bin/sh\necho second\n");
    notes.install("third/smolrx-tool", "755", "#!/bin/sh\necho third\n");
    notes.install("smolrx-tool", "755", "#!/bin/sh\necho here\n");
    let start = |places: &str| {
        let mut command = with_command(&POKED, &["smolrx-tool"]);
        command.env("PATH", places).current_dir(notes.name(""));
        command
    };
    for (places, says) in [
        (path(&format!("{second}:{third}")), "second"),
        (path(&format!("{third}:{second}")), "third"),
        (path(&format!("{first}:{third}")), "third"),
        (path(&format!("/no/such:/dev/null:{second}")), "second"),
        (path(&format!("/{}:{second}", "x".repeat(5000))), "second"),
        (path(&format!(":{second}")), "here"),
        (path("/no/such") + "::", "here"),
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

/// An event is whole up to the system's limit of 128 KiB a variable; a longer one is told, and the server goes on.
#[test]
fn long_event_is_whole_or_told() {
    let (notes, mut server) = noted(&[&QUIETLY_POKED[..], &["--max-line", "300000"]].concat(), NOTE);
    let fits = 131_072 - "SMOLRX_EVENT=\0".len();
    let line = |length: usize| -> String { ('a'..='z').cycle().take(length).collect() };
    let escaped = "\x7f".repeat(40_000); // six bytes for each
    let (mut noted, mut told) = (vec![], 0);
    for long in [line(4096), line(fits + 1), line(70_000), line(200_000), line(299_000), escaped, line(fits)]
    {
        server.echo(long.clone() + "\n");
        if long.len() <= fits && !long.starts_with('\x7f') {
            noted.push(long);
        } else {
            told += 1;
        }
        notes.wait_for_count(noted.len());
        server.stderr.wait_for_count(told);
    }
    assert_eq!(server.stop().stderr, ["smolrx: cannot run sh: too long for the system (error 7)"; 4]);
    assert!(notes.lines() == noted, "an event is not whole");
}

/// For want of processes or memory, or while somebody writes the program, a run is left out, which is told, and the
/// server goes on.
#[test]
fn run_that_is_left_out_is_told() {
    let notes = Notes::new();
    let name = notes.name("program");
    assert!(Command::new("install").args(["-m", "755", "/bin/sh", &name]).status().unwrap().success());
    let mut server = notes.server("true", &POKED, &[&name, "-c", NOTE]);
    let beginning = format!("smolrx: cannot run {name}: ");
    let told = |why: &str| {
        let is_told = |line: &String| line.starts_with(&beginning) && line.ends_with(why);
        server.stderr.wait_until(why, |lines| lines.iter().any(is_told).then_some(()));
    };
    let writer = File::options().append(true).open(&name).unwrap();
    server.echo("busy\n");
    told("(error 26)");
    drop(writer);
    eventually(PATIENCE, "it runs", || {
        server.echo("free\n");
        thread::sleep(ms(20));
        !notes.lines().is_empty()
    });

    let strace = |arguments: &[&str]| {
        let mut strace = Command::new("strace");
        strace.args(["-qq", "-f", "-o", "/dev/null", "-e"]).args(arguments);
        strace
    };
    if let Some(reason) = refusal(&mut strace(&["inject=clone:error=ENOMEM", "true"])) {
        return skip(format!("no strace that injects the want of memory: {reason}"));
    }
    let pid = server.id().to_string();
    let is_traced = || server.proc_field("status", "TracerPid:") != "0";
    for (error, why) in [("ENOMEM", "out of memory (error 12)"), ("EAGAIN", "no process is free (error 11)")]
    {
        let calls = "clone,clone3,fork,vfork";
        let (trace, inject) = (format!("trace={calls}"), format!("inject={calls}:error={error}"));
        let mut strace = Process::spawn(strace(&[&trace, "-e", &inject, "-p", &pid]));
        eventually(PATIENCE, "strace has it", is_traced);
        server.echo("meanwhile\n");
        told(why);
        strace.signal(Signal::TERM);
        strace.exited(PATIENCE);
        eventually(PATIENCE, "strace has left it", || !is_traced());
    }
    server.echo("after\n");
    notes.wait_for("after");
    server.stop();
    assert!(notes.lines().iter().all(|event| event == "free" || event == "after"), "{:?}", notes.lines());
}

// ------------------------------------------------------------- commands that misbehave

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
