//! `smolrx [OPTION]... -- COMMAND [ARG]...`: what the command gets, when it runs, and how it ends.

mod common;

use common::*;
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::thread;
use std::time::Instant;

/// A free port of the loopback interface, no clock, and each poke an event.
const POKED: &str = "--bind 127.0.0.1 --tcp-port 0 --interval 0 --debounce 1";

/// A debounce so slow that an event is pending until the end.
const PENDING: &str = "--debounce 600000";

/// Ticks that come as fast as they may.
const TICKING: &str = "--interval 10";

/// A script that notes its begin, a signal that ends it, and its end, which comes when it is released.
const HELD: &str = r#"exec > /dev/null 2>&1
    trap 'echo "got TERM" >> "$D/notes"; exit' TERM
    trap 'echo "got INT" >> "$D/notes"; exit' INT
    echo "begin $SMOLRX_EVENT" >> "$D/notes"
    while [ -e "$D/hold" ]; do sleep 0.02; done
    echo "end $SMOLRX_EVENT" >> "$D/notes""#;

/// A script that notes its event, and that is all.
const NOTE: &str = r#"printf '%s\n' "$SMOLRX_EVENT" >> "$D/notes""#;

/// A server that runs this command for each poke.
fn with_command(options: &str, command: &[&str]) -> Command {
    let mut server = program(&format!("{POKED} {options} --"));
    server.args(command);
    server
}

/// A folder, `$D` for the server and its command, in which the command leaves notes.
struct Notes(Scratch);

/// The folder, and a server that runs this script.
fn noted(options: &str, script: &str) -> (Notes, Server) {
    noted_after("true", options, script)
}

/// The same, started by a shell after `setup`.
fn noted_after(setup: &str, options: &str, script: &str) -> (Notes, Server) {
    let notes = Notes::new();
    let server = Server::on_loopback(after(setup, &notes.command(options, &["sh", "-c", script])));
    (notes, server)
}

impl Notes {
    fn new() -> Self {
        let notes = Self(Scratch::new());
        fs::write(notes.name("hold"), "").unwrap();
        notes
    }

    /// Lets runs that are held go on.
    fn release(&self) {
        fs::remove_file(self.name("hold")).unwrap();
    }

    /// The full name of a file in the folder.
    fn name(&self, file: &str) -> String {
        self.0.file(file).to_str().unwrap().into()
    }

    /// Makes a file of this mode. (Not by this process: what another test starts at that moment would have it
    /// open for writing, and nobody could run it then.)
    fn install(&self, file: &str, mode: &str, content: impl AsRef<[u8]>) -> String {
        let (source, name) = (self.name("source"), self.name(file));
        fs::write(&source, content).unwrap();
        assert!(Command::new("install").args(["-m", mode, &source, &name]).status().unwrap().success());
        name
    }

    /// The server with this command.
    fn command(&self, options: &str, command: &[&str]) -> Command {
        let mut server = with_command(options, command);
        server.env("D", self.name(""));
        server
    }

    /// Pokes a server, and waits for what is noted next.
    fn poke(&self, server: &Server, line: impl AsRef<[u8]>) -> String {
        let count = self.lines().len();
        server.echo(line);
        self.wait_for_count(count + 1);
        self.lines().swap_remove(count)
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

/// Waits until a server has this many children, zombies included.
fn wait_for_children(server: &Server, count: usize) {
    let children = || server.tasks("children").concat();
    eventually(PATIENCE, &format!("{count} children"), || children().split_whitespace().count() == count);
}

// ------------------------------------------------------- what the command gets

/// The command finds the event in `SMOLRX_EVENT`, a line as the transcript shows it, whatever a client sends.
#[test]
fn event_is_in_the_environment() {
    let (notes, server) = noted("", r#"printf '<%s>\n' "$SMOLRX_EVENT" >> "$D/notes""#);
    let text = "foo\n\n   \n0\n-rf\n--help\n--\nSMOLRX_EVENT=x\nPATH=/nowhere\n=\n$(touch x) `id` \"'; exit\n\
        two  spaces\tand a tab\nünï→☃\nesc \x1b[31m and nul \0 and cr \r within\n\
        \u{202e}right to left\u{2028}\n%s %n \\0 \\n\nlast\n";
    let text = [text.as_bytes(), b"\xff\xfe no UTF-8 \xc3\n"].concat();
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        assert_eq!(notes.poke(&server, line), format!("<{}>", shown(line)), "the event of {line:?}");
    }
    assert_eq!(server.stderr.lines(), [""; 0]);
}

/// A script prints the same in a run as in the server's place, after the same `setup`, beside clients or not.
#[track_caller]
fn is_given_the_same(setup: &str, script: &str, arguments: &[&[u8]]) {
    let given = |command: &mut Command| {
        command.args(arguments.iter().copied().map(OsStr::from_bytes));
        after(setup, command)
    };
    let script = ["sh", "-c", script, "sh"];
    let mut in_its_place = given(Command::new("env").envs(MALLOC).args(script));
    let mut printed = run(in_its_place.env("SMOLRX_EVENT", "poke")).stdout;
    let mut command = given(&mut with_command("-q", &script));
    let mut server = Server::on_loopback(command.env("SMOLRX_EVENT", "an older one"));
    server.echo("poke\n");
    server.stdout.wait_for_count(1);
    let clients = server.clients(100, "half");
    clients.iter().for_each(Client::wait_until_taken);
    server.echo("poke\n");
    server.stdout.wait_for_count(printed.len() + 1);
    clients.into_iter().for_each(Client::reset);
    printed.extend_from_within(..);
    assert_eq!(server.stop().stdout, printed);
}

/// The command has the server's environment to the byte, but for one `SMOLRX_EVENT`, which is the event's.
#[test]
fn environment_is_the_servers() {
    let setup = r"export SMOLRX_EVENTS=1 SMOLRX_EVEN=2 XSMOLRX_EVENT=3 EMPTY= NOT_UTF_8=$(printf '\377\376')
        export LINES=$(printf 'a\nb=c')";
    is_given_the_same(setup, r"tr '\0' '\n' < /proc/$$/environ | grep -av ^_= | cat -v | sort", &[]);
}

/// A server without any environment finds the command where a shell looks then, and gives it the event alone.
#[test]
fn empty_environment() {
    let mut server = Server::on_loopback(with_command("-q", &["env"]).env_clear());
    server.echo("poke\n");
    let exit = server.stop();
    assert_eq!((exit.stdout, exit.stderr), (vec!["SMOLRX_EVENT=poke".into()], vec![]));
}

/// All arguments of the command reach it exactly, be they no UTF-8, empty, or like options of the server.
#[test]
fn arguments_are_the_commands() {
    let arguments =
        b"\xff\xfe||--help|-h|--version|-V|--health|--|-q|--interval|nonsense|--tcp-port=99999999|\
        a b|line\nend|$D|*|\x1b[31m";
    let arguments: Vec<&[u8]> = arguments.split(|&byte| byte == b'|').collect();
    is_given_the_same("true", "printf '<%s>\\n' \"$@\" | cat -v", &arguments);
}

/// The command's standard input is the server's, without the events: each run goes on where the one before
/// has stopped reading, and one that reads all of it, as ssh does, takes no event from those that follow.
#[test]
fn stdin_is_the_servers() {
    let setup = r#"printf '%s\n' one two three > "$D/input"; exec < "$D/input""#;
    let script = r#"case $SMOLRX_EVENT in all*) text=$(cat);; *) read -r text;; esac
        echo "$SMOLRX_EVENT <$text>" >> "$D/notes""#;
    let (notes, server) = noted_after(setup, "", script);
    for (event, text) in [("a", "one"), ("b", "two"), ("all", "three"), ("all again", ""), ("c", "")] {
        assert_eq!(notes.poke(&server, format!("{event}\n")), format!("{event} <{text}>"));
    }
}

/// Signals are blocked, ignored or at their default for the command as they were when the server was started.
#[test]
fn signals_are_as_before() {
    for signals in [
        "",
        "--block-signal=INT,TERM,HUP,CHLD,PIPE,XFSZ,USR1,WINCH --ignore-signal=USR2",
        "--ignore-signal=INT,QUIT,TERM,HUP,XFSZ",
    ] {
        let setup = format!("exec env {signals} \"$0\" \"$@\"");
        is_given_the_same(&setup, "exec grep -E '^(SigBlk|SigIgn|SigPnd|ShdPnd):' /proc/self/status", &[]);
    }
}

/// The command has the server's folder, mask for new files, session, process group, and first limits of
/// descriptors, though the server has raised its own and has more in use than the old soft limit allows.
#[test]
fn folder_group_and_descriptor_limits_are_as_before() {
    let setup = "cd /usr; umask 027; ulimit -Sn 64; ulimit -Hn 1024";
    let script = "pwd; umask; ulimit -Sn; ulimit -Hn; cut -d ' ' -f 5,6 /proc/$$/stat";
    is_given_the_same(setup, script, &[]);
}

/// A run needs no descriptor that clients could take from it: with all of them in use, it works.
#[test]
fn run_with_no_descriptor_left() {
    let (notes, server) = noted_after("ulimit -n 64", "--keep-open", NOTE);
    let mut clients: Vec<Client> = (0..80).map(|_| server.connect()).collect();
    let is_full = |line: &String| line.starts_with("smolrx: cannot accept: ");
    server.stderr.wait_until("its complaint", |lines| lines.iter().any(is_full).then_some(()));
    for i in 0..5 {
        clients[0].send(format!("{i}\n"));
        notes.wait_for_count(i + 1);
    }
    assert_eq!(notes.lines(), ["0", "1", "2", "3", "4"]);
    assert!(server.stderr.lines().iter().all(is_full), "{:?}", server.stderr);
}

/// The command has no descriptor of the server's but the three standard ones, with clients connected or not.
#[test]
fn no_descriptor_is_the_servers() {
    is_given_the_same("true", "exec ls -1 /proc/self/fd", &[]);
}

// ------------------------------------------------------------- one run at a time

/// Runs never overlap, and of what comes during one the latest poke is run next, once: it replaces the tick
/// that waits, and no tick replaces it; then the clock goes on.
#[test]
fn latest_event_is_run_next() {
    let (notes, server) = noted(TICKING, HELD);
    notes.wait_for_count(1);
    thread::sleep(ms(100)); // a tick is pending
    for i in 0..10 {
        server.echo(format!("poke {i}\n"));
        thread::sleep(ms(20)); // each an event of its own
    }
    thread::sleep(ms(300)); // thirty ticks
    assert_eq!(notes.lines().len(), 1);
    notes.release();
    notes.wait_for_count(6);
    let lines = notes.lines();
    let tick = |i: usize| lines[i].strip_prefix("begin ").unwrap().parse::<u64>().unwrap();
    assert_eq!(lines[1..4], [format!("end {}", tick(0)), "begin poke 9".into(), "end poke 9".into()]);
    assert!(tick(4) > tick(0), "{lines:?}");
}

/// A fast clock with a slow command does not fall behind: each run has the latest tick, as it is observed.
#[test]
fn slow_command_does_not_fall_behind() {
    let (notes, mut server) = noted(TICKING, &format!("{NOTE}; sleep 1"));
    notes.wait_for_count(4);
    let ticks: Vec<u64> = notes.lines().iter().map(|line| line.parse().unwrap()).collect();
    // A busy machine's clock leaves some out, and never so many.
    assert!(ticks.windows(2).all(|pair| pair[1] >= pair[0] + 8), "{ticks:?}");
    assert_eq!(observed(&server.stop().stdout), notes.lines());
}

/// A run that lasts, as nobody reads its output, delays no echo, no health check and no idle client's end,
/// and costs no time; what is pending is run once somebody reads. (`head` ends `yes` by SIGPIPE.)
#[test]
fn long_run_delays_nobody() {
    let script = format!("yes \"line of $SMOLRX_EVENT\" | head -n 100000; {NOTE}");
    let (notes, mut server) = noted("-q --timeout 1000", &script);
    server.stdout.pause();
    server.echo("first\n");
    let mut idle = server.connect();
    idle.send("half");
    let start = Instant::now();
    while start.elapsed() < ms(3000) {
        let sent = Instant::now();
        server.echo("meanwhile\n");
        assert!(sent.elapsed() < ms(1000), "an echo took {:?}", sent.elapsed());
        thread::sleep(ms(10));
    }
    server.echo("last\n");
    assert_healthy(server.address.port());
    assert_eq!(idle.until_closed(), b"", "the idle client");
    let busy = server.busy_during(ms(500));
    assert!(busy < ms(100), "busy for {busy:?} of half a second");
    assert_eq!(notes.lines(), [""; 0], "the run has ended though its output is not read");
    server.stdout.resume();
    notes.wait_for("last");
    let exit = server.stop();
    let output = notes.lines().into_iter().flat_map(|event| vec![format!("line of {event}"); 100_000]);
    assert!(output.eq(exit.stdout), "the output of {:?} is not whole", notes.lines());
    assert_eq!(exit.stderr, [""; 0], "`yes` has a word to say without SIGPIPE");
}

// ---------------------------------------------------------------- the transcript

/// The transcript goes on beside the command's own output.
#[test]
fn transcript_goes_on_beside_the_output() {
    let script = "echo \"ran $SMOLRX_EVENT\"; echo \"told $SMOLRX_EVENT\" >&2";
    let (_notes, mut server) = noted("", script);
    let port = server.echo("foo\n");
    let mut exit = server.stop();
    let [received, sent, closed] = conversation("foo", port);
    let serving = format!("Serving on {}", server.address);
    // Which of the two comes first of what is written at the same moment, is nobody's promise.
    exit.stdout.sort();
    assert_eq!(exit.stdout, [&closed, "Observing foo", &received, &sent, &serving, "ran foo"]);
    assert_eq!(exit.stderr, ["told foo"]);
}

/// What a run prints comes behind the line of its event, each time.
#[test]
fn output_comes_behind_its_event() {
    let mut server = Server::of(with_command("--interval 10", &["echo", "ran"]));
    server.stdout.wait_for_count(500);
    let lines = server.stop().stdout;
    let behind = |line: &str| lines.iter().skip_while(|other| *other != line).nth(1).cloned();
    for event in observed(&lines) {
        assert_eq!(behind(&format!("Observing {event}")).as_deref(), Some("ran"), "{event}");
    }
}

/// A run that fails is told in a sentence, with `--quiet`, too, and is not repeated.
#[test]
fn failed_run_is_told() {
    let (notes, mut server) = noted("--quiet", r#"echo x >> "$D/notes"; eval "$SMOLRX_EVENT""#);
    let exits = [3, 0, 1, 255, 137].map(|code| (format!("exit {code}"), format!("exited with {code}")));
    // SIGABRT (6) may dump a core; of the real-time signals, from 34 on, nix knows none.
    let kills = [9, 15, 2, 6, 40, 64]
        .map(|signal| (format!("kill -{signal} $$"), format!("was ended by signal {signal}")));
    let sigchld = ("kill -17 $$; exit 4".into(), "exited with 4".into());
    let mut expected = vec![];
    for (event, end) in exits.into_iter().chain(kills).chain([sigchld]) {
        notes.poke(&server, format!("{event}\n"));
        if event != "exit 0" {
            expected.push(format!("smolrx: the command {end}"));
        }
        server.stderr.wait_for_count(expected.len());
    }
    assert_eq!(server.stop().stderr, expected);
    assert_eq!(notes.lines().len(), 12);
}

/// A run that fails is told although it ends while the server looks for other children that have ended.
#[test]
fn failed_run_is_told_though_it_ends_in_the_middle_of_reaping() {
    let (notes, server) = noted("", &format!("{HELD}\nexit 3"));
    notes.poke(&server, "poke\n");
    let Some(strace) = strace("wait4:delay_exit=1000000") else { return }; // µs
    let _strace = server.traced_by(strace);
    server.signal(Signal::CHILD);
    thread::sleep(ms(200)); // it has found none, and is held up
    notes.release();
    server.stderr.wait_for("smolrx: the command exited with 3");
}

// ------------------------------------------------------------------------ the end

/// After SIGTERM, or SIGINT with it at once, the server waits for the run under way, longer than for its
/// clients, runs the latest event, be it a line that its client completes meanwhile, and ends with 0.
#[test]
fn signal_waits_for_the_run_and_runs_what_is_pending() {
    let cases = [(&[Signal::TERM][..], 7000, "third"), (&[Signal::INT, Signal::TERM], 500, "completed")];
    for (signals, time, last) in cases {
        let (notes, mut server) = noted("", HELD);
        notes.poke(&server, "first\n");
        server.echo("second\n");
        server.echo("third\n");
        let mut client = server.connect();
        client.send("comp");
        client.wait_until_taken();
        server.suspend();
        signals.iter().for_each(|signal| server.signal(*signal));
        server.wake();
        server.wait_until_refused();
        if last == "completed" {
            client.send("leted\n");
            assert_eq!(client.rest(), b"completed\n");
        }
        thread::sleep(ms(time));
        assert!(server.is_running(), "{signals:?}: ended in the middle of a run");
        assert_eq!(notes.lines(), ["begin first"], "{signals:?}");
        notes.release();
        let exit = server.exited(ms(6000));
        assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{exit:?}");
        let runs = ["first", last].map(|event| [format!("begin {event}"), format!("end {event}")]);
        assert_eq!(notes.lines(), runs.concat());
        assert_eq!(observed(&exit.stdout).last(), Some(&last), "{signals:?}");
    }
}

/// A signal brings about the run of the event that the debounce holds, and none without one; a failure of
/// that run is told before the end, which is with 0 all the same, unless the command is not there.
#[test]
fn signal_runs_what_the_debounce_holds() {
    let long = &*"x".repeat(200_000);
    let fails = ["sh", "-c", "sleep 0.1; echo \"ran $SMOLRX_EVENT\"; exit 3"];
    let options = format!("{PENDING} -q --max-line 300000");
    for (command, pokes, code, said, told) in [
        (&fails[..], &[][..], 0, &[][..], &[][..]),
        (&fails, &["a"], 0, &["ran a"], &["smolrx: the command exited with 3"]),
        (&fails, &["a", "b", "c"], 0, &["ran c"], &["smolrx: the command exited with 3"]),
        (&["true"], &[long], 0, &[], &["smolrx: cannot run true: too long for the system (error 7)"]),
        (&["no-such"], &["a"], 127, &[], &["smolrx: cannot run no-such: not found (error 2)"]),
    ] {
        for _ in 0..10 {
            let mut server = Server::on_loopback(with_command(&options, command));
            pokes.iter().for_each(|poke| _ = server.echo(format!("{poke}\n")));
            server.signal(Signal::TERM);
            let exit = server.exited(ms(6000));
            assert_eq!(exit.code, Some(code), "{exit:?}");
            assert_eq!([exit.stdout, exit.stderr], [said, told]);
        }
    }
}

/// The second signal, and only that, is passed on to the command, be the run the pending event's or in a
/// session of its own, and ends the server at once with 128 and its number.
#[test]
fn second_signal_is_passed_on_and_ends_it() {
    let (term, int) = (Signal::TERM, Signal::INT);
    let held = ["sh", "-c", HELD];
    let in_a_session = ["sh", "-c", "exec setsid sh -c \"$0\"", HELD];
    for (options, command, first, second, code, got) in [
        ("", &held[..], int, term, 143, "got TERM"),
        ("", &held, term, int, 130, "got INT"),
        ("", &in_a_session, term, term, 143, "got TERM"),
        (PENDING, &held, int, int, 130, "got INT"),
    ] {
        let notes = Notes::new();
        let mut server = Server::on_loopback(notes.command(options, command));
        server.echo("first\n");
        if options.is_empty() {
            notes.wait_for("begin first");
            server.echo("second\n");
        }
        server.signal(first);
        server.wait_until_refused();
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

/// A command that ignores signals, or is stopped, or has filled an output that nobody reads, holds up neither
/// the end by a second signal nor, silently and with 141, the end by an output that its reader closes.
#[test]
fn command_holds_up_no_end() {
    let ignores = r#"trap '' TERM; exec > /dev/null 2>&1; echo $$ > "$D/notes"
        while [ -e "$D/hold" ]; do sleep 0.02; done"#;
    let stops = r#"exec > /dev/null 2>&1; echo $$ > "$D/notes"; kill -STOP $$"#;
    let fills = r#"echo $$ > "$D/notes"; yes"#; // which ends with the pipe
    for (script, code) in [(ignores, 143), (ignores, 141), (stops, 143), (stops, 141), (fills, 143)] {
        let what = format!("{code}, {script}");
        let notes = Notes::new();
        let (reader, writer) = io::pipe().unwrap();
        let mut server = Server::on_loopback(notes.command("", &["sh", "-c", script]).stdout(writer));
        let pid = Pid::from_raw(notes.poke(&server, "poke\n").parse().unwrap()).unwrap();
        thread::sleep(ms(100)); // now the output is full
        server.echo("more\n"); // which cannot be written there
        let reader = (code == 143).then_some(reader);
        if reader.is_some() {
            server.signal_twice(Signal::TERM, Signal::TERM);
        }
        assert_eq!(server.status(ms(2000)).code(), Some(code), "{what}");
        drop(reader);
        notes.release();
        // What is stopped has SIGTERM before it, or its end. (What has ended already can't be signalled.)
        let _ = kill_process(pid, Signal::CONT);
        assert_eq!(server.exited(PATIENCE).stderr, [""; 0], "{what}");
    }
}

/// Ctrl-C in a terminal reaches both: the command, which may end by it, and the server, which then ends well.
#[test]
fn ctrl_c_reaches_both() {
    let notes = Notes::new();
    let (screen, end) = terminal();
    let mut keys = screen.try_clone().unwrap();
    let screen = Transcript::of(screen);
    // The terminal that is to control the session is the one under stdin.
    let mut command = after("exec setsid -c \"$0\" \"$@\" <&1", &notes.command("", &["sh", "-c", HELD]));
    let mut server = Server::on_loopback(command.stdout(end.try_clone().unwrap()).stderr(end));
    notes.poke(&server, "poke\n");
    keys.write_all(b"\x03").unwrap();
    assert_eq!(server.exited(ms(6000)).code, Some(0), "{screen:?}");
    assert_eq!(notes.lines(), ["begin poke", "got INT"]);
}

// ------------------------------------------------------------------ what is left behind

/// As process 1 it reaps what runs leave behind, be it a hundred children that end at once, during a run,
/// which is not over then, or later; those who stay hold up no good end, which SIGHUP brings about, too.
#[test]
fn process_1_reaps_orphans() {
    let notes = Notes::new();
    let script = r#"i=0; while [ $i -lt 100 ]; do ((sleep 0.5; exit 3) &) > /dev/null 2>&1; i=$((i + 1)); done
        sleep 1000 > /dev/null 2>&1 &"#;
    let command = notes.command("", &["sh", "-c", &format!("{script}\n{HELD}")]);
    let Some(mut server) = as_process_one("true", &command) else { return };
    notes.poke(&server, "first\n");
    server.echo("second\n");
    wait_for_children(&server, 1);
    thread::sleep(ms(200));
    assert_eq!(notes.lines(), ["begin first"]);
    notes.release();
    notes.wait_for("end second");
    wait_for_children(&server, 2); // those who stay
    server.signal(Signal::HUP);
    let exit = server.exited(ms(6000));
    assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{exit:?}");
    assert_eq!(notes.lines(), ["begin first", "end first", "begin second", "end second"]);
}

/// Without a command it reaps the children of the program that it has replaced, as process 1 and elsewhere,
/// also one that has ended before that, of which no signal tells.
#[test]
fn reaps_without_a_command() {
    let inherited = "(sleep 0.1; exit 7) & (sleep 0.3; exit 8) & (sleep 0.2 &) & sleep 0.5 & true";
    // (A shell would wait for its child.)
    let zombie = r#"exec perl -e '$SIG{CHLD} = sub { $ended = 1 }; fork or exit 8;
        select undef, undef, undef, 0.01 until $ended; exec @ARGV' "$0" "$@""#;
    let elsewhere = [inherited, zombie].map(|setup| Server::on_loopback(after(setup, &program(POKED))));
    for server in elsewhere.into_iter().chain(as_process_one(inherited, &program(POKED))) {
        wait_for_children(&server, 0);
        server.echo("poke\n");
        assert_eq!(server.stderr.lines(), [""; 0]);
    }
}

/// A run is over when the command ends: not when it closes its output, at a stray SIGCHLD or when another
/// child of the server ends, and no later because what it has left behind keeps the output open.
#[test]
fn run_is_over_when_the_command_ends() {
    let setup = "(while [ -d \"$D\" ] && [ ! -e \"$D/go\" ]; do sleep 0.02; done; exit 7) & true";
    let stays = "(while [ -d \"$D\" ]; do sleep 0.02; done) & echo \"ran $SMOLRX_EVENT\"; exec >&- 2>&- <&-";
    let (notes, server) = noted_after(setup, "", &format!("{stays}\n{HELD}"));
    notes.poke(&server, "first\n");
    server.echo("second\n");
    wait_for_children(&server, 2); // the inherited one and the run
    fs::write(notes.name("go"), "").unwrap();
    wait_for_children(&server, 1);
    (0..100).for_each(|_| server.signal(Signal::CHILD));
    thread::sleep(ms(200));
    assert_eq!(notes.lines(), ["begin first"]);
    notes.release();
    notes.wait_for("end second");
    server.stdout.wait_for("ran second");
    assert_eq!(server.stderr.lines(), [""; 0]);
    assert_eq!(notes.lines(), ["begin first", "end first", "begin second", "end second"]);
}

/// Three hundred runs, and as many that could not be started, leave no descriptor, memory or child behind.
#[test]
fn runs_leak_nothing() {
    let (notes, server) = noted("-q --max-line 300000", NOTE);
    notes.poke(&server, "x\n");
    wait_for_children(&server, 0);
    let descriptors = server.descriptors();
    let memory_after = |runs: usize| {
        server.stderr.clear();
        for i in 1..=runs {
            notes.poke(&server, "x\n");
            server.echo(line_of(140_001));
            server.stderr.wait_for_count(i);
        }
        wait_for_children(&server, 0);
        eventually(PATIENCE, "no descriptor is left", || server.descriptors() == descriptors);
        (server.memory_kb(), server.threads())
    };
    let (before, after) = (memory_after(30), memory_after(300));
    assert!(after.0 <= before.0 + 150 && after.1 == before.1, "{before:?} kB and threads, then {after:?}");
}

/// The end of each run is noticed at once, also of the shortest, and where the parent blocks SIGCHLD.
#[test]
fn shortest_runs_are_noticed() {
    for setup in ["true", "exec env --block-signal=CHLD \"$0\" \"$@\""] {
        let server = Server::on_loopback(after(setup, &with_command(TICKING, &["false"])));
        server.stderr.wait_for_count(200);
        assert!(server.stderr.lines().iter().all(|line| line == "smolrx: the command exited with 1"));
    }
}

/// A server whose parent ignores SIGCHLD notices each run's end, also beside another child, and ends well.
#[test]
fn ignored_sigchld_holds_up_nothing() {
    for others in ["true", "while [ -d \"$D\" ]; do sleep 0.1; done > /dev/null 2>&1 &"] {
        // `env` comes last: a shell has a handler of its own.
        let setup = format!("{others}\nexec env --ignore-signal=CHLD \"$0\" \"$@\"");
        let (notes, mut server) = noted_after(&setup, "", NOTE);
        for event in ["a", "b", "c"] {
            assert_eq!(notes.poke(&server, format!("{event}\n")), event);
        }
        server.stop();
        assert_eq!(notes.lines(), ["a", "b", "c"], "beside {others}");
    }
}

// --------------------------------------------------------------- what can't be started

/// A command that is not found, may not be run, is no program, or has a name that no file can have, ends the
/// server at the first event with the shells' code and a sentence, which is one harmless line.
#[test]
fn command_that_cannot_be_started_ends_it() {
    let notes = Notes::new();
    let without_interpreter = notes.install("interpreter", "755", "#!/no/such/interpreter\n");
    let zeros = notes.install("zeros", "755", [0; 1000]);
    let empty = notes.install("empty", "755", "");
    let text = notes.install("text", "755", "echo no interpreter is named\n");
    let closed = notes.install("closed", "644", "#!/bin/sh\n");
    let (folder, itself) = (notes.name("folder"), notes.name("itself"));
    fs::create_dir(&folder).unwrap();
    symlink(&itself, &itself).unwrap();
    let (long, longer) = ("x".repeat(300), format!("/{}", "x/".repeat(3000)));
    let not_found =
        ["smolrx-no-such", "./no/such", "/no/such", "--help", "./\x1b[31m\u{202e}", &without_interpreter];
    let not_there = ["", "/dev/null/x", "/dev/null", &long, &longer, &itself, "/"];
    for (codes, why, commands) in [
        (&[127][..], "not found (error 2)", &not_found[..]),
        (&[126], "permission denied (error 13)", &[&closed, &folder]),
        (&[126], "(error 8)", &[&zeros, &empty, &text]),
        (&[126, 127], "", &not_there),
    ] {
        for command in commands {
            let mut server = Server::on_loopback(with_command("", &[command, "--argument"]));
            let port = server.echo("poke\n");
            let exit = server.exited(ms(6000));
            let what = format!("{command:.60}: {exit:?}");
            assert_eq!(exit.stdout[1..4], conversation("poke", port), "{what}");
            assert!(codes.contains(&exit.code.unwrap()) && exit.stderr.len() == 1, "{what}");
            let beginning = format!("smolrx: cannot run {:.60}", shown(command.as_bytes()));
            assert!(exit.stderr[0].starts_with(&beginning) && exit.stderr[0].ends_with(why), "{what}");
        }
    }
}

/// A command that is there no more ends the server at the next event, and is not tried for the pending one.
#[test]
fn missing_command_is_not_tried_again() {
    let notes = Notes::new();
    let script = notes.install("script", "755", format!("#!/bin/sh\n{HELD}"));
    let mut server = Server::on_loopback(notes.command("--debounce 1500", &[&script]));
    notes.poke(&server, "first\n");
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
    for (folder, mode) in [("first", "644"), ("second", "755"), ("third", "755"), (".", "755")] {
        fs::create_dir_all(notes.name(folder)).unwrap();
        notes.install(&format!("{folder}/smolrx-tool"), mode, format!("#!/bin/sh\necho {folder}\n"));
    }
    let poked_with_path = |places: &str| {
        let mut command = with_command("", &["smolrx-tool"]);
        let server = Server::on_loopback(command.env("PATH", places).current_dir(notes.name("")));
        server.echo("poke\n");
        server
    };
    for (places, says) in [
        ("second:third", "second"),
        (&notes.name("third:second"), "third"),
        ("first:third", "third"),
        (&format!("/no/such:/dev/null:/{}:second", "x".repeat(5000)), "second"),
        (":second", "."),
        ("/no/such::", "."),
    ] {
        let mut server = poked_with_path(places);
        server.stdout.wait_for(says);
        assert_eq!(server.stop().stderr, [""; 0], "{places:.100}");
    }
    assert_eq!(poked_with_path("first").exited(ms(6000)).code, Some(126));
}

/// An event is whole up to the system's limit, 128 KiB a variable; a longer one is told, and others are run.
#[test]
fn long_event_is_whole_or_told() {
    let (notes, mut server) = noted("--max-line 300000", NOTE);
    let fits = 131_072 - "SMOLRX_EVENT=\0".len();
    let line = |length: usize| -> String { ('a'..='z').cycle().take(length).collect() };
    let escaped = "\x7f".repeat(40_000); // six bytes for each
    for (i, long) in [line(fits + 1), line(299_000), escaped].into_iter().enumerate() {
        server.echo(long + "\n");
        server.stderr.wait_for_count(i + 1);
    }
    for long in [4096, 70_000, fits].map(line) {
        assert!(notes.poke(&server, format!("{long}\n")) == long, "an event is not whole");
    }
    assert_eq!(server.stop().stderr, ["smolrx: cannot run sh: too long for the system (error 7)"; 3]);
    assert_eq!(notes.lines().len(), 3);
}

/// A run is left out and told for want of processes or memory, or while somebody writes the program.
#[test]
fn run_that_is_left_out_is_told() {
    let notes = Notes::new();
    let program = notes.install("program", "755", fs::read("/bin/sh").unwrap());
    let mut server = Server::on_loopback(notes.command("", &[&program, "-c", NOTE]));
    let is_told = |why: &str| server.stderr.wait_for(&format!("smolrx: cannot run {program}: {why}"));
    let writer = File::options().append(true).open(&program).unwrap();
    server.echo("busy\n");
    is_told("unexpected (error 26)");
    drop(writer);

    for (error, why) in [("ENOMEM", "out of memory (error 12)"), ("EAGAIN", "no process is free (error 11)")]
    {
        let Some(mut strace) = strace(&format!("clone,clone3,fork,vfork:error={error}")) else { return };
        strace.arg("-f");
        let strace = server.traced_by(strace);
        server.echo("meanwhile\n");
        is_told(why);
        drop(strace);
    }
    assert_eq!(notes.poke(&server, "after\n"), "after");
    server.stop();
    assert_eq!(notes.lines().len(), 1);
}
